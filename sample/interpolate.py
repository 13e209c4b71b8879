"""Draws the way between prompts or seeds.

python -m sample.interpolate --prompt "a red circle" "a blue star" --out way.gif
"""

from latent_t2i.configs import cli
from latent_t2i.sample.settings import InterpolateConfig


def main(prog: str | None = None) -> None:
    """Runs the command; `prog` is its name in the help."""
    run = "latent_t2i.sample.interpolation:interpolate"
    cli.main(run, InterpolateConfig, None, prog=prog or "python -m sample.interpolate")


if __name__ == "__main__":
    main()
