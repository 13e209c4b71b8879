"""A finished set grows with its source, and its failed images are tried again."""

import json
import os
import random
import re
import shutil
import signal
from dataclasses import replace
from multiprocessing.context import ForkServerContext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from latent_t2i.pipeline import growth
from latent_t2i.pipeline.config import PipelineConfig, SourceConfig, ViewsConfig
from latent_t2i.pipeline.growth import new_quarantined
from latent_t2i.pipeline.stage import build
from latent_t2i.shards import extend
from latent_t2i.shards.extend import read_rows, row_example, row_key
from latent_t2i.shards.quarantine import Quarantined
from latent_t2i.shards.reader import open_shards
from latent_t2i.shards.schema import Example, FormatError, Manifest
from latent_t2i.shards.verify import verify
from tests.shard_sets import edit_json
from tests.stage_one import (
    Moment,
    begun,
    build_one,
    contents,
    make_config,
    random_kills,
    run,
    start,
    stopped,
)

NUM_KILLS = 10


class Source:
    """A folder of small images with one to two captions each."""

    def __init__(self, root: Path, num: int) -> None:
        self.root = root
        self.root.mkdir()
        for number in range(num):
            self.add(number)

    def path(self, number: int) -> Path:
        return self.root / f"{number:04d}.png"

    def add(self, number: int, *, seed: int = 0, good: bool = True) -> None:
        """Writes an image, or a file that is none, and its captions unless they exist."""
        noise = np.random.default_rng([number, seed]).integers(0, 256, (20, 18, 3))
        Image.fromarray(noise.astype(np.uint8)).save(self.path(number))
        if not good:
            self.path(number).write_text("no picture")
        self.path(number).with_suffix(".txt").write_text(
            "\n".join(f"picture {number} {index}" for index in range(1 + number % 2))
        )

    def remove(self, number: int) -> None:
        self.path(number).unlink()
        self.path(number).with_suffix(".txt").unlink()


def config_of(source: Source, out: Path, **changes: Any) -> PipelineConfig:
    small = {"image_size_px": 16, "records_per_shard": 4, "max_quarantined": 0.2}
    of_folder = SourceConfig(kind="folder", images=str(source.root))
    return make_config(of_folder, out, **small | changes)


def num_encoded(capsys: pytest.CaptureFixture[str]) -> int:
    """Returns how many images the runs since the last call say they encoded."""
    found = re.findall(r"^encoded +(\d+) images in this run$", capsys.readouterr().out, re.M)
    return sum(map(int, found))


def keys_of(folder: Path) -> list[str]:
    shards = open_shards(folder)
    return shards.keys(np.arange(len(shards)))


def examples_of(folder: Path) -> dict[str, Example]:
    """Returns all records of a set by key."""
    manifest = Manifest.load(folder)
    found = {}
    for entry in manifest.shards:
        layout = manifest.layouts[entry.layout]
        for row in read_rows(folder / entry.name, layout, entry.records):
            found[row_key(row)] = row_example(row, layout)
    return found


def arrays_of(example: Example) -> list[Any]:
    return [example.latent, example.text, example.tokens, *example.extra.values()]


def shard_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.tar"))}


def require_sound(folder: Path, *, num_source: int) -> Manifest:
    """Returns the manifest of a set without faults, of which all accounts add up."""
    assert list(verify(folder)) == []
    manifest = Manifest.load(folder)
    quarantined = manifest.read_quarantined()
    assert manifest.num_source == num_source == manifest.num_records + len(quarantined)
    keys = keys_of(folder)
    assert len(keys) == len({*keys} | {*quarantined}) - len(quarantined)
    assert not (folder / "progress").exists()
    return manifest


@pytest.fixture
def source(tmp_path: Path) -> Source:
    return Source(tmp_path / "images", 16)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "shards"


def test_a_changed_source_is_described(
    source: Source, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source.add(3, good=False)
    config = config_of(source, out)
    build(config)
    before = contents(out)
    source.add(16)
    source.add(17)
    source.remove(0)
    source.add(5, seed=1)
    source.path(6).with_suffix(".txt").write_text("another caption")
    message = (
        r"the source has changed since this set was made of it: 2 \(0016, 0017\) are new, "
        r"1 \(0000\) are gone, 1 \(0006\) have other captions or fields, "
        r"1 \(0005\) have another image\. --append adds .* --retry .* tries the 1 quarantined"
    )
    with pytest.raises(ValueError, match=message):
        build(config)
    build(replace(config, append=True, dry_run=True))
    lines = capsys.readouterr().out.splitlines()
    assert "2 (0016, 0017) new: appended" in lines
    assert "1 (0006) changed since: kept as encoded, without --retry" in lines
    assert contents(out) == before


def test_new_records_are_appended(
    source: Source, out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(source, out)
    first = build_one(config)
    old = shard_bytes(out)
    for number in (16, 17, 18):
        source.add(number)
    source.add(19, good=False)
    new = Source(tmp_path / "new", 0)
    for number in range(16, 20):
        new.add(number, good=number < 19)
    build(config_of(new, tmp_path / "of_new", max_quarantined=0.5))
    num_encoded(capsys)
    manifest = build_one(replace(config, append=True))
    assert num_encoded(capsys) == 3
    require_sound(out, num_source=20)
    added = {name: b for name, b in shard_bytes(out).items() if name not in old}
    assert {name: shard_bytes(out)[name] for name in old} == old
    assert list(added.values()) == list(shard_bytes(tmp_path / "of_new").values())
    assert manifest.read_quarantined() == {"0019": "not an image"}
    assert manifest.latent_statistics != first.latent_statistics
    before = contents(out)
    assert build_one(replace(config, append=True)) == manifest
    assert "no new records: nothing to do" in capsys.readouterr().out
    assert build_one(config) == manifest  # the plain command has nothing to do either
    assert contents(out) == before


def test_records_that_are_gone_or_changed_stay_as_they_are(
    source: Source, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(source, out)
    build(config)
    old = shard_bytes(out)
    source.add(16)
    source.remove(0)
    source.path(6).with_suffix(".txt").write_text("another caption")
    build(replace(config, append=True))
    lines = capsys.readouterr().out.splitlines()
    assert "1 (0016) new: appended" in lines
    assert "1 (0000) no longer in the source: kept as encoded" in lines
    assert "1 (0006) changed since: kept as encoded, without --retry" in lines
    assert shard_bytes(out).items() > old.items()
    require_sound(out, num_source=17)
    build(config)  # the changes are accepted


@pytest.mark.parametrize("text_dtype", ["float16", "int8"])
def test_a_retried_image_gives_the_set_of_a_run_in_which_it_had_not_failed(
    source: Source, out: Path, tmp_path: Path, text_dtype: str, capsys: Any
) -> None:
    config = config_of(source, out, text_dtype=text_dtype)
    build(replace(config, out=str(tmp_path / "whole")))
    for number in (3, 8, 10, 12, 14):  # all of one shard among them
        source.add(number, good=False)
    config = replace(config, max_quarantined=0.5)
    build(config)
    for number in (3, 8, 10, 14):
        source.add(number)
    num_encoded(capsys)
    manifest = build_one(replace(config, retry=True))
    assert num_encoded(capsys) == 7
    assert manifest.read_quarantined() == {"0012": "not an image"}
    source.add(12)
    build(replace(config, retry=True))
    assert num_encoded(capsys) == 4
    assert contents(out) == contents(tmp_path / "whole")
    build(replace(config, retry=True))
    assert "nothing to try again: nothing to do" in capsys.readouterr().out


def test_edited_images_and_captions_are_encoded_again(
    source: Source, out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(source, out)
    build(config)
    source.add(5, seed=1)
    source.path(8).with_suffix(".txt").write_text("another caption")
    build(replace(config, out=str(tmp_path / "whole")))
    num_encoded(capsys)
    build(replace(config, retry=True))
    assert num_encoded(capsys) == 8
    assert contents(out) == contents(tmp_path / "whole")


def test_records_that_cannot_be_encoded_again_are_copied(
    source: Source, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source.add(4, good=False)
    config = config_of(source, out, views=ViewsConfig(flip=True, crops=2))
    build(config)
    before = examples_of(out)
    source.add(4)
    source.remove(0)  # the shard holds 0, 2, 4 and 6
    source.path(6).write_text("no picture any more")
    num_encoded(capsys)
    build(replace(config, retry=True))
    assert num_encoded(capsys) == 2
    require_sound(out, num_source=16)
    after = examples_of(out)
    assert after.pop("0004").meta["captions"] == ["picture 4 0"]
    assert after.keys() == before.keys()
    for key, example in before.items():
        assert example.meta == after[key].meta
        assert example.extra.keys() == after[key].extra.keys() == {"view_box"}
        for one, other in zip(arrays_of(example), arrays_of(after[key]), strict=True):
            np.testing.assert_allclose(one, other, atol=0 if key in ("0000", "0006") else 1e-2)


def test_a_record_without_a_shard_is_tried_again_as_a_new_one(source: Source, out: Path) -> None:
    text = source.path(3).with_suffix(".txt")
    caption = text.read_text()
    text.write_text("")
    config = config_of(source, out)
    assert build_one(config).read_quarantined() == {"0003": "no caption"}
    text.write_text(caption)
    build(replace(config, append=True))
    assert "0003" not in keys_of(out)
    build(replace(config, retry=True))
    assert keys_of(out)[-1] == "0003"
    require_sound(out, num_source=16)


def test_parts_are_listed(source: Source, out: Path) -> None:
    config = config_of(source, out)
    assert build_one(config).parts == ()
    for number in (16, 17):
        source.add(number)
        build(replace(config, append=True))
    parts = Manifest.load(out).parts
    assert [(part.first_shard, part.num_shards) for part in parts] == [(0, 4), (4, 1), (5, 1)]
    assert [part.num_records for part in parts] == [16, 17, 18]
    edit_json(out / "manifest.json", lambda document: document["parts"][2].update(first_shard=4))
    with pytest.raises(FormatError, match=r"parts: expected \[0, 4, 5\], found \[0, 4, 4\]"):
        Manifest.load(out)


def test_other_settings_are_refused(source: Source, out: Path) -> None:
    build(config_of(source, out))
    source.add(16)
    for flag in ("append", "retry"):
        with pytest.raises(ValueError, match="max_tokens: found 16, expected 20"):
            build(config_of(source, out, max_tokens=20, **{flag: True}))
        with pytest.raises(ValueError, match=f"--{flag}: not available with --buckets"):
            config_of(source, out, buckets=True, **{flag: True})


def test_an_image_that_is_edited_before_a_run_is_resumed(
    source: Source, out: Path, tmp_path: Path, forks: ForkServerContext, capsys: Any
) -> None:
    config = config_of(source, out)
    assert run(forks, config, kill_at="shard-000002.tar") == -signal.SIGKILL
    source.add(2, seed=1)
    source.path(0).touch()  # the same bytes
    build(config)
    printed = capsys.readouterr().out
    assert "shard-000000.tar is encoded again: the image of 0002 has changed since" in printed
    assert "encoded     12 images in this run" in printed
    build(replace(config, out=str(tmp_path / "whole")))
    assert contents(out) == contents(tmp_path / "whole")


def test_processes_share_an_extension(
    source: Source, out: Path, tmp_path: Path, forks: ForkServerContext
) -> None:
    source.add(3, good=False)
    config = config_of(source, out)
    build(config)
    shutil.copytree(out, tmp_path / "one")
    source.add(3)
    for number in range(16, 26):
        source.add(number)
    config = replace(config, append=True, retry=True)
    log = tmp_path / "log"
    both = [start(forks, config, rank=rank, num_processes=2, log=log) for rank in range(2)]
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0], log.read_text()
    assert len(begun(log)) == len({*begun(log)}) == 5
    build(replace(config, out=str(tmp_path / "one")))
    assert contents(out) == contents(tmp_path / "one")
    require_sound(out, num_source=26)


def change(source: Source) -> None:
    """Mends, adds, removes and edits images."""
    source.add(3)
    for number in range(16, 22):
        source.add(number)
    source.remove(0)
    source.add(5, seed=1)


KILLS: list[Moment] = [
    ("write", 3),
    "shard-000005.json",  # a report
    "shards-2.npy",
    "manifest.json",  # the extension is complete
    "shard-000002.tar",  # moved in, without a manifest in the set
    "manifest.json",
    ("rmtree", 1),
]


@pytest.mark.parametrize(
    "kills", [KILLS[3:5], pytest.param(KILLS, marks=pytest.mark.slow)], ids=["two", "all"]
)
def test_killed_anywhere_and_started_again(
    source: Source, out: Path, tmp_path: Path, forks: ForkServerContext, kills: list[Moment]
) -> None:
    source.add(3, good=False)
    config = config_of(source, out)
    build(config)
    shutil.copytree(out, tmp_path / "whole")
    change(source)
    config = replace(config, append=True, retry=True)
    build(replace(config, out=str(tmp_path / "whole")))
    for kill in kills:
        assert run(forks, config, kill_at=kill) == -signal.SIGKILL
        if (out / "manifest.json").exists():
            assert list(verify(out)) == []
    build(config)
    assert contents(out) == contents(tmp_path / "whole")
    require_sound(out, num_source=22)


@pytest.mark.parametrize("retry", [False, True])
def test_what_a_killed_run_left_is_removed_although_images_are_compared(
    source: Source, out: Path, tmp_path: Path, forks: ForkServerContext, retry: bool
) -> None:
    config = config_of(source, out)
    build(replace(config, out=str(tmp_path / "whole")))
    assert run(forks, config, kill_at=("rmtree", 1)) == -signal.SIGKILL
    assert (out / "progress/shard-000000.json").exists()
    os.utime(source.path(0))  # so its bytes are compared
    build(replace(config, retry=retry))
    assert contents(out) == contents(tmp_path / "whole")


def test_old_tables_are_removed_by_the_next_run(
    source: Source, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its process was killed after the new manifest had replaced the old one."""
    config = config_of(source, out)
    build(config)
    source.add(16)
    shutil.copytree(out, tmp_path / "whole")
    build(replace(config, out=str(tmp_path / "whole"), append=True))

    def stop(folder: Path) -> None:
        assert not (folder / "shards-2.npy").exists()

    with monkeypatch.context() as patch:
        patch.setattr(extend, "_remove_old_tables", stop)
        with pytest.raises(AssertionError):
            build(replace(config, append=True))
    assert {"shards.npy", "shards-2.npy"} <= {*contents(out)}
    build(config)
    assert contents(out) == contents(tmp_path / "whole")


def test_an_extension_survives_the_plain_command(
    source: Source, out: Path, tmp_path: Path, forks: ForkServerContext, capsys: Any
) -> None:
    """As another rank while it is written, and after a kill."""
    source.add(3, good=False)
    source.add(9, good=False)
    config = config_of(source, out)
    build(config)
    source.add(3)
    source.add(9)
    log, retry = tmp_path / "log", replace(config, retry=True)
    with stopped(forks, retry, ("write", 6), log) as first:
        before = contents(out)
        assert run(forks, config, rank=1, num_processes=2, log=tmp_path / "other") == 0
        after = contents(out)
        assert {*before} <= {*after} and "progress/rank-0.lock" in after
    capsys.readouterr()
    build(config)
    assert "continue its unfinished extension with --retry" in capsys.readouterr().out
    assert run(forks, retry, log=tmp_path / "again") == 0
    assert len(begun(log)) == 2 and begun(tmp_path / "again") == begun(log)[1:]
    assert build_one(config).read_quarantined() == {}
    require_sound(out, num_source=16)
    assert first.exitcode == -signal.SIGKILL


def test_a_set_that_is_extended_while_it_is_compared_is_compared_again(
    source: Source, out: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    config = config_of(source, out)
    build(config)
    source.add(16)
    config = replace(config, append=True)
    original = growth.compare

    def compare(*args: Any, **kwargs: Any) -> growth.Growth:
        grown = original(*args, **kwargs)
        monkeypatch.setattr(growth, "compare", original)
        monkeypatch.setenv("RANK", "0")
        build(config)
        monkeypatch.setenv("RANK", "1")
        return grown

    monkeypatch.setattr(growth, "compare", compare)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert build_one(config) == Manifest.load(out)
    assert "no new records: nothing to do" in capsys.readouterr().out
    assert keys_of(out)[-1] == "0016"
    require_sound(out, num_source=17)


@pytest.mark.parametrize("flag", ["append", "retry"])
def test_a_set_is_extended_on_the_kind_of_device_that_made_it(
    source: Source, out: Path, monkeypatch: pytest.MonkeyPatch, flag: str
) -> None:
    config = config_of(source, out)
    build(config)
    before = contents(out)
    monkeypatch.setattr("latent_t2i.pipeline.stage.device_name", lambda device: "NVIDIA H100")
    assert build(config)
    source.add(5, seed=1)
    with pytest.raises(ValueError, match=r"set was made of it: 1 \(0005\) have another image"):
        build(config)
    message = r"--append and --retry: expected the kind .* set, 'cpu', found 'NVIDIA H100'"
    with pytest.raises(ValueError, match=message):
        build(replace(config, **{flag: True}))
    assert contents(out) == before


@pytest.mark.slow
def test_a_thousand_images_grow_through_kills(
    tmp_path: Path, forks: ForkServerContext, capsys: pytest.CaptureFixture[str]
) -> None:
    """10 records added, 5 removed, 3 edited and 4 mended; then the same with 10 random kills."""
    source = Source(tmp_path / "images", 1000)
    failed, edited, gone = (100, 101, 500, 777), (7, 300, 301), (50, 51, 52, 600, 999)
    for number in failed:
        source.add(number, good=False)
    config = config_of(source, tmp_path / "out", records_per_shard=20, num_threads=2)
    build(config)
    assert num_encoded(capsys) == 996
    shutil.copytree(tmp_path / "out", tmp_path / "killed")
    old = shard_bytes(tmp_path / "out")
    for number in failed:
        source.add(number)
    for number in edited:
        source.add(number, seed=1)
    for number in gone:
        source.remove(number)
    for number in range(1000, 1010):
        source.add(number)

    build(replace(config, append=True))
    assert num_encoded(capsys) == 10
    manifest = require_sound(tmp_path / "out", num_source=1010)
    assert (manifest.num_records, len(manifest.read_quarantined())) == (1006, 4)
    assert shard_bytes(tmp_path / "out").items() > old.items()
    build(replace(config, retry=True))
    changed = {
        name for name, content in old.items() if shard_bytes(tmp_path / "out")[name] != content
    }
    manifest = require_sound(tmp_path / "out", num_source=1010)
    assert (manifest.num_records, manifest.read_quarantined()) == (1010, {})
    shards = {path: json.dumps(sorted(keys_of_shard(tmp_path / "out", path))) for path in changed}
    wanted = {f"{number:04d}" for number in (*failed, *edited)}
    assert all(any(key in keys for key in wanted) for keys in shards.values())
    in_changed = sum(len(json.loads(keys)) for keys in shards.values())
    num_copied = sum(f"{number:04d}" in keys for number in gone for keys in shards.values())
    assert num_encoded(capsys) == in_changed - num_copied

    moments = random.Random(0)
    num_killed = 0
    for append in (True, False):
        killed = str(tmp_path / "killed")
        of_flags = replace(config, out=killed, append=append, retry=not append)
        for kill in random_kills(moments, NUM_KILLS // 2):
            exit_code = run(forks, of_flags, kill_at=kill)
            assert exit_code in (0, -signal.SIGKILL)
            num_killed += exit_code == -signal.SIGKILL
            if (tmp_path / "killed/manifest.json").exists():
                assert list(verify(tmp_path / "killed")) == []
        assert run(forks, of_flags) == 0
    assert num_killed >= NUM_KILLS // 2
    assert contents(tmp_path / "killed") == contents(tmp_path / "out")


def keys_of_shard(folder: Path, name: str) -> list[str]:
    manifest = Manifest.load(folder)
    (place,) = manifest.shards.find([name])
    entry = manifest.shards[place]
    layout = manifest.layouts[entry.layout]
    return list(map(row_key, read_rows(folder / name, layout, entry.records)))


def test_repeated_keys_are_not_counted_again() -> None:
    """They have the number of their record, which changes with the records before."""
    reason = "another record has the key"
    old = [Quarantined(key=key, reason=reason, shard=None) for key in ("a#2", "b#7", "c")]
    index: Any = SimpleNamespace(
        quarantined={"a#3": reason, "a#5": reason, "b#7": reason, "c": "x", "d": "x", "e": "x"}
    )
    grown: Any = SimpleNamespace(quarantined=old, changes=SimpleNamespace(unusable={"d"}))
    assert new_quarantined(index, grown) == {"a#5": reason, "e": "x"}
