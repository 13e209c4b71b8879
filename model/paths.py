"""Where things are: the project root, inputs given by name, the default place of outputs, and room.

An input path counts from the current directory first and from the project root second, so a
preset's `scenes/encoders/vae` is found from anywhere. An output path that a user gives counts from
the current directory only; default outputs go to the checkout, or to the current directory once
installed.
"""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What the system says where a disk, a quota or a file's limit leaves no room."""
ROOT = Path(__file__).resolve().parent.parent
"""The folder that holds the packages: the checkout, or site-packages once installed."""


def find_path(name: str | Path) -> Path | None:
    """Returns `name` as given if it exists, else under the project root if it exists there."""
    given = Path(name).expanduser()
    candidates = (given,) if given.is_absolute() else (given, ROOT / given)
    return next((path for path in candidates if path.exists()), None)


def output_root() -> Path:
    """Returns the folder under which default outputs (`shards/data`, `runs`) are made."""
    return ROOT if (ROOT / "pyproject.toml").is_file() else Path.cwd()


def free_bytes(folder: Path) -> int:
    """Returns the room on the disk that a folder lies on, or would."""
    here = folder.absolute()
    return shutil.disk_usage(next(path for path in (here, *here.parents) if path.exists())).free


def size(num_bytes: float) -> str:
    """Returns a size as people read it."""
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"


@contextmanager
def complete_or_absent(final: Path, num_bytes: int | None = None) -> Iterator[Path]:
    """Yields a temporary folder beside `final` that takes its name and place once it is whole.

    The files are flushed to disk before the rename, so neither a killed process nor a power cut
    leaves a half-written folder under the final name. What an earlier kill left under a temporary
    name goes. Raises OSError with the folder, the `num_bytes` that it takes and those that were
    free where there is no room: `final` is then as it was, and nothing else is left.
    """
    temporary = final.with_name(f".{final.name}.partial")
    old = final.with_name(f".{final.name}.old")
    for leftover in (temporary, old):
        shutil.rmtree(leftover, ignore_errors=True)
    temporary.mkdir(parents=True)
    num_free = shutil.disk_usage(temporary).free
    try:
        yield temporary
        for path in [*temporary.rglob("*"), temporary]:
            _flush(path)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)  # on a full disk, make room
        if number := _no_room(error):
            needed = "more" if num_bytes is None else f"{num_bytes:,} bytes"
            text = f"not written, {os.strerror(number)}: needs {needed}, {num_free:,} bytes free"
            text += "; make room and give the same command again"
            raise OSError(number, text, str(final)) from error
        raise
    if final.exists():
        final.rename(old)
    temporary.rename(final)
    _flush(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def _no_room(error: BaseException) -> int | None:
    """Returns the system's number of an error that tells of a full disk, also of safetensors'."""
    if isinstance(error, OSError) and error.errno in FULL:
        return error.errno
    if isinstance(error, SafetensorError):
        return next((number for number in FULL if f"(os error {number})" in str(error)), None)
    return None


def _flush(path: Path) -> None:
    """Forces a file or folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
