"""Reading files from folders and servers: retries and errors."""

import http.server
import pickle
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import fsspec
import pytest

from latent_t2i.shards.remote.transport import (
    RemoteError,
    Retry,
    is_remote,
    join,
    open_stream,
    read_file,
)
from latent_t2i.shards.schema import FormatError
from tests.servers import QUICK, Server, serve, serve_s3

CONTENT = bytes(range(256)) * 20_000  # larger than the buffers of a connection


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with one file."""
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "a.tar").write_bytes(CONTENT)
    return tmp_path / "files"


@pytest.fixture(params=[True, False], ids=["ranges", "no ranges"])
def server(folder: Path, request: pytest.FixtureRequest) -> Iterator[Server]:
    """A server with ranges, and one without."""
    with serve(folder, ranges=request.param) as served:
        yield served


def read(location: str, name: str = "a.tar", retry: Retry = QUICK) -> bytes:
    """Reads a file in small pieces."""
    with open_stream(join(location, name), size=len(CONTENT), retry=retry) as stream:
        return b"".join(iter(lambda: stream.read(10_240), b""))


def test_is_remote() -> None:
    assert [is_remote(name) for name in ("a/b", "/a", "C:\\a")] == [False] * 3
    assert all(is_remote(name) for name in ("s3://a/b", "hf://datasets/a/b"))


@pytest.mark.parametrize(
    ("location", "expected"),
    [
        ("/data/train", "/data/train/a.tar"),
        ("https://host/train/", "https://host/train/a.tar"),
        ("https://host/train?key=1", "https://host/train/a.tar?key=1"),
        ("s3://bucket/what?", "s3://bucket/what?/a.tar"),
    ],
)
def test_join(location: str, expected: str) -> None:
    assert join(location, "a.tar") == expected


def test_file_of_a_folder(folder: Path) -> None:
    assert read(str(folder)) == read(f"file://{folder}") == CONTENT


def test_file_of_a_server(server: Server) -> None:
    assert read(server.url) == read_file(f"{server.url}/a.tar") == CONTENT
    assert server.asked == ["a.tar"] * 2


def test_file_of_pythons_http_server(folder: Path) -> None:
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    handler.func.log_message = lambda *args: None  # type: ignore[attr-defined]
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as plain:
        threading.Thread(target=plain.serve_forever, args=(0.01,), daemon=True).start()
        assert read(f"http://127.0.0.1:{plain.server_address[1]}") == CONTENT
        plain.shutdown()


def test_file_of_a_bucket(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve_s3(folder, monkeypatch) as url:
        assert read(url) == CONTENT
        with pytest.raises(RemoteError, match=rf"^{url}/b\.tar: not found"):
            read(url, "b.tar")
        fsspec.filesystem("s3").pipe(f"{url}/a.tar", CONTENT[:-5])
        with pytest.raises(RemoteError, match=r"after 4 attempts; .* ended after 5119995 bytes"):
            read(url)


@pytest.mark.parametrize("fault", ["drop", "short", "hang up", "503", "500", "429"])
def test_temporary_fault_is_retried(server: Server, fault: str) -> None:
    server.faults["a.tar"] = [fault, fault]
    assert read(server.url) == CONTENT
    assert server.asked == ["a.tar"] * 3


def test_lost_connection_resumes_at_its_position(folder: Path) -> None:
    with serve(folder) as server:
        server.faults["a.tar"] = [
            "drop"
        ] * 10  # more than the attempts; each response delivers half of the rest
        assert read(server.url) == CONTENT
        assert len(server.asked) == 11


@pytest.mark.parametrize("fault", ["503", "hang up", "short"])
def test_permanent_fault_is_reported_with_the_attempts(folder: Path, fault: str) -> None:
    causes = {
        "503": r"HTTP status 503 \(Service",
        "hang up": "Disconnected",
        "short": "ended after",
    }
    with serve(folder, ranges=False) as server:
        server.faults["a.tar"] = [f"{fault}..."]
        with pytest.raises(RemoteError, match=causes[fault]) as raised:
            read(server.url)
        assert str(raised.value).startswith(f"{server.url}/a.tar: gave up at byte ")
        assert " after 4 attempts" in str(raised.value)
        # aiohttp repeats a request whose connection is closed at once
        assert len(server.asked) == (8 if fault == "hang up" else 4)


@pytest.mark.parametrize(
    ("fault", "message"), [("", "not found: there is no such file at"), ("403", "HTTP status 403")]
)
def test_final_errors_are_not_retried(server: Server, fault: str, message: str) -> None:
    server.faults["b.tar"] = [fault]
    with pytest.raises(RemoteError, match=rf"^{server.url}/b.tar: {message}"):
        read(server.url, "b.tar")
    assert server.asked == ["b.tar"]


def test_missing_server_is_reported(folder: Path) -> None:
    with serve(folder) as server:
        url = server.url
    with pytest.raises(RemoteError, match="after 4 attempts; the last error: ClientConn"):
        read(url)


def test_longer_file_is_rejected(server: Server, folder: Path) -> None:
    (folder / "a.tar").write_bytes(CONTENT + b"x")
    for location in (server.url, str(folder)):
        with pytest.raises(FormatError, match=r"a\.tar: too long: expected 5120000 bytes"):
            read(location)


def test_waits_grow(folder: Path) -> None:
    waits: list[float] = []
    retry = Retry(attempts=6, first_wait_s=1, longest_wait_s=5, pause=waits.append)
    with serve(folder) as server:
        server.faults["a.tar"] = ["503..."]
        with pytest.raises(RemoteError, match="after 6 attempts"):
            read(server.url, retry=retry)
    assert all(w / 2 <= wait <= w for wait, w in zip(waits, [1, 2, 4, 5, 5], strict=True))


def test_errors_do_not_show_the_query_of_a_url(folder: Path) -> None:
    with serve(folder) as server, pytest.raises(RemoteError) as raised:
        read(f"{server.url}?signature=secret", "b.tar")
    assert str(raised.value).startswith(f"{server.url}/b.tar: not found")
    assert "secret" not in str(raised.value)


def test_missing_package_is_named() -> None:
    with pytest.raises(ValueError, match=r"gs://b/a.tar: this protocol needs a package: .*gcsfs"):
        read_file("gs://b/a.tar")
    with pytest.raises(ValueError, match=r"nosuch://b/a.tar: Protocol not known: nosuch"):
        read_file("nosuch://b/a.tar")


def test_remote_error_can_be_pickled() -> None:
    error = pickle.loads(pickle.dumps(RemoteError("a: not found")))
    assert (type(error), str(error)) == (RemoteError, "a: not found")
