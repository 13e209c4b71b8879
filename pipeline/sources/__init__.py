"""Where captioned images come from: one module per kind of source, all yielding `Record`s."""
