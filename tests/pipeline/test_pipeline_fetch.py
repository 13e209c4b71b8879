"""A file over HTTP: gone on with after any break, never put together of two, never a wrong one."""

import errno
import hashlib
import io
import re
import socket
from collections.abc import Callable, Iterator
from email.utils import formatdate
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tqdm import tqdm

from latent_t2i.pipeline import fetch as module
from latent_t2i.pipeline.fetch import RemoteFile, check, fetch, part_of, version_of
from latent_t2i.shards.remote.transport import RemoteError
from tests.servers import QUICK, Server, serve

NAME = "photographs.zip"
HALF = 500_000
CONTENT = np.random.default_rng(0).bytes(2 * HALF)
OTHER = np.random.default_rng(1).bytes(2 * HALF)


def etag(content: bytes) -> dict[str, str]:
    return {"ETag": f'"{hashlib.md5(content).hexdigest()}"'}


def weak_etag(content: bytes) -> dict[str, str]:
    return {"ETag": f"W/{etag(content)['ETag']}"}


def date(content: bytes) -> dict[str, str]:
    return {"Last-Modified": formatdate(content[0], usegmt=True)}


def quiet_bar(task: str, total: int, done: int) -> Any:
    return tqdm(total=total, initial=done, disable=True)


def bring(server: Server, path: Path, content: bytes = CONTENT, **changes: Any) -> None:
    file = RemoteFile(
        url=f"{server.url}/{NAME}",
        num_bytes=changes.get("num_bytes", len(content)),
        sha256=hashlib.sha256(content).hexdigest(),
    )
    fetch(file, path, retry=QUICK, make_bar=quiet_bar)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    folder = tmp_path / "served"
    folder.mkdir()
    (folder / NAME).write_bytes(CONTENT)
    with serve(folder) as server:
        server.version = etag
        yield server


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / NAME


@pytest.fixture
def starts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The range of each request, empty where the whole file is asked for."""
    asked: list[str] = []
    original = module._open

    def spy(url: str, headers: dict[str, str]) -> Any:
        asked.append(headers.get("Range", ""))
        return original(url, headers)

    monkeypatch.setattr(module, "_open", spy)
    return asked


def left(path: Path) -> set[str]:
    return {file.name for file in path.parent.iterdir() if file.is_file()}


def test_brings_a_file(server: Server, path: Path) -> None:
    bring(server, path)
    assert path.read_bytes() == CONTENT
    assert left(path) == {path.name, version_of(path).name}


@pytest.mark.parametrize("version", [etag, date])
@pytest.mark.parametrize("fault", ["drop", "short"])
def test_goes_on_where_it_broke_off(
    server: Server,
    path: Path,
    starts: list[str],
    version: Callable[[bytes], dict[str, str]],
    fault: str,
) -> None:
    server.version = version
    server.faults = {NAME: [fault, fault]}
    bring(server, path)
    assert path.read_bytes() == CONTENT
    assert starts == ["", f"bytes={HALF}-", f"bytes={HALF + HALF // 2}-"]


def test_a_later_call_goes_on(server: Server, path: Path, starts: list[str]) -> None:
    server.faults = {NAME: ["drop", "404"]}
    with pytest.raises(RemoteError, match="404"):
        bring(server, path)
    assert part_of(path).read_bytes() == CONTENT[:HALF]
    assert not path.exists()
    bring(server, path)
    assert path.read_bytes() == CONTENT
    assert starts == ["", f"bytes={HALF}-", f"bytes={HALF}-"]


def test_a_part_that_is_whole_is_not_fetched_again(server: Server, path: Path) -> None:
    part_of(path).write_bytes(CONTENT)
    bring(server, path)
    assert path.read_bytes() == CONTENT
    assert not server.asked


@pytest.mark.parametrize("text", ["", '{"etag": "', "not JSON"])
def test_begins_anew_when_the_version_is_not_known(
    server: Server, path: Path, starts: list[str], capsys: pytest.CaptureFixture[str], text: str
) -> None:
    part_of(path).write_bytes(CONTENT[:HALF])
    if text:
        version_of(path).write_text(text)
    bring(server, path)
    assert path.read_bytes() == CONTENT
    assert starts == [""]
    assert "from its beginning again" in capsys.readouterr().out


def test_begins_anew_when_the_part_is_too_long(server: Server, path: Path) -> None:
    part_of(path).write_bytes(CONTENT + b"more")
    version_of(path).write_text("{}")
    bring(server, path)
    assert path.read_bytes() == CONTENT


@pytest.mark.parametrize("version", [weak_etag, lambda content: {}])
def test_a_server_that_names_no_version_is_asked_from_the_beginning(
    server: Server,
    path: Path,
    starts: list[str],
    version: Callable[[bytes], dict[str, str]],
) -> None:
    server.version = version
    server.faults = {NAME: ["drop"]}
    bring(server, path)
    assert path.read_bytes() == CONTENT
    assert starts == ["", ""]


def test_a_server_without_ranges_begins_anew(server: Server, path: Path, starts: list[str]) -> None:
    server.ranges = False
    server.faults = {NAME: ["drop"]}
    bring(server, path)
    assert path.read_bytes() == CONTENT
    assert starts == ["", f"bytes={HALF}-"]


@pytest.mark.parametrize("heeds", [True, False], ids=["If-Range heeded", "If-Range ignored"])
@pytest.mark.parametrize("version", [etag, date])
def test_never_glues_two_files_together(
    server: Server,
    path: Path,
    monkeypatch: pytest.MonkeyPatch,
    version: Callable[[bytes], dict[str, str]],
    heeds: bool,
) -> None:
    hashed = []
    original = module.hash_file
    monkeypatch.setattr(module, "hash_file", lambda *args: hashed.append(1) or original(*args))
    server.version, server.heeds_if_range = version, heeds
    server.faults = {NAME: ["drop"]}

    def change(name: str) -> None:
        if server.counts[name] == 2:
            (server.folder / name).write_bytes(OTHER)

    server.before = change
    bring(server, path, OTHER)
    assert path.read_bytes() == OTHER
    assert len(server.asked) == (2 if heeds else 3)
    assert len(hashed) == 1, "the sum is right at once: the parts were not even tried"


def test_a_shorter_file_is_told_by_its_size(server: Server, path: Path) -> None:
    server.faults = {NAME: ["drop"]}
    server.heeds_if_range = False
    server.version = lambda content: {"ETag": '"the same"'}

    def shorten(name: str) -> None:
        if server.counts[name] == 2:
            (server.folder / name).write_bytes(CONTENT[: HALF // 2])  # answers 416

    server.before = shorten
    with pytest.raises(ValueError, match=f"expected {2 * HALF} bytes, found {HALF // 2}"):
        bring(server, path)
    assert not part_of(path).exists()


@pytest.mark.parametrize("size", [HALF, 3 * HALF])
def test_refuses_another_size_before_it_fetches(server: Server, path: Path, size: int) -> None:
    with pytest.raises(ValueError, match=f"{NAME}: expected {size} bytes, found {2 * HALF}: not"):
        bring(server, path, num_bytes=size)
    assert not left(path)


def test_refuses_a_file_that_goes_on_without_end(server: Server, path: Path) -> None:
    server.faults = {NAME: ["short"]}  # half of it, with no word on the length
    with pytest.raises(ValueError, match="expected 1000 bytes, found more"):
        bring(server, path, num_bytes=1000)
    assert not part_of(path).exists()


def test_a_flipped_bit_is_fetched_again(server: Server, path: Path) -> None:
    server.faults = {NAME: ["corrupt"]}
    bring(server, path)
    assert path.read_bytes() == CONTENT
    assert len(server.asked) == 2


def test_another_content_is_refused(server: Server, path: Path) -> None:
    (server.folder / NAME).write_bytes(OTHER)
    with pytest.raises(ValueError) as caught:
        bring(server, path)
    for content in (CONTENT, OTHER):
        assert hashlib.sha256(content).hexdigest() in str(caught.value)
    assert len(server.asked) == 2
    assert not path.exists() and not part_of(path).exists()


def test_waits_for_a_busy_server(
    server: Server, path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.faults = {NAME: ["503", "hang up", "429"]}
    bring(server, path)
    assert path.read_bytes() == CONTENT
    assert "HTTP status 503; trying again" in capsys.readouterr().out


def test_gives_up_when_it_gets_no_further(server: Server, path: Path) -> None:
    server.faults = {NAME: ["drop", "503..."]}
    with pytest.raises(RemoteError) as caught:
        bring(server, path)
    words = (
        f"gave up at byte {HALF} after {QUICK.attempts} attempts; .*status 503; the same command"
    )
    assert re.search(words, str(caught.value))
    assert len(server.asked) == QUICK.attempts
    assert part_of(path).read_bytes() == CONTENT[:HALF]


def test_many_breaks_with_progress_are_no_reason_to_give_up(server: Server, path: Path) -> None:
    server.faults = {NAME: ["drop"] * 3 * QUICK.attempts}  # each brings half of what is left
    bring(server, path)
    assert path.read_bytes() == CONTENT


def test_a_server_that_always_begins_anew_and_breaks_off_is_given_up(
    server: Server, path: Path
) -> None:
    server.ranges = False
    server.faults = {NAME: ["drop"] * 50}
    with pytest.raises(RemoteError, match=f"gave up at byte {HALF}"):
        bring(server, path)


@pytest.mark.parametrize("status", ["403", "404", "410"])
def test_does_not_wait_for_what_is_refused(server: Server, path: Path, status: str) -> None:
    server.faults = {NAME: [f"{status}..."]}
    with pytest.raises(RemoteError, match=f"{NAME}: HTTP status {status}"):
        bring(server, path)
    assert len(server.asked) == 1


def test_a_server_that_is_not_there_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    gone = Server(tmp_path, ranges=True)
    gone.url = f"http://127.0.0.1:{port}"
    with pytest.raises(RemoteError, match="ConnectionRefusedError"):
        bring(gone, tmp_path / NAME)


def test_a_full_disk_is_not_tried_again(
    server: Server, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class FullDisk(io.BytesIO):
        def write(self, content: Any, /) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    original = Path.open

    def open_on_full_disk(file: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        return FullDisk() if mode == "ab" else original(file, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", open_on_full_disk)
    with pytest.raises(OSError, match="No space left"):
        bring(server, path)
    assert len(server.asked) == 1


def test_check_tells_another_file(path: Path) -> None:
    path.write_bytes(CONTENT)
    right = RemoteFile(url="", num_bytes=2 * HALF, sha256=hashlib.sha256(CONTENT).hexdigest())
    check(right, path, make_bar=quiet_bar)
    wrong = RemoteFile(url="", num_bytes=1, sha256=right.sha256)
    with pytest.raises(ValueError, match=f"{NAME}: expected 1 bytes, found {2 * HALF}: move it"):
        check(wrong, path, make_bar=quiet_bar)
    path.write_bytes(OTHER)
    with pytest.raises(ValueError, match=f"{NAME}: sha256: expected {right.sha256}, found "):
        check(right, path, make_bar=quiet_bar)
    assert path.exists(), "it is the user's"
