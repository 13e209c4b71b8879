"""How good a bundle is: figures, curves and a report that people can read."""
