"""Text-to-image latent diffusion trained from precomputed latents and text embeddings.

The packages are top-level folders of the checkout (`pipeline/`, `train/` ...) and this folder holds
a symbolic link to each. A wheel contains real folders.
"""

# The links give import names (`latent_t2i.train`) that do not clash with a user's `train.py`.

__version__ = "0.1.0"
