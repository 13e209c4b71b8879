"""Generates images from a bundle.

python -m sample.run --config scenes
python -m sample.run --bundle runs/NAME/bundle --prompt "a red circle" "a blue star"
"""

from latent_t2i.configs.cli import main
from latent_t2i.sample.config import SampleConfig
from latent_t2i.sample.pictures import sample

if __name__ == "__main__":
    main(sample, SampleConfig, "sample")
