"""Serves the files of a folder through FUSE, read-only, each request after a delay.

    python -m bench.loaders.slow_files FOLDER MOUNT_POINT --latency-ms 1

It stands in for a network file system: page faults, readahead and the page cache are those of the
kernel, and every lookup, open and read is a round trip. It speaks the kernel's protocol itself
(include/uapi/linux/fuse.h), so it needs Linux and the right to mount, but no library.
"""

import argparse
import ctypes
import errno
import os
import stat
import struct
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from subprocess import PIPE, Popen
from sys import executable

LOOKUP, FORGET, GETATTR, OPEN, READ, RELEASE, FLUSH, INIT, BATCH_FORGET = (
    *(1, 2, 3, 14, 15, 18, 25, 26, 42),
)
ASYNC_READ, MAX_PAGES = 1 << 0, 1 << 22
HEADER = struct.Struct("<IIQQIIII")
ATTRIBUTES = struct.Struct("<6Q10I")
REQUEST_BYTES = 2**17
MAX_READAHEAD_BYTES = 2**17
"""The default of Linux, for NFS too."""
MAX_READ_PAGES = 256
"""A MiB, as NFS reads at once."""
NUM_THREADS = 64
VALID_S = 60
MS_RDONLY_NOSUID_NODEV = 7
MNT_DETACH = 2
ROOT = 1


def main() -> None:
    """Mounts the folder and serves it until it is unmounted."""
    parser = argparse.ArgumentParser(description="Serves a folder through FUSE with a delay.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("mount_point", type=Path)
    parser.add_argument("--latency-ms", type=float, default=1.0)
    args = parser.parse_args()
    descriptor = os.open("/dev/fuse", os.O_RDWR)
    mount(args.mount_point, descriptor)
    print("mounted", flush=True)
    paths = tuple(sorted(path for path in args.folder.iterdir() if path.is_file()))
    Server(descriptor, paths, args.latency_ms / 1000).run()


def can_mount() -> bool:
    """Returns whether this process may mount FUSE file systems: as root, with the device."""
    return os.geteuid() == 0 and os.access("/dev/fuse", os.R_OK | os.W_OK)


@contextmanager
def mounted(folder: Path, mount_point: Path, latency_ms: float) -> Iterator[None]:
    """Mounts a folder for the time of a block, with an empty page cache."""
    command = [executable, "-m", "bench.loaders.slow_files", str(folder), str(mount_point)]
    process = Popen([*command, "--latency-ms", str(latency_ms)], stdout=PIPE, text=True)
    assert process.stdout
    try:
        if process.stdout.readline() != "mounted\n":
            raise OSError(f"{mount_point}: FUSE could not be mounted")
        yield
    finally:
        unmount(mount_point)
        process.terminate()
        process.wait()
        process.stdout.close()


def mount(mount_point: Path, descriptor: int) -> None:
    """Mounts an open /dev/fuse. Raises OSError if the system refuses."""
    options = f"fd={descriptor},rootmode=40000,user_id=0,group_id=0,allow_other"
    libc = ctypes.CDLL(None, use_errno=True)
    values = (b"bench", bytes(mount_point), b"fuse.bench")
    if libc.mount(*values, ctypes.c_ulong(MS_RDONLY_NOSUID_NODEV), options.encode()):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(mount_point))


def unmount(mount_point: Path) -> None:
    """Unmounts a folder; open and mapped files stay readable as long as the server runs."""
    ctypes.CDLL(None, use_errno=True).umount2(bytes(mount_point), MNT_DETACH)


@dataclass(frozen=True)
class Server:
    """Answers the kernel's requests."""

    descriptor: int
    paths: tuple[Path, ...]
    """File n of the tuple is node n + 2."""
    latency_s: float

    def run(self) -> None:
        """Answers requests at once in threads, until the folder is unmounted."""
        files = [os.open(path, os.O_RDONLY) for path in self.paths]
        with ThreadPoolExecutor(NUM_THREADS) as pool:
            while True:
                try:
                    request = os.read(self.descriptor, REQUEST_BYTES)
                except OSError as error:
                    if error.errno == errno.ENODEV:  # unmounted
                        return
                    raise
                pool.submit(self._serve, request, files)

    def _serve(self, request: bytes, files: list[int]) -> None:
        _, operation, unique, node, *_ = HEADER.unpack_from(request)
        if operation in (FORGET, BATCH_FORGET):  # these have no reply
            return
        if operation in (LOOKUP, GETATTR, OPEN, READ):
            time.sleep(self.latency_s)
        found = self._answer(operation, node, request[HEADER.size :], files)
        code, body = (-found, b"") if isinstance(found, int) else (0, found)
        os.write(self.descriptor, struct.pack("<IiQ", 16 + len(body), code, unique) + body)

    def _answer(self, operation: int, node: int, body: bytes, files: list[int]) -> bytes | int:
        """Returns the body of the reply, or the number of an error."""
        if operation == INIT:
            return _init(body)
        if operation == LOOKUP:
            names = [bytes(path.name, "utf-8") for path in self.paths]
            if (name := body.rstrip(b"\0")) not in names:
                return errno.ENOENT
            node = names.index(name) + ROOT + 1
            times = struct.pack("<4Q2I", node, 0, VALID_S, VALID_S, 0, 0)
            return times + self._attributes(node)
        if operation == GETATTR:
            return struct.pack("<Q2I", VALID_S, 0, 0) + self._attributes(node)
        if operation == OPEN:
            return struct.pack("<Q2I", 0, 0, 0)
        if operation == READ:
            _, offset, size = struct.unpack_from("<QQI", body)
            return os.pread(files[node - ROOT - 1], size, offset)
        return b"" if operation in (RELEASE, FLUSH) else errno.ENOSYS

    def _attributes(self, node: int) -> bytes:
        if node == ROOT:
            size, mode = 0, stat.S_IFDIR | 0o555
        else:
            size = self.paths[node - ROOT - 1].stat().st_size
            mode = stat.S_IFREG | 0o444
        blocks = -(-size // 512)
        return ATTRIBUTES.pack(node, size, blocks, *[0] * 3, *[0] * 3, mode, 1, *[0] * 3, 4096, 0)


def _init(body: bytes) -> bytes:
    major, _, readahead, flags = struct.unpack_from("<4I", body)
    return struct.pack(
        "<4I2H2I2H8I",
        *(major, 31, min(readahead, MAX_READAHEAD_BYTES), flags & (ASYNC_READ | MAX_PAGES)),
        *(NUM_THREADS, NUM_THREADS, 4096, 1, MAX_READ_PAGES, 0),
        *[0] * 8,
    )


if __name__ == "__main__":
    main()
