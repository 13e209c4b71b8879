"""Draws a table of images: prompts x guidance scales, seeds, steps or bundles.

python -m sample.grid --prompt "a red circle" "a blue star" --guidance-scale 1 2 4 7
"""

from latent_t2i.configs import cli
from latent_t2i.sample.settings import GridConfig


def main(prog: str | None = None) -> None:
    """Runs the command; `prog` is its name in the help."""
    run = "latent_t2i.sample.comparison:draw_grid"
    cli.main(run, GridConfig, None, prog=prog or "python -m sample.grid")


if __name__ == "__main__":
    main()
