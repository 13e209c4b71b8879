"""Faults: broken records, damaged checkpoints, full disks, changed settings, malicious files."""

import ast
import errno
import os
import pickle
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from latent_t2i.model.paths import ROOT
from latent_t2i.shards.loader import MapLoader
from latent_t2i.shards.schema import Manifest
from latent_t2i.shards.settings import Verify
from latent_t2i.train import checkpoint, loop
from latent_t2i.train.config import DataConfig, OptimConfig
from latent_t2i.train.loop import longest_streak, train
from tests import tiny
from tests.train.conftest import MakeConfig
from tests.train.process_groups import assert_same_checkpoint


def names(run: Path) -> list[str]:
    """The steps of a run's checkpoints, after checking that the folder holds nothing else."""
    assert all(path.name.startswith("step-") for path in (run / "checkpoints").iterdir())
    return [
        path.name.removeprefix("step-0000") for path in checkpoint.find_all(run / "checkpoints")
    ]


@pytest.fixture
def overflow_at(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes the gradients of some steps infinite, as an overflow does."""

    def install(*steps: int) -> None:
        def overflowing(run: Any, batch: Any) -> torch.Tensor:
            loss = accumulate(run, batch)
            if run.state.step in steps:
                for parameter in run.state.unet.parameters():
                    parameter.grad *= torch.inf
            return loss

        monkeypatch.setattr(loop, "accumulate_gradients", overflowing)

    accumulate = loop.accumulate_gradients
    return install


@pytest.mark.parametrize(
    ("num_before", "skipped", "expected"),
    [
        (0, "....", range(0)),
        (0, ".xx.", range(11, 13)),
        (3, "x.xx", range(7, 11)),
        (3, ".xx.", range(11, 13)),
        (0, "x.xx", range(12, 14)),
    ],
)
def test_the_longest_streak(num_before: int, skipped: str, expected: range) -> None:
    assert longest_streak(10, num_before, [mark == "x" for mark in skipped]) == expected


def test_too_many_skipped_steps_roll_back_to_the_checkpoint_before_them(
    make_config: MakeConfig,
    overflow_at: Callable[..., None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings: dict[str, Any] = {
        "num_steps": 14,
        "checkpoint_every_steps": 2,
        "keep_checkpoints": 1,
        "log_every_steps": 5,
        "max_bad_steps": 5,
    }
    whole, run = tmp_path / "whole", tmp_path / "run"
    train(make_config(**settings | {"num_steps": 4, "out": str(whole)}))
    overflow_at(5, 6, 7, 8, 9, 10)  # checkpoints at 6, 8 and 10, of which one is kept

    def refuse(loader: Any, step: int) -> list[str]:
        raise AssertionError(step)

    monkeypatch.setattr(MapLoader, "nonfinite_keys", refuse)  # as the losses are finite
    message = (
        r"steps 5 to 10: 6 steps in a row .*max_bad_steps: 5.* restored .*step-00000004, deleted "
        r"step-00000010; records of the last ones: all finite\..*--optim.learning-rate"
    )
    with pytest.raises(ValueError, match=message):
        train(make_config(**settings))
    assert names(run) == ["0004"]
    assert_same_checkpoint(
        run / "checkpoints" / "step-00000004", whole / "checkpoints" / "step-00000004"
    )
    assert '"skipped": 5' in (run / "metrics.jsonl").read_text().splitlines()[-2]
    overflow_at()
    train(make_config(**settings))
    train(make_config(**settings | {"out": str(whole)}))
    assert_same_checkpoint(
        run / "checkpoints" / "step-00000014", whole / "checkpoints" / "step-00000014"
    )


def test_a_streak_that_ends_within_an_interval_counts(
    make_config: MakeConfig, overflow_at: Callable[..., None], tmp_path: Path
) -> None:
    overflow_at(4, 5, 6)
    with pytest.raises(ValueError, match=r"steps 4 to 6: 3 steps .* restored .*step-00000003"):
        train(make_config(log_every_steps=10, max_bad_steps=2, keep_checkpoints=1))
    assert names(tmp_path / "run") == ["0003"]


def test_skipped_steps_from_the_first_on_delete_no_checkpoint(
    make_config: MakeConfig, overflow_at: Callable[..., None], tmp_path: Path
) -> None:
    overflow_at(*range(10))
    with pytest.raises(ValueError, match=r"steps 0 to 5: .*no checkpoint precedes them"):
        train(make_config(max_bad_steps=4, log_every_steps=10))
    assert names(tmp_path / "run") == ["0003"]


def test_nan_records_are_named_when_the_run_stops(make_config: MakeConfig, tmp_path: Path) -> None:
    folder = tiny.make_shards(tmp_path / "bad")
    tiny.plant_nan(folder, shard=0, records=range(10))
    with pytest.raises(ValueError, match=r"records of the last ones: 00-3-0000\d\d, ") as caught:
        train(make_config(shards=str(folder), max_bad_steps=1))
    assert "01-3-" not in str(caught.value)
    assert "02-3-" not in str(caught.value)


def three_checkpoints(make_config: MakeConfig, **changes: Any) -> Path:
    """The newest checkpoint of a run of three steps that keeps one per step."""
    config = make_config(num_steps=3, checkpoint_every_steps=1, keep_checkpoints=3, **changes)
    train(config)
    return Path(str(config.out)) / "checkpoints" / "step-00000003"


def test_a_damaged_checkpoint_is_refused_naming_the_one_before(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    last = three_checkpoints(make_config)
    kept = shutil.copytree(last, tmp_path / "kept")
    faults: list[Callable[[], Any]] = [
        lambda: os.truncate(last / "unet.safetensors", 5000),
        lambda: os.truncate(last / "optimizer.safetensors", 5),
        lambda: (last / "ema.safetensors").unlink(),
        lambda: (last / "state.json").unlink(),
        lambda: (last / "state.json").write_text('{"step": 3}'),
        lambda: (last / "state.json").write_bytes(pickle.dumps(Malicious())),
        lambda: (last / "unet.safetensors").write_bytes(pickle.dumps(Malicious())),
        lambda: save_file({"conv_in.weight": torch.zeros(1)}, last / "unet.safetensors"),
        lambda: save_file({"other/exp_avg": torch.zeros(1)}, last / "optimizer.safetensors"),
        lambda: save_file({"conv_in.weight": torch.zeros(1)}, last / "ema.safetensors"),
    ]
    for fault in faults:
        fault()
        with pytest.raises(
            ValueError, match=r"step-00000003: .* is damaged .* resume from .*-00000002"
        ):
            train(make_config(num_steps=3))
        shutil.rmtree(last)
        shutil.copytree(kept, last)
    for older in checkpoint.find_all(last.parent)[:-1]:
        shutil.rmtree(older)
    faults[0]()
    with pytest.raises(ValueError, match="delete this folder to start again at step 0"):
        train(make_config(num_steps=3))


def test_resuming_from_an_older_checkpoint_gives_the_same_bits(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    last = three_checkpoints(make_config)
    kept = shutil.move(last, tmp_path / "kept")
    train(make_config(num_steps=3))
    assert_same_checkpoint(last, Path(kept))


def test_without_its_checkpoints_a_run_starts_again_and_says_so(
    make_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    last = three_checkpoints(make_config)
    kept = shutil.copytree(last, tmp_path / "kept")
    assert "starting at step 0" not in capsys.readouterr().err
    shutil.rmtree(last.parent)
    train(make_config(num_steps=3))
    stderr = capsys.readouterr().err
    for name in ("metrics.jsonl", "bundle"):
        assert f"run/{name}: found without a checkpoint in" in stderr
    assert_same_checkpoint(last, Path(kept))


@contextmanager
def file_limit(num_bytes: int) -> Iterator[None]:
    """Limits the size of files, which fails writes as a full disk does."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_at_a_checkpoint_is_named_and_the_run_resumes(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    whole = three_checkpoints(make_config, out=str(tmp_path / "whole"))
    run = tmp_path / "run"
    train(make_config(num_steps=1))
    size = (whole / "unet.safetensors").stat().st_size
    message = r"not written, .*needs [\d,]+ bytes, [\d,]+ bytes free; make room .*step-00000003'"
    with file_limit(size + 100), pytest.raises(OSError, match=message) as caught:
        train(make_config(num_steps=3))
    assert caught.value.errno == errno.EFBIG
    assert names(run) == ["0001"]
    train(make_config(num_steps=3))
    assert_same_checkpoint(run / "checkpoints" / "step-00000003", whole)


def test_a_full_disk_at_the_bundle_is_named_and_the_run_resumes(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    last = three_checkpoints(make_config)
    bundle = shutil.move(last.parent.parent / "bundle", tmp_path / "kept")
    with file_limit(5000), pytest.raises(OSError, match=r"not written, .*run/bundle'"):
        train(make_config(num_steps=3))
    left = {path.name for path in last.parent.parent.iterdir()}
    assert left == {".lock", "bundle.sha256", "checkpoints", "config.json", "metrics.jsonl"}
    again = train(make_config(num_steps=3))
    name = "unet/diffusion_pytorch_model.safetensors"
    assert (again / name).read_bytes() == (Path(bundle) / name).read_bytes()


def test_a_changed_rate_is_reported_and_a_changed_latent_size_refused(
    make_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(make_config(num_steps=1))
    train(make_config(num_steps=2, optim=OptimConfig(learning_rate=2e-4)))
    assert "optim.learning_rate changed from 0.0001 to 0.0002" in capsys.readouterr().err
    larger = tiny.make_shards(tmp_path / "larger", sizes=(24,), latent_side=16)
    with pytest.raises(ValueError, match=r"latent_shape: the run in .* has \[4, 8, 8\], .*16, 16"):
        train(make_config(num_steps=3, shards=str(larger)))


class Malicious:
    """A pickle that makes a folder when it is loaded."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, ("code-was-run",))


def malicious_array(path: Path) -> bytes:
    """An .npy file of one object, whose code `numpy.load` with allow_pickle runs."""
    with path.open("wb") as file:
        np.save(file, np.array([Malicious()], object), allow_pickle=True)
    return path.read_bytes()


def test_an_object_array_in_the_shards_is_not_unpickled(
    make_config: MakeConfig, tmp_path: Path, elsewhere: Path
) -> None:
    folder = tiny.make_shards(tmp_path / "bad")
    content = malicious_array(tmp_path / "malicious.npy")
    layout = Manifest.load(folder).layouts[0]
    field = layout.fields["text"]
    settings: dict[str, Any] = {"shards": str(folder), "num_steps": 7}

    def write_into(record: int) -> None:
        with (folder / "shard-000000.tar").open("r+b") as file:
            start = field.offset_bytes - field.header_bytes
            file.seek(record * layout.record_bytes + start)
            file.write(content)

    write_into(1)
    train(make_config(**settings, data=DataConfig(verify="none")))  # read as numbers
    for verify in get_args(Verify)[:2]:
        config = make_config(**settings, data=DataConfig(verify=verify), out=str(tmp_path / verify))
        with pytest.raises(ValueError, match=r"shard-000000.tar: sha256"):
            train(config)
    write_into(0)
    with pytest.raises(ValueError, match=r"shard-000000.tar: .* field text: expected array header"):
        train(make_config(**settings, out=str(tmp_path / "other")))
    (folder / "empty_text.npy").write_bytes(content)
    with pytest.raises(ValueError, match=r"empty_text.npy"):
        train(make_config(**settings))
    assert list(elsewhere.iterdir()) == []
    np.load(tmp_path / "malicious.npy", allow_pickle=True)
    assert [path.name for path in elsewhere.iterdir()] == ["code-was-run"]


def unsafe_loads(source: str) -> list[str]:
    """A module's calls and imports that can execute code from a file."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            if names == ["UnpicklingError"]:  # what torch.load raises with weights_only
                continue
            modules = [*names, getattr(node, "module", None) or ""]
            found += [m for m in modules if m in ("pickle", "dill", "joblib", "shelve", "marshal")]
        elif isinstance(node, ast.Call):
            call = ast.unparse(node.func)
            flags = {k.arg: getattr(k.value, "value", None) for k in node.keywords}
            if (
                (call in ("np.load", "numpy.load") and flags.get("allow_pickle") is not False)
                or (call == "torch.load" and flags.get("weights_only") is not True)
                or call in ("yaml.unsafe_load", "yaml.full_load", "eval", "exec")
            ):
                found.append(call)
    return found


def test_no_module_loads_formats_that_can_execute_code() -> None:
    packages = sorted({path.parent for path in ROOT.glob("*/__init__.py")} - {ROOT / "latent_t2i"})
    assert len(packages) == 8
    for package in packages:
        for path in package.rglob("*.py"):
            assert unsafe_loads(path.read_text()) == [], path


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import pickle", ["pickle"]),
        ("from pickle import loads", ["pickle"]),
        ("torch.load(path)", ["torch.load"]),
        ("torch.load(path, weights_only=True)", []),
        ("np.load(path)", ["np.load"]),
        ("np.load(path, allow_pickle=False)", []),
        ("np.load(path, allow_pickle=True)", ["np.load"]),
    ],
)
def test_unsafe_loads_are_detected(source: str, found: list[str]) -> None:
    assert unsafe_loads(source) == found
