"""Stage two: trains the denoiser from shards and writes a bundle."""
