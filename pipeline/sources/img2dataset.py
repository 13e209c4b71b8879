"""Tars as img2dataset writes them: KEY.jpg with KEY.txt, KEY.json or both, for each image.

Any WebDataset tar will do whose members of one key stand side by side. Each tar is gone through
once, front to back, for its names and captions: of a local one the images are passed over, a remote
one comes over the network whole. The images are read later, by range, so that a tar must neither be
compressed nor on a server that cannot send a part of a file. Captions are the .txt as a whole; the
JSON's where there is none, or where a field was asked for.
"""

import contextlib
import json
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO, cast

from latent_t2i.pipeline.sources import locators
from latent_t2i.pipeline.sources.folder import MOST_TEXT_BYTES, decode_text, is_image
from latent_t2i.pipeline.sources.locators import TarLocator, last_name, without_query
from latent_t2i.pipeline.sources.record import (
    CAPTION_COLUMNS,
    Record,
    make_extra,
    make_key,
    read_captions,
)
from latent_t2i.shards.remote.transport import BUFFER_BYTES, is_remote, open_at, open_stream
from latent_t2i.shards.schema import BLOCK_BYTES

COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".tar.lz4")
TEXTS = (".txt", ".json")

Sample = tuple[str, list[tuple[tarfile.TarInfo, bytes]]]
"""A key, and its members with their content, which of images is left out."""


def records(
    tars: Sequence[tuple[str, str]], *, caption_column: str | None = None
) -> Iterator[Record]:
    """Yields a record for each sample of the tars, given as (path or URL, short name).

    A key that does not begin with its tar's short name, as img2dataset's do, gets that in front; if
    the names differ in length every key does, since one could begin with another's.
    Raises ValueError, with tar and byte, for one that is cut short, broken or no tar, and
    RemoteError for one that cannot be had.
    """
    alike = len({len(short_name) for _, short_name in tars}) == 1
    for url, short_name in tars:
        for key, members in _samples(url):
            named = alike and key.startswith(short_name)
            full_key = key if named else f"{short_name}_{key}"
            yield _record(url, make_key(full_key), members, caption_column)


def _record(
    url: str,
    key: str,
    members: list[tuple[tarfile.TarInfo, bytes]],
    caption_column: str | None,
) -> Record:
    images = [member for member, _ in members if is_image(member.name)]
    image = images[0] if images else members[0][0]
    texts = {_extension(member.name): content for member, content in members}
    captions, fields, problem = _read_texts(texts, caption_column)
    if not images:
        told = fields.get("error_message")
        problem = "no image of this key in the tar" + (f": {told}" if told else "")
    elif len(images) > 1:
        problem = f"{len(images)} images of this key in the tar"
    return Record(
        key=key,
        locator=TarLocator(url, image.offset_data, image.size, f"{last_name(url)}/{image.name}"),
        captions=captions,
        extra=make_extra(fields, image.name),
        problem=problem,
    )


def _read_texts(
    texts: Mapping[str, bytes], caption_column: str | None
) -> tuple[tuple[str, ...], dict[str, Any], str | None]:
    """Returns a sample's captions, the JSON's other fields, and what is wrong with either."""
    fields, problem = _read_json(texts[".json"]) if ".json" in texts else ({}, None)
    names = (caption_column,) if caption_column else CAPTION_COLUMNS
    column = next((name for name in names if name in fields), None)
    value = fields.pop(column) if column else None
    if caption_column is None and ".txt" in texts:
        value, wrong = decode_text(texts[".txt"])
        problem = wrong or problem
    captions, wrong = read_captions(value)
    return captions, fields, problem or wrong


def _read_json(content: bytes) -> tuple[dict[str, Any], str | None]:
    text, problem = decode_text(content)
    if problem:
        return {}, problem.replace("caption", "JSON")
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError):
        return {}, "JSON cannot be read"
    return (fields, None) if isinstance(fields, dict) else ({}, "JSON is no object")


def _samples(url: str) -> Iterator[Sample]:
    """Yields each key with its members, as they stand in the tar."""
    with _open(url) as file:
        for key, members in groupby(_members(url, file), lambda item: _key(item[0].name)):
            yield key, list(members)


def _members(url: str, file: "Forward") -> Iterator[tuple[tarfile.TarInfo, bytes]]:
    """Yields the files of a tar with the content of texts. Raises ValueError as `records` does."""
    shown = without_query(url)
    try:
        tar = tarfile.open(fileobj=cast(BinaryIO, file), mode="r:")  # noqa: SIM115 - holds nothing
        while (member := tar.next()) is not None:
            cast(Any, tar).members.clear()  # else it would keep all of them
            if _is_hidden(member.name):
                continue
            if member.isreg():
                yield member, _read_text(tar, member)
            elif not member.isdir():
                raise ValueError(f"{shown}: {member.name} is a link or a device, expected a file")
    except (tarfile.TarError, EOFError) as error:
        message = f"{shown}: not a tar, or cut short, at byte {file.tell()}: {error}"
        raise ValueError(message) from None
    _require_end(shown, file)


def _read_text(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    if _extension(member.name) not in TEXTS:
        return b""
    content = tar.extractfile(member)
    assert content is not None
    return content.read(MOST_TEXT_BYTES + 1)


def _require_end(shown: str, file: "Forward") -> None:
    """Raises ValueError unless the last that was read is the block of zeros that ends a tar.

    Python's tarfile takes any end for the end, so that a tar cut between members passes for whole.
    """
    if file.last != bytes(BLOCK_BYTES):
        what = "no tar header" if len(file.last) == BLOCK_BYTES else "cut short"
        raise ValueError(f"{shown}: {what} at byte {file.tell() - len(file.last)}")
    while chunk := file.read(BUFFER_BYTES):
        if chunk.strip(b"\0"):
            raise ValueError(
                f"{shown}: more after the end at byte {file.tell() - len(chunk)}: tars joined "
                "by `cat` cannot be read"
            )


class Forward:
    """A file that is only ever read forwards, as tarfile wants it; remembers what it read last."""

    def __init__(self, file: BinaryIO, skip: Callable[[int], object]) -> None:
        self._file = file
        self._skip = skip
        self._position = 0
        self.last = b""

    def read(self, size: int) -> bytes:
        """Returns up to `size` bytes."""
        self.last = self._file.read(size)
        self._position += len(self.last)
        return self.last

    def tell(self) -> int:
        """Returns how many bytes came before."""
        return self._position

    def seek(self, position: int) -> int:
        """Passes over bytes. Past the end it goes there all the same, and reading gives nothing."""
        assert position >= self._position, "tarfile went back"
        self._skip(position - self._position)
        self._position = position
        return position

    def seekable(self) -> bool:
        """True, after a fashion."""
        return True


@contextlib.contextmanager
def _open(url: str) -> Iterator[Forward]:
    """Opens a tar. Raises ValueError for a server that sends whole files only."""
    if not is_remote(url):
        with Path(url).open("rb") as file:
            yield Forward(file, lambda num_bytes: file.seek(num_bytes, 1))
        return
    _require_ranges(url)
    with open_stream(url, retry=locators.RETRY) as stream:
        yield Forward(cast(BinaryIO, stream), lambda num_bytes: _pass_over(stream, num_bytes))


def _require_ranges(url: str) -> None:
    def begins_at() -> int:
        file, to_skip = open_at(url, BLOCK_BYTES)
        file.close()
        return BLOCK_BYTES - to_skip

    if not locators.with_retries(url, begins_at):
        raise ValueError(
            f"{without_query(url)}: the server cannot send a part of a file, and so no single "
            "image: bring the tars here first"
        )


def _pass_over(stream: Any, num_bytes: int) -> None:
    while num_bytes and (chunk := stream.read(min(num_bytes, BUFFER_BYTES))):
        num_bytes -= len(chunk)


def _key(name: str) -> str:
    """Returns a member's name up to the first dot of its last part, as WebDataset cuts it."""
    folder, slash, last = name.removeprefix("./").rpartition("/")
    return folder + slash + last.partition(".")[0]


def _is_hidden(name: str) -> bool:
    """Returns whether a name begins with a dot, as what macOS adds to tars does."""
    return name.rpartition("/")[2].startswith(".")


def _extension(name: str) -> str:
    _, dot, extension = name.rpartition("/")[2].partition(".")
    return (dot + extension).lower()
