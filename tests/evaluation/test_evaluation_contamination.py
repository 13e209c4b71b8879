"""Contamination: images of the training set are found by COCO id in either layout, or by hash."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latent_t2i.evaluation.contamination import check
from latent_t2i.evaluation.metrics.metric import Item
from latent_t2i.shards.buckets import finish_buckets
from latent_t2i.shards.schema import FormatError
from tests import shard_sets

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
            assert found is None
        else:
            assert found is not None
            assert (found["count"], set(found["examples"])) == (len(common), common)


def test_equal_ids_of_other_images_are_not_the_same(train: Path) -> None:
    key = f"{IDS[0]:012d}"
    same = Item(position=0, key=key, captions=("something else", f"about {key}"))
    other = Item(position=0, key=key, captions=("a red circle",))
    found = check([same], [train])
    assert found == {"count": 1, "examples": [key], "train_keys": [key], "num_same_captions": 0}
    assert check([other], [train]) is None


def test_equal_captions_are_a_hint_only(train: Path, capsys: pytest.CaptureFixture[str]) -> None:
    item = Item(position=0, key="mine.jpg", captions=(f"ABOUT {IDS[1]:012d}.",))
    assert check([item], [train]) is None
    assert "1 of the prompts are also captions in" in capsys.readouterr().out


def test_equal_files_are_found_where_records_have_a_hash(tmp_path: Path) -> None:
    image = tmp_path / "mine.jpg"
    image.write_bytes(b"an image")
    digest = hashlib.sha256(image.read_bytes()).hexdigest()
    folder = write_shards(tmp_path / "set", ["00000-1", "00000-2"], sha256=digest)
    found = check([Item(position=0, key="mine.jpg")], [folder], files=[image])
    assert found is not None
    assert (found["count"], found["examples"]) == (1, ["mine.jpg"])
    image.write_bytes(b"another image")
    assert check([Item(position=0, key="mine.jpg")], [folder], files=[image]) is None


def test_all_buckets_are_compared(tmp_path: Path) -> None:
    for name, number in (("64x64", IDS[0]), ("48x80", IDS[1])):
        width, height = (int(side) // shard_sets.DOWNSCALE for side in name.split("x"))
        examples = shard_sets.make_examples(1, size=(height, width))
        examples = [replace(examples[0], key=f"{number:012d}")]
        shard_sets.write_set(tmp_path / name, [examples])
    finish_buckets(tmp_path, ["64x64", "48x80"], quarantined={})
    items = [Item(position=n, key=f"{number:012d}.jpg") for n, number in enumerate(IDS)]
    found = check(items, [tmp_path])
    assert found is not None and found["count"] == 2


def test_a_folder_without_shards_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="manifest"):
        check([], [tmp_path])
