"""Pictures from a bundle.

python -m sample.run --config scenes
python -m sample.run --bundle runs/NAME/bundle --prompt "a red circle" "a blue star"
"""

from configs.cli import main
from sample.config import SampleConfig
from sample.pictures import sample

if __name__ == "__main__":
    main(sample, SampleConfig, "sample")
