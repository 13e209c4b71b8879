"""The oracle metric on drawn scenes, whose checks are known."""

import numpy as np
import pytest

from latent_t2i.evaluation.config import EvaluationConfig
from latent_t2i.evaluation.metrics.metric import Batch, Context, Item
from latent_t2i.evaluation.metrics.oracle import Oracle
from latent_t2i.evaluation.processes import Group
from latent_t2i.scenes import oracle
from latent_t2i.scenes.dataset import render
from latent_t2i.scenes.prompts import KINDS, Kind, make_prompts

CONTEXT = Context(config=EvaluationConfig(name="test"))


def drawn(kind: Kind, num: int = 24) -> Batch:
    """The drawn scenes of prompts."""
    prompts = make_prompts("easy", kind, num, 3)
    items = [
        Item(position=n, key=f"{kind}-{n}", captions=(p.text,), prompt=p, group=kind)
        for n, p in enumerate(prompts)
    ]
    return Batch(images=render([p.scene for p in prompts]), items=items)


def judge(*batches: Batch) -> Oracle:
    metric = Oracle(CONTEXT)
    for batch in batches:
        metric.update(batch)
    metric.gather(Group())
    return metric


@pytest.mark.parametrize("kind", KINDS)
def test_drawn_scenes_pass_all_checks_and_permuted_ones_fail(kind: Kind) -> None:
    batch = drawn(kind)
    figures = judge(batch).compute()
    assert set(figures.values()) == {1.0}
    assert f"oracle/{kind}/all" in figures
    permuted = Batch(images=np.roll(batch.images, 1, axis=0), items=batch.items)
    assert judge(permuted).compute()[f"oracle/{kind}/all"] < 0.3


def test_an_attribute_is_averaged_over_the_prompts_that_mention_it() -> None:
    batch = drawn("single")
    images = np.roll(batch.images, 1, axis=0)
    metric = judge(Batch(images=images, items=batch.items))
    scenes = [(item.prompt.scene, item.prompt.mentions) for item in batch.items if item.prompt]
    checks = [
        oracle.check(scene, found, mentions)
        for (scene, mentions), found in zip(scenes, oracle.detect(images), strict=True)
    ]
    figures = metric.compute()
    for name in {name for image in checks for name in image}:
        passed = [image[name] for image in checks if name in image]
        assert figures[f"oracle/single/{name}"] == np.mean(passed), name
    assert sum("place" in image for image in checks) < len(checks), "some do not mention it"
    assert metric.values[0] == {f"oracle/single/{k}": float(v) for k, v in checks[0].items()}


def test_figures_are_independent_of_batches_and_named_by_kind() -> None:
    batches = [drawn("single", 8), drawn("pair", 8)]
    items = [Item(**{**vars(item), "position": item.position + 8}) for item in batches[1].items]
    batches[1] = batches[1].with_items(items)
    whole = judge(*batches)
    parts = [
        Batch(images=batch.images[i : i + 3], items=batch.items[i : i + 3])
        for batch in batches
        for i in range(0, 8, 3)
    ]
    assert judge(*parts[::-1]).values == whole.values
    assert {name.split("/")[1] for name in whole.compute()} == {"single", "pair"}


def test_a_prompt_without_a_scene_is_an_error() -> None:
    batch = drawn("single", 1)
    items = [Item(position=0, key="a.png", captions=("a dog",))]
    with pytest.raises(ValueError, match=r"the prompt of a\.png has no scene; expected generated"):
        judge(batch.with_items(items))
