"""CLIP score and R-precision against torchmetrics, and on drawn scenes, whose captions fit."""

import importlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torchmetrics.functional.multimodal import clip_score
from transformers import CLIPModel, CLIPProcessor, CLIPTokenizer

from latent_t2i.evaluation.clip_model import Clip, is_text_encoder_of, load_clip
from latent_t2i.evaluation.config import EvaluationConfig, WeightsConfig
from latent_t2i.evaluation.metrics.clip_score import ClipScore
from latent_t2i.evaluation.metrics.metric import (
    Batch,
    Context,
    ImageMetric,
    Item,
    MissingWeights,
)
from latent_t2i.evaluation.metrics.r_precision import Embedded, RPrecision, rank_first
from latent_t2i.evaluation.networks import load_image_processor
from latent_t2i.model.encoders import quiet
from latent_t2i.model.paths import ROOT
from latent_t2i.scenes.dataset import render
from latent_t2i.scenes.prompts import make_prompts
from tests import tiny
from tests.bundles import make_bundle
from tests.judging import judge, judge_by_two, rotate_captions, split

CLIP = ROOT / "scenes" / "encoders" / "clip"
NUM = 120
RELEASED = 74.9539
"""The CLIP score of version 0.1.0 on the images of the test below."""


class RememberingClip(Clip):
    """The embedded CLIP, which embeds each image only once, to save time."""

    def __init__(self) -> None:
        super().__init__(str(CLIP))
        self._known: dict[bytes, NDArray[np.float32]] = {}

    def embed_images(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        keys = [image.tobytes() for image in images]
        new = [number for number, key in enumerate(keys) if key not in self._known]
        if new:
            found = super().embed_images(images[new])
            self._known |= {keys[n]: image for n, image in zip(new, found, strict=True)}
        return np.stack([self._known[key] for key in keys])


def make_context(clip: Clip) -> Context:
    config = EvaluationConfig(name="no such run")
    return Context(config=config, shared={("clip", config.weights.clip): clip})


@pytest.fixture(scope="module")
def context() -> Context:
    return make_context(RememberingClip())


@pytest.fixture(scope="module")
def scenes() -> Batch:
    """Drawn scenes of different prompts."""
    prompts = {prompt.text: prompt for prompt in make_prompts("full", "pair", NUM, 3)}
    items = [
        Item(position=n, key=f"{n}.png", captions=(p.text,), prompt=p)
        for n, p in enumerate(prompts.values())
    ]
    assert len(items) > 100
    return Batch(images=render([p.scene for p in prompts.values() if p.scene]), items=items)


class PlainFeatures:
    """CLIPModel as torchmetrics expects it: features are tensors, as in older transformers."""

    def __init__(self, model: CLIPModel) -> None:
        self._model = model
        self.config, self.device, self.dtype = model.config, model.device, model.dtype

    def to(self, _: torch.device) -> "PlainFeatures":
        return self

    def get_image_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self._model.get_image_features(pixel_values).pooler_output

    def get_text_features(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self._model.get_text_features(ids, mask).pooler_output


def test_clip_score_equals_torchmetrics(context: Context, scenes: Batch) -> None:
    (batch, *_) = split(scenes, 12)
    with quiet():
        processor = CLIPProcessor(
            image_processor=load_image_processor(CLIP, flag="--weights.clip"),
            tokenizer=CLIPTokenizer.from_pretrained(CLIP),
        )
    plain = PlainFeatures(load_clip(context).model)
    images = [torch.from_numpy(image.copy()).permute(2, 0, 1) for image in batch.images]
    texts = [item.captions[0] for item in batch.items]
    reference = clip_score(images, texts, model_name_or_path=lambda: (plain, processor))
    metric = judge(ClipScore(context), batch)
    assert metric.compute()["clip_score"] == pytest.approx(float(reference), abs=1e-4)
    for number, (image, text) in enumerate(zip(images, texts, strict=True)):
        single = clip_score(image, text, model_name_or_path=lambda: (plain, processor))
        assert metric.values[number]["clip_score"] == pytest.approx(float(single), abs=1e-4)


def test_a_negative_cosine_counts_as_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clamp is for each image, as in the paper; torchmetrics clamps the mean only."""

    class Known:
        name = fingerprint = "known"
        warning = ""

        def embed_images(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
            return np.array([[1, 0], [1, 0]], np.float32)

        def embed_texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
            cosines = np.array([0.3, -0.1])
            return np.stack([cosines, np.sqrt(1 - cosines**2)], 1).astype(np.float32)

    items = [Item(position=n, key="", captions=(text,)) for n, text in enumerate("ab")]
    batch = Batch(images=np.zeros((2, 8, 8, 3), np.uint8), items=items)
    metric = judge(ClipScore(make_context(Known())), batch)  # type: ignore[arg-type]
    assert [values["clip_score"] for values in metric.values.values()] == pytest.approx([30, 0])
    assert metric.compute()["clip_score"] == pytest.approx(15)
    module = importlib.import_module("torchmetrics.functional.multimodal.clip_score")
    monkeypatch.setattr(module, "_get_clip_model_and_processor", lambda _: (None, None))
    update = lambda *_: (torch.tensor([30.0, -10.0]), 2)  # noqa: E731
    monkeypatch.setattr(module, "_clip_score_update", update)
    assert float(clip_score(batch.images, ["a", "b"])) == pytest.approx(10)


def test_the_clip_score_is_that_of_the_released_metric(context: Context) -> None:
    prompts = make_prompts("easy", "single", 70, 3)
    items = [Item(position=n, key="", captions=(p.text,)) for n, p in enumerate(prompts)]
    batch = Batch(images=render([p.scene for p in prompts if p.scene]), items=items)
    score = judge(ClipScore(context), batch).compute()["clip_score"]
    assert score == pytest.approx(RELEASED, abs=1e-3)


def test_captions_beyond_77_tokens_keep_their_end_token(context: Context) -> None:
    clip = load_clip(context)
    start = "a red circle left of a blue square " * 12
    long, longer = clip.embed_texts([start, start + "and a green triangle " * 9])
    tokens = CLIPTokenizer.from_pretrained(CLIP)(start)["input_ids"]
    assert len(tokens) > clip.max_tokens == 77
    # By hand: the first 76 tokens and the end token, whose state is the embedding.
    ids = torch.tensor([[*tokens[:76], tokens[-1]]])
    with torch.inference_mode():
        expected = clip.model.get_text_features(ids).pooler_output[0]
    expected = expected / expected.norm()
    assert long == pytest.approx(expected.numpy(), abs=1e-5)
    assert longer == pytest.approx(long, abs=1e-5), "what is cut off does not matter"
    # Without its end token, the embedding would be that of the start token: the same for all texts.
    other = clip.embed_texts(["a green star above a yellow heart " * 12])[0]
    assert np.abs(other - long).max() > 0.01


def test_a_tokenizer_without_a_limit_is_cut_as_well(tmp_path: Path, context: Context) -> None:
    shutil.copytree(CLIP, tmp_path / "clip")
    settings = tmp_path / "clip" / "tokenizer_config.json"
    settings.write_text(settings.read_text().replace('"model_max_length": 77,', ""))
    clip = Clip(str(tmp_path / "clip"))
    assert clip._tokenizer.model_max_length > 1e9
    texts = ["a red circle " * 99]
    assert clip.embed_texts(texts) == pytest.approx(load_clip(context).embed_texts(texts))


@pytest.mark.parametrize(("metric", "num"), [(ClipScore, 24), (RPrecision, NUM)])
def test_values_depend_neither_on_batches_nor_on_processes(
    metric: type[ImageMetric], num: int, context: Context, scenes: Batch
) -> None:
    if metric is ClipScore:
        context = make_context(Clip(str(CLIP)))
    (scenes, *_) = split(scenes, num)
    whole = judge(metric(context), scenes)
    parts = judge(metric(context), *split(scenes, 7)[::-1])
    assert list(parts.values) == list(whole.values) == list(range(len(scenes.items)))
    shared = judge_by_two(lambda: metric(context), split(scenes, 10))
    for position, values in whole.values.items():
        assert list(values) == [metric.name]
        assert parts.values[position] == pytest.approx(values, abs=1e-4)
        assert shared.values[position] == pytest.approx(values, abs=1e-4)


def test_matching_captions_score_above_shuffled_ones(context: Context, scenes: Batch) -> None:
    matched = judge(ClipScore(context), scenes).compute()["clip_score"]
    wrong = judge(ClipScore(context), rotate_captions(scenes)).compute()["clip_score"]
    assert wrong < matched - 5


def test_r_precision_of_drawn_scenes_is_high_and_of_shuffled_ones_chance(
    context: Context, scenes: Batch
) -> None:
    metric = judge(RPrecision(context), scenes)
    assert metric.compute()["r_precision"] > 0.9
    assert metric.details() == {
        "num_captions": 100,
        "num_images": len(scenes.items),
        "num_images_used": len(scenes.items),
    }
    chance = judge(RPrecision(context), rotate_captions(scenes)).compute()["r_precision"]
    assert chance < 0.1


def test_r_precision_names_a_smaller_number_of_captions(context: Context, scenes: Batch) -> None:
    (few, *_) = split(scenes, 8)
    metric = judge(RPrecision(context), few)
    assert list(metric.compute()) == ["r_precision/of_8"]
    assert metric.details()["num_captions"] == 8
    same = few.with_items([replace(item, captions=("the same",)) for item in few.items])
    assert judge(RPrecision(context), same).compute() == {}, "nothing to find"


def test_r_precision_keeps_a_bounded_part_that_does_not_depend_on_batches(
    context: Context, scenes: Batch
) -> None:
    whole = judge(RPrecision(context, keep=20), scenes)
    parts = judge(RPrecision(context, keep=20), *split(scenes, 9)[::-1])
    assert len(whole.values) == 20
    assert parts.values == whole.values
    assert list(whole.values) != list(range(20)), "chosen among all"
    assert whole.details()["num_images_used"] == 20
    assert whole.details()["num_images"] == len(scenes.items)


def embedded(caption: str, image: Sequence[float], text: Sequence[float]) -> Embedded:
    return Embedded(caption=caption, image=np.float32(image), text=np.float32(text))


def test_ranks_of_known_embeddings() -> None:
    kept = {
        0: embedded("a", [1, 0], [1, 0]),
        1: embedded("b", [1, 0], [0, 1]),
        2: embedded("c", [0, 1], [0.6, 0.8]),
        3: embedded("c", [0.6, 0.8], [0.6, 0.8]),
    }
    assert rank_first(kept, 0) == {0: 1.0, 1: 0.0, 2: 0.0, 3: 1.0}
    alike = {n: embedded(str(n), [1, 0], [1, 0]) for n in range(250)}
    assert set(rank_first(alike, 0).values()) == {1 / 100}, "chance"


def test_other_captions_are_chosen_by_seed_and_position() -> None:
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(400, 2, 4))
    vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
    kept = {n: embedded(str(n), image, text) for n, (image, text) in enumerate(vectors)}
    ranks = rank_first(kept, 0)
    assert rank_first(dict(reversed(kept.items())), 0) == ranks
    assert rank_first(kept, 1) != ranks


def test_reference_images_without_captions_are_left_out(context: Context, scenes: Batch) -> None:
    (batch, *_) = split(scenes, 6)
    partly = batch.with_items([replace(batch.items[0], captions=()), *batch.items[1:]])
    metric = judge(ClipScore(context), partly)
    assert metric.values[0] == {}
    assert metric.details() == {"num_images": 5}
    assert judge(RPrecision(context), partly).details()["num_images"] == 5


def test_a_scorer_that_is_the_conditioning_clip_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = make_bundle(tmp_path / "bundle")

    def printed(clip: str, **settings: str) -> str:
        weights = WeightsConfig(clip=clip)
        context = Context(config=EvaluationConfig(name="x", weights=weights, **settings))
        load_clip(context)
        load_clip(context)
        return capsys.readouterr().out

    own = clip_with_processor(tmp_path / "clip")
    message = printed(own, bundle=str(bundle))
    assert message.startswith("warning: --weights.clip: ")
    assert f"is also the text encoder of the bundle {bundle}" in message
    assert message.count("warning") == 1, "once"
    assert printed(str(CLIP), bundle=str(bundle)) == ""
    assert printed(own, images="a folder") == "", "finished images have no bundle"


def clip_with_processor(folder: Path) -> str:
    shutil.copytree(tiny.encoders().clip, folder)
    shutil.copy(CLIP / "preprocessor_config.json", folder)
    return str(folder)


def test_the_shipped_bundle_is_conditioned_by_the_embedded_clip(context: Context) -> None:
    assert is_text_encoder_of(ROOT / "scenes" / "bundle", load_clip(context))
    assert not is_text_encoder_of(ROOT / "scenes", load_clip(context)), "no text encoder"


def test_unusable_scorers_are_named(tmp_path: Path) -> None:
    def load(name: str) -> Clip:
        return load_clip(
            Context(config=EvaluationConfig(name="x", weights=WeightsConfig(clip=name)))
        )

    with pytest.raises(MissingWeights, match=r"--weights\.clip: no folder .*; download config"):
        load("openai/clip-vit-base-patch32")
    with pytest.raises(ValueError, match=r"expected model_type 'clip', found 'clip_text_model'"):
        load(str(ROOT / "scenes" / "bundle" / "text_encoder"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=rf"--weights\.clip: {tmp_path}/empty has no config"):
        load(str(tmp_path / "empty"))
    half = tmp_path / "half"
    shutil.copytree(CLIP, half)
    (half / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match=rf"--weights\.clip: {half} does not load"):
        load(str(half))


def test_converted_scorers_with_older_settings_embed_alike(
    tmp_path: Path, context: Context
) -> None:
    """OpenCLIP's converted models have `eos_token_id` 2 and pad with "!"."""
    folder = tmp_path / "clip"
    shutil.copytree(CLIP, folder)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["eos_token_id"] = 2
    (folder / "config.json").write_text(json.dumps(config))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["pad_token"] = "!"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    clip = Clip(str(folder))
    assert clip._tokenizer.pad_token_id != clip._tokenizer.eos_token_id
    texts = ["a red circle", "a blue square left of a green star " * 15]
    expected = load_clip(context).embed_texts(texts)
    assert clip.embed_texts(texts) == pytest.approx(expected, abs=1e-5)
