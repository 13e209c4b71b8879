"""From a bundle and prompts to pictures; needs nothing of the training data."""
