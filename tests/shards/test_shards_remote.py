"""Files from folders, servers and commands; what breaks off is taken up again, or named."""

import http.server
import pickle
import threading
import time
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

CONTENT = bytes(range(256)) * 20_000  # more than a connection's buffers hold


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with one file."""
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "a.tar").write_bytes(CONTENT)
    return tmp_path / "files"


@pytest.fixture(params=[True, False], ids=["ranges", "no ranges"])
def server(folder: Path, request: pytest.FixtureRequest) -> Iterator[Server]:
    """A server that can begin in the middle of a file, and one that cannot."""
    with serve(folder, ranges=request.param) as served:
        yield served


def read(location: str, name: str = "a.tar", retry: Retry = QUICK) -> bytes:
    """Reads a file in small pieces."""
    with open_stream(join(location, name), size=len(CONTENT), retry=retry) as stream:
        return b"".join(iter(lambda: stream.read(10_240), b""))


def test_folders_urls_and_commands_are_told_apart() -> None:
    assert [is_remote(name) for name in ("a/b", "/a", "C:\\a")] == [False] * 3
    assert all(is_remote(name) for name in ("s3://a/b", "pipe:cat /a", "hf://datasets/a/b"))


@pytest.mark.parametrize(
    ("location", "expected"),
    [
        ("/data/train", "/data/train/a.tar"),
        ("https://host/train/", "https://host/train/a.tar"),
        ("https://host/train?key=1", "https://host/train/a.tar?key=1"),
        ("s3://bucket/what?", "s3://bucket/what?/a.tar"),
        ("pipe:cat /data/train", "pipe:cat /data/train/a.tar"),
    ],
)
def test_a_file_of_a_location(location: str, expected: str) -> None:
    assert join(location, "a.tar") == expected


def test_a_name_cannot_add_to_a_command() -> None:
    assert join("pipe:cat /data", "a; rm b") == "pipe:cat /data/'a; rm b'"


def test_a_file_of_a_folder_and_of_a_command(folder: Path) -> None:
    assert read(str(folder)) == read(f"file://{folder}") == read(f"pipe:cat {folder}") == CONTENT


def test_a_file_of_a_server(server: Server) -> None:
    assert read(server.url) == read_file(f"{server.url}/a.tar") == CONTENT
    assert server.asked == ["a.tar"] * 2


def test_a_file_of_pythons_own_server(folder: Path) -> None:
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    handler.func.log_message = lambda *args: None  # type: ignore[attr-defined]
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as plain:
        threading.Thread(target=plain.serve_forever, args=(0.01,), daemon=True).start()
        assert read(f"http://127.0.0.1:{plain.server_address[1]}") == CONTENT
        plain.shutdown()


def test_a_file_of_a_bucket(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve_s3(folder, monkeypatch) as url:
        assert read(url) == CONTENT
        with pytest.raises(RemoteError, match=rf"^{url}/b\.tar: not found$"):
            read(url, "b.tar")
        fsspec.filesystem("s3").pipe(f"{url}/a.tar", CONTENT[:-5])
        with pytest.raises(RemoteError, match=r"after 4 attempts; .* ended after 5119995 bytes"):
            read(url)


@pytest.mark.parametrize("fault", ["drop", "short", "hang up", "503", "500", "429"])
def test_a_fault_that_passes_is_not_seen(server: Server, fault: str) -> None:
    server.faults["a.tar"] = [fault, fault]
    assert read(server.url) == CONTENT
    assert server.asked == ["a.tar"] * 3


def test_a_lost_connection_is_taken_up_where_it_broke_off(folder: Path) -> None:
    with serve(folder) as server:
        server.faults["a.tar"] = ["drop"] * 10  # more than the attempts: each brings half the rest
        assert read(server.url) == CONTENT
        assert len(server.asked) == 11


@pytest.mark.parametrize("fault", ["503", "hang up", "short"])
def test_a_fault_that_stays_is_named_with_the_attempts(folder: Path, fault: str) -> None:
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
        # of a connection that is closed at once, aiohttp makes a second one unasked
        assert len(server.asked) == (8 if fault == "hang up" else 4)


@pytest.mark.parametrize(("fault", "message"), [("", "not found"), ("403", "HTTP status 403")])
def test_a_refusal_is_named_at_once(server: Server, fault: str, message: str) -> None:
    server.faults["b.tar"] = [fault]
    with pytest.raises(RemoteError, match=rf"^{server.url}/b.tar: {message}"):
        read(server.url, "b.tar")
    assert server.asked == ["b.tar"]


def test_no_server_is_named(folder: Path) -> None:
    with serve(folder) as server:
        url = server.url
    with pytest.raises(RemoteError, match=r"after 4 attempts; the last one: ClientConnectorError"):
        read(url)


def test_a_file_that_is_too_long_is_refused(server: Server, folder: Path) -> None:
    (folder / "a.tar").write_bytes(CONTENT + b"x")
    for location in (server.url, str(folder), f"pipe:cat {folder}"):
        with pytest.raises(FormatError, match=r"a\.tar: too long: expected 5120000 bytes"):
            read(location)


def test_a_command_that_fails_is_run_again(folder: Path, tmp_path: Path) -> None:
    script = tmp_path / "flaky.sh"
    script.write_text(
        f'echo x >> {tmp_path}/runs\nhead -c 999 "$1"\n[ -e {tmp_path}/ok ] || exit 7\n'
    )
    command = f"pipe:sh {script} {folder}"
    with pytest.raises(RemoteError, match=r"after 4 attempts; the last one: OSError: exit code 7$"):
        read_file(join(command, "a.tar"), retry=QUICK)
    (tmp_path / "ok").touch()
    assert read_file(join(command, "a.tar"), retry=QUICK) == CONTENT[:999]
    assert (tmp_path / "runs").read_text().split() == ["x"] * 5


def test_a_commands_last_words_are_the_cause(folder: Path) -> None:
    with pytest.raises(RemoteError, match=r"exit code 1: cat: .*b\.tar.*No such file"):
        read_file(f"pipe:cat {folder}/b.tar", retry=QUICK)


def test_waits_grow(folder: Path) -> None:
    waits: list[float] = []
    retry = Retry(attempts=6, first_wait_s=1, longest_wait_s=5, pause=waits.append)
    with pytest.raises(RemoteError, match="after 6 attempts"):
        read(f"pipe:false {folder}", retry=retry)
    assert all(w / 2 <= wait <= w for wait, w in zip(waits, [1, 2, 4, 5, 5], strict=True))


def test_a_missing_package_is_named() -> None:
    with pytest.raises(ValueError, match=r"gs://b/a.tar: a package is missing .*gcsfs"):
        read_file("gs://b/a.tar")
    with pytest.raises(ValueError, match=r"nosuch://b/a.tar: Protocol not known: nosuch"):
        read_file("nosuch://b/a.tar")


def test_an_error_survives_the_way_between_processes() -> None:
    error = pickle.loads(pickle.dumps(RemoteError("a: not found")))
    assert (type(error), str(error)) == (RemoteError, "a: not found")


def test_a_stream_that_is_left_early_ends_its_command(tmp_path: Path) -> None:
    stream = open_stream("pipe:yes", retry=QUICK)
    assert stream.read(4) == b"y\ny\n"
    before = time.monotonic()
    stream.close()
    assert time.monotonic() - before < 5
