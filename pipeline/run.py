"""Stage one: captioned images to shards of latents and text. Killed, it goes on where it was.

python -m pipeline.run --config scenes
python -m pipeline.run --config coco64 --source.images DIR --source.captions FILE
"""

from configs.cli import main
from pipeline.config import PipelineConfig
from pipeline.stage import build

if __name__ == "__main__":
    main(build, PipelineConfig, "pipeline")
