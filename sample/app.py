"""Serves a web page that generates images.

python -m sample.app
"""

from latent_t2i.configs import cli
from latent_t2i.sample.settings import AppConfig


def main(prog: str | None = None) -> None:
    """Runs the command; `prog` is its name in the help."""
    run = "latent_t2i.sample.page:serve"
    cli.main(run, AppConfig, None, prog=prog or "python -m sample.app")


if __name__ == "__main__":
    main()
