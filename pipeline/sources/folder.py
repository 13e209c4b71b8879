"""A folder of images with its captions beside them, in either of two conventions.

metadata.jsonl or metadata.csv with a `file_name` (Hugging Face's imagefolder): it tells of all
images below its folder, and its other columns go into the shards. Several lines for one image are
several captions. Else a .txt beside each image (kohya's): each line of it that is not blank is a
caption, or, with `caption_per="file"`, all of it is one.

Images come sorted by their path below the folder. What lies about that is neither an image, a .txt
nor metadata, and what begins with a dot, is no part of the data. Held in memory are the names in
the folders on the way down and, where there is one, the metadata's text.
"""

import csv
import heapq
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import chain, groupby
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from PIL import Image

from latent_t2i.pipeline.sources.locators import FileLocator
from latent_t2i.pipeline.sources.record import (
    Record,
    find_column,
    make_extra,
    make_key,
    read_captions,
)

METADATA = ("metadata.jsonl", "metadata.csv")
NEVER_DECODED = {"BUFR", "GRIB", "HDF5", "MPEG"}
"""Pillow knows these formats by name only."""
MOST_TEXT_BYTES = 2**24
csv.field_size_limit(2**31 - 1)  # captions may be longer than the 128 kB it would allow

CaptionPer = Literal["line", "file"]


@dataclass(frozen=True)
class FolderOptions:
    """Which folder was asked for, and how its captions are told."""

    root: Path
    caption_column: str | None
    caption_per: CaptionPer


def records(
    folder: Path, *, caption_column: str | None = None, caption_per: CaptionPer = "line"
) -> Iterator[Record]:
    """Yields a record for each image at any depth and for each other file that metadata names.

    A .txt without an image and an image that metadata does not name are records with a problem.
    Raises ValueError, with file and line, for metadata that cannot be read.
    """
    return _visit(FolderOptions(folder, caption_column, caption_per), "", ())


@cache
def image_suffixes() -> frozenset[str]:
    """Returns the file name extensions that Pillow can read, in lower case and with their dot."""
    known = Image.registered_extensions().items()
    return frozenset(s for s, kind in known if kind in Image.OPEN and kind not in NEVER_DECODED)


def is_image(name: str) -> bool:
    """Returns whether a file is an image by its name."""
    return _suffix(name) in image_suffixes()


def decode_text(content: bytes) -> tuple[str, str | None]:
    """Returns the text of a caption's file, or what is wrong with it."""
    if len(content) > MOST_TEXT_BYTES:
        return "", f"caption of more than {MOST_TEXT_BYTES} bytes"
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return "", "caption is not UTF-8"
    if "\0" in text:  # UTF-16 without its mark passes for UTF-8
        return "", "caption is not UTF-8: it has NUL bytes"
    return text, None


def _visit(
    asked: FolderOptions, prefix: str, above: tuple[tuple[int, int], ...]
) -> Iterator[Record]:
    """Yields the records of a folder and those below; `prefix` is empty or ends with a slash."""
    names, above = _list(asked.root / prefix, above)
    metadata = _find_metadata(asked.root / prefix, names)
    if metadata is not None:
        yield from _with_metadata(asked, prefix, metadata)
        return
    texts = {_stem(name): name for name in names if _suffix(name) == ".txt"}
    pictured = {_stem(name) for name in names if is_image(name)}
    for name in names:
        if name.endswith("/"):
            yield from _visit(asked, prefix + name, above)
        elif is_image(name):
            yield _with_text(asked, prefix, name, texts.get(_stem(name)))
        elif _suffix(name) == ".txt" and _stem(name) not in pictured:
            yield _record(asked, prefix + name, problem="a .txt without an image beside it")


def _list(
    folder: Path, above: tuple[tuple[int, int], ...]
) -> tuple[list[str], tuple[tuple[int, int], ...]]:
    """Returns a folder's names, those of folders with a slash so that paths sort as names do.

    `above` are the folders on the way here, as device and inode. Raises ValueError for a folder
    within itself, which a link can make.
    """
    status = folder.stat()
    here = (status.st_dev, status.st_ino)
    if here in above:
        raise ValueError(f"{folder}: a link to a folder that holds it")
    with os.scandir(folder) as entries:
        names = [e.name + "/" * e.is_dir() for e in entries if not e.name.startswith(".")]
    return sorted(names), (*above, here)


def _find_metadata(folder: Path, names: list[str]) -> Path | None:
    if "metadata.parquet" in names:
        raise ValueError(f"{folder / 'metadata.parquet'}: expected {' or '.join(METADATA)}")
    found = [name for name in METADATA if name in names]
    if len(found) > 1:
        raise ValueError(f"{folder}: has both {' and '.join(found)}: which is it?")
    return folder / found[0] if found else None


def _with_text(asked: FolderOptions, prefix: str, name: str, text_name: str | None) -> Record:
    """Returns the record of an image, with the captions of the .txt beside it, if there is one."""
    if text_name is None:
        return _record(asked, prefix + name)
    try:
        with (asked.root / prefix / text_name).open("rb") as file:
            text, problem = decode_text(file.read(MOST_TEXT_BYTES + 1))
    except OSError as error:
        text, problem = "", f"caption cannot be read: {error.strerror}"
    parts = re.split(r"\r\n|\r|\n", text) if asked.caption_per == "line" else [text]
    captions, _ = read_captions([part.strip() for part in parts])
    return _record(asked, prefix + name, captions=captions, problem=problem)


def _with_metadata(asked: FolderOptions, prefix: str, path: Path) -> Iterator[Record]:
    """Yields the records of a folder that has metadata: of what it names, and of what is there."""
    lines, columns = _read_metadata(path)
    if not lines:
        raise ValueError(f"{path}: names no image")
    column = find_column(columns, asked.caption_column, str(path))
    on_disk = _images_below(asked.root / prefix, "", ())
    for name, _ in groupby(heapq.merge(on_disk, sorted(lines))):
        if name not in lines:
            yield _record(asked, prefix + name, problem=f"not in {path.name}")
            continue
        rows = [json.loads(line) for line in lines.pop(name)]
        told = [read_captions(row.get(column)) for row in rows]
        problem = next((problem for _, problem in told if problem), _problem_of(name))
        yield _record(
            asked,
            prefix + name,
            captions=tuple(chain.from_iterable(captions for captions, _ in told)),
            problem=problem,
            extra={key: value for key, value in rows[0].items() if key != column},
        )


def _problem_of(name: str) -> str | None:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        return "file name leads out of the folder"
    return "file name has a NUL byte" if "\0" in name else None


def _images_below(folder: Path, prefix: str, above: tuple[tuple[int, int], ...]) -> Iterator[str]:
    names, above = _list(folder / prefix, above)
    if prefix and _find_metadata(folder / prefix, names):
        raise ValueError(f"{folder / prefix}: has metadata, and so has {folder}: expected only one")
    for name in names:
        if name.endswith("/"):
            yield from _images_below(folder, prefix + name, above)
        elif is_image(name):
            yield prefix + name


def _read_metadata(path: Path) -> tuple[dict[str, list[str]], list[str]]:
    """Returns the lines of each file name, as JSON, and all columns in order of appearance."""
    lines: dict[str, list[str]] = {}
    columns: dict[str, None] = {}
    rows = _read_csv(path) if path.suffix == ".csv" else _read_jsonl(path)
    for number, row in rows:
        name = row.get("file_name")
        if not isinstance(name, str) or not name:
            raise ValueError(
                f"{path}: line {number}: expected a file_name, found only {sorted(row)}"
                if "file_name" not in row
                else f"{path}: line {number}: file_name is {name!r}, expected the name of a file"
            )
        columns |= dict.fromkeys(row)
        lines.setdefault(str(PurePosixPath(name)), []).append(json.dumps(row))
    return lines, list(columns)


def _read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: line {number}: not JSON: {error}") from None
        if not isinstance(row, dict):
            raise ValueError(f"{path}: line {number}: expected a JSON object, found {line[:40]!r}")
        yield number, row


def _read_csv(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    reader = csv.DictReader(_lines(path), strict=True)
    try:
        for row in reader:
            if None in row:
                raise ValueError(
                    f"{path}: line {reader.line_num}: more fields than the "
                    f"{len(reader.fieldnames or ())} of the first line"
                )
            yield reader.line_num, row
    except csv.Error as error:
        first = reader.line_num + 1  # of the row, which quotes may make longer
        raise ValueError(f"{path}: line {first}: not CSV: {error}") from None


def _lines(path: Path) -> Iterator[str]:
    """Yields a file's lines with their ends. Raises ValueError for one that is not UTF-8."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                yield line.decode("utf-8" if number > 1 else "utf-8-sig")
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}: line {number}: not UTF-8: {error.reason}") from None


def _record(
    asked: FolderOptions,
    name: str,
    *,
    captions: tuple[str, ...] = (),
    problem: str | None = None,
    extra: Mapping[str, Any] | None = None,
) -> Record:
    return Record(
        key=make_key(str(PurePosixPath(name).with_suffix(""))),
        locator=FileLocator(str(asked.root / name)),
        captions=captions,
        extra=make_extra(extra or {}, name),
        problem=problem,
    )


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()  # noqa: PTH122 - a Path for each name takes longer


def _stem(name: str) -> str:
    return os.path.splitext(name)[0]  # noqa: PTH122
