"""Stage one: captioned images to shards of latents and text. The same command again resumes.

python -m pipeline.run --config scenes
python -m pipeline.run --config coco64 --source.images DIR --source.captions FILE
"""

from latent_t2i.configs.cli import main
from latent_t2i.pipeline.config import PipelineConfig
from latent_t2i.pipeline.stage import build

if __name__ == "__main__":
    main(build, PipelineConfig, "pipeline")
