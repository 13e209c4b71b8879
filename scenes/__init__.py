"""Procedurally generated captioned scenes, small encoders trained on them, and an exact oracle.

Training on your own images needs nothing from here. The scenes let one command run the whole
pipeline offline on a CPU, and the oracle measures how well an image follows its caption.
"""
