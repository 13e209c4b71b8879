"""Tars of img2dataset, local and remote: their samples, and tars that are broken."""

import io
import json
import os
import tarfile
import tracemalloc
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import webdataset
from webdataset import tariterators

from latent_t2i.pipeline.config import SourceConfig
from latent_t2i.pipeline.sources import coco, img2dataset
from latent_t2i.pipeline.sources.img2dataset import TarOptions
from latent_t2i.pipeline.sources.locators import TarLocator, read_image_bytes
from latent_t2i.pipeline.sources.open import open_source
from latent_t2i.pipeline.sources.record import Record
from latent_t2i.shards.remote.transport import RemoteError
from tests.servers import QUICK, serve, serve_s3

JPEG = bytes(range(256)) * 300  # more than a block of a tar


def write_tar(
    path: Path,
    members: Iterable[tuple[str, bytes | str]],
    tar_format: int = tarfile.GNU_FORMAT,
) -> Path:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w", format=tar_format) as tar:
        for name, content in members:
            data = content if isinstance(content, bytes) else content.encode()
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def sample(key: str, **fields: Any) -> list[tuple[str, bytes | str]]:
    """Returns the members of a sample as img2dataset writes them."""
    caption = f"caption of {key}"
    document = {"caption": caption, "url": "u", "key": key, "status": "success", "similarity": 0.3}
    return [
        (f"{key}.jpg", key.encode() + JPEG),
        (f"{key}.json", json.dumps(document | fields)),
        (f"{key}.txt", caption),
    ]


def read(*paths: Path | str, **options: Any) -> list[Record]:
    tars = [(str(path), Path(path).stem) for path in paths]
    return list(img2dataset.records(tars, TarOptions(**options)))


def read_one(path: Path, *members: tuple[str, bytes | str], **options: Any) -> Record:
    (record,) = read(write_tar(path / "00000.tar", members), **options)
    return record


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two tars of two samples."""
    folder = tmp_path / "tars"
    folder.mkdir()
    for tar in ("00000", "00001"):
        write_tar(folder / f"{tar}.tar", sample(f"{tar}0000") + sample(f"{tar}0001"))
    return folder


def source_of(location: str) -> list[Record]:
    source = SourceConfig(kind="webdataset", images=location)
    return list(open_source(source))


def test_samples(folder: Path) -> None:
    records = source_of(str(folder))
    keys = ["000000000", "000000001", "000010000", "000010001"]
    assert [record.key for record in records] == keys
    assert [record.captions for record in records] == [(f"caption of {key}",) for key in keys]
    assert [read_image_bytes(record.locator) for record in records] == [
        key.encode() + JPEG for key in keys
    ]
    fields = {"url": "u", "key": keys[0], "status": "success", "similarity": 0.3}
    assert records[0].extra == fields | {"file_name": f"{keys[0]}.jpg"}
    assert isinstance(records[0].locator, TarLocator)
    assert records[0].locator.name == f"00000.tar/{keys[0]}.jpg"
    assert {record.problem for record in records} == {None}


def test_locators_point_to_the_images_that_webdataset_reads(folder: Path) -> None:
    paths = sorted(folder.iterdir())
    found = {}
    for path in paths:
        with path.open("rb") as file:
            members = (m | {"__url__": ""} for m in tariterators.tar_file_iterator(file))
            for item in tariterators.group_by_keys(members):
                found[item["__key__"]] = (item["jpg"], item["txt"].decode())
    assert found == {r.key: (read_image_bytes(r.locator), r.captions[0]) for r in read(*paths)}


def test_samples_of_a_server(folder: Path) -> None:
    with serve(folder) as server:
        tars = [(f"{server.url}/{name}.tar", name) for name in ("00000", "00001")]
        server.faults["00001.tar"] = ["503", "drop", "hang up"]
        local, remote = (
            source_of(str(folder)),
            list(img2dataset.records(tars, TarOptions(), retry=QUICK)),
        )
        assert [(r.key, r.captions) for r in remote] == [(r.key, r.captions) for r in local]
        server.faults["00000.tar"] = ["503..."]
        with pytest.raises(RemoteError, match=r"00000\.tar: gave up after 4 attempts"):
            list(img2dataset.records(tars, TarOptions(), retry=QUICK))


def test_a_server_without_ranges(folder: Path) -> None:
    with (
        serve(folder, ranges=False) as server,
        pytest.raises(ValueError, match=r"00000\.tar: the server does not support byte ranges"),
    ):
        source_of(f"{server.url}/{{00000..00001}}.tar")


@pytest.mark.parametrize("tail", ["", "/*.tar", "/{00000,00001}.tar"])
def test_samples_of_a_bucket(folder: Path, tail: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve_s3(folder, monkeypatch) as url:
        local, remote = source_of(str(folder)), source_of(url + tail)
        assert [record.captions for record in remote] == [record.captions for record in local]
        assert read_image_bytes(remote[3].locator) == b"000010001" + JPEG


def test_real_photographs(coco_mini: Path, tmp_path: Path) -> None:
    """The tar is written with WebDataset's own writer."""
    captions = coco_mini / "annotations" / "captions_val2017.json"
    expected = list(coco.records(coco_mini / "val2017", captions))
    with webdataset.TarWriter(str(tmp_path / "00000.tar")) as tar:
        for number, record in enumerate(expected):
            content, fields = read_image_bytes(record.locator), {"caption": record.captions[0]}
            tar.write({"__key__": f"00000{number:04d}", "jpg": content, "json": fields})
    found = read(tmp_path / "00000.tar")
    assert [read_image_bytes(record.locator) for record in found] == [
        read_image_bytes(record.locator) for record in expected
    ]
    assert [record.captions for record in found] == [record.captions[:1] for record in expected]


def test_captions_of_json_without_a_text(tmp_path: Path) -> None:
    record = read_one(tmp_path, *sample("0")[:2])
    assert record.captions == ("caption of 0",)
    assert "caption" not in record.extra


def test_captions_of_a_named_field(tmp_path: Path) -> None:
    record = read_one(tmp_path, *sample("0", alt=["x", "y"]), caption_column="alt")
    assert record.captions == ("x", "y")
    assert record.extra["caption"] == "caption of 0"
    assert read_one(tmp_path, *sample("0"), caption_column="alt").captions == ()


def test_a_text_is_one_unchanged_caption(tmp_path: Path) -> None:
    assert read_one(tmp_path, ("0.jpg", b""), ("0.txt", "a\nb 🐕")).captions == ("a\nb 🐕",)
    assert read_one(tmp_path, ("0.jpg", b""), ("0.txt", " \n")).captions == ()
    assert read_one(tmp_path, ("0.jpg", b"")).captions == ()


def test_a_blank_text_leaves_the_caption_to_the_json(tmp_path: Path) -> None:
    image, document, _ = sample("0")
    record = read_one(tmp_path, image, document, ("0.txt", " \n"))
    assert (record.captions, record.problem) == (("caption of 0",), None)


def test_texts_of_another_extension(tmp_path: Path) -> None:
    members: list[tuple[str, bytes | str]] = [("0.jpg", b""), ("0.output.txt", "a dog")]
    hint = "no .txt but a .output.txt: set --source.caption-extension .output.txt"
    assert read_one(tmp_path, *members).problem == hint
    record = read_one(tmp_path, *members, caption_extension=".output.txt")
    assert (record.captions, record.problem) == (("a dog",), None)


def test_all_images_before_all_texts(tmp_path: Path) -> None:
    members = [member for key in ("00000_0", "00000_1") for member in sample(key)]
    path = write_tar(tmp_path / "00000.tar", sorted(members, key=lambda m: m[0].endswith(".txt")))
    expected = read(write_tar(tmp_path / "adjacent" / "00000.tar", members))
    found = read(path, members="anywhere")
    assert [(r.key, r.captions, r.extra) for r in found] == [
        (r.key, r.captions, r.extra) for r in expected
    ]
    assert [read_image_bytes(r.locator) for r in found] == [
        read_image_bytes(r.locator) for r in expected
    ]
    (image, *_) = read(write_tar(path, [("a.jpg", b""), ("b.jpg", b""), ("a.txt", "a")]))
    assert image.problem == (
        "no text beside the image: if it is elsewhere, set --source.tar-members anywhere"
    )


@pytest.mark.parametrize(
    ("members", "problem"),
    [
        ([("0.txt", "t")], "no image of this key in the tar"),
        (
            [("0.json", '{"status": "failed", "error_message": "404"}')],
            "no image of this key in the tar: 404",
        ),
        (
            [("0.json", json.dumps({"error_message": "\x1b[2J" + "x" * 10**6}))],
            "no image of this key in the tar: \\x1b[2J" + "x" * 196,
        ),
        ([("0.jpg", b""), ("0.png", b"")], "2 images of this key in the tar"),
        ([("0.jpg", b""), ("0.txt", b"\xe9")], "caption is not UTF-8"),
        ([("0.jpg", b""), ("0.json", b"\xe9")], "JSON is not UTF-8"),
        ([("0.jpg", b""), ("0.json", b'{"a": ')], "JSON cannot be parsed"),
        ([("0.jpg", b""), ("0.json", b"[" * 100_000)], "JSON cannot be parsed"),
        ([("0.jpg", b""), ("0.json", b"[]")], "JSON is not an object"),
        ([("0.jpg", b""), ("0.json", b'{"text": {}}')], "caption is not text but dict"),
        ([("0.jpg", b""), ("0.txt", b"x" * (2**24 + 1))], "caption of more than 16777216 bytes"),
    ],
)
def test_samples_that_cannot_be_used(
    tmp_path: Path, members: list[tuple[str, bytes | str]], problem: str
) -> None:
    record = read_one(tmp_path, *members)
    assert (record.problem, record.key) == (problem, "00000_0")


def test_keys_that_repeat_in_each_tar_get_its_name(tmp_path: Path) -> None:
    tars = [write_tar(tmp_path / f"x-{n}.tar", sample("0001")) for n in range(2)]
    assert [record.key for record in read(*tars)] == ["x-0_0001", "x-1_0001"]


def test_short_names_of_several_lengths_do_not_collide(tmp_path: Path) -> None:
    tars = [write_tar(tmp_path / f"{n}.tar", sample("10") + sample("1")) for n in ("1", "10")]
    assert [record.key for record in read(*tars)] == ["1_10", "1_1", "10_10", "10_1"]


@pytest.mark.parametrize("tar_format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_foreign_names_and_folders(tmp_path: Path, tar_format: int) -> None:
    names = ["./a.b/0001", "é/" + "long" * 40, "日本 🐕"]
    members = [member for name in names for member in sample(name)]
    path = write_tar(tmp_path / "00000.tar", members, tar_format)
    with tarfile.open(path, "a") as tar:
        tar.add(tmp_path, "folder", recursive=False)
    with tarfile.open(path, "a") as tar:
        tar.addfile(tarfile.TarInfo("._0002.jpg"))
    records = read(path)
    assert [record.extra["file_name"] for record in records] == [f"{name}.jpg" for name in names]
    assert [read_image_bytes(record.locator) for record in records] == [
        n.encode() + JPEG for n in names
    ]
    assert len({record.key for record in records}) == 3


def test_an_empty_tar(tmp_path: Path) -> None:
    assert read(write_tar(tmp_path / "0.tar", [])) == []


def test_a_tar_truncated_at_any_block_is_refused(tmp_path: Path) -> None:
    members = [("0.jpg", b"x" * 700), ("0.txt", "t"), ("1.jpg", b"y"), ("1.txt", "t")]
    content = write_tar(tmp_path / "0.tar", members).read_bytes()
    num_blocks = 3 + 2 + 2 + 2  # headers and contents
    for size in [*range(0, num_blocks * 512 + 1, 512), 100, 700, 1600, num_blocks * 512 + 100]:
        (tmp_path / "0.tar").write_bytes(content[:size])
        with pytest.raises(ValueError, match=r"0\.tar: .*truncated.* at byte \d+"):
            read(tmp_path / "0.tar")
    (tmp_path / "0.tar").write_bytes(content[: num_blocks * 512 + 512])
    assert len(read(tmp_path / "0.tar")) == 2


def test_a_truncated_remote_tar(folder: Path) -> None:
    content = (folder / "00000.tar").read_bytes()
    (folder / "00000.tar").write_bytes(content[: len(content) // 2])
    with serve(folder) as server, pytest.raises(ValueError, match=r"00000\.tar: .*truncated"):
        source_of(f"{server.url}/00000.tar")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no tar" * 1000, "0.tar: not a tar, or truncated, at byte 512: "),
        (b"\x1f\x8b" + bytes(2000), "0.tar: not a tar, or truncated, at byte 512: "),
    ],
)
def test_a_file_that_is_not_a_tar(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "0.tar").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read(tmp_path / "0.tar")


def test_garbage_between_members(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "0.tar", [("0.jpg", b"x"), ("1.jpg", b"y"), ("2.jpg", b"z")])
    content = bytearray(path.read_bytes())
    content[1024:1100] = os.urandom(76)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"0\.tar: not a tar header at byte 1024"):
        read(path)


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE])
def test_a_header_that_would_fill_the_memory(tmp_path: Path, kind: bytes) -> None:
    header = tarfile.TarInfo("long")
    header.type, header.size = kind, 30 * 10**9
    (tmp_path / "0.tar").write_bytes(header.tobuf(tarfile.GNU_FORMAT))
    os.truncate(tmp_path / "0.tar", 30 * 10**9 + 2048)  # sparse: needs no disk space
    with pytest.raises(
        ValueError, match=r"0\.tar: not a tar, or .*: a header of 30000000000 bytes"
    ):
        read(tmp_path / "0.tar")


def test_tars_joined_by_cat(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "0.tar", [("0.jpg", b"x")])
    path.write_bytes(path.read_bytes() * 2)
    with pytest.raises(ValueError, match=r"0\.tar: more data after the end of the tar at byte"):
        read(path)


def test_zeros_without_end_after_a_tar(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "0.tar", [("0.jpg", b"x")])
    os.truncate(path, 10**6)
    assert len(read(path)) == 1
    os.truncate(path, 30 * 10**9)  # sparse: needs no disk space
    with pytest.raises(ValueError, match=r"0\.tar: more than 16777216 zeros after the end"):
        read(path)


def test_a_link_in_a_tar(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "0.tar", [("0.jpg", b"x")])
    link = tarfile.TarInfo("1.jpg")
    link.type, link.linkname = tarfile.SYMTYPE, "0.jpg"
    with tarfile.open(path, "a") as tar:
        tar.addfile(link)
    with pytest.raises(ValueError, match=r"0\.tar: 1\.jpg is a link, device or sparse file"):
        read(path)


def test_records_are_made_one_by_one(folder: Path) -> None:
    (folder / "00001.tar").write_bytes(b"")
    tars = [(str(folder / f"{name}.tar"), name) for name in ("00000", "00001")]
    found = img2dataset.records(tars, TarOptions())
    assert [next(found).key, next(found).key] == ["000000000", "000000001"]
    with pytest.raises(ValueError, match="00001"):
        next(found)


def test_memory_does_not_grow_with_the_number_of_samples(tmp_path: Path) -> None:
    def peak_bytes(num_samples: int) -> int:
        members = (m for n in range(num_samples) for m in ((f"{n:06d}.jpg", b"x" * 1000),))
        path = write_tar(tmp_path / f"{num_samples}.tar", members)
        tracemalloc.start()
        assert _count(img2dataset.records([(str(path), "0")], TarOptions())) == num_samples
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return peak

    peak_bytes(10)  # imports modules
    assert peak_bytes(4000) < peak_bytes(400) + 50_000


def _count(records: Iterator[Record]) -> int:
    return sum(1 for _ in records)
