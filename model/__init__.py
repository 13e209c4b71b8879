"""Shared by training and sampling: encoders, denoiser, objective, weight averages and bundle."""
