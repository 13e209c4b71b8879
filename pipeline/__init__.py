"""Stage one: captioned images to shards of latents and text, each network run once.

    python -m pipeline.run --config demo

An image's path: `sources.open.open_source()` -> `images.load()` -> `EncoderPool` -> `ShardWriter`.
"""
