"""A set of format version 2 trains like the same records in the present version, bit for bit."""

import shutil
from dataclasses import asdict
from pathlib import Path

import pytest

from latent_t2i.shards.schema import Manifest
from latent_t2i.train.config import DataConfig
from latent_t2i.train.loop import train
from tests import tiny
from tests.shard_sets import edit_json, write_records_of_version_2
from tests.train.conftest import MakeConfig, assert_same_weights, losses

DATA = Path(__file__).parents[1] / "shards/data/v2/float16"
NUM_STEPS = 5
"""Of three records in batches of two: more than three epochs."""


@pytest.fixture
def sets(tmp_path: Path) -> tuple[Path, Path]:
    """The records in version 2 and 3, with the identities of tiny encoders."""
    identities = tiny.make_identities(tiny.make_encoders(tmp_path / "encoders", text_width=8))
    shutil.copytree(DATA, tmp_path / "old")
    made_by = {key: asdict(identity) for key, identity in identities.items()}
    edit_json(tmp_path / "old/manifest.json", lambda document: document.update(made_by))
    write_records_of_version_2(tmp_path / "new", **identities)
    return tmp_path / "old", tmp_path / "new"


@pytest.mark.parametrize("shuffle", ["full", "blocks"])
def test_losses_and_weights_are_equal(
    make_config: MakeConfig, sets: tuple[Path, Path], tmp_path: Path, shuffle: str
) -> None:
    assert [Manifest.load(folder).schema_version for folder in sets] == [2, 3]
    bundles = [
        train(
            make_config(
                shards=str(folder),
                data=DataConfig(shuffle=shuffle),
                out=str(tmp_path / f"run-{folder.name}"),
                batch_size=2,
                num_steps=NUM_STEPS,
                log_every_steps=1,
            )
        )
        for folder in sets
    ]
    found, expected = (losses(tmp_path / f"run-{folder.name}") for folder in sets)
    assert len({*found}) == NUM_STEPS
    assert found == expected
    assert_same_weights(*bundles)
