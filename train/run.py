"""The command of stage two: accelerate launch train/run.py --config PRESET [flags]."""

import sys
from pathlib import Path

if sys.path[0] == str(Path(__file__).resolve().parent):  # run as a script
    # In a checkout the folder above holds latent_t2i/; in an installed wheel it is latent_t2i.
    above = Path(__file__).resolve().parent.parent
    sys.path[0] = str(above if (above / "latent_t2i").is_dir() else above.parent)

from latent_t2i.configs import cli
from latent_t2i.train.config import TrainConfig


def main(prog: str | None = None) -> None:
    """Runs the command; `prog` is its name in the help."""
    cli.main("latent_t2i.train.loop:train", TrainConfig, "train", prog=prog)


if __name__ == "__main__":
    main()
