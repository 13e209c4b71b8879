"""Stage one: captioned images to shards of latents and text. The same command again resumes.

python -m pipeline.run --config scenes
python -m pipeline.run --config coco64 --source.images DIR --source.captions FILE
"""

from latent_t2i.configs import cli
from latent_t2i.pipeline.config import PipelineConfig


def main(prog: str | None = None) -> None:
    """Runs the command; `prog` is its name in the help."""
    cli.main("latent_t2i.pipeline.stage:build", PipelineConfig, "pipeline", prog=prog)


if __name__ == "__main__":
    main()
