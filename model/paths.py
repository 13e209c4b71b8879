"""Input and output paths, free disk space, and folders that are written completely or not at all.

A relative input path is looked up in the current directory, then in the project root, so a preset's
`scenes/encoders/vae` is found from any directory. An output path given by the user is relative to
the current directory. Default outputs go to the checkout, or to the current directory if installed.
"""

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Error numbers of a full disk, an exceeded quota and an exceeded file size limit."""
ROOT = Path(__file__).resolve().parent.parent
"""The folder that contains the packages: the checkout, or the installed latent_t2i."""


def find_path(name: str | Path) -> Path | None:
    """Returns `name` if it exists, else the same path under the project root, else None."""
    given = Path(name).expanduser()
    candidates = (given,) if given.is_absolute() else (given, ROOT / given)
    return next((path for path in candidates if path.exists()), None)


def output_root() -> Path:
    """Returns the folder under which default outputs (`shards/data`, `runs`) are created."""
    return ROOT if (ROOT / "pyproject.toml").is_file() else Path.cwd()


def free_bytes(folder: Path) -> int:
    """Returns the free space on the disk of a folder that need not exist yet."""
    folder = folder.absolute()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    return shutil.disk_usage(existing).free


def hash_file(path: Path) -> str:
    """Returns the sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def format_bytes(num_bytes: float) -> str:
    """Returns a size in MB or GB."""
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"


@contextmanager
def complete_or_absent(final: Path, num_bytes: int | None = None) -> Iterator[Path]:
    """Yields a temporary folder that is renamed to `final` when the block ends without an error.

    The files are flushed to disk before the rename, so neither a killed process nor a power cut
    leaves a partial folder under the final name; their permissions follow the umask. An existing
    `final` is replaced. Leftovers of an earlier killed attempt are deleted. If the disk is full,
    raises OSError with the folder, the required `num_bytes` and the free bytes; `final` is then
    unchanged.
    """
    temporary = final.with_name(f".{final.name}.partial")
    old = final.with_name(f".{final.name}.old")
    for leftover in (temporary, old):
        shutil.rmtree(leftover, ignore_errors=True)
    temporary.mkdir(parents=True)
    num_free = shutil.disk_usage(temporary).free
    default_mode = _default_mode(temporary)
    try:
        yield temporary
        for path in [*temporary.rglob("*"), temporary]:
            if path.is_file() and not path.is_symlink():  # safetensors creates files with mode 0600
                path.chmod(path.stat().st_mode | default_mode)
            _flush(path)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if number := _no_space_errno(error):
            needed = "more" if num_bytes is None else f"{num_bytes:,} bytes"
            text = f"not written, {os.strerror(number)}: needs {needed}, {num_free:,} bytes free"
            text += "; make room on the disk and run the same command again"
            raise OSError(number, text, str(final)) from error
        raise
    if final.exists():
        final.rename(old)  # a folder cannot be replaced in one rename
    temporary.rename(final)
    _flush(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def _default_mode(folder: Path) -> int:
    """Returns the permissions of a new file, which depend on the umask and on default ACLs."""
    probe = folder / ".mode"
    probe.touch()
    mode = probe.stat().st_mode
    probe.unlink()
    return mode


def _no_space_errno(error: BaseException) -> int | None:
    """Returns the error number if `error` reports a full disk, else None."""
    if isinstance(error, OSError) and error.errno in NO_SPACE:
        return error.errno
    if isinstance(error, SafetensorError):  # carries the number in its text only
        return next((number for number in NO_SPACE if f"(os error {number})" in str(error)), None)
    return None


def _flush(path: Path) -> None:
    """Flushes a file or folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
