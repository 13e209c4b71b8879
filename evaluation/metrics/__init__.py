"""The metrics, by name: to add one, write its module and add its line here."""

import importlib

from latent_t2i.evaluation.metrics.metric import Context, Metric

METRICS = {
    "oracle": "oracle:Oracle",
    "clip_score": "clip_score:ClipScore",
    "r_precision": "r_precision:RPrecision",
    "caption_similarity": "caption_similarity:CaptionSimilarity",
    "consistency": "consistency:Consistency",
    "fid": "frechet:Fid",
    "kid": "kid:Kid",
    "inception_score": "inception_score:InceptionScore",
    "prdc": "prdc:Prdc",
    "frechet_distance": "frechet:FrechetDistance",
    "cmmd": "cmmd:Cmmd",
    "mind": "mind:Mind",
    "lpips": "lpips:Lpips",
    "memorisation": "memorisation:Memorisation",
}
"""Name: module and class, imported only when the metric is used."""


def metric_class(name: str) -> type[Metric]:
    """Returns the class of a metric; raises ValueError for an unknown name."""
    if name not in METRICS:
        raise ValueError(f"--metrics: found {name!r}, expected all or some of {', '.join(METRICS)}")
    module, _, cls = METRICS[name].partition(":")
    found: type[Metric] = getattr(
        importlib.import_module(f"latent_t2i.evaluation.metrics.{module}"), cls
    )
    return found


__all__ = ["METRICS", "Context", "Metric", "metric_class"]
