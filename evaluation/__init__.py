"""Evaluates a bundle: metrics, charts and an HTML report."""
