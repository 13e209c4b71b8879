"""The oracle's checks of drawn scenes: the share of images with an attribute of the prompt right.

`oracle/KIND/ATTRIBUTE` is averaged over the prompts that mention the attribute. It needs prompts
with their scene, and takes the place of a captioner and of a detector for them. `scenes.oracle`
explains how an image is checked.
"""

from collections.abc import Mapping, Sequence

from latent_t2i.evaluation.metrics.metric import Batch, ImageMetric, Item
from latent_t2i.scenes import oracle
from latent_t2i.scenes.oracle import DetectedScene


class Oracle(ImageMetric):
    """The oracle's checks; an image's values are 0 or 1."""

    name = "oracle"
    needs = frozenset({"scenes"})
    rows = ("samples", "real", "reconstruction", "shuffled")

    def score(self, batch: Batch) -> Sequence[Mapping[str, float]]:
        detected = batch.cached("oracle", lambda: oracle.detect(batch.images))
        return [_check(item, found) for item, found in zip(batch.items, detected, strict=True)]


def _check(item: Item, detected: DetectedScene) -> dict[str, float]:
    if item.prompt is None or item.prompt.scene is None:
        raise ValueError(
            f"--metrics oracle: the prompt of {item.key} has no scene; expected generated prompts "
            "(--oracle)"
        )
    checks = oracle.check(item.prompt.scene, detected, item.prompt.mentions)
    return {f"oracle/{item.group}/{name}": float(passed) for name, passed in checks.items()}
