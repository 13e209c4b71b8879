"""A folder of images, with captions in metadata or in a text file beside each image.

metadata.jsonl or metadata.csv with a `file_name` (Hugging Face's imagefolder) covers all images
below its folder, and several lines for one image are several captions. Without metadata, each line
of the .txt beside an image is a caption (kohya's layout).

Images are sorted by their path below the folder. Other files and names with a leading dot are
ignored. Memory holds the names in one folder per level and the text of one metadata file.
"""

import csv
import heapq
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain, groupby
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from PIL import Image

from latent_t2i.pipeline.sources.locators import (
    FileLocator,
    LocatorError,
    open_regular,
    printable,
)
from latent_t2i.pipeline.sources.record import (
    Record,
    SourceError,
    extra_fields,
    find_caption_column,
    make_key,
    parse_captions,
    problem_of_name,
)

METADATA = ("metadata.jsonl", "metadata.csv")
NEVER_DECODED = {"BUFR", "GRIB", "HDF5", "MPEG"}
"""Formats that Pillow identifies but cannot decode."""
PLUGIN_SUFFIXES = frozenset({".avif", ".heic", ".heif", ".hif", ".jxl"})
RAW_SUFFIXES = frozenset({".arw", ".cr2", ".cr3", ".dng", ".nef", ".orf", ".raf", ".rw2"})
"""Pillow would read their thumbnail, because some are TIFF files."""
MAX_TEXT_BYTES = 2**24
csv.field_size_limit(MAX_TEXT_BYTES)  # the default of 128 kB is too little for some captions

CaptionPer = Literal["line", "paragraph", "file"]
SEPARATORS = {
    "line": r"\r\n|\r|\n",
    "paragraph": r"(?>\r\n|\r|\n)[ \t]*(?>\r\n|\r|\n)\s*",
    "file": r"\Z",
}
TEXT_SUFFIXES = frozenset({".cap", ".caption", ".captions", ".text", ".txt"})
"""Extensions of texts that are probably captions, for hints."""
Inodes = tuple[tuple[int, int], ...]
"""Device and inode of each folder on the way down."""


@dataclass(frozen=True)
class FolderOptions:
    """The folder and how its captions are stored."""

    root: Path
    caption_column: str | None = None
    caption_per: CaptionPer = "line"
    caption_extension: str = ".txt"

    def stem(self, name: str) -> str | None:
        """Returns a text file's name without the extension, None for other files."""
        ends = name.lower().endswith(self.caption_extension.lower())
        return name[: -len(self.caption_extension)] if ends else None


def records(options: FolderOptions) -> Iterator[Record]:
    """Yields a record for each image at any depth and for each other file that metadata names.

    A text without an image and an image that metadata does not name are records with a problem.
    Raises SourceError, with file and line, for metadata that cannot be read.
    """
    return _walk(options, "", ())


@cache
def readable_suffixes() -> frozenset[str]:
    """Returns the file name extensions that Pillow can read, in lower case with their dot."""
    known = Image.registered_extensions().items()
    return frozenset(s for s, kind in known if kind in Image.OPEN and kind not in NEVER_DECODED)


def find_images(names: Sequence[str]) -> list[str]:
    """Returns the images among the names of a folder or sample, by their extension.

    They include images that cannot be read, such as HEIC without its plugin, because these must be
    quarantined and not ignored. Beside a JPEG of the same name, however, they are copies.
    """
    readable = [name for name in names if _suffix(name) in readable_suffixes()]
    stems = {_stem(name) for name in readable}
    unreadable = (n for n in names if _suffix(n) in PLUGIN_SUFFIXES | RAW_SUFFIXES)
    return readable + [n for n in unreadable if n not in readable and _stem(n) not in stems]


def problem_of_suffix(name: str) -> str | None:
    """Returns why a file cannot be read by its extension alone."""
    return "camera raw file: convert it to JPEG" if _suffix(name) in RAW_SUFFIXES else None


def decode_text(content: bytes) -> tuple[str, str | None]:
    """Returns the text of a caption file, and what is wrong with it."""
    if len(content) > MAX_TEXT_BYTES:
        return "", f"caption of more than {MAX_TEXT_BYTES} bytes"
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return "", "caption is not UTF-8"
    if "\0" in text:  # UTF-16 without a byte order mark is valid UTF-8
        return "", "caption is not UTF-8: it has NUL bytes"
    return text, None


def _walk(options: FolderOptions, prefix: str, parents: Inodes) -> Iterator[Record]:
    """Yields the records below a folder. `prefix` is empty or ends with a slash."""
    names, parents = _list(options.root / prefix, parents)
    metadata = _find_metadata(options.root / prefix, names)
    if metadata is not None:
        yield from _with_metadata(options, prefix, metadata)
        return
    texts = {stem: name for name in names if (stem := options.stem(name)) is not None}
    images = set(find_images(names))
    stems = {_stem(name) for name in images}
    strays = {name for stem, name in texts.items() if stem not in stems}
    # Texts of no image under the present setting: KEY.caption or KEY.output.txt.
    others = (n for n in names if _suffix(n) in TEXT_SUFFIXES and options.stem(n) not in stems)
    hints = {stem: name for name in others for stem in (_stem(name), _stem(_stem(name)))}
    for name in names:
        if name.endswith("/"):
            yield from _walk(options, prefix + name, parents)
        elif name in images:
            stem = _stem(name)
            yield _with_text(options, prefix, name, texts.get(stem), hints.get(stem))
        elif name in strays:
            problem = f"a {options.caption_extension} without an image beside it"
            yield _record(options, prefix + name, problem=problem)


def _list(folder: Path, parents: Inodes) -> tuple[list[str], Inodes]:
    """Returns a folder's names, sorted, and its parents with the folder itself.

    A subfolder's name ends with a slash, so that paths sort as names do. Raises SourceError for a
    link to a parent.
    """
    status = folder.stat()
    inode = (status.st_dev, status.st_ino)  # the same for a folder and a link to it
    if inode in parents:
        raise SourceError(f"{folder}: a link to a folder that contains it")
    with os.scandir(folder) as entries:
        names = [e.name + "/" * e.is_dir() for e in entries if not e.name.startswith(".")]
    return sorted(names), (*parents, inode)


def _find_metadata(folder: Path, names: list[str]) -> Path | None:
    if "metadata.parquet" in names:
        raise SourceError(f"{folder / 'metadata.parquet'}: expected {' or '.join(METADATA)}")
    found = [name for name in METADATA if name in names]
    if len(found) > 1:
        raise SourceError(f"{folder}: found {' and '.join(found)}, expected only one of them")
    return folder / found[0] if found else None


def _with_text(
    options: FolderOptions, prefix: str, name: str, text_name: str | None, hint: str | None
) -> Record:
    """Returns the record of an image, with the captions of its text file if it has one.

    `hint` is the name of a text with another extension.
    """
    if text_name is None:
        found = hint.removeprefix(_stem(name)) if hint else None
        problem = found and hint_extension(options.caption_extension, found)
        return _record(options, prefix + name, problem=problem)
    try:
        with open_regular(options.root / prefix / text_name) as file:
            text, problem = decode_text(file.read(MAX_TEXT_BYTES + 1))
    except OSError as error:
        text, problem = "", f"caption cannot be read: {error.strerror or error}"
    parts = re.split(SEPARATORS[options.caption_per], text)
    captions, _ = parse_captions([part.strip() for part in parts])
    return _record(options, prefix + name, captions=captions, problem=problem)


def hint_extension(expected: str, found: str) -> str:
    """Returns the problem of an image whose text has another extension than is expected."""
    return f"no {expected} but a {found}: set --source.caption-extension {printable(found)}"


def _with_metadata(options: FolderOptions, prefix: str, path: Path) -> Iterator[Record]:
    """Yields the records of all images below a folder and of all files that its metadata names."""
    rows, columns = _read_metadata(path)
    if not rows:
        raise SourceError(f"{path}: names no image")
    column = find_caption_column(columns, options.caption_column, str(path))
    # Both sides are sorted, so that one pass finds the names that only one of them has.
    on_disk = _images_below(options.root / prefix, "", ())
    for name, _ in groupby(heapq.merge(on_disk, sorted(rows))):
        if name not in rows:
            yield _record(options, prefix + name, problem=f"not in {path.name}")
            continue
        fields = [json.loads(row) for row in rows.pop(name)]
        parsed = [parse_captions(row.get(column)) for row in fields]
        problems = (problem for _, problem in parsed if problem)
        yield _record(
            options,
            prefix + name,
            captions=tuple(chain.from_iterable(captions for captions, _ in parsed)),
            problem=next(problems, problem_of_name(name)),
            extra={key: value for key, value in fields[0].items() if key != column},
        )


def _images_below(folder: Path, prefix: str, parents: Inodes) -> Iterator[str]:
    names, parents = _list(folder / prefix, parents)
    if prefix and _find_metadata(folder / prefix, names):
        raise SourceError(f"{folder / prefix}: has metadata and so has {folder}, expected only one")
    images = set(find_images(names))
    for name in names:
        if name.endswith("/"):
            yield from _images_below(folder, prefix + name, parents)
        elif name in images:
            yield prefix + name


def _read_metadata(path: Path) -> tuple[dict[str, list[str]], list[str]]:
    """Returns the rows of each file name, as JSON, and all columns in order of appearance."""
    found: dict[str, list[str]] = {}
    columns: dict[str, None] = {}
    for number, row in _read_csv(path) if path.suffix == ".csv" else _read_jsonl(path):
        if "file_name" not in row:
            raise SourceError(
                f"{path}: line {number}: expected a file_name, found only {sorted(row)}"
            )
        name = row["file_name"]
        if not isinstance(name, str) or not name:
            raise SourceError(
                f"{path}: line {number}: file_name is {name!r}, expected the name of a file"
            )
        columns |= dict.fromkeys(row)
        # Text takes less memory than the parsed row, and all rows of a folder are held.
        found.setdefault(str(PurePosixPath(name)), []).append(json.dumps(row))
    return found, list(columns)


def _read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise SourceError(f"{path}: line {number}: not JSON: {error}") from None
        if not isinstance(row, dict):
            raise SourceError(f"{path}: line {number}: expected a JSON object, found {line[:40]!r}")
        yield number, row


def _read_csv(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    reader = csv.DictReader(_lines(path), strict=True)
    try:
        for row in reader:
            if None in row:
                raise SourceError(
                    f"{path}: line {reader.line_num}: more fields than the "
                    f"{len(reader.fieldnames or ())} of the first line"
                )
            yield reader.line_num, row
    except csv.Error as error:
        first = reader.line_num + 1  # the row's first line: a quoted field may have several
        raise SourceError(f"{path}: line {first}: not CSV: {error}") from None


def _lines(path: Path) -> Iterator[str]:
    """Yields a file's lines with their ends. Raises SourceError for long ones and for bad UTF-8."""
    try:
        file = open_regular(path)
    except LocatorError as error:
        raise SourceError(f"{path}: {error}") from None
    with file:
        lines = iter(lambda: file.readline(MAX_TEXT_BYTES + 1), b"")
        for number, line in enumerate(lines, 1):
            if len(line) > MAX_TEXT_BYTES:
                raise SourceError(f"{path}: line {number}: more than {MAX_TEXT_BYTES} bytes")
            try:
                yield line.decode("utf-8" if number > 1 else "utf-8-sig")
            except UnicodeDecodeError as error:
                raise SourceError(f"{path}: line {number}: not UTF-8: {error.reason}") from None


def _record(
    options: FolderOptions,
    name: str,
    *,
    captions: tuple[str, ...] = (),
    problem: str | None = None,
    extra: Mapping[str, Any] | None = None,
) -> Record:
    return Record(
        key=make_key(str(PurePosixPath(name).with_suffix(""))),
        locator=FileLocator(str(options.root / name)),
        captions=captions,
        extra=extra_fields(extra or {}, name),
        problem=problem or problem_of_suffix(name),
    )


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()  # noqa: PTH122 - faster than a Path


def _stem(name: str) -> str:
    return os.path.splitext(name)[0]  # noqa: PTH122
