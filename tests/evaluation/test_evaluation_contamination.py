"""Contamination: images of the training set are found by COCO id in either layout, or by hash."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from latent_t2i.evaluation import contamination
from latent_t2i.evaluation.config import EvaluationConfig
from latent_t2i.evaluation.contamination import check
from latent_t2i.evaluation.inputs import open_inputs
from latent_t2i.evaluation.metrics.metric import Item
from latent_t2i.pipeline.stage import build
from latent_t2i.shards.buckets import finish_buckets
from latent_t2i.shards.schema import FormatError
from tests import shard_sets
from tests.coco_folders import make_coco
from tests.stage_one import make_config

IDS = (42, 73, 139, 285, 632, 724, 776, 785, 802, 872)
"""Ids of COCO's val2017, of which all but 139 are in train2014 or val2014."""
LAYOUTS = ("{:012d}", "{:012d}.jpg", "COCO_val2014_{:012d}.jpg", "val2017/{:012d}.jpg")


def write_shards(folder: Path, keys: Sequence[str], **meta: str) -> Path:
    examples = [
        replace(example, key=key, meta=example.meta | {"captions": [f"About {key}."]} | meta)
        for key, example in zip(
            keys, shard_sets.make_examples(len(keys), num_captions=1), strict=True
        )
    ]
    shard_sets.write_set(folder, [examples])
    return folder


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Path:
    keys = [f"{number:012d}" for number in IDS[:5]]
    return write_shards(tmp_path_factory.mktemp("train") / "set", keys)


@pytest.fixture(scope="module")
def train_2014(tmp_path_factory: pytest.TempPathFactory) -> Path:
    keys = [f"COCO_train2014_{number:012d}" for number in IDS[:5]]
    return write_shards(tmp_path_factory.mktemp("train") / "2014", keys)


@settings(max_examples=25)
@given(st.lists(st.tuples(st.sampled_from(IDS), st.sampled_from(LAYOUTS)), max_size=8))
def test_ids_are_found_in_either_layout(
    train: Path, train_2014: Path, chosen: list[tuple[int, str]]
) -> None:
    items = [Item(position=n, key=name.format(i)) for n, (i, name) in enumerate(chosen)]
    common = {item.key.rpartition("/")[2] for item, (i, _) in zip(items, chosen, strict=True)
              if i in IDS[:5]}  # fmt: skip
    for folder in (train, train_2014):
        found = check(items, [folder])
        if not common:
            assert found["count"] == 0
        else:
            assert (found["count"], set(found["examples"])) == (len(common), common)
        assert found["num_images_compared"] == len({i for i, _ in chosen})
        assert (found["status"], found["reason"]) == ("checked", None)


def test_equal_ids_of_other_images_are_not_the_same(train: Path) -> None:
    key = f"{IDS[0]:012d}"
    same = Item(position=0, key=key, captions=("something else", f"about {key}"))
    other = Item(position=0, key=key, captions=("a red circle",))
    found = check([same], [train])
    assert (found["count"], found["examples"], found["train_keys"]) == (1, [key], [key])
    assert check([other], [train])["count"] == 0


def test_equal_captions_are_a_hint_only(train: Path, capsys: pytest.CaptureFixture[str]) -> None:
    item = Item(position=0, key="mine.jpg", captions=(f"ABOUT {IDS[1]:012d}.",))
    assert check([item], [train])["count"] == 0
    printed = capsys.readouterr().out
    assert "1 of the prompts are also captions in" in printed
    assert "(5 of 5 records compared)" in printed


@pytest.mark.parametrize("name", ["sha256", "image_sha256"])
def test_equal_files_are_found_where_any_record_has_a_hash(tmp_path: Path, name: str) -> None:
    image = tmp_path / "mine.jpg"
    image.write_bytes(b"an image")
    digest = hashlib.sha256(image.read_bytes()).hexdigest()
    first, second = shard_sets.make_examples(2)
    second = replace(second, meta=second.meta | {name: digest})
    shard_sets.write_set(tmp_path / "set", [[first, second]])
    item = Item(position=0, key="mine.jpg")
    found = check([item], [tmp_path / "set"], files=[image])
    assert (found["count"], found["examples"]) == (1, ["mine.jpg"])
    assert found["train_keys"] == [second.key]
    assert (found["status"], found["reason"]) == (
        "partly checked", "hashes of 1 of 2 records were compared"
    )  # fmt: skip
    image.write_bytes(b"another image")
    assert check([item], [tmp_path / "set"], files=[image])["count"] == 0


@pytest.mark.parametrize("max_read", [1, 100])
def test_images_of_a_set_of_stage_one_are_found_by_their_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, max_read: int
) -> None:
    """Whatever the number of records whose JSON is read."""
    monkeypatch.setattr(contamination, "MAX_READ", max_read)
    folder = make_coco(tmp_path / "coco")
    build(make_config(folder, tmp_path / "set"))
    (tmp_path / "reference").mkdir()
    copy = tmp_path / "reference" / "copy.png"
    copy.write_bytes((folder.images / "000000000003.png").read_bytes())
    other = tmp_path / "reference" / "other.png"
    other.write_bytes(b"another")
    items = [Item(position=n, key=path.name) for n, path in enumerate((copy, other))]
    found = check(items, [tmp_path / "set"], files=[copy, other])
    assert (found["examples"], found["train_keys"]) == (["copy.png"], ["000000000003"])
    assert (found["num_images_compared"], found["num_hashes_compared"]) == (2, 6)
    assert found["status"] == "checked"


def test_images_that_cannot_be_compared_are_counted(train: Path) -> None:
    named = Item(position=0, key=f"{IDS[9]:012d}.jpg")
    nameless = Item(position=1, key="1", captions=("a red circle",))
    found = check([named, nameless], [train])
    assert (found["status"], found["count"]) == ("partly checked", 0)
    assert (found["num_images"], found["num_images_compared"]) == (2, 1)
    assert "1 of the 2 images of the prompts and the reference have no COCO id" in found["reason"]
    assert check([nameless], [train])["status"] == "not checked"


def test_ids_say_nothing_about_a_training_set_without_them(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "set", ["00000-1", "00000-2"])
    found = check([Item(position=0, key=f"{IDS[0]:012d}.jpg")], [folder])
    assert found["status"] == "not checked"


def save_images(folder: Path) -> Path:
    folder.mkdir()
    for number in IDS[:2]:
        Image.new("RGB", (4, 4), (number % 256, 0, 0)).save(folder / f"{number:012d}.png")
    return folder


def test_what_is_not_checked_is_recorded(
    train: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = save_images(tmp_path / "images")
    np.savez(tmp_path / "reference.npz", mu=np.zeros(3), sigma=np.eye(3))
    settings = EvaluationConfig(
        name="tests", images=str(images), out=str(tmp_path / "out"), allow_contamination=True
    )
    found = open_inputs(settings).contamination
    assert (found["status"], found["count"]) == ("not checked", 0)
    assert "training set of the images is unknown" in found["reason"]
    assert "contamination: not checked: the training set of" in capsys.readouterr().out
    settings = replace(settings, train_shards=(str(train),))
    assert open_inputs(settings).contamination["status"] == "checked"
    settings = replace(settings, reference=str(tmp_path / "reference.npz"))
    found = open_inputs(settings).contamination
    assert (found["status"], found["num_images_compared"]) == ("partly checked", 2)
    assert found["reason"] == "reference.npz holds statistics of the reference without its images"


def test_all_buckets_are_compared(tmp_path: Path) -> None:
    for name, number in (("64x64", IDS[0]), ("48x80", IDS[1])):
        width, height = (int(side) // shard_sets.DOWNSCALE for side in name.split("x"))
        examples = shard_sets.make_examples(1, size=(height, width))
        examples = [replace(examples[0], key=f"{number:012d}")]
        shard_sets.write_set(tmp_path / name, [examples])
    finish_buckets(tmp_path, ["64x64", "48x80"], quarantined={})
    items = [Item(position=n, key=f"{number:012d}.jpg") for n, number in enumerate(IDS)]
    found = check(items, [tmp_path])
    assert found["count"] == 2


def test_a_folder_without_shards_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="manifest"):
        check([], [tmp_path])
