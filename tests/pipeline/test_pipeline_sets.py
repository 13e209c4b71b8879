"""An output folder holds one set or one bucketed set, of one command, and nothing else."""

from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from latent_t2i.pipeline import stage
from latent_t2i.pipeline.config import PipelineConfig
from latent_t2i.pipeline.stage import build
from tests.coco_folders import CocoFolder, make_coco
from tests.stage_one import contents, make_config


@pytest.fixture
def folder(tmp_path: Path) -> CocoFolder:
    return make_coco(tmp_path / "coco", [2, 2, 2, 2])


@pytest.fixture
def square(folder: CocoFolder, tmp_path: Path) -> PipelineConfig:
    return make_config(folder, tmp_path / "out")


@pytest.fixture
def bucketed(square: PipelineConfig) -> PipelineConfig:
    return replace(square, buckets=True, bucket_multiple_px=16)


def require_refused(config: PipelineConfig, message: str) -> None:
    """Runs the stage, which is refused and changes no file."""
    out = Path(str(config.out))
    before = contents(out)
    with pytest.raises(ValueError, match=message):
        build(config)
    assert contents(out) == before


@pytest.mark.parametrize("is_finished", [False, True])
def test_a_square_and_a_bucketed_set_in_one_folder_are_refused(
    square: PipelineConfig,
    bucketed: PipelineConfig,
    monkeypatch: pytest.MonkeyPatch,
    is_finished: bool,
) -> None:
    for first, second, message in (
        (square, bucketed, "expected a bucketed set, found a set without --buckets: choose"),
        (bucketed, square, r"expected a set without --buckets, found .* \(64x64.*: choose another"),
    ):
        out = f"{square.out}-{first.buckets}"
        with monkeypatch.context() as patch:
            if not is_finished:
                patch.setattr(stage, "finish", lambda *_, **limit: {})
            build(replace(first, out=out))
        require_refused(replace(second, out=out), message)


def test_a_bucketed_set_among_the_images_is_refused(
    folder: CocoFolder, bucketed: PipelineConfig
) -> None:
    message = r"contains other files \(000000000001.png, .* and no shards: choose an empty folder"
    require_refused(replace(bucketed, out=str(folder.images)), message)


def test_buckets_of_other_settings_are_named(folder: CocoFolder, bucketed: PipelineConfig) -> None:
    for path in folder.images.iterdir():
        Image.new("RGB", (120, 60)).save(path)
    build(bucketed)
    foreign = "expected the buckets 64x64, also found 80x48, of other images or settings"
    require_refused(replace(bucketed, max_aspect=1.0), foreign)
    setting = "preprocessing.bucket_multiple_px: found 16, .* 8"
    require_refused(replace(bucketed, bucket_multiple_px=8, max_aspect=1.8), setting)


@pytest.mark.parametrize("bucket_multiple_px", [12, 48])
def test_a_multiple_that_the_vae_cannot_divide_is_refused_before_listing(
    bucketed: PipelineConfig, monkeypatch: pytest.MonkeyPatch, bucket_multiple_px: int
) -> None:
    """The tiny VAE scales down by 8, so 12 needs 24, and 48 does not divide 64."""
    monkeypatch.setattr("latent_t2i.pipeline.stage.open_source", None)
    multiple = {12: 24, 48: 48}[bucket_multiple_px]
    message = rf"--image-size-px: expected a multiple of {multiple} \(the least .*\), found 64"
    with pytest.raises(ValueError, match=message):
        build(replace(bucketed, bucket_multiple_px=bucket_multiple_px))
    assert not Path(str(bucketed.out)).exists()
