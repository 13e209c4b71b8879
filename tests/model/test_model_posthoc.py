"""Averages of other widths, made from snapshots, agree with direct sums over all steps."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from latent_t2i.model import posthoc
from latent_t2i.model.bundle import INFO_FILE, read_info
from latent_t2i.model.config import EMAConfig
from latent_t2i.model.ema import EMA, gamma_of
from latent_t2i.model.paths import ROOT
from latent_t2i.model.posthoc import Profile, mix, synthesise
from tests import bundles
from tests.weights import direct_sum

POWERS = EMAConfig(decay=None, sigma_rels=(0.05, 0.1), snapshot_dtype="float32")


def save(folder: Path, ema: EMA, step: int, settings: dict[str, Any] | None = None) -> None:
    posthoc.save_snapshot(
        folder, ema.config, ema.powers, step=step, train_s=step / 2, settings=settings or {}
    )


def grid(num_snapshots: int, num_steps: int, sigma_rels: tuple[float, ...]) -> list[Profile]:
    """Returns the profiles of evenly spaced snapshots."""
    steps = [num_steps * (number + 1) // num_snapshots for number in range(num_snapshots)]
    return [Profile(step=step, sigma_rel=each) for step in steps for each in sigma_rels]


def test_shares_match_the_algorithm_of_the_paper() -> None:
    profiles = grid(8, 4000, (0.05, 0.1))
    wanted = Profile(step=4000, sigma_rel=0.07)
    steps = np.array([[p.step for p in (*profiles, wanted)]], np.float64)
    gammas = np.array([[gamma_of(p.sigma_rel) for p in (*profiles, wanted)]])
    ratio = steps.T / steps
    exponent = np.where(ratio < 1, gammas, -gammas.T)
    inner = (gammas.T + 1) * (gammas + 1) * ratio**exponent
    inner /= (gammas.T + gammas + 1) * np.maximum(steps.T, steps)  # equation 151
    expected = np.linalg.solve(inner[:-1, :-1], inner[:-1, -1])
    expected /= expected.sum()
    assert mix(profiles, wanted)[0].shares == pytest.approx(expected, abs=1e-3)


def test_shares_of_known_and_of_other_widths() -> None:
    profiles = grid(10, 1000, (0.05, 0.1))
    others = [Profile(step=1000, sigma_rel=sigma_rel) for sigma_rel in (0.02, 0.07, 0.2)]
    known, *mixtures = mix(profiles, profiles[-1], *others)
    assert known.error < 1e-9
    assert known.shares == pytest.approx([0.0] * 19 + [1.0], abs=1e-9)
    assert [sum(each.shares) for each in mixtures] == pytest.approx([1.0] * 3, abs=1e-12)


def test_more_snapshots_reduce_the_error() -> None:
    wanted = Profile(step=3000, sigma_rel=0.03)
    errors = [mix(grid(count, 3000, (0.05, 0.1)), wanted)[0].error for count in (5, 10, 20, 40)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.02 < errors[0]


def test_coarse_intervals_give_nearly_the_same_mixture(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    profiles = grid(16, 8000, (0.05, 0.1))
    wanted = Profile(step=8000, sigma_rel=0.15)
    (exact,) = mix(profiles, wanted)
    monkeypatch.setattr(posthoc, "MAX_CELLS", 1000)
    (coarse,) = mix(profiles, wanted)
    assert coarse.error == pytest.approx(exact.error, rel=0.01)
    assert coarse.shares == pytest.approx(exact.shares, abs=1e-3)


@pytest.mark.parametrize("sigma_rel", [0.03, 0.07, 0.15, 0.2])
def test_a_mixture_approximates_the_direct_sum_with_the_reported_error(
    tmp_path: Path, sigma_rel: float
) -> None:
    num_steps = 200
    # Element s is 1 in step s and 0 in all others, so an average consists of the step weights.
    weight = nn.Parameter(torch.zeros(num_steps))
    ema = EMA(POWERS, [("weight", weight)])
    for step in range(num_steps):
        weight.data = torch.eye(num_steps)[step]
        ema.update([weight], step)
        if (step + 1) % 20 == 0:
            save(tmp_path, ema, step + 1)
    snapshots = posthoc.read_snapshots(tmp_path)
    mixture = posthoc.choose_mixture(snapshots, sigma_rel, None, 0.2)
    made = posthoc.blend(mixture, snapshots, {"weight": weight.detach()})["weight"]
    wanted, narrower, wider = (
        direct_sum(list(torch.eye(num_steps)), width).float()
        for width in (sigma_rel, 0.8 * sigma_rel, 1.2 * sigma_rel)
    )
    error = float((made - wanted).norm() / wanted.norm())
    assert error == pytest.approx(mixture.error, rel=1e-3)
    assert error > 1e-3
    assert (made - wanted).norm() < min((made - narrower).norm(), (made - wider).norm())


def make_run(
    folder: Path, *, num_snapshots: int = 12, dtype: str = "float32", seed: int = 0
) -> dict[int, dict[str, Tensor]]:
    """Writes a run: a bundle, and snapshots of a random walk; returns the weights by step."""
    bundles.make_bundle(folder / "bundle")
    info = read_info(folder / "bundle")
    info["step"] = num_snapshots * 10
    info["metrics"] = {"loss": 1.0}
    info["config"] = {"seed": seed, "batch_size": 4, "optim": {}}
    (folder / "bundle" / INFO_FILE).write_text(json.dumps(info))
    tensors = load_file(folder / "bundle" / "unet" / "diffusion_pytorch_model.safetensors")
    named = [(name, nn.Parameter(tensor)) for name, tensor in tensors.items()]
    config = EMAConfig(sigma_rels=(0.05, 0.1), snapshot_dtype=dtype)  # type: ignore[arg-type]
    ema = EMA(config, named)
    history = {}
    generator = torch.Generator().manual_seed(seed)
    for step in range(1, num_snapshots * 10 + 1):
        for _, parameter in named:
            parameter.data.add_(0.01 * torch.randn(parameter.shape, generator=generator))
        ema.update([parameter for _, parameter in named], step - 1)
        history[step] = {"conv_in.weight": dict(named)["conv_in.weight"].detach().clone()}
        if step % 10 == 0:
            save(folder / "snapshots", ema, step, info["config"])
    return history


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, dict[str, Tensor]]]:
    folder = tmp_path_factory.mktemp("finished") / "run"
    return folder, make_run(folder)


@pytest.fixture
def run(finished: tuple[Path, Any], tmp_path: Path) -> Path:
    """A copy of a finished run with 12 snapshots, which a test may damage."""
    return shutil.copytree(finished[0], tmp_path / "run")


def network(bundle: Path) -> dict[str, Tensor]:
    return load_file(bundle / "unet" / "diffusion_pytorch_model.safetensors")


def test_the_command_writes_a_bundle_and_prints_its_error(
    run: Path,
    finished: tuple[Path, dict[int, dict[str, Tensor]]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    posthoc.main(["--run", str(run), "--sigma-rel", "0.15"])
    out = run / "bundle-0.15"
    printed = capsys.readouterr().out
    assert printed.startswith(f"{out}: sigma_rel 0.15 at step 120 from 24 averages; error of the")
    info = read_info(out)
    assert (info["step"], info["train_seconds"], info["metrics"]) == (120, 60.0, {"loss": 1.0})
    assert f"{info['ema']['profile_error']:.2%}" in printed
    history = [each["conv_in.weight"] for each in finished[1].values()]
    expected = direct_sum(history, 0.15).float()
    torch.testing.assert_close(network(out)["conv_in.weight"], expected, rtol=0, atol=3e-3)
    assert not torch.allclose(network(run / "bundle")["conv_in.weight"], expected, atol=3e-3)
    StableDiffusionPipeline.from_pretrained(out)
    for path in (run / "bundle").rglob("*.*"):
        if path.is_file() and path.name != INFO_FILE and path.parent.name != "unet":
            assert (out / path.relative_to(run / "bundle")).read_bytes() == path.read_bytes()


def test_an_earlier_step_keeps_its_own_time_and_no_metrics(run: Path) -> None:
    out, mixture = synthesise(run, 0.1, step=80)
    assert out == run / "bundle-0.1-step-00000080"
    assert len(mixture.profiles) == 16
    info = read_info(out)
    assert (info["step"], info["train_seconds"], info["metrics"]) == (80, 40.0, {})
    snapshot = posthoc.folder_of(run / "snapshots", 80) / "sigma_rel-0.1.safetensors"
    for name, tensor in load_file(snapshot).items():
        torch.testing.assert_close(network(out)[name], tensor, rtol=1e-6, atol=1e-7)


def test_float16_snapshots_and_bundles_keep_their_dtypes(tmp_path: Path) -> None:
    make_run(tmp_path, dtype="float16")
    path = tmp_path / "bundle" / "unet" / "diffusion_pytorch_model.safetensors"
    halved = {name: tensor.half() for name, tensor in load_file(path).items()}
    save_file(halved, path, metadata={"format": "pt"})
    out, _ = synthesise(tmp_path, 0.15)
    assert {tensor.dtype for tensor in network(out).values()} == {torch.float16}
    kept = posthoc.folder_of(tmp_path / "snapshots", 10) / "sigma_rel-0.05.safetensors"
    assert {tensor.dtype for tensor in load_file(kept).values()} == {torch.float16}


def test_later_snapshots_are_deleted_when_a_step_is_repeated(tmp_path: Path) -> None:
    ema = EMA(POWERS, nn.Linear(2, 2).named_parameters())
    (tmp_path / ".step-00000007.partial").mkdir(parents=True)
    for step in (10, 20, 30, 20):
        save(tmp_path, ema, step)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000010", "step-00000020"]


def test_a_failed_write_leaves_no_snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(posthoc, "save_file", full)
    ema = EMA(POWERS, nn.Linear(2, 2).named_parameters())
    with pytest.raises(OSError, match="no space"):
        save(tmp_path, ema, 1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sigma-rel", "0.3"], r"--sigma-rel: expected .* less than 0.2886\d+, found 0.3"),
        (
            ["--sigma-rel", "0.005"],
            r"--sigma-rel: 0.005 at step 120 cannot be synthesised from 24 averages in 12 "
            r"snapshots: the error is \d+.\d%, expected at most --max-error 0.1; possible "
            r"are 0.03 to 0.2\d,",
        ),
        (
            ["--sigma-rel", "0.07", "--max-error", "0"],
            r"at most --max-error 0.0; no width is possible",
        ),
        (
            ["--sigma-rel", "0.1", "--step", "85"],
            r"no snapshot of step 85; expected one of 10, 20, 30, ",
        ),
        (["--sigma-rel", "0.1", "--out", "RUN/bundle"], r"--out: .* is the run's own bundle"),
        (["--sigma-rel", "0.1", "--out", "RUN"], r"--out: .* exists and is not a bundle"),
    ],
)
def test_errors_are_one_line_with_exit_code_two(
    run: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as exit_:
        posthoc.main(["--run", str(run), *(each.replace("RUN", str(run)) for each in arguments)])
    assert exit_.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: --")
    with pytest.raises(ValueError, match=message):
        raise ValueError(line)
    assert sorted(p.name for p in run.iterdir()) == ["bundle", "snapshots"]


def test_a_run_without_bundle_or_snapshots_is_refused(run: Path) -> None:
    for snapshot in posthoc.find_folders(run / "snapshots"):
        record = json.loads((snapshot / posthoc.SNAPSHOT_FILE).read_text())
        record["sigma_rels"] = [0.05]
        (snapshot / posthoc.SNAPSHOT_FILE).write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"has snapshots of sigma_rel 0.05 only; expected .* two"):
        synthesise(run, 0.1)
    shutil.rmtree(run / "snapshots")
    with pytest.raises(
        ValueError, match=r"--run: .* has no snapshots; .* train with --ema.sigma-rels"
    ):
        synthesise(run, 0.1)
    shutil.rmtree(run / "bundle")
    with pytest.raises(ValueError, match=r"--run: no finished bundle in .*; it is written when"):
        synthesise(run, 0.1)
    with pytest.raises(
        ValueError, match=r"--run: no folder 'runs/nobody' in the current directory or the project"
    ):
        synthesise("runs/nobody", 0.1)


def replace_tensors(run: Path, **changes: Any) -> None:
    """Replaces tensors of one average in the fourth snapshot."""
    path = posthoc.folder_of(run / "snapshots", 40) / "sigma_rel-0.1.safetensors"
    save_file({**load_file(path), **changes}, path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"conv_in.bias": torch.zeros(5)},
            r"sigma_rel-0.1.safetensors: snapshot of another network: the shape of conv_in.bias is "
            r"\[5\], in the bundle \[16\]",
        ),
        (
            {"more": torch.zeros(5)},
            r"another network: the shape of more is \[5\], in the bundle None",
        ),
        (
            {"conv_in.bias": torch.full((16,), torch.nan)},
            r"0.1.safetensors: contains .* not finite",
        ),
    ],
)
def test_unusable_snapshots_are_refused(
    run: Path, changes: dict[str, Tensor], message: str
) -> None:
    replace_tensors(run, **changes)
    with pytest.raises(ValueError, match=message):
        synthesise(run, 0.15)
    assert not (run / "bundle-0.15").exists()


def test_a_snapshot_of_another_run_is_refused(run: Path) -> None:
    path = posthoc.folder_of(run / "snapshots", 40) / posthoc.SNAPSHOT_FILE
    record = json.loads(path.read_text())
    record["config"]["seed"] = 9
    path.write_text(json.dumps(record))
    message = r"step-00000040: snapshot of another run: seed is 9, in the bundle 0; delete"
    with pytest.raises(ValueError, match=message):
        synthesise(run, 0.15)
    shutil.rmtree(path.parent)
    _, mixture = synthesise(run, 0.15)
    assert len(mixture.profiles) == 22


@pytest.mark.parametrize(
    "changes",
    [
        {"step": 50},
        {"step": 40.0},
        {"train_s": "x"},
        {"sigma_rels": 0.1},
        {"sigma_rels": ["x"]},
        {"dtype": "int8"},
        {"config": []},
    ],
)
def test_a_snapshot_with_invalid_fields_is_refused(run: Path, changes: dict[str, Any]) -> None:
    path = posthoc.folder_of(run / "snapshots", 40) / posthoc.SNAPSHOT_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ValueError, match=r"step-00000040: damaged \(.*\); delete the folder"):
        synthesise(run, 0.15)


@pytest.mark.parametrize("name", ["sigma_rel-0.1.safetensors", posthoc.SNAPSHOT_FILE])
def test_a_truncated_snapshot_is_refused(run: Path, name: str) -> None:
    path = posthoc.folder_of(run / "snapshots", 40) / name
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"step-00000040.*: damaged \(.*\); delete the folder"):
        synthesise(run, 0.15)


@pytest.mark.slow
def test_the_module_runs_as_a_command(run: Path) -> None:
    command = [sys.executable, "-W", "error", "-m", "latent_t2i.model.posthoc", "--run", str(run)]
    done = subprocess.run(
        [*command, "--sigma-rel", "0.12"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "error of the profile" in done.stdout
    assert read_info(run / "bundle-0.12")["ema"]["sigma_rel"] == 0.12
