"""Invalid settings of stage one are refused, and the error names the flag."""

from typing import Any

import pytest

from latent_t2i.configs.cli import ConfigError, parse
from latent_t2i.pipeline.config import PipelineConfig, ViewsConfig

COCO = ("--source.images", "i", "--source.captions", "c")
BASE = ("--name", "n", "--vae", "v", "--text-encoder", "t")


def test_flags_make_a_config() -> None:
    config = parse(PipelineConfig, "pipeline", [*BASE, *COCO, "--views.flip", "--views.crops", "3"])
    assert (config.source.images, config.source.num_images) == ("i", None)
    assert (config.views, config.views.num) == (ViewsConfig(flip=True, crops=3), 6)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "--source.images: required for a coco"),
        (("--source.images", "i"), "--source.captions: required for a coco"),
        (("--source.kind", "scenes"), "--source.num-images: required for a"),
        (
            ("--source.kind", "scenes", "--source.num-images", "5", "--source.images", "i"),
            "--source.images: has no effect on a scenes",
        ),
        (
            ("--source.kind", "scenes", "--source.num-images", "5", "--split", "test"),
            "--split: expected train, val, held_out for scenes, found 'test'",
        ),
        ((*COCO, "--source.num-images", "0"), "--source.num-images: expected at least 1, found 0"),
        ((*COCO, "--name", "a/b"), "--name: expected the name of a folder, found 'a/b'"),
        ((*COCO, "--split", ".."), "--split: expected the name of a folder, found '..'"),
        ((*COCO, "--max-tokens", "2"), "--max-tokens: expected at least 3, found 2"),
        ((*COCO, "--batch-size", "0"), "--batch-size: expected at least 1, found 0"),
        ((*COCO, "--records-per-shard", "0"), "--records-per-shard: expected at least 1"),
        ((*COCO, "--max-shard-bytes", "0"), "--max-shard-bytes: expected at least 1, found 0"),
        ((*COCO, "--text-dtype", "int4"), "invalid choice 'int4' for argument '--text-dtype'"),
        ((*COCO, "--image-size-px", "-8"), "--image-size-px: expected at least 1, found -8"),
        ((*COCO, "--max-quarantined", "2"), "--max-quarantined: expected a share from 0 to 1"),
        ((*COCO, "--num-threads", "0"), "--num-threads: expected at least 1, found 0"),
        ((*COCO, "--seed", "-1"), "--seed: expected at least 0, found -1"),
        ((*COCO, "--max-aspect", "nan"), "--max-aspect: expected at least 1, found nan"),
        ((*COCO, "--max-aspect", "inf"), "--max-aspect: expected at least 1, found inf"),
        ((*COCO, "--max-quarantined", "nan"), "--max-quarantined: expected a share from 0 to 1"),
        ((*COCO, "--views.crops", "0"), "--views.crops: expected at least 1, found 0"),
    ],
)
def test_invalid_settings_are_refused(flags: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse(PipelineConfig, "pipeline", [*BASE, *flags])
    assert str(error.value).startswith(message)
