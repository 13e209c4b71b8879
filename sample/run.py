"""Generates images from a bundle.

python -m sample.run --config scenes
python -m sample.run --bundle runs/NAME/bundle --prompt "a red circle" "a blue star"
"""

from latent_t2i.configs import cli
from latent_t2i.sample.config import SampleConfig


def main(prog: str | None = None) -> None:
    """Runs the command; `prog` is its name in the help."""
    cli.main("latent_t2i.sample.pictures:sample", SampleConfig, "sample", prog=prog)


if __name__ == "__main__":
    main()
