"""`evaluation.run` on a bundle of noise: all metrics, and a self-contained report."""

import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from latent_t2i.configs.cli import ConfigError, parse
from latent_t2i.evaluation.config import EvaluationConfig
from latent_t2i.evaluation.evaluate import evaluate
from latent_t2i.model.bundle import digest
from latent_t2i.model.paths import ROOT
from latent_t2i.sample import pictures
from tests.bundles import make_bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("bundle") / "bundle")


def config(bundle: Path, out: Path, **settings: object) -> EvaluationConfig:
    chosen = {"num_prompts": 4, "num_steps": 2, "guidance_scales": (1.0, 4.0)} | settings
    return EvaluationConfig(name="tiny", bundle=str(bundle), out=str(out), **chosen)


class Links(HTMLParser):
    """Collects the URLs that a page loads and counts its images."""

    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.sizes: list[tuple[str | None, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "img":
            self.sizes.append((dict(attrs)["width"], dict(attrs)["height"]))
        self.loads += [str(value) for name, value in attrs if name in ("src", "href")]


def test_metrics_and_report_with_the_oracle(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [
        {"step": s, "loss": 1.0 / s, "time_breakdown": {"denoise": 0.9, "data": 0.1}}
        for s in (1, 2)
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    report = evaluate(config(bundle, tmp_path, run=str(tmp_path), started_at=1))
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    for name in (
        "oracle/single/shape_and_colour",
        "oracle/pair/colours",
        "oracle/pair/all",
        "oracle/held_out/shape_and_colour",
    ):
        assert 0 <= metrics[name] <= 1
        assert 0 <= metrics[f"{name}@g1"] <= 1
        assert f"{name}@g4" not in metrics, "the main guidance scale has no suffix"
    assert 0 <= metrics["clip_score"] < metrics["clip_score/drawn"] <= 100
    assert metrics["train_seconds"] == 1.5
    assert metrics["total_seconds"] > 1e9
    assert (metrics.pop("bundle"), metrics.pop("bundle_sha256")) == (str(bundle), digest(bundle))
    assert all(isinstance(value, int | float) for value in metrics.values()), "flat"
    page = report.read_text()
    links = Links()
    links.feed(page)
    assert all(link.startswith(("data:image/png", "#")) for link in links.loads)
    assert not re.search(r"url\(\s*['\"]?http|@import|<script", page)
    assert links.sizes == [("64", "64")] * (4 * 3 + 2 * 2), "samples and guidance rows"
    assert "number of correct attributes differs most" in page
    assert re.search(r'<i class="key" style="background:#3b7dd8"></i>denoise', page)
    assert digest(bundle)[:16] in page
    assert str(report) in capsys.readouterr().out


def test_metrics_and_report_of_captions(bundle: Path, tmp_path: Path) -> None:
    captions = tmp_path / "captions.json"
    annotations = [{"image_id": i, "caption": f"caption <{i}> & more"} for i in (3, 1, 1, 2)]
    captions.write_text(json.dumps({"images": [], "annotations": annotations}))
    settings = {"oracle": False, "captions": str(captions), "num_prompts": 3}
    report = evaluate(config(bundle, tmp_path, **settings))
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert not [name for name in metrics if name.startswith("oracle")]
    assert {"clip_score", "clip_score@g1"} <= set(metrics)
    assert metrics["num_prompts"] == 3
    page = report.read_text()
    assert "caption &lt;1&gt; &amp; more" in page
    assert "The run folder has no metrics.jsonl" in page
    assert "differs most" not in page


def test_the_report_of_images_that_are_not_square(bundle: Path, tmp_path: Path) -> None:
    wide = tmp_path / "bundle"
    shutil.copytree(bundle, wide)
    path = wide / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sample_size": [8, 16]}))
    settings = config(wide, tmp_path / "out", guidance_scales=(4.0,))
    with pytest.raises(ValueError, match=r"--oracle: .* 128 x 64 pixels, .* square"):
        evaluate(settings)
    captions = tmp_path / "captions.json"
    captions.write_text(json.dumps({"annotations": [{"image_id": 1, "caption": "a"}]}))
    page = evaluate(replace(settings, oracle=False, captions=str(captions))).read_text()
    links = Links()
    links.feed(page)
    assert links.sizes == [("128", "64")]
    assert "aspect-ratio" not in page
    assert "at each guidance scale" not in page, "there is only one"


def test_a_run_without_a_bundle_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pictures, "output_root", lambda: tmp_path)
    with pytest.raises(ValueError, match=r"--bundle: .*runs/untrained/bundle does not exist"):
        evaluate(EvaluationConfig(name="untrained", out=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_the_loss_curve_is_that_of_the_bundles_own_run(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--run: .*metrics\.jsonl does not exist"):
        evaluate(config(bundle, tmp_path, run=str(tmp_path)))
    own = tmp_path / "run" / "bundle"
    shutil.copytree(bundle, own)
    history = own.parent / "metrics.jsonl"
    history.write_text('{"step": 1, "loss": "low"}\n')
    with pytest.raises(ValueError, match=r"run/metrics\.jsonl, line 1: loss is 'low'"):
        evaluate(config(own, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_an_unusable_bundle_info_is_an_error(bundle: Path, tmp_path: Path) -> None:
    own = tmp_path / "bundle"
    shutil.copytree(bundle, own)
    info = json.loads((own / "bundle.json").read_text())
    (own / "bundle.json").write_text(json.dumps(info | {"train_seconds": "long"}))
    with pytest.raises(ValueError, match=r"bundle\.json: train_seconds: expected .*, found 'long'"):
        evaluate(config(own, tmp_path / "out"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--no-oracle"], "--captions: required with --no-oracle"),
        (["--captions", "x.json"], "--captions: found 'x.json', but the oracle"),
        (["--num-prompts", "0"], "--num-prompts: expected .*, found 0"),
        (["--num-steps", "0"], "--num-steps: expected .*, found 0"),
        (["--batch-size", "0"], "--batch-size: expected .*, found 0"),
        (["--guidance-scale", "nan"], "--guidance-scale: expected .*, found nan"),
        (["--guidance-scales", "0", "4"], "--guidance-scales: expected .*, found 0"),
        (["--guidance-scales", "2", "2.0000001"], "--guidance-scales: .* the same name"),
        (["--guidance-scales", "2", "inf"], "--guidance-scales: expected .*, found inf"),
        (["--seed", str(2**63)], f"--seed: expected .*, found {2**63}"),
        (["--started-at", "99999999999"], "--started-at: expected .*, found 99999999999"),
    ],
)
def test_invalid_settings_are_errors(flags: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(EvaluationConfig, "evaluation", ["--config", str(ROOT / "configs/demo.yaml"), *flags])
