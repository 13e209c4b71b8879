"""Writes a bundle with a model card and float16 weights, and uploads it.

python -m sample.export --bundle runs/NAME/bundle --out build/NAME
"""

from latent_t2i.configs import cli
from latent_t2i.sample.settings import ExportConfig


def main(prog: str | None = None) -> None:
    """Runs the command; `prog` is its name in the help."""
    run = "latent_t2i.sample.publishing:export"
    cli.main(run, ExportConfig, None, prog=prog or "python -m sample.export")


if __name__ == "__main__":
    main()
