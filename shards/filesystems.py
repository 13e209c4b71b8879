"""Finds out on which kind of file system a folder is, to choose how its shards are read."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from latent_t2i.shards.settings import ReadMode

MOUNTS = Path("/proc/self/mountinfo")
NETWORK = re.compile(
    r"9p|afs|beegfs|ceph|cifs|fuse(\..+)?|glusterfs|gpfs|lustre|nfs4?|orangefs|panfs|smb3|smbfs"
    r"|virtiofs|wekafs"
)
"""File systems, by their names in Linux, on which a page fault is a round trip to a server."""


def choose_read(mode: ReadMode, folder: Path) -> Literal["map", "pread"]:
    """Returns how to read files of a folder; `auto` is pread on a network file system."""
    if mode != "auto":
        return mode
    return "pread" if NETWORK.fullmatch(file_system(folder)) else "map"


def file_system(folder: Path) -> str:
    """Returns the kind of file system that a folder is on; empty if the system does not tell."""
    if not MOUNTS.exists():
        return ""
    return find_kind(folder.resolve(), MOUNTS.read_text("utf-8", "replace").splitlines())


def find_kind(path: Path, mounts: Iterable[str]) -> str:
    """Returns the kind of a path's file system from the lines of /proc/self/mountinfo."""
    kind, longest = "", -1
    for line in mounts:
        # 36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw,errors=continue
        before, _, after = line.partition(" - ")
        point = Path(_unescape(before.split(" ")[4]))
        # Of two mounts on one folder, the later one hides the earlier.
        if path.is_relative_to(point) and len(point.parts) >= longest:
            kind, longest = after.split(" ")[0], len(point.parts)
    return kind


def _unescape(text: str) -> str:
    """Replaces the escapes of mountinfo, as \\040 for a space."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), text)
