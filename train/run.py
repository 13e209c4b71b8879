"""Stage two on the command line: accelerate launch train/run.py --config PRESET [flags]."""

import sys
from pathlib import Path

if sys.path[0] == str(Path(__file__).resolve().parent):  # started as a script
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from configs import cli
from train.config import TrainConfig
from train.loop import train

if __name__ == "__main__":
    cli.main(train, TrainConfig, "train")
