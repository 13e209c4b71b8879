"""Changes an image: image to image, inpainting, variations.

python -m sample.edit --init-image photo.png --mask mask.png --strength 0.6 --prompt "a red star"
"""

from latent_t2i.configs import cli
from latent_t2i.sample.settings import EditConfig


def main(prog: str | None = None) -> None:
    """Runs the command; `prog` is its name in the help."""
    run = "latent_t2i.sample.editing:edit"
    cli.main(run, EditConfig, None, prog=prog or "python -m sample.edit")


if __name__ == "__main__":
    main()
