"""Figures: against torchmetrics, and by cases whose answer is known."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torchmetrics.functional.multimodal import clip_score
from transformers import AutoImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

from latent_t2i.evaluation.curves import guidance_chart, loss_chart, read_history, smooth
from latent_t2i.evaluation.drawing import Prompt, Samples
from latent_t2i.evaluation.metrics import ClipScorer, judge, oracle_figures
from latent_t2i.evaluation.report import wilson
from latent_t2i.model.encoders import quiet
from latent_t2i.model.paths import ROOT
from latent_t2i.scenes import prompts as scene_prompts
from latent_t2i.scenes.draw import draw

CLIP = ROOT / "scenes" / "encoders" / "clip"


def drawn_as_asked(kind: str, num: int = 24) -> Samples:
    made = scene_prompts.make_prompts("easy", kind, num, 3)
    prompts = [Prompt(text=p.text, scene=p.scene, mentions=p.mentions) for p in made]
    pictures = [draw(p.scene) for p in made]
    return Samples(kind=kind, guidance_scale=4.0, prompts=prompts, pictures=pictures)


@pytest.mark.parametrize("kind", scene_prompts.KINDS)
def test_pictures_drawn_as_asked_are_all_right_and_shuffled_ones_are_not(kind: str) -> None:
    asked = drawn_as_asked(kind)
    figures = oracle_figures(kind, judge(asked))
    assert set(figures.values()) == {1.0}
    other = [*asked.pictures[1:], asked.pictures[0]]
    wrong = Samples(kind=kind, guidance_scale=4.0, prompts=asked.prompts, pictures=other)
    assert oracle_figures(kind, judge(wrong))[f"oracle/{kind}/all"] < 0.3


def test_an_attribute_is_counted_over_the_prompts_that_tell_it() -> None:
    verdicts = [{"colour": True, "place": False}, {"colour": True}, {"colour": False}]
    assert oracle_figures("single", verdicts, "@g1") == {
        "oracle/single/colour@g1": pytest.approx(2 / 3),
        "oracle/single/place@g1": 0.0,
    }


class OlderTransformers:
    """CLIPModel as torchmetrics knows it: features come as plain tensors."""

    def __init__(self, model: CLIPModel) -> None:
        self._model = model
        self.config, self.device, self.dtype = model.config, model.device, model.dtype

    def to(self, _: torch.device) -> "OlderTransformers":
        return self

    def get_image_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self._model.get_image_features(pixel_values).pooler_output

    def get_text_features(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self._model.get_text_features(ids, mask).pooler_output


def test_clip_score_is_torchmetrics() -> None:
    asked = drawn_as_asked("single", 12)
    texts = [prompt.text for prompt in asked.prompts]
    with quiet():
        model = CLIPModel.from_pretrained(CLIP, dtype=torch.float32)
        processor = CLIPProcessor(
            image_processor=AutoImageProcessor.from_pretrained(CLIP),
            tokenizer=CLIPTokenizer.from_pretrained(CLIP),
        )
    older = OlderTransformers(model.eval().requires_grad_(False))
    images = [torch.from_numpy(picture.copy()).permute(2, 0, 1) for picture in asked.pixels]
    reference = clip_score(images, texts, model_name_or_path=lambda: (older, processor))
    assert ClipScorer(str(CLIP)).score(asked.pixels, texts) == pytest.approx(
        float(reference), abs=1e-3
    )


def test_clip_score_does_not_depend_on_the_batch_and_prefers_the_right_text() -> None:
    asked = drawn_as_asked("single", 70)
    scorer = ClipScorer(str(CLIP))
    texts = [prompt.text for prompt in asked.prompts]
    whole = scorer.score(asked.pixels, texts)
    parts = [scorer.score(asked.pixels[i : i + 7], texts[i : i + 7]) for i in range(0, 70, 7)]
    assert np.mean(parts) == pytest.approx(whole, abs=1e-3)
    assert scorer.score(asked.pixels, [*texts[1:], texts[0]]) < whole - 5


def test_a_folder_that_is_no_clip_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"--clip: {tmp_path}"):
        ClipScorer(str(tmp_path))


def test_wilson_interval_holds_known_values() -> None:
    assert wilson(0.5, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    assert wilson(1.0, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)
    assert wilson(0.0, 10)[0] == 0.0


def test_smoothing_keeps_a_constant_and_follows_a_step() -> None:
    assert smooth([2.0] * 5) == pytest.approx([2.0] * 5)
    assert smooth([0.0, 1.0], weight=0.5) == pytest.approx([0.0, 2 / 3])


def test_charts_are_inline_and_the_same_each_time() -> None:
    history = [{"step": step, "loss": 1 / step} for step in range(1, 9)] + [
        {"step": 9, "loss": None}
    ]
    chart = loss_chart(history)
    assert chart.startswith("<svg")
    assert chart == loss_chart(history)
    assert "validation" not in chart
    measured = [{"step": 8, "validation": {"loss": 0.5}}, {"step": 9, "validation": {"loss": 0.4}}]
    assert "validation (EMA)" in loss_chart([*history, *measured])
    both = guidance_chart({"first": [(1.0, 0.2), (4.0, 0.9)], "second": [(1.0, 0.4)]})
    assert "first" in both
    assert "second" in both


def test_a_broken_history_names_its_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": \n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: not JSON"):
        read_history(path)
