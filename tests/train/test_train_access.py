"""Training from a URL: identical runs through the cache, streaming, and refused settings."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from latent_t2i.configs import cli
from latent_t2i.shards import filesystems
from latent_t2i.shards.reader import ShardSet
from latent_t2i.train.config import DataConfig, TrainConfig
from latent_t2i.train.loop import train
from latent_t2i.train.preflight import validate
from tests import tiny
from tests.servers import Server, serve
from tests.train.conftest import MakeConfig, losses, skipped_lines


@pytest.fixture
def server(shards: Path) -> Iterator[Server]:
    """A server of the shards that the tests train on."""
    with serve(shards) as served:
        yield served


@pytest.fixture
def cache_dir(tmp_path: Path) -> str:
    """An empty folder."""
    return str(tmp_path / "cache")


def test_a_run_from_a_url_is_the_run_from_the_folder(
    make_config: MakeConfig, server: Server, cache_dir: str, tmp_path: Path
) -> None:
    server.faults["shard-000001.tar"] = ["503", "drop"]
    train(make_config())
    remote = make_config(
        shards=server.url, out=str(tmp_path / "remote"), data=DataConfig(cache_dir=cache_dir)
    )
    train(remote)
    assert losses(tmp_path / "remote") == losses(tmp_path / "run")
    assert len(list(Path(cache_dir).glob("*/*.tar"))) == 3


def test_a_run_resumes_with_cache_access_after_map(
    make_config: MakeConfig,
    server: Server,
    cache_dir: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    train(make_config(out=str(tmp_path / "whole")))
    train(make_config(num_steps=5))
    capsys.readouterr()
    data = DataConfig(access="cache", cache_dir=cache_dir, cache_bytes=10**8)
    train(make_config(shards=server.url, data=data))
    assert losses(tmp_path / "run")[-1] == losses(tmp_path / "whole")[-1]
    assert "data.access changed from 'auto' to 'cache'" in capsys.readouterr().err


@pytest.mark.parametrize("first", ["map", "stream"])
def test_a_run_cannot_change_to_or_from_stream(make_config: MakeConfig, first: Any) -> None:
    train(make_config(num_steps=1, data=DataConfig(access=first)))
    second: Any = "stream" if first == "map" else "map"
    names = {"map": "map and cache", "stream": "stream"}
    message = f"has '{names[first]}', found '{names[second]}'"
    with pytest.raises(ValueError, match=f"^order of data.access: the run in .* {message}"):
        train(make_config(num_steps=2, data=DataConfig(access=second)))


def test_streaming_trains_and_reports_how_it_resumes(
    make_config: MakeConfig, server: Server, capsys: pytest.CaptureFixture[str], cache_dir: str
) -> None:
    data = DataConfig(access="stream", window_records=8)
    config = make_config(shards=server.url, data=data, num_steps=6)
    train(config)
    assert "stream access resumes" not in capsys.readouterr().err
    train(replace(config, num_steps=10))
    stderr = capsys.readouterr().err
    assert stderr.count("stream access resumes at the start of a shard") == 1
    assert len(losses(config.out)) == 4
    assert not Path(cache_dir).exists()


def test_another_streaming_window_is_refused(make_config: MakeConfig) -> None:
    train(make_config(num_steps=1, data=DataConfig(access="stream", window_records=8)))
    with pytest.raises(ValueError, match=r"data.window_records: .* has 8, found 9"):
        train(make_config(num_steps=2, data=DataConfig(access="stream", window_records=9)))


def test_non_finite_streamed_records_are_named(
    make_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny.make_shards(tmp_path / "bad")
    tiny.plant_nan(folder, shard=1, records=[3])
    train(make_config(shards=str(folder), data=DataConfig(access="stream"), num_steps=6))
    (line,) = skipped_lines(capsys)
    assert "01-3-000003" in line


def test_reading_on_a_network_file_system(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Positioned reads give the same run, and the log says why they were chosen."""
    train(make_config(out=str(tmp_path / "mapped"), num_steps=4))
    mounts = tmp_path / "mountinfo"
    mounts.write_text("22 1 8:1 / / rw - nfs4 host:/data rw\n")
    monkeypatch.setattr(filesystems, "MOUNTS", mounts)
    config = make_config(num_steps=4)
    plan = validate(config, num_processes=1)
    assert isinstance(plan.shards, ShardSet)
    assert (plan.shards.read, plan.access.read) == ("pread", "auto")
    (note,) = [note for note in plan.notes if note.startswith("data.read")]
    assert "on a network file system (nfs4), so shards are read instead of mapped" in note
    train(config)
    assert losses(tmp_path / "run") == losses(tmp_path / "mapped")
    other = validate(make_config(data=DataConfig(read="map")), num_processes=1)
    assert not [note for note in other.notes if note.startswith("data.read")]


def test_preflight_reads_no_shard(make_config: MakeConfig, server: Server, cache_dir: str) -> None:
    for data in (DataConfig(cache_dir=cache_dir), DataConfig(access="stream")):
        plan = validate(make_config(shards=server.url, data=data), num_processes=1)
        assert plan.order.num_records == 24
    assert not [name for name in server.asked if name.endswith(".tar")]


@pytest.mark.parametrize(
    ("data", "remote", "message"),
    [
        (DataConfig(access="map"), True, r"data.access: map needs a folder on a local disk"),
        (DataConfig(num_workers=2), False, r"data.num_workers: has no effect with map access"),
        (DataConfig(window_records=9), True, r"data.window_records: has no effect with cache"),
        (DataConfig(cache_bytes=9), False, r"data.cache_bytes: has no effect .* found 9"),
        (DataConfig(access="stream", cache_dir="a"), True, r"data.cache_dir: .* expected None"),
        (
            DataConfig(access="stream", verify="full"),
            True,
            r"data.verify: has no effect with s",
        ),
        (DataConfig(access="stream", read="pread"), True, r"data.read: has no effect with stream"),
        (DataConfig(access="stream", last_batch="drop"), True, r"data.last_batch: has no effect"),
        (DataConfig(access="stream", shuffle="blocks"), True, r"data.shuffle: stream access mixes"),
        (DataConfig(access="stream", num_workers=4), True, r"1 processes x 4 workers = 4 readers"),
        (
            DataConfig(cache_dir="CACHE", cache_bytes=50_000),
            True,
            r"data.cache_bytes: shuffle full",
        ),
    ],
)
def test_impossible_access_is_refused_before_anything_is_built(
    make_config: MakeConfig,
    server: Server,
    cache_dir: str,
    data: DataConfig,
    remote: bool,
    message: str,
) -> None:
    if data.cache_dir == "CACHE":
        data = replace(data, cache_dir=cache_dir)
    changes = {"shards": server.url} if remote else {}
    with pytest.raises(ValueError, match=message):
        validate(make_config(data=data, **changes), num_processes=1)


def test_another_vae_is_refused_naming_the_url(
    make_config: MakeConfig, server: Server, tmp_path: Path
) -> None:
    tiny.make_encoders(tmp_path, seed=1)
    data = DataConfig(access="stream")
    with pytest.raises(ValueError, match=rf"^{server.url}: vae: the shards were made with"):
        validate(
            make_config(shards=server.url, vae=str(tmp_path / "vae"), data=data), num_processes=1
        )


def test_a_url_without_shards_gives_one_line_and_exit_code_two(
    server: Server,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    cache_dir: str,
    elsewhere: Path,
) -> None:
    flags = ["--name", "x", "--num-steps", "3", "--shards", f"{server.url}/no"]
    monkeypatch.setattr("sys.argv", ["run.py", *flags, "--data.cache-dir", cache_dir])
    with pytest.raises(SystemExit) as exit_:
        cli.main(train, TrainConfig, "train")
    assert exit_.value.code == 2
    (line,) = [s for s in capsys.readouterr().err.splitlines() if not s.startswith("warning")]
    assert line.startswith(
        f"error: {server.url}/no/manifest.json: not found: there is no such file"
    )
