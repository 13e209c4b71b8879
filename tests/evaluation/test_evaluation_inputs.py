"""What `evaluation.run` reads before it draws: settings, the bundle's info, the run's history."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from latent_t2i.configs.cli import ConfigError, parse
from latent_t2i.evaluation.config import EvaluationConfig
from latent_t2i.evaluation.evaluate import evaluate
from latent_t2i.model.paths import ROOT
from tests.bundles import make_bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("bundle") / "bundle")


def config(bundle: Path, out: Path, **settings: object) -> EvaluationConfig:
    chosen = {"num_prompts": 4, "num_steps": 2, "guidance_scales": (1.0, 4.0)} | settings
    return EvaluationConfig(name="tiny", bundle=str(bundle), out=str(out), **chosen)


def test_images_that_are_not_square(bundle: Path, tmp_path: Path) -> None:
    wide = tmp_path / "bundle"
    shutil.copytree(bundle, wide)
    path = wide / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sample_size": [8, 16]}))
    settings = config(wide, tmp_path / "out", guidance_scales=(4.0,))
    with pytest.raises(ValueError, match=r"--oracle: .* 128 x 64 pixels, .* square"):
        evaluate(settings)
    captions = tmp_path / "captions.json"
    captions.write_text(json.dumps({"annotations": [{"image_id": 1, "caption": "a"}]}))
    page = evaluate(
        replace(settings, oracle=False, captions=str(captions), metrics=("clip_score",))
    ).read_text()
    assert 'width="128" height="64"' in page
    assert "aspect-ratio" not in page
    assert "at each guidance scale" not in page, "there is only one"


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
        (["--num-seed-sets", "0"], "--num-seed-sets: expected .*3.*, found 0"),
        (["--num-seed-sets", "2"], "--num-seed-sets: expected .*3.*, found 2"),
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
