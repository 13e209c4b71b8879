"""The published protocols: what they fix, and prompts that a second run reads again."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from latent_t2i.evaluation import protocols
from latent_t2i.evaluation.config import EvaluationConfig, WeightsConfig
from latent_t2i.evaluation.inputs import open_inputs
from latent_t2i.evaluation.protocols import PROTOCOLS, apply_protocol, protocol_items
from tests.coco_folders import CocoFolder, make_coco


def make_config(**settings: Any) -> EvaluationConfig:
    return EvaluationConfig(name="tests", **settings)


def test_own_settings_are_left_alone() -> None:
    config = make_config(num_steps=7)
    assert apply_protocol(config) is config


def test_uvit() -> None:
    config = apply_protocol(make_config(protocol="coco-uvit"))
    assert (config.size, config.num_prompts, config.resize) == (256, 30_000, "pytorch")
    assert (config.scheduler, config.num_steps) == ("dpmpp-singlestep-3", 50)
    assert config.guidance_scale == 2  # 1 in U-ViT's cond + scale * (cond - uncond)
    assert not config.oracle
    assert config.captions == "data/coco/annotations/captions_val2014.json"
    assert config.reference == "data/coco/val2014"
    assert config.weights == WeightsConfig()


def test_mlperf() -> None:
    config = apply_protocol(make_config(protocol="coco-mlperf"))
    assert (config.size, config.num_prompts, config.resize) == (512, 30_000, "pytorch")
    assert (config.scheduler, config.num_steps, config.guidance_scale) == ("ddim", 50, 8)
    assert config.weights.clip == "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    assert config.captions == "data/coco/val2014_30k.tsv"
    assert config.reference == "data/coco/val2014_30k_stats.npz"
    assert config.seed == 2023
    assert apply_protocol(make_config(protocol="coco-mlperf", seed=7)).seed == 7


def test_paths_and_other_weights_may_be_given() -> None:
    given = make_config(
        protocol="coco-mlperf",
        oracle=False,
        captions="a.tsv",
        reference="b.npz",
        weights=WeightsConfig(inception="c.pth"),
    )
    config = apply_protocol(given)
    assert (config.captions, config.reference) == ("a.tsv", "b.npz")
    assert config.weights.inception == "c.pth"
    assert config.weights.clip.startswith("laion/")


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"num_steps": 25}, "--num-steps: found 25 with --protocol coco-mlperf.*fixes it to 50"),
        ({"resize": "clean"}, "--resize: found 'clean'"),
        (
            {"guidance_interval": (0.1, 3.0)},
            r"--guidance-interval: found \(0\.1, 3\.0\) .* to None",
        ),
        ({"weights": WeightsConfig(clip="other")}, r"--weights\.clip: found 'other'"),
    ],
)
def test_a_fixed_setting_cannot_be_changed(settings: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        apply_protocol(make_config(protocol="coco-mlperf", **settings))


def test_every_fixed_setting_exists() -> None:
    for name, protocol in PROTOCOLS.items():
        assert apply_protocol(make_config(protocol=name)).protocol == name
        assert protocol.source


@pytest.fixture
def coco(tmp_path: Path) -> CocoFolder:
    return make_coco(tmp_path / "coco", [5] * 8, size_px=8)


def small(coco: CocoFolder, num: int = 6) -> EvaluationConfig:
    return make_config(
        protocol="coco-uvit", oracle=False, captions=str(coco.captions), num_prompts=num
    )


def test_prompts_are_chosen_once(coco: CocoFolder, tmp_path: Path) -> None:
    out = tmp_path / "out"
    items = protocol_items(small(coco), out)
    assert [item.position for item in items] == list(range(6))
    assert len({item.key for item in items}) == 6
    listed = json.loads((out / protocols.PROMPTS_FILE).read_text())
    assert [row["key"] for row in listed["prompts"]] == [item.key for item in items]
    assert (listed["protocol"], listed["num_prompts"], listed["seed"]) == ("coco-uvit", 6, 1234)
    # The second run reads the list, whatever the choice would be now.
    listed["prompts"].reverse()
    (out / protocols.PROMPTS_FILE).write_text(json.dumps(listed))
    again = protocol_items(small(coco), out)
    assert [item.captions for item in again] == [item.captions for item in reversed(items)]
    assert again[0].prompt is not None
    assert again[0].prompt.text == again[0].captions[0]


def test_processes_write_the_prompts_at_once(
    coco: CocoFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each process finishes its file while the other's is not renamed yet."""
    items = protocol_items(small(coco), tmp_path / "alone")
    write = Path.write_text

    def write_and_let_another_write(path: Path, *args: Any) -> int:
        monkeypatch.setattr(Path, "write_text", write)
        found = write(path, *args)
        assert protocol_items(small(coco), tmp_path / "out") == items
        return found

    monkeypatch.setattr(Path, "write_text", write_and_let_another_write)
    assert protocol_items(small(coco), tmp_path / "out") == items
    assert [path.name for path in (tmp_path / "out").iterdir()] == [protocols.PROMPTS_FILE]
    listed = [(tmp_path / name / protocols.PROMPTS_FILE).read_text() for name in ("alone", "out")]
    assert listed[0] == listed[1]


def test_prompts_of_other_settings_are_refused(coco: CocoFolder, tmp_path: Path) -> None:
    protocol_items(small(coco), tmp_path)
    with pytest.raises(ValueError, match=r"prompts\.json: num_prompts is 6, expected 5"):
        protocol_items(small(coco, 5), tmp_path)
    coco.change("captions", info={})
    with pytest.raises(ValueError, match=r"captions_sha256 is .* another protocol or captions"):
        protocol_items(small(coco), tmp_path)
    (tmp_path / protocols.PROMPTS_FILE).write_text("{}")
    with pytest.raises(ValueError, match="is not a list of prompts; delete it"):
        protocol_items(small(coco), tmp_path)


def test_too_few_captions(coco: CocoFolder, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="captions of 8 images, but --protocol coco-uvit needs 9"):
        protocol_items(small(coco, 9), tmp_path)
    assert not (tmp_path / protocols.PROMPTS_FILE).exists()


def test_missing_captions_file(tmp_path: Path) -> None:
    config = apply_protocol(make_config(protocol="coco-mlperf"))
    with pytest.raises(ValueError, match=r"no file 'data/coco/val2014_30k\.tsv'"):
        protocol_items(config, tmp_path)


def test_the_guidance_interval_is_fixed_in_every_protocol() -> None:
    for name in PROTOCOLS:
        with pytest.raises(ValueError, match="--guidance-interval: found"):
            apply_protocol(make_config(protocol=name, guidance_interval=(0.1, 3.0)))


def finished(coco: CocoFolder, images: Path, out: Path, num: int = 8) -> EvaluationConfig:
    """Returns the settings of finished images under a protocol of `num` prompts."""
    config = small(coco, num)
    return replace(config, images=str(images), out=str(out), metrics=("clip_score",))


def test_finished_images_show_the_protocols_prompts(coco: CocoFolder, tmp_path: Path) -> None:
    out = tmp_path / "out"
    config = finished(coco, coco.images, out)
    found = open_inputs(config)
    prompts = {item.key: item.captions for item in protocol_items(config, out)}
    assert {item.key: item.captions for item in found.items} == prompts
    assert found.captions_by == "file name"
    for num in (5, 9):
        with pytest.raises(
            ValueError, match=rf"found 8 images with .*coco-uvit, expected its {num}"
        ):
            open_inputs(finished(coco, coco.images, tmp_path / "other", num))
    assert not (tmp_path / "other").exists()


def test_finished_images_without_the_prompts_names(coco: CocoFolder, tmp_path: Path) -> None:
    """Only a public list has an order that images of other programs can follow."""
    images = tmp_path / "images"
    images.mkdir()
    for number, path in enumerate(sorted(coco.images.iterdir())):
        (images / f"{number:05d}.png").write_bytes(path.read_bytes())
    config = finished(coco, images, tmp_path / "uvit")
    for _ in range(2):
        with pytest.raises(ValueError, match=r"no image of .*images has the name of a prompt"):
            open_inputs(config)
    listed = tmp_path / "list.tsv"
    rows = "".join(f"{number}\tcaption {number}\n" for number in range(1, 9))
    listed.write_text(f"image_id\tcaption\n{rows}")
    changes = {"captions": str(listed), "out": str(tmp_path / "mlperf")}
    found = open_inputs(replace(config, protocol="coco-mlperf", **changes))
    assert [item.captions[0] for item in found.items] == [f"caption {n}" for n in range(1, 9)]
    assert found.captions_by == "position"
