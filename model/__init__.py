"""What training and sampling share: encoders, denoiser, objective, weight average and bundle."""
