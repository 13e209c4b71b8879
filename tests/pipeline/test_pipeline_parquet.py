"""Parquet of the Hugging Face Hub: which columns are used, and that listing reads no image."""

import io
import os
import sys
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from latent_t2i.pipeline.config import SourceConfig
from latent_t2i.pipeline.sources import coco, locators, parquet
from latent_t2i.pipeline.sources.locators import ParquetLocator, read_image_bytes
from latent_t2i.pipeline.sources.open import open_source
from latent_t2i.pipeline.sources.record import Record
from latent_t2i.shards.remote.transport import RemoteError
from tests.servers import serve_s3


def write(path: Path, columns: dict[str, Any], *, rows_per_group: int = 2) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=rows_per_group)
    return path


def images(num_images: int, *, num_bytes: int = 10) -> list[dict[str, Any]]:
    """Returns an image column as the Hub stores it."""
    return [
        {"bytes": bytes([number]) * num_bytes, "path": f"{number}.jpg"}
        for number in range(num_images)
    ]


def read(path: Path | str, **options: Any) -> list[Record]:
    return list(parquet.records([(str(path), Path(path).stem)], **options))


def source_of(location: str, **options: Any) -> list[Record]:
    source = SourceConfig(kind="parquet", images=location, **options)
    return list(open_source(source))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two files in the layout of the Hub, with five rows in three row groups each."""
    for name in ("train-00000-of-00002", "train-00001-of-00002"):
        columns = {"image": images(5), "text": [f"{name} {n}" for n in range(5)]}
        write(tmp_path / "data" / f"{name}.parquet", columns)
    return tmp_path / "data"


def test_rows_in_order(folder: Path) -> None:
    records = source_of(str(folder))
    names = ["train-00000-of-00002", "train-00001-of-00002"]
    assert [record.key for record in records] == [f"{n}_{r:07d}" for n in names for r in range(5)]
    texts = [f"{name} {row}" for name in names for row in range(5)]
    assert [record.captions for record in records] == [(text,) for text in texts]
    contents = [image["bytes"] for image in images(5)] * 2
    assert [read_image_bytes(record.locator) for record in records] == contents
    assert [record.extra for record in records[:2]] == [{"file_name": f"{n}.jpg"} for n in range(2)]
    assert records[3].locator == ParquetLocator(
        str(folder / f"{names[0]}.parquet"), 1, 1, "image.bytes"
    )


def test_only_the_first_images(folder: Path) -> None:
    (folder / "train-00001-of-00002.parquet").write_bytes(b"never read")
    assert len(source_of(str(folder), num_images=5)) == 5


@pytest.mark.parametrize("tail", ["", "/train-*.parquet", "/train-0000{0,1}-of-00002.parquet"])
def test_rows_of_a_bucket(folder: Path, tail: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve_s3(folder, monkeypatch) as url:
        local, remote = source_of(str(folder)), source_of(url + tail)
        assert [(r.key, r.captions) for r in remote] == [(r.key, r.captions) for r in local]
        assert [read_image_bytes(r.locator) for r in remote] == [
            read_image_bytes(r.locator) for r in local
        ]


def test_rows_of_the_hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`hf://` is another file system of fsspec; a memory file system replaces it here."""

    class Hub(type(fsspec.filesystem("memory"))):  # type: ignore[misc]
        protocol = "hf"
        store: dict[str, Any] = {}  # noqa: RUF012 - as in the base class

        @classmethod
        def _strip_protocol(cls, path: str) -> Any:
            return super()._strip_protocol(path.replace("hf://", "memory://"))

    monkeypatch.setitem(sys.modules["fsspec.registry"]._registry, "hf", Hub)
    hub = fsspec.filesystem("hf")
    for path in folder.iterdir():
        hub.pipe(f"/datasets/a/b/data/{path.name}", path.read_bytes())
    remote = source_of("hf://datasets/a/b/data/train-*.parquet")
    assert isinstance(remote[0].locator, ParquetLocator)
    assert remote[0].locator.url.startswith("hf://")
    assert [r.captions for r in remote] == [r.captions for r in source_of(str(folder))]
    assert [read_image_bytes(r.locator) for r in remote] == [
        image["bytes"] for image in images(5)
    ] * 2


def test_real_photographs(coco_mini: Path, tmp_path: Path) -> None:
    captions = coco_mini / "annotations" / "captions_val2017.json"
    expected = list(coco.records(coco_mini / "val2017", captions))
    rows = [{"bytes": read_image_bytes(r.locator), "path": r.extra["file_name"]} for r in expected]
    columns = {"image": rows, "captions": [list(record.captions) for record in expected]}
    found = read(write(tmp_path / "val.parquet", columns, rows_per_group=10))
    assert [record.captions for record in found] == [record.captions for record in expected]
    assert [read_image_bytes(record.locator) for record in found] == [row["bytes"] for row in rows]
    assert [record.extra["file_name"] for record in found] == [row["path"] for row in rows]


def test_listing_reads_no_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"bytes": os.urandom(10**6), "path": None} for _ in range(8)]
    columns = {"image": pa.array(rows, HUB), "text": list("abcdefgh")}
    content = write(tmp_path / "a.parquet", columns).read_bytes()
    sizes: list[int] = []

    class Counted(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            chunk = super().read(size)
            sizes.append(len(chunk))
            return chunk

    def open_counted(url: str) -> Any:
        return pq.ParquetFile(Counted(content))

    for module in (locators, parquet):
        monkeypatch.setattr(module, "open_parquet", open_counted)
    (record, *_) = read(tmp_path / "a.parquet")
    assert sum(sizes) < 10**6  # the footer of up to 64 kB five times, and the captions
    assert read_image_bytes(record.locator) == rows[0]["bytes"]
    assert sum(sizes) > 10**6


def test_plain_bytes_and_other_columns(tmp_path: Path) -> None:
    columns = {
        "jpg": pa.array([b"a", b"b", b"c"], pa.large_binary()),
        "prompt": pa.array(["a", None, "c"]).dictionary_encode(),
        "width": [1, 2, 3],
        "similarity": [0.5, float("nan"), None],
        "objects": [{"box": [1.5, 2.0]}] * 3,
        "mask": [b"m"] * 3,
        "masks": [[b"m"]] * 3,
        "when": pa.array([0, 1, 2], pa.timestamp("s")),
    }
    first, second, third = read(write(tmp_path / "a.parquet", columns))
    assert (first.captions, second.captions, third.captions) == (("a",), (), ("c",))
    fields = {"width": 1, "similarity": 0.5, "objects": {"box": [1.5, 2.0]}}
    assert first.extra == fields | {"file_name": "a.parquet"}
    assert "similarity" not in second.extra
    assert third.extra["similarity"] is None
    assert [read_image_bytes(record.locator) for record in (first, second, third)] == [
        b"a",
        b"b",
        b"c",
    ]


def test_columns_by_name(tmp_path: Path) -> None:
    columns = {"a.photo": [b"a"], "image": [b"b"], "alt": ["x"], "text": ["y"]}
    path = write(tmp_path / "a.parquet", columns)
    (record,) = read(path, image_column="a.photo", caption_column="alt")
    assert (read_image_bytes(record.locator), record.captions) == (b"a", ("x",))
    assert record.extra["text"] == "y"


@pytest.mark.parametrize("statistics", [True, False])
def test_rows_without_an_image(tmp_path: Path, statistics: bool) -> None:
    """They are found in the listing if the file counts nulls, else when they are read."""
    hub = pa.array([*images(2), *images(2), {"bytes": None, "path": "a.jpg"}, None], HUB)
    for name, column in (("a", hub), ("b", pa.array([b"", b"a", b"b", b"c", None, None]))):
        table = pa.table({"image": column, "text": list("abcdef")})
        path = tmp_path / f"{name}.parquet"
        pq.write_table(table, path, row_group_size=3, write_statistics=statistics)
        records = read(path)
        problem = "no image in this row" if statistics else None
        assert [record.problem for record in records] == [None] * 4 + [problem] * 2
        for record in records[4:]:
            with pytest.raises(locators.LocatorError, match="no image in this row"):
                read_image_bytes(record.locator)
    assert read(tmp_path / "a.parquet")[4].extra["file_name"] == "a.jpg"


HUB = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"photo": [b""], "text": ["t"]},
            "--source.image-column: .*a.parquet has no column 'image' or .*, only 'photo', 'text'",
        ),
        (
            {"image": ["a.jpg"], "text": ["t"]},
            "--source.image-column: .*a.parquet: 'image' is string, expected bytes, or a struct",
        ),
        (
            {"image": [{"path": "a.jpg"}], "text": ["t"]},
            "'image' is struct<path: string>, expected bytes, or a struct with a field 'bytes'",
        ),
        (
            {"image": [b""], "alt": ["t"]},
            "--source.caption-column: .*a.parquet has no column 'text' or .*, only 'image', 'alt'",
        ),
        (
            {"image": [b""], "text": [5]},
            "--source.caption-column: .*a.parquet: 'text' is int64, expected text or a list",
        ),
    ],
)
def test_columns_refused(tmp_path: Path, columns: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(write(tmp_path / "a.parquet", columns))


@pytest.mark.parametrize("size", [0, 3, 200])
def test_a_truncated_file(folder: Path, size: int) -> None:
    path = folder / "train-00000-of-00002.parquet"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(
        ValueError, match=r"train-00000-of-00002\.parquet: not parquet, or broken: "
    ):
        read(path)


def test_a_broken_page(tmp_path: Path) -> None:
    columns = {"text": ["a", "b"] * 500, "image": [b"a", b"b"] * 500}
    path = write(tmp_path / "a.parquet", columns, rows_per_group=1000)
    content = bytearray(path.read_bytes())
    content[4:40] = b"\xff" * 36
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.parquet: not parquet, or broken: "):
        read(path)


def test_a_missing_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"a\.parquet: no such file"):
        read(tmp_path / "a.parquet")

    def fail(url: str) -> Any:
        raise RemoteError("away")

    monkeypatch.setattr(parquet, "open_parquet", fail)
    with pytest.raises(RemoteError, match="away"):
        read(tmp_path / "a.parquet")


def test_without_pyarrow(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ValueError, match=r"pip install 'latent-t2i\[parquet\]'"):
        source_of(str(folder))
