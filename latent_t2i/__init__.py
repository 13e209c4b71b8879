"""Text-to-image latent diffusion trained from precomputed latents and text embeddings.

The packages lie at the top of the checkout (`pipeline/`, `train/` ...) and this folder holds a
symbolic link to each, so that their import names (`latent_t2i.pipeline`, `latent_t2i.train`)
cannot clash with a `train.py` or a `model/` of the user's. A wheel contains real folders.
"""
