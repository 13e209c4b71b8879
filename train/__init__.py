"""Stage two: shards in, a bundle out; nothing but the denoiser runs."""
