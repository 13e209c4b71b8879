"""Generates images from a bundle and prompts; needs no training data."""
