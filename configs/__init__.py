"""The config loader (`cli.py`) and one YAML preset per recipe."""
