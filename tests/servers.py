"""Servers on loopback for tests: an HTTP server with faults, and an S3 API."""

import contextlib
import http.server
import itertools
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import pytest

from latent_t2i.shards.remote.transport import Retry

QUICK = Retry(attempts=4, first_wait_s=0.001)
NUMBERS = itertools.count()


class Server:
    """The requests that a server received, and the faults that it simulates."""

    def __init__(self, folder: Path, *, ranges: bool) -> None:
        self.folder = folder
        self.ranges = ranges
        self.url = ""
        self.asked: list[str] = []
        self.faults: dict[str, list[str]] = {}
        """Faults by file name, one per request: "503", "drop", "short", "hang up", "corrupt"."""
        self.before: Callable[[str], Any] = lambda name: None
        """Called with the file name before each response."""

    @property
    def counts(self) -> Counter[str]:
        """Number of requests for each file."""
        return Counter(self.asked)

    def next_fault(self, name: str) -> str:
        """Removes and returns the next fault; one that ends in "..." is kept."""
        faults = self.faults.get(name, [])
        if not faults:
            return ""
        return faults[0].removesuffix("...") if faults[0].endswith("...") else faults.pop(0)


class Handler(http.server.BaseHTTPRequestHandler):
    """Responds to GET with a file or a range of it."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # otherwise each response takes 40 ms

    def __init__(self, server: Server, *args: Any) -> None:
        self.told = server
        super().__init__(*args)

    def log_message(self, *args: Any) -> None:
        """Suppresses the log."""

    def do_GET(self) -> None:
        name = self.path.lstrip("/").partition("?")[0]
        self.told.asked.append(name)
        self.told.before(name)
        fault = self.told.next_fault(name)
        path = self.told.folder / name
        if fault.isdigit() or not path.is_file():
            self.send_error(int(fault or 404))
        elif fault == "hang up":
            self._hang_up()
        else:
            self._send(path.read_bytes(), fault)

    def _send(self, content: bytes, fault: str) -> None:
        wanted = self.headers.get("Range") if self.told.ranges else None
        first, _, last = (wanted or "bytes=0-").removeprefix("bytes=").partition("-")
        start, end = int(first), int(last) + 1 if last else len(content)
        body = content[start:end]
        if wanted and not body:
            self.send_error(416)
            return
        self.send_response(206 if wanted else 200)
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(content)}")
        if fault != "short":  # without a length, the end of the connection is the end of the file
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if fault == "corrupt":
            body = body[:1000] + bytes([body[1000] ^ 1]) + body[1001:]
        self.wfile.write(body[: len(body) // 2] if fault in ("drop", "short") else body)
        if fault in ("drop", "short"):
            self.wfile.flush()
            time.sleep(0.03)  # otherwise the client may see the end before the data
            self._hang_up()

    def _hang_up(self) -> None:
        self.wfile.flush()
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def serve(folder: Path, *, ranges: bool = True) -> Iterator[Server]:
    """Serves a folder over HTTP; without `ranges` like Python's http.server."""
    served = Server(folder, ranges=ranges)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, served))
    server.handle_error = lambda *args: None  # type: ignore[method-assign]  # clients hang up
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    served.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield served
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextlib.contextmanager
def serve_s3(folder: Path | None, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Serves a copy of a folder from an S3 bucket of moto, and yields its URL."""
    from moto.server import ThreadedMotoServer  # absent where only tests/gpu runs

    bucket = f"bucket-{next(NUMBERS)}"
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    settings = {"endpoint_url": f"http://{host}:{port}", "key": "id", "secret": "secret"}
    monkeypatch.setitem(fsspec.config.conf, "s3", settings)
    try:
        system = fsspec.filesystem("s3")
        system.mkdir(bucket)
        for path in folder.iterdir() if folder else ():
            system.pipe(f"{bucket}/train/{path.name}", path.read_bytes())
        yield f"s3://{bucket}/train"
    finally:
        server.stop()
