"""Stage one: captioned images to shards of latents and text, each network run once.

    python -m pipeline.run --config demo

A datum goes one way: `sources.records()` -> `images.load()` -> `encode.examples()` -> the shards.
"""
