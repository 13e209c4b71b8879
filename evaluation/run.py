"""Computes the metrics of a bundle and writes a report.

python -m evaluation.run --config demo
python -m evaluation.run --config coco64 --bundle runs/coco64/bundle
"""

from latent_t2i.configs import cli
from latent_t2i.evaluation.config import EvaluationConfig


def main(prog: str | None = None) -> None:
    """Runs the command; `prog` is its name in the help."""
    cli.main("latent_t2i.evaluation.evaluate:evaluate", EvaluationConfig, "evaluation", prog=prog)


if __name__ == "__main__":
    main()
