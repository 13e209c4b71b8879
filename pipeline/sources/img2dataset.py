"""Tars of img2dataset: KEY.jpg with KEY.txt, KEY.json or both for each image.

Listing reads each tar once: it skips the images of a local tar, but downloads all of a remote one.
Images are read later by byte range, so tars must not be compressed, and a server must support
ranges. The caption is the .txt, or a field of the JSON if the .txt is missing or blank, or if a
field is named.
"""

import contextlib
import json
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, BinaryIO, Literal, cast

from latent_t2i.pipeline.sources.folder import (
    MAX_TEXT_BYTES,
    TEXT_SUFFIXES,
    decode_text,
    find_images,
    hint_extension,
    problem_of_suffix,
)
from latent_t2i.pipeline.sources.locators import (
    LocatorError,
    TarLocator,
    file_name_of,
    open_regular,
    printable,
    with_retries,
    without_query,
)
from latent_t2i.pipeline.sources.record import (
    CAPTION_COLUMNS,
    Record,
    SourceError,
    extra_fields,
    make_key,
    parse_captions,
)
from latent_t2i.shards.remote.transport import (
    BUFFER_BYTES,
    Retry,
    is_remote,
    open_at,
    open_stream,
)
from latent_t2i.shards.schema import BLOCK_BYTES

COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".tar.lz4")
MAX_MESSAGE_CHARACTERS = 200
MAX_PADDING_BYTES = 2**24
MAX_READ_BYTES = 2 * MAX_TEXT_BYTES

Member = tuple[tarfile.TarInfo, bytes]
"""A file in a tar, with its content if it is a text."""


@dataclass(frozen=True, kw_only=True)
class TarOptions:
    """How the captions of tars are stored."""

    caption_column: str | None = None
    caption_extension: str = ".txt"
    members: Literal["adjacent", "anywhere"] = "adjacent"
    """Where the members of a key are in the tar."""


def records(
    tars: Sequence[tuple[str, str]], options: TarOptions, *, retry: Retry | None = None
) -> Iterator[Record]:
    """Yields a record for each sample of the tars, given as (path or URL, short name).

    A key that does not start with its tar's short name, as img2dataset's do, gets it as a prefix.
    Raises SourceError, with tar and byte, for a tar that is truncated or broken, and RemoteError
    for one that cannot be downloaded.
    """
    # With names of different lengths, one could be a prefix of another: then prefix all keys.
    has_one_length = len({len(short_name) for _, short_name in tars}) == 1
    for url, short_name in tars:
        for key, members in _samples(url, options, retry):
            is_prefixed = has_one_length and key.startswith(short_name)
            full_key = key if is_prefixed else f"{short_name}_{key}"
            yield _record(url, make_key(full_key), members, options)


def _record(url: str, key: str, members: list[Member], options: TarOptions) -> Record:
    names = find_images([member.name for member, _ in members])
    images = [member for member, _ in members if member.name in names]
    image = images[0] if images else members[0][0]
    texts = {_extension(member.name): content for member, content in members}
    captions, fields, problem = _read_texts(texts, options)
    if not images:
        message = printable(str(fields.get("error_message") or "")[:MAX_MESSAGE_CHARACTERS])
        problem = "no image of this key in the tar" + (f": {message}" if message else "")
    elif len(images) > 1:
        problem = f"{len(images)} images of this key in the tar"
    elif not problem:
        problem = problem_of_suffix(image.name) or (None if captions else _hint(texts, options))
    name = f"{file_name_of(url)}/{image.name}"
    return Record(
        key=key,
        locator=TarLocator(url, image.offset_data, image.size, name),
        captions=captions,
        extra=extra_fields(fields, image.name),
        problem=problem,
    )


def _hint(extensions: Iterable[str], options: TarOptions) -> str | None:
    """Returns what to do about an image without a caption, if its sample shows it."""
    expected = options.caption_extension.lower()
    texts = [e for e in extensions if e != expected and e.endswith(tuple(TEXT_SUFFIXES))]
    if expected not in extensions and texts:
        return hint_extension(expected, texts[0])
    if not {expected, ".json"} & {*extensions} and options.members == "adjacent":
        return "no text beside the image: if it is elsewhere, set --source.tar-members anywhere"
    return None


def _read_texts(
    texts: Mapping[str, bytes], options: TarOptions
) -> tuple[tuple[str, ...], dict[str, Any], str | None]:
    """Returns a sample's captions, the JSON's other fields, and what is wrong with either."""
    fields, problem = _read_json(texts[".json"]) if ".json" in texts else ({}, None)
    names = (options.caption_column,) if options.caption_column else CAPTION_COLUMNS
    column = next((name for name in names if name in fields), None)
    captions, caption_problem = parse_captions(fields.pop(column) if column else None)
    content = texts.get(options.caption_extension.lower())
    if options.caption_column is None and content is not None:
        text, text_problem = decode_text(content)
        if text.strip() or text_problem:
            (captions, caption_problem), problem = parse_captions(text), text_problem or problem
    return captions, fields, problem or caption_problem


def _read_json(content: bytes) -> tuple[dict[str, Any], str | None]:
    text, problem = decode_text(content)
    if problem:
        return {}, problem.replace("caption", "JSON")
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError):
        return {}, "JSON cannot be parsed"
    return (fields, None) if isinstance(fields, dict) else ({}, "JSON is not an object")


def _samples(
    url: str, options: TarOptions, retry: Retry | None
) -> Iterator[tuple[str, list[Member]]]:
    """Yields each key with its members, in the tar's order."""
    with _open(url, retry) as file:
        members = _members(url, file, {options.caption_extension.lower(), ".json"})
        if options.members == "adjacent":
            for key, group in groupby(members, lambda item: _key(item[0].name)):
                yield key, list(group)
            return
        found: dict[str, list[Member]] = {}
        for member in members:
            found.setdefault(_key(member[0].name), []).append(member)
    yield from found.items()


def _members(url: str, file: "ForwardFile", texts: set[str]) -> Iterator[Member]:
    name = without_query(url)
    try:
        # "r:" refuses compression, so offsets in the tar are offsets in the file.
        tar = tarfile.open(fileobj=cast(BinaryIO, file), mode="r:")  # noqa: SIM115 - holds nothing
        while (member := tar.next()) is not None:
            cast(Any, tar).members.clear()  # tarfile would keep all of them in memory
            if _is_hidden(member.name):
                continue
            if member.isreg() and not member.issparse():
                is_text = _extension(member.name) in texts
                yield member, _read_text(tar, member) if is_text else b""
            elif not member.isdir():
                raise SourceError(f"{name}: {member.name} is a link, device or sparse file")
    except (tarfile.TarError, EOFError) as error:
        message = f"{name}: not a tar, or truncated, at byte {file.tell()}: {error}"
        raise SourceError(message) from None
    _require_end(name, file)


def _read_text(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    content = tar.extractfile(member)
    assert content is not None
    return content.read(MAX_TEXT_BYTES + 1)


def _require_end(name: str, file: "ForwardFile") -> None:
    """Raises SourceError unless the last block is zeros, as at the end of a tar.

    tarfile accepts the end of the file as the end of the tar, even if it is truncated there.
    """
    if file.last != bytes(BLOCK_BYTES):
        problem = "not a tar header" if len(file.last) == BLOCK_BYTES else "truncated"
        raise SourceError(f"{name}: {problem} at byte {file.tell() - len(file.last)}")
    end = file.tell()
    while chunk := file.read(BUFFER_BYTES):
        if file.tell() - end > MAX_PADDING_BYTES:  # a stream of zeros may never end
            raise SourceError(
                f"{name}: more than {MAX_PADDING_BYTES} zeros after the end of the tar"
            )
        if chunk.strip(b"\0"):
            raise SourceError(
                f"{name}: more data after the end of the tar at byte {file.tell() - len(chunk)}; "
                "tars joined with `cat` are not supported"
            )


class ForwardFile:
    """A file that can only be read forwards, with the interface that tarfile needs."""

    def __init__(self, file: BinaryIO, skip: Callable[[int], object]) -> None:
        self._file = file
        self._skip = skip
        self._position = 0
        self.last = b""
        """What `read` returned last."""

    def read(self, size: int) -> bytes:
        """Returns up to `size` bytes. Raises ReadError for a header that would fill the memory."""
        if size > MAX_READ_BYTES:
            raise tarfile.ReadError(f"a header of {size} bytes")
        self.last = self._file.read(size)
        self._position += len(self.last)
        return self.last

    def tell(self) -> int:
        """Returns the position in bytes."""
        return self._position

    def seek(self, position: int) -> int:
        """Skips bytes. Past the end, the next read returns nothing."""
        assert position >= self._position, "tarfile seeked backwards"
        self._skip(position - self._position)
        self._position = position
        return position

    def seekable(self) -> bool:
        """Returns True: tarfile only seeks forwards."""
        return True


@contextlib.contextmanager
def _open(url: str, retry: Retry | None) -> Iterator[ForwardFile]:
    if not is_remote(url):
        try:
            file = open_regular(url)
        except LocatorError as error:
            raise SourceError(f"{url}: {error}") from None
        with file:
            yield ForwardFile(file, lambda num_bytes: file.seek(num_bytes, 1))
        return
    _require_ranges(url, retry)
    with open_stream(url, retry=retry) as stream:
        yield ForwardFile(cast(BinaryIO, stream), lambda num_bytes: _skip(stream, num_bytes))


def _require_ranges(url: str, retry: Retry | None) -> None:
    def first_byte() -> int:
        file, to_skip = open_at(url, BLOCK_BYTES)
        file.close()
        return BLOCK_BYTES - to_skip

    if not with_retries(url, first_byte, retry):
        raise SourceError(
            f"{without_query(url)}: the server does not support byte ranges, so single images "
            "cannot be read: download the tars first"
        )


def _skip(stream: Any, num_bytes: int) -> None:
    while num_bytes and (chunk := stream.read(min(num_bytes, BUFFER_BYTES))):
        num_bytes -= len(chunk)


def _key(name: str) -> str:
    """Returns a member's key as WebDataset does: its path up to the first dot of the file name."""
    folder, slash, last = name.removeprefix("./").rpartition("/")
    return folder + slash + last.partition(".")[0]


def _is_hidden(name: str) -> bool:
    """Returns whether a file name starts with a dot, like those that macOS adds to tars."""
    return name.rpartition("/")[2].startswith(".")


def _extension(name: str) -> str:
    _, dot, extension = name.rpartition("/")[2].partition(".")
    return (dot + extension).lower()
