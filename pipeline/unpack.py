"""A zip's folder on disk, all of it or nothing, each file checked by the zip's own CRC-32.

    with open_zip(Path("train2014.zip"), "train2014") as contents:
        unpack(contents, Path("data/coco/train2014"), num_threads=2, make_bar=...)

Files are written under a temporary name beside, by several threads (inflating and CRC-32 let go of
Python's lock), and the folder gets its name by one rename. Where it is there already, which the
annotations of two years share, files are moved in one by one, each of them whole. A zip with a name
that leads out of the folder, a link or an encrypted member is refused before anything is written.
"""

import re
import shutil
import stat
import threading
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from latent_t2i.model.paths import complete_or_absent
from latent_t2i.pipeline.fetch import MakeBar

BUFFER_BYTES = 1 << 18
BLOCK_BYTES = 4096
"""A file takes whole blocks of a disk."""
BROKEN = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError)
"""What zipfile raises for a damaged member, or one packed in a way it does not know."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Contents:
    """What a zip has in one folder."""

    file: zipfile.ZipFile
    members: dict[str, zipfile.ZipInfo]
    """By path within the folder."""
    num_outside: int
    """Files that are not in the folder, and are left out."""

    @property
    def num_bytes(self) -> int:
        """The room that the files take unpacked."""
        blocks = (-(-info.file_size // BLOCK_BYTES) for info in self.members.values())
        return sum(blocks) * BLOCK_BYTES


@contextmanager
def open_zip(path: Path, folder: str) -> Iterator[Contents]:
    """Yields what a zip has in `folder`. Raises ValueError for none, or an unsafe one."""
    try:
        file = zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path}: no zip that can be read: {error}") from error
    with file:
        members: dict[str, zipfile.ZipInfo] = {}
        num_outside = 0
        for info in file.infolist():
            _require_safe(path, info)
            if info.is_dir():
                continue
            inside = info.filename.removeprefix(f"{folder}/")
            if inside == info.filename:
                num_outside += 1
            elif inside in members:
                raise ValueError(f"{path}: {info.filename!r} stands twice in it")
            else:
                members[inside] = info
        yield Contents(file=file, members=members, num_outside=num_outside)


def _require_safe(path: Path, info: zipfile.ZipInfo) -> None:
    """Raises ValueError for a member that may be written elsewhere than under its folder."""
    name = info.filename
    parts = re.split(r"[/\\]", name)
    faults = {
        "an absolute path": not parts[0] or parts[0].endswith(":"),
        "a path that leads out of the folder": ".." in parts,
        "a link": stat.S_ISLNK(info.external_attr >> 16),
        "encrypted": bool(info.flag_bits & 1),
    }
    for fault, is_so in faults.items():
        if is_so:
            raise ValueError(f"{path}: member {name!r} is {fault}: nothing of it is unpacked")


def unpack(contents: Contents, final: Path, *, num_threads: int, make_bar: MakeBar) -> None:
    """Writes the files as the folder `final`. Raises ValueError for a damaged member."""
    target = _beside(final) if final.exists() else final
    with complete_or_absent(target) as temporary:
        _extract_all(contents, temporary, num_threads, make_bar)
    if target != final:
        _move_in(target, final, list(contents.members))
    tidy(final)


def tidy(final: Path) -> None:
    """Removes what a killed `unpack` left beside a folder."""
    beside = _beside(final)
    for name in (final, beside):
        shutil.rmtree(name.with_name(f".{name.name}.partial"), ignore_errors=True)
    shutil.rmtree(beside, ignore_errors=True)


def _beside(final: Path) -> Path:
    return final.with_name(f".{final.name}.more")


def _move_in(source: Path, final: Path, names: Sequence[str]) -> None:
    """Moves files one by one, those first that replace one: what is counted is complete last."""
    for name in sorted(names, key=lambda name: not (final / name).exists()):
        (final / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).replace(final / name)


def _extract_all(contents: Contents, to: Path, num_threads: int, make_bar: MakeBar) -> None:
    for folder in {PurePosixPath(name).parent for name in contents.members}:
        (to / folder).mkdir(parents=True, exist_ok=True)
    todo = list(contents.members.items())
    total = sum(info.file_size for _, info in todo)
    lock, stop = threading.Lock(), threading.Event()
    with make_bar("unpack", total, 0) as bar:

        def work(first: int) -> None:
            try:
                for name, info in todo[first::num_threads]:
                    if stop.is_set():
                        return
                    _extract(contents.file, info, to / name)
                    with lock:
                        bar.update(info.file_size)
            except BaseException:
                stop.set()  # the others need not go on
                raise

        with ThreadPoolExecutor(num_threads) as pool:
            try:
                list(pool.map(work, range(num_threads)))
            finally:
                stop.set()  # an interrupt reaches only this thread


def _extract(file: zipfile.ZipFile, info: zipfile.ZipInfo, path: Path) -> None:
    try:
        with file.open(info) as source, path.open("xb") as out:
            shutil.copyfileobj(source, out, BUFFER_BYTES)
    except BROKEN as error:
        raise ValueError(f"{file.filename}: member {info.filename!r}: {error}") from error
