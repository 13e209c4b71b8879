"""Computes the metrics of a bundle and writes a report.

python -m evaluation.run --config demo
python -m evaluation.run --config coco64 --bundle runs/coco64/bundle
"""

from latent_t2i.configs.cli import main
from latent_t2i.evaluation.config import EvaluationConfig
from latent_t2i.evaluation.evaluate import evaluate

if __name__ == "__main__":
    main(evaluate, EvaluationConfig, "evaluation")
