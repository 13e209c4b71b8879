"""Sources of captioned images: one module per kind, all of which yield `Record`s."""
