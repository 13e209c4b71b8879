"""Stage one with a URL as --out: S3, and a store whose puts fail half way."""

import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import fsspec
import pytest

from latent_t2i.pipeline.config import PipelineConfig
from latent_t2i.pipeline.hub import HubFolder
from latent_t2i.pipeline.plan import ShardPlan
from latent_t2i.pipeline.stage import build
from latent_t2i.pipeline.upload import NUM_LOCAL_SHARDS, Mirror
from latent_t2i.shards.access import Access, open_set
from latent_t2i.shards.remote.transport import RemoteError
from tests.coco_folders import CocoFolder, make_coco
from tests.object_stores import HubApi, Store, install_hub
from tests.servers import QUICK, serve_s3
from tests.stage_one import Moment, begun, contents, make_config, run, start, stopped

SLOW = pytest.mark.slow


@pytest.fixture
def folder(tmp_path: Path) -> CocoFolder:
    return make_coco(tmp_path / "coco", [2, 2, 3, 2, 2, 3])


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    with serve_s3(None, monkeypatch) as url:
        yield url


def at_url(config: PipelineConfig, url: str, tmp_path: Path) -> PipelineConfig:
    return replace(config, out=url, work_dir=str(tmp_path / "work"))


def objects(url: str) -> dict[str, bytes]:
    """Returns every object's bytes, by its path below the URL."""
    system, root = fsspec.core.url_to_fs(url)
    system.invalidate_cache()
    paths = system.find(root)
    return {path.removeprefix(f"{root}/"): system.cat_file(path) for path in paths}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[str]:
    Store.faults[:] = []
    yield f"store://{tmp_path}/store/train"
    Store.faults[:] = []


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No waits between attempts."""
    monkeypatch.setattr("latent_t2i.shards.remote.upload.Retry", lambda: QUICK)


def test_a_set_in_s3_has_the_bytes_of_a_local_one(
    folder: CocoFolder, tmp_path: Path, s3: str
) -> None:
    config = make_config(folder, tmp_path / "local")
    (expected,) = build(config).values()
    config = at_url(config, s3, tmp_path)
    (manifest,) = build(config).values()
    assert manifest.sha256 == expected.sha256
    assert objects(s3) == contents(tmp_path / "local")
    assert not list((tmp_path / "work").glob("*/*"))
    shards = open_set(s3, Access(kind="cache", cache_dir=tmp_path / "cache"), verify="full")
    assert shards.manifest.sha256 == expected.sha256
    (again,) = build(config).values()
    assert again.sha256 == expected.sha256


def test_buckets_and_a_restored_image(
    folder: CocoFolder, tmp_path: Path, store: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config(folder, tmp_path / "local", buckets=True, records_per_shard=1)
    build(config)
    image = folder.images / "000000000002.png"
    saved = image.read_bytes()
    image.write_bytes(saved[:5000])
    config = at_url(config, store, tmp_path)
    with pytest.raises(ValueError, match="1 of 6 images cannot be used"):
        build(config)
    assert not [name for name in objects(store) if "manifest.json" in name or ".put" in name]
    assert len([name for name in objects(store) if name.endswith(".tar")]) == 5
    image.write_bytes(saved)
    build(config)
    assert objects(store) == contents(tmp_path / "local")
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("shards") and line.endswith(f"in {store}")]


@pytest.mark.parametrize("name", ["buckets.json", "manifest.json"])
def test_a_temporary_file_of_a_killed_process_is_deleted(
    folder: CocoFolder, tmp_path: Path, store: str, forks: ForkServerContext, name: str
) -> None:
    """Also by a command that finds the set finished."""
    config = make_config(folder, tmp_path / "local", buckets=name == "buckets.json")
    build(config)
    config = at_url(config, store, tmp_path)
    assert run(forks, config, kill_at=("mv", name)) == -signal.SIGKILL
    (left,) = (found for found in objects(store) if ".put" in found)
    content = (tmp_path / "store/train" / left).read_bytes()
    for _ in range(2):
        build(config)
        assert objects(store) == contents(tmp_path / "local")
        (tmp_path / "store/train" / left).write_bytes(content)


def test_an_image_that_was_edited_before_the_set_was_finished(
    folder: CocoFolder, tmp_path: Path, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its shard is written again; that of an image with a new time but the same bytes is not."""
    config = at_url(make_config(folder, tmp_path), store, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("latent_t2i.pipeline.stage.finish", lambda *args, **limit: {})
        build(config)
    images = [folder.images / f"00000000000{number}.png" for number in (1, 4)]
    images[0].write_bytes(images[0].read_bytes())
    images[1].write_bytes((folder.images / "000000000005.png").read_bytes())
    put: list[str] = []
    original = Store.put_file

    def logging(self: Store, lpath: str, rpath: str, **kwargs: Any) -> None:
        put.append(Path(lpath).name)
        original(self, lpath, rpath, **kwargs)

    monkeypatch.setattr(Store, "put_file", logging)
    build(config)
    assert [name for name in put if name.endswith(".tar")] == ["shard-000001.tar"]
    build(replace(config, out=str(tmp_path / "local"), work_dir=None))
    assert objects(store) == contents(tmp_path / "local")


def test_a_reported_shard_that_is_missing_or_short_at_the_url_is_put_again(
    folder: CocoFolder, tmp_path: Path, store: str
) -> None:
    config = make_config(folder, tmp_path / "local", records_per_shard=1)
    build(config)
    config = at_url(config, store, tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("latent_t2i.pipeline.stage.finish", lambda *args, **limit: {})
        build(config)
    (tmp_path / "store/train/shard-000001.tar").unlink()
    with (tmp_path / "store/train/shard-000003.tar").open("r+b") as short:
        short.truncate(1000)
    build(config)
    assert objects(store) == contents(tmp_path / "local")


def test_a_put_that_fails_half_way_is_repeated(
    folder: CocoFolder, tmp_path: Path, store: str, quick: None
) -> None:
    """An unfinished run has no partial file under a final name; the same command completes it."""
    config = make_config(folder, tmp_path / "local", records_per_shard=1)
    build(config)
    config = at_url(config, store, tmp_path)
    Store.faults[:] = ["half", "short", "", "half..."]
    with pytest.raises(RemoteError, match=r"shard-000001.tar: gave up after 4 attempts; .* reset"):
        build(config)
    found = objects(store)
    assert set(found) == {
        "progress/provenance.json",
        "progress/shard-000000.json",
        "shard-000000.tar",
    }
    assert not list((tmp_path / "work").rglob("*.tar"))
    Store.faults[:] = []
    build(config)
    assert objects(store) == contents(tmp_path / "local")


def test_a_short_object_in_s3_is_put_again(
    folder: CocoFolder, tmp_path: Path, s3: str, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import s3fs

    config = make_config(folder, tmp_path / "local", records_per_shard=3)
    build(config)
    original = s3fs.S3FileSystem._call_s3
    faults = iter(["drop", "short"])

    async def call(self: Any, method: str, *args: Any, **kwargs: Any) -> Any:
        if method == "put_object" and kwargs["Key"].endswith(".tar"):
            fault = next(faults, "")
            if fault == "drop":
                raise ConnectionResetError("connection reset")
            if fault == "short":
                kwargs["Body"] = kwargs["Body"][:1000]
        return await original(self, method, *args, **kwargs)

    monkeypatch.setattr(s3fs.S3FileSystem, "_call_s3", call)
    build(at_url(config, s3, tmp_path))
    assert next(faults, "none left") == "none left"
    assert objects(s3) == contents(tmp_path / "local")


KILLS: list[Moment] = [
    ("pipe_file", 1),  # the provenance
    ("put_file", 1),  # before the first shard
    ("mv", 2),  # the first shard has no name yet
    ("pipe_file", 1),  # the first shard is there without its report
    ("pipe_file", 2),  # the second one
    ("put_file", 2),  # the third shard is there; the first small file
    ("mv", 3),  # the manifest
    ("rm", 1),  # the reports
]
SOME_KILLS: list[Moment] = [("pipe_file", 2), ("mv", 2), ("rm", 1)]
"""The first shard has no report; the second has another name; the set is finished."""


@pytest.mark.parametrize("kills", [SOME_KILLS, pytest.param(KILLS, marks=SLOW)])
def test_killed_anywhere_and_started_again(
    folder: CocoFolder, tmp_path: Path, store: str, forks: ForkServerContext, kills: list[Moment]
) -> None:
    """Complete or absent, each time; no shard with a report is begun again, on any host."""
    local = make_config(folder, tmp_path / "local")
    build(local)
    expected = contents(tmp_path / "local")
    config = at_url(local, store, tmp_path)
    finished: set[str] = set()
    for number, kill in enumerate(kills):
        log, host = tmp_path / f"{number}.log", f"host-{number}"
        exit_code = run(forks, config, kill_at=kill, log=log, host=host)
        assert exit_code == -signal.SIGKILL, kill
        assert not finished & {*begun(log)}
        found = objects(store) if (tmp_path / "store").exists() else {}
        whole = {name for name in found if "progress" not in name and ".put" not in name}
        assert all(found[name] == expected[name] for name in whole)
        assert ("manifest.json" in found) == (number == len(kills) - 1)
        finished |= {Path(name).stem for name in found if name.startswith("progress/shard-")}
    assert run(forks, config) == 0
    assert objects(store) == expected


def test_the_working_folder_holds_two_shards_at_most(
    folder: CocoFolder, tmp_path: Path, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each shard but the last is put when the next one is finished and waits."""
    num_shards, found = 6, []
    waits = [threading.Event() for _ in range(num_shards)]
    original_put, original_file = Mirror.put, Store.put_file

    def put(self: Mirror, shard: ShardPlan) -> None:
        waits[shard.index].set()
        original_put(self, shard)

    def put_file(self: Store, lpath: str, rpath: str, **kwargs: Any) -> None:
        if lpath.endswith(".tar"):
            for waiting in waits[len(found) + 1 :][:1]:
                assert waiting.wait(60)
                time.sleep(0.1)  # time enough for a third one to begin, if it did not wait
            paths = Path(lpath).parent.glob("shard-*.tar*")
            found.append(len({path.stat().st_ino for path in paths}))
        original_file(self, lpath, rpath, **kwargs)

    monkeypatch.setattr(Mirror, "put", put)
    monkeypatch.setattr(Store, "put_file", put_file)
    config = make_config(folder, tmp_path / "local", records_per_shard=1, batch_size=1)
    build(at_url(config, store, tmp_path))
    assert found == [NUM_LOCAL_SHARDS] * (num_shards - 1) + [1]


@pytest.mark.parametrize("text_dtype", [pytest.param("float16", marks=SLOW), "int8"])
def test_two_processes_at_once(
    folder: CocoFolder, tmp_path: Path, store: str, forks: ForkServerContext, text_dtype: str
) -> None:
    """Rank 1 waits for the scale of rank 0; each begins its own shards only."""
    config = make_config(folder, tmp_path / "local", text_dtype=text_dtype, records_per_shard=1)
    build(config)
    config = at_url(config, store, tmp_path)
    logs = [tmp_path / f"{rank}.log" for rank in range(2)]
    second = start(forks, config, rank=1, num_processes=2, log=logs[1])
    try:
        waits = text_dtype == "int8"
        while waits and not (logs[1].exists() and "waiting for rank 0" in logs[1].read_text()):
            time.sleep(0.02)
            assert second.is_alive()
        assert run(forks, config, rank=0, num_processes=2, log=logs[0]) == 0
        second.join(60)
        assert second.exitcode == 0
    finally:
        second.kill()
    assert objects(store) == contents(tmp_path / "local")
    assert [len(begun(log)) for log in logs] == [3, 3]
    assert "images      6 in = 6 written + 0 quarantined" in "".join(
        log.read_text() for log in logs
    )


def test_another_process_finishes_the_set_while_this_one_looks(
    folder: CocoFolder, tmp_path: Path, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its manifest comes after this process has looked for it, and before it reads the rest."""
    config = make_config(folder, tmp_path / "local")
    build(config)
    config = at_url(config, store, tmp_path)
    original = Mirror._pull_set
    num_calls = 0

    def pull(self: Mirror, name: str) -> None:
        nonlocal num_calls
        original(self, name)
        num_calls += 1
        if num_calls == 2:  # at the end
            monkeypatch.setattr(Mirror, "_pull_set", original)
            build(replace(config, work_dir=str(tmp_path / "other")))

    monkeypatch.setattr(Mirror, "_pull_set", pull)
    build(config)
    assert num_calls == 2 and objects(store) == contents(tmp_path / "local")


@pytest.mark.parametrize("twin_kill", [pytest.param(("put_file", 2), marks=SLOW), None])
def test_a_rank_that_is_started_twice_on_two_hosts_does_no_harm(
    folder: CocoFolder,
    tmp_path: Path,
    store: str,
    forks: ForkServerContext,
    twin_kill: Moment | None,
) -> None:
    """They share a home, whose locks work on one host only."""
    config = make_config(folder, tmp_path / "local")
    build(config)
    config = at_url(config, store, tmp_path)
    log = tmp_path / "log"
    with stopped(forks, config, ("put_file", 2), log, host="one") as first:
        exit_code = run(forks, config, kill_at=twin_kill, host="two")
        assert exit_code == (-signal.SIGKILL if twin_kill else 0)
        os.kill(first.pid or 0, signal.SIGCONT)
        first.join()
    if twin_kill:  # the second shard was put by both, with equal bytes
        assert first.exitcode == 0
    else:
        assert first.exitcode == 2
        assert "provenance.json: is gone while this process wrote shards" in log.read_text()
        assert run(forks, config) == 0  # removes a report that came after the manifest
    assert objects(store) == contents(tmp_path / "local")


def test_settings_may_change_without_a_shard(
    folder: CocoFolder, tmp_path: Path, store: str, quick: None
) -> None:
    config = at_url(make_config(folder, tmp_path, text_dtype="int8"), store, tmp_path)
    other = replace(config, max_tokens=12)
    Store.faults[:] = ["half..."]
    with pytest.raises(RemoteError, match=r"shard-000000.tar: gave up"):
        build(config)
    Store.faults[:] = []
    (manifest,) = build(other).values()
    assert manifest.max_tokens == 12
    message = rf"^{re.escape(store)}: contains other shards .*: max_tokens: .*delete this one$"
    with pytest.raises(ValueError, match=message):
        build(config)


def test_another_command_at_the_same_url_is_noticed_before_the_next_shard(
    folder: CocoFolder, tmp_path: Path, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = at_url(make_config(folder, tmp_path), store, tmp_path)
    provenance = tmp_path / "store/train/progress/provenance.json"
    original = Mirror.put

    def put(self: Mirror, shard: ShardPlan) -> None:
        if shard.index:
            provenance.write_bytes(provenance.read_bytes().replace(b"16", b"12"))
        original(self, shard)

    monkeypatch.setattr(Mirror, "put", put)
    with pytest.raises(ValueError, match=rf"{re.escape(store)}/progress/provenance.json: was repl"):
        build(config)
    assert [name for name in objects(store) if name.endswith(".tar")] == ["shard-000000.tar"]


def test_refusals_and_the_plan(
    folder: CocoFolder,
    tmp_path: Path,
    store: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = at_url(make_config(folder, tmp_path), store, tmp_path)
    assert build(replace(config, dry_run=True)) == {}
    assert f"shards      3 in {store}" in capsys.readouterr().out
    assert not (tmp_path / "store").exists() and not (tmp_path / "work").exists()
    usage = shutil.disk_usage(tmp_path)._replace(free=10_000)
    with monkeypatch.context() as patch:
        patch.setattr("latent_t2i.model.paths.shutil.disk_usage", lambda path: usage)
        with pytest.raises(ValueError, match=r"before they are uploaded, 2 shards need .*dir"):
            build(config)
    (tmp_path / "store/train").mkdir(parents=True)
    (tmp_path / "store/train/notes.txt").touch()
    with pytest.raises(ValueError, match=rf"{re.escape(store)}: contains other files \(notes.txt"):
        build(config)
    with pytest.raises(ValueError, match="--work-dir: needs a URL for --out, found 'shards'"):
        replace(config, out="shards")


def test_a_set_on_the_hub_is_committed_in_batches(
    folder: CocoFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: None
) -> None:
    config = make_config(folder, tmp_path / "local", text_dtype="int8")
    build(config)
    url = install_hub(tmp_path / "hub", monkeypatch)
    HubApi.statuses[:] = [409, 503]
    build(at_url(config, url, tmp_path))
    assert objects(url) == contents(tmp_path / "local")
    names = [[path.removeprefix("train/") for path in commit] for commit in HubApi.commits]
    assert names[:2] == [["progress/provenance.json"], ["progress/text_scale.json"]]
    assert len(names[2]) == 2 * 3 and len(names) == 4
    assert names[3][0] == "progress/" and names[3][-1] == "manifest.json"
    build(at_url(config, url, tmp_path))
    assert len(HubApi.commits) == 4


def test_commits_of_a_set_of_many_shards_keep_to_the_limit_of_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shard is visible with its report, and the reports are deleted with the manifest."""
    folder = make_coco(tmp_path / "coco", [1] * 60)
    config = make_config(folder, tmp_path / "local", records_per_shard=1, batch_size=16)
    build(config)
    url = install_hub(tmp_path / "hub", monkeypatch)
    build(at_url(config, url, tmp_path))
    assert objects(url) == contents(tmp_path / "local")
    for commit in HubApi.commits:
        paths = {path.removeprefix("train/") for path in commit}
        reports = {f"progress/{Path(path).stem}.json" for path in paths if path.endswith(".tar")}
        assert reports == {path for path in paths if path.startswith("progress/shard-")}
    assert sum(path.endswith(".tar") for commit in HubApi.commits for path in commit) == 60
    assert {"train/progress/", "train/manifest.json"} <= {*HubApi.commits[-1]}
    assert not any("manifest" in path for commit in HubApi.commits[:-1] for path in commit)


def test_changes_beyond_the_limit_of_a_commit_keep_their_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failed commit leaves the later ones to the next call, and the next changes wait longer."""
    url = install_hub(tmp_path / "hub", monkeypatch)
    remote = HubFolder(url, QUICK)
    now_s = 1000.0
    monkeypatch.setattr("latent_t2i.pipeline.hub.time.monotonic", lambda: now_s)
    remote.put_bytes("old", b"0")
    remote.commit()
    remote.delete("old")
    for number in range(130):
        remote.put_bytes(f"{number}.tar", b"1")
        remote.put_bytes(f"{number}.json", b"2")
        remote.commit(now=False)
    remote.put_bytes("manifest.json", b"3")
    with monkeypatch.context() as patch:
        patch.setattr(HubApi, "statuses", [200, 409, 403])
        with pytest.raises(RemoteError, match="403"):
            remote.commit()
    assert len(remote.list()) == 1 + 100
    remote.commit()
    assert [len(commit) for commit in HubApi.commits] == [1, 100, 100, 62]
    assert HubApi.commits[-1][0] == "train/old" and HubApi.commits[-1][-1] == "train/manifest.json"
    assert len(remote.list()) == 261
    waits_s = []
    for num_added in (100, 100):
        for number in range(num_added):
            remote.put_bytes(f"{now_s}-{number}", b"4")
        start_s, num_commits = now_s, len(HubApi.commits)
        while len(HubApi.commits) == num_commits:
            now_s += 1
            remote.commit(now=False)
        waits_s.append(now_s - start_s)
    assert waits_s == [2 * 36, 36]  # the last call made two commits


def test_what_another_process_deleted_on_the_hub_is_not_deleted_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = install_hub(tmp_path / "hub", monkeypatch)
    first, second = HubFolder(url), HubFolder(url)
    first.put_bytes("a", b"1")
    first.put_bytes("b/c", b"2")
    first.commit()
    for remote in (first, second):
        remote.delete("a")
        remote.delete_folder("b")
    second.commit()
    first.commit()
    assert first.list() == {} and len(HubApi.commits) == 2


def test_an_interrupted_run_to_the_hub_is_resumed(
    folder: CocoFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(folder, tmp_path / "local", records_per_shard=1)
    build(config)
    url = install_hub(tmp_path / "hub", monkeypatch)
    config = at_url(config, url, tmp_path)
    monkeypatch.setattr("latent_t2i.pipeline.hub.MAX_FILES_PER_COMMIT", 4)
    monkeypatch.setattr("latent_t2i.pipeline.hub.MAX_COMMITS_PER_HOUR", 10**9)
    monkeypatch.setattr(HubApi, "num_uploads", 3)
    with pytest.raises(KeyboardInterrupt):
        build(config)
    assert [len(commit) for commit in HubApi.commits] == [1, 4, 2]
    names = objects(url)
    assert sum(name.endswith(".tar") for name in names) == 3
    assert sum(name.startswith("progress/shard-") for name in names) == 3
    monkeypatch.setattr(HubApi, "num_uploads", 10**9)
    build(config)
    assert objects(url) == contents(tmp_path / "local")


def test_refusals_of_the_hub(
    folder: CocoFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: None
) -> None:
    url = install_hub(tmp_path / "hub", monkeypatch)
    config = at_url(make_config(folder, tmp_path), url, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("latent_t2i.pipeline.hub.HubFolder.max_files", 22)
        with pytest.raises(ValueError, match=rf"{url}: the set has 3 shards, .*--records-per"):
            build(config)
    missing = url.replace("me/set", "me/other")
    with pytest.raises(RemoteError, match=rf"{missing}: there is no such repository.*hf repos cre"):
        build(replace(config, out=missing))
    HubApi.statuses[:] = [403]
    with pytest.raises(RemoteError, match=r"HTTP status 403.*: run `hf auth login` with a token"):
        build(config)
    assert {path.name for path in (tmp_path / "hub/me/set").iterdir()} == {"README.md"}
