"""The averages of the weights against the formulas, and post-hoc ones against direct sums."""

import itertools
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
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
from latent_t2i.model.ema import EMA, MAX_SIGMA_REL, EMAConfig, gamma_of, power_decay, sigma_rel_of
from latent_t2i.model.paths import ROOT
from latent_t2i.model.posthoc import Profile, mix, synthesise
from tests import bundles

POWERS = EMAConfig(decay=None, sigma_rels=(0.05, 0.1))


def walk(layer: nn.Module, num_steps: int) -> Iterator[int]:
    """Moves a layer's weights at random, a step at a time; yields the number of steps before."""
    generator = torch.Generator().manual_seed(3)
    for step in range(num_steps):
        for parameter in layer.parameters():
            parameter.data.add_(torch.randn(parameter.shape, generator=generator))
        yield step


def direct_sum(history: list[Tensor], sigma_rel: float) -> Tensor:
    """The mean of the weights of steps 1 to T by the power profile, integrated over each step."""
    powers = np.arange(len(history) + 1.0) ** (gamma_of(sigma_rel) + 1)
    shares = torch.from_numpy(np.diff(powers) / powers[-1])
    return torch.einsum("t,t...->...", shares, torch.stack(history).double())


def test_the_average_follows_the_formula() -> None:
    layer = nn.Linear(3, 2)
    ema = EMA(EMAConfig(decay=0.6), layer.named_parameters())
    expected = {name: p.detach().clone() for name, p in layer.named_parameters()}
    for step in walk(layer, 20):
        ema.update(layer.parameters(), step)
        decay = min(0.6, (1 + step) / (10 + step))
        for name, p in layer.named_parameters():
            expected[name] = decay * expected[name] + (1 - decay) * p.detach()
    for name, average in ema.average.items():
        torch.testing.assert_close(average, expected[name])


def test_one_foreach_call_is_a_loop_over_tensors_bit_by_bit() -> None:
    network = nn.Sequential(nn.Conv2d(3, 5, 3), nn.Linear(7, 4)).to(
        memory_format=torch.channels_last
    )
    config = EMAConfig(decay=0.99, sigma_rels=(0.05, 0.1))
    ema = EMA(config, network.named_parameters())
    looped = [[p.detach().clone() for p in network.parameters()] for _ in range(3)]
    for step in walk(network, 10):
        ema.update(network.parameters(), step)
        for averages, decay in zip(looped, ema.decays_at(step), strict=True):
            for average, parameter in zip(averages, network.parameters(), strict=True):
                average.lerp_(parameter.detach(), 1.0 - decay)
    flat = itertools.chain.from_iterable(looped)
    for (name, ours), expected in zip(ema.state_dict().items(), flat, strict=True):
        assert torch.equal(ours, expected), name


@pytest.mark.parametrize("sigma_rel", [0.01, 0.05, 0.1, 0.25])
def test_a_power_average_is_the_direct_sum_over_all_steps(sigma_rel: float) -> None:
    layer, history = nn.Linear(4, 3), []
    ema = EMA(EMAConfig(decay=None, sigma_rels=(sigma_rel,)), layer.named_parameters())
    for step in walk(layer, 300):
        ema.update(layer.parameters(), step)
        history.append(layer.weight.detach().clone())
        expected = direct_sum(history, sigma_rel).float()
        torch.testing.assert_close(ema.average["weight"], expected, rtol=1e-5, atol=1e-4)


def test_the_first_weights_count_for_nothing_in_a_power_average() -> None:
    layer = nn.Linear(4, 3)
    ema = EMA(POWERS, layer.named_parameters())
    nn.init.constant_(layer.weight, 7.0)
    ema.update(layer.parameters(), 0)
    assert all((average["weight"] == 7.0).all() for average in ema.powers.values())


def test_gammas_of_the_paper() -> None:
    assert gamma_of(0.10) == pytest.approx(6.94, abs=0.005)
    assert gamma_of(0.05) == pytest.approx(16.97, abs=0.005)


@pytest.mark.parametrize("sigma_rel", [0.001, 0.02, 0.05, 0.1, 0.2, 0.288])
def test_width_and_exponent_are_inverse_and_the_width_is_that_of_the_profile(
    sigma_rel: float,
) -> None:
    gamma = gamma_of(sigma_rel)
    assert sigma_rel_of(gamma) == pytest.approx(sigma_rel, rel=1e-9)
    times = (np.arange(2_000_000) + 0.5) / 2_000_000
    shares = times**gamma / (times**gamma).sum()
    mean = (shares * times).sum()
    assert ((shares * (times - mean) ** 2).sum()) ** 0.5 == pytest.approx(sigma_rel, rel=1e-5)


def test_the_greatest_width_is_that_of_the_plain_mean() -> None:
    assert sigma_rel_of(0.0) == pytest.approx(MAX_SIGMA_REL)
    assert gamma_of(MAX_SIGMA_REL - 1e-9) == pytest.approx(0.0, abs=1e-6)


def test_half_precision_weights_have_a_float32_average() -> None:
    layer = nn.Linear(3, 2).half()
    ema = EMA(EMAConfig(), layer.named_parameters())
    ema.update(layer.parameters(), 0)
    assert {average.dtype for average in ema.average.values()} == {torch.float32}


def test_without_warmup_the_decay_is_constant() -> None:
    ema = EMA(EMAConfig(decay=0.9, warmup=False), nn.Linear(1, 1).named_parameters())
    assert ema.decays_at(0) == ema.decays_at(1000) == [0.9]


def test_the_bundle_gets_the_decays_average_or_else_the_first_power() -> None:
    layer = nn.Linear(1, 1)
    both = EMA(EMAConfig(sigma_rels=(0.1, 0.05)), layer.named_parameters())
    only = EMA(EMAConfig(decay=None, sigma_rels=(0.1, 0.05)), layer.named_parameters())
    for ema in (both, only):
        for step in walk(layer, 3):
            ema.update(layer.parameters(), step)
    assert both.decays_at(1) == [2 / 11, *only.decays_at(1)]
    assert only.decays_at(1) == [power_decay(gamma_of(0.1), 1), power_decay(gamma_of(0.05), 1)]
    assert both.average is not both.powers[0.1]
    assert only.average is only.powers[0.1]


def test_averages_are_restored_in_place() -> None:
    layer = nn.Linear(3, 2)
    config = EMAConfig(decay=0.9, sigma_rels=(0.05, 0.1))
    first = EMA(config, layer.named_parameters())
    for step in walk(layer, 5):
        first.update(layer.parameters(), step)
    second = EMA(config, layer.named_parameters())
    kept = second.average["weight"]
    second.load(first.state_dict())
    assert second.average["weight"] is kept
    for name, tensor in first.state_dict().items():
        assert torch.equal(second.state_dict()[name], tensor), name
    assert not torch.equal(first.powers[0.05]["weight"], first.powers[0.1]["weight"])


def test_a_decays_average_alone_is_stored_under_the_parameters_names() -> None:
    assert list(EMA(EMAConfig(), nn.Linear(1, 1).named_parameters()).state_dict()) == [
        "weight",
        "bias",
    ]


def test_averages_of_other_profiles_are_refused_naming_both() -> None:
    parameters = list(nn.Linear(3, 2).named_parameters())
    saved = EMA(EMAConfig(sigma_rels=(0.05,)), parameters).state_dict()
    message = r"has averages of decay, sigma_rel 0.05, the settings ask for decay, sigma_rel 0.1;"
    with pytest.raises(ValueError, match=message):
        EMA(EMAConfig(sigma_rels=(0.1,)), parameters).load(saved)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"decay": 1.0}, r"ema.decay: expected 0 <= decay < 1, found 1.0"),
        ({"decay": None}, r"ema.decay, ema.sigma_rels: give at least one, found neither"),
        ({"sigma_rels": (0.3,)}, r"ema.sigma_rels: expected .* less than 0.2887, .* found 0.3"),
        ({"sigma_rels": (0.0,)}, r"ema.sigma_rels: expected more than 0 .* found 0.0"),
        ({"sigma_rels": (0.1, 0.1)}, r"ema.sigma_rels: one comes twice, found \(0.1, 0.1\)"),
        (
            {"sigma_rels": (0.1,), "snapshot_every_steps": 5},
            r"ema.snapshot_every_steps: .* two or more of ema.sigma_rels .* found \(0.1,\)",
        ),
        (
            {"sigma_rels": (0.1, 0.05), "snapshot_every_steps": 0},
            r"ema.snapshot_every_steps: expected more than 0, found 0",
        ),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EMAConfig(**settings)


def grid(num_snapshots: int, num_steps: int, sigma_rels: tuple[float, ...]) -> list[Profile]:
    """The profiles of evenly spaced snapshots."""
    steps = [num_steps * (number + 1) // num_snapshots for number in range(num_snapshots)]
    return [Profile(step=step, sigma_rel=each) for step in steps for each in sigma_rels]


def test_shares_are_those_of_the_papers_algorithm() -> None:
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
    assert mix(profiles, wanted).shares == pytest.approx(expected, abs=1e-3)


def test_a_profile_that_is_there_is_taken_as_it_is() -> None:
    profiles = grid(10, 1000, (0.05, 0.1))
    mixture = mix(profiles, profiles[-1])
    assert mixture.error < 1e-9
    assert mixture.shares == pytest.approx([0.0] * 19 + [1.0], abs=1e-9)


@pytest.mark.parametrize("sigma_rel", [0.02, 0.07, 0.2])
def test_shares_add_up_to_one(sigma_rel: float) -> None:
    mixture = mix(grid(10, 1000, (0.05, 0.1)), Profile(step=1000, sigma_rel=sigma_rel))
    assert sum(mixture.shares) == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("max_cells", [999, 4000])
def test_the_norm_of_a_profile_is_the_papers(
    monkeypatch: pytest.MonkeyPatch, max_cells: int
) -> None:
    monkeypatch.setattr(posthoc, "MAX_CELLS", max_cells)
    profile, gamma = Profile(step=3000, sigma_rel=0.1), gamma_of(0.1)
    cells = posthoc._cells(posthoc._cell_edges([4000, 3000, 17]), profile)
    expected = (gamma + 1) ** 2 / ((2 * gamma + 1) * 3000)  # equation 151
    assert float((cells**2).sum()) == pytest.approx(expected, rel=1e-3)


def test_more_snapshots_match_better() -> None:
    wanted = Profile(step=3000, sigma_rel=0.03)
    errors = [mix(grid(count, 3000, (0.05, 0.1)), wanted).error for count in (5, 10, 20, 40)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.02 < errors[0]


def test_runs_too_long_to_compare_step_by_step_are_compared_in_pieces(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    profiles = grid(16, 8000, (0.05, 0.1))
    wanted = Profile(step=8000, sigma_rel=0.15)
    exact = mix(profiles, wanted)
    monkeypatch.setattr(posthoc, "MAX_CELLS", 1000)
    coarse = mix(profiles, wanted)
    assert coarse.error == pytest.approx(exact.error, rel=0.01)
    assert coarse.shares == pytest.approx(exact.shares, abs=1e-3)


@pytest.mark.parametrize("sigma_rel", [0.03, 0.07, 0.2])
def test_the_error_is_that_of_what_each_step_counts_for(tmp_path: Path, sigma_rel: float) -> None:
    num_steps = 200
    weight = nn.Parameter(torch.zeros(num_steps))  # number s is 1 in step s and 0 in all others,
    config = EMAConfig(sigma_rels=(0.05, 0.1), snapshot_dtype="float32")
    ema = EMA(config, [("weight", weight)])  # so an average is what each step counts for in it
    for step in range(num_steps):
        weight.data = torch.eye(num_steps)[step]
        ema.update([weight], step)
        if (step + 1) % 20 == 0:
            posthoc.save_snapshot(
                tmp_path, ema.config, ema.powers, step=step + 1, train_s=0.0, settings={}
            )
    snapshots = posthoc.read_snapshots(tmp_path)
    mixture = posthoc.choose(snapshots, sigma_rel, None, 0.2)
    made = posthoc.blend(mixture, snapshots)["weight"]
    wanted = direct_sum(list(torch.eye(num_steps)), sigma_rel).float()
    error = float((made - wanted).norm() / wanted.norm())
    assert error == pytest.approx(mixture.error, rel=1e-3)
    assert error > 1e-3


@pytest.mark.parametrize("sigma_rel", [0.03, 0.07, 0.15, 0.2])
def test_a_mixture_is_the_direct_sum_within_the_error_it_reports(
    tmp_path: Path, sigma_rel: float
) -> None:
    layer, history, num_steps = nn.Linear(4, 3), [], 400
    config = EMAConfig(sigma_rels=(0.05, 0.1), snapshot_dtype="float32")
    ema = EMA(config, layer.named_parameters())
    for step in walk(layer, num_steps):
        ema.update(layer.parameters(), step)
        history.append(layer.weight.detach().clone())
        if (step + 1) % 40 == 0:
            posthoc.save_snapshot(
                tmp_path, ema.config, ema.powers, step=step + 1, train_s=0.0, settings={}
            )
    snapshots = posthoc.read_snapshots(tmp_path)
    mixture = posthoc.choose(snapshots, sigma_rel, None, 0.1)
    made = posthoc.blend(mixture, snapshots)["weight"].double()
    off = (made - direct_sum(history, sigma_rel)).norm()
    # Cauchy and Schwarz: shares that sum to 0, times weights less any constant
    powers = np.arange(num_steps + 1.0) ** (gamma_of(sigma_rel) + 1)
    profile_norm = float(np.linalg.norm(np.diff(powers) / powers[-1]))
    weights = torch.stack(history).double()
    bound = mixture.error * profile_norm * (weights - weights.mean(0)).norm()
    assert off < bound + 1e-4
    nearest = min(
        (made - direct_sum(history, other)).norm() for other in (sigma_rel * 0.8, sigma_rel * 1.2)
    )
    assert off < nearest


# ---------------------------------------------------------------- whole runs' folders


def make_run(
    folder: Path, *, num_snapshots: int = 12, dtype: str = "float32", seed: int = 0
) -> dict[int, dict[str, Tensor]]:
    """Writes a bundle and snapshots of a random walk from its weights; returns them by step."""
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
            posthoc.save_snapshot(
                folder / "snapshots",
                ema.config,
                ema.powers,
                step=step,
                train_s=step / 2,
                settings=info["config"],
            )
    return history


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, dict[str, Tensor]]]:
    folder = tmp_path_factory.mktemp("finished") / "run"
    return folder, make_run(folder)


@pytest.fixture
def run(finished: tuple[Path, Any], tmp_path: Path) -> Path:
    """A finished run with 12 snapshots, a copy to spoil."""
    return shutil.copytree(finished[0], tmp_path / "run")


def network(bundle: Path) -> dict[str, Tensor]:
    return load_file(bundle / "unet" / "diffusion_pytorch_model.safetensors")


def test_the_command_writes_a_bundle_and_says_how_well_it_fits(
    run: Path,
    finished: tuple[Path, dict[int, dict[str, Tensor]]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    posthoc.main(["--run", str(run), "--sigma-rel", "0.15"])
    out = run / "bundle-0.15"
    said = capsys.readouterr().out
    assert said.startswith(f"{out}: sigma_rel 0.15 at step 120 from 24 averages; the profile is")
    info = read_info(out)
    assert (info["step"], info["train_seconds"], info["metrics"]) == (120, 60.0, {"loss": 1.0})
    assert f"{info['ema']['profile_error']:.2%}" in said
    history = [each["conv_in.weight"] for each in finished[1].values()]
    expected = direct_sum(history, 0.15).float()
    torch.testing.assert_close(network(out)["conv_in.weight"], expected, rtol=0, atol=3e-3)
    assert not torch.allclose(network(run / "bundle")["conv_in.weight"], expected, atol=3e-3)
    StableDiffusionPipeline.from_pretrained(out)
    for path in (run / "bundle").rglob("*.*"):
        if path.is_file() and path.name != INFO_FILE and path.parent.name != "unet":
            assert (out / path.relative_to(run / "bundle")).read_bytes() == path.read_bytes()


def test_an_earlier_step_has_figures_of_its_own(run: Path) -> None:
    out, mixture = synthesise(run, 0.1, step=80)
    assert out == run / "bundle-0.1-step-00000080"
    assert len(mixture.profiles) == 16
    info = read_info(out)
    assert (info["step"], info["train_seconds"], info["metrics"]) == (80, 40.0, {})
    snapshot = posthoc.folder_of(run / "snapshots", 80) / "sigma_rel-0.1.safetensors"
    for name, tensor in load_file(snapshot).items():
        torch.testing.assert_close(network(out)[name], tensor, rtol=1e-6, atol=1e-7)


def test_float16_snapshots_and_bundles_keep_their_types(tmp_path: Path) -> None:
    make_run(tmp_path, dtype="float16")
    path = tmp_path / "bundle" / "unet" / "diffusion_pytorch_model.safetensors"
    halved = {name: tensor.half() for name, tensor in load_file(path).items()}
    save_file(halved, path, metadata={"format": "pt"})
    out, _ = synthesise(tmp_path, 0.15)
    assert {tensor.dtype for tensor in network(out).values()} == {torch.float16}
    kept = posthoc.folder_of(tmp_path / "snapshots", 10) / "sigma_rel-0.05.safetensors"
    assert {tensor.dtype for tensor in load_file(kept).values()} == {torch.float16}


def test_snapshots_past_a_step_that_is_taken_again_go(tmp_path: Path) -> None:
    ema = EMA(POWERS, nn.Linear(2, 2).named_parameters())
    (tmp_path / ".step-00000007.partial").mkdir(parents=True)
    for step in (10, 20, 30, 20):
        posthoc.save_snapshot(tmp_path, ema.config, ema.powers, step=step, train_s=0.0, settings={})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000010", "step-00000020"]


def test_a_write_that_fails_leaves_no_snapshot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(posthoc, "save_file", full)
    ema = EMA(POWERS, nn.Linear(2, 2).named_parameters())
    with pytest.raises(OSError, match="no space"):
        posthoc.save_snapshot(tmp_path, ema.config, ema.powers, step=1, train_s=0.0, settings={})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sigma-rel", "0.3"], r"--sigma-rel: expected .* less than 0.2887, .* found 0.3"),
        (
            ["--sigma-rel", "0.005"],
            r"--sigma-rel: 0.005 at step 120 is out of reach of 24 averages in 12 snapshots: .* "
            r"missed by \d+.\d% .* they reach from 0.03 to 0.2\d",
        ),
        (["--sigma-rel", "0.07", "--max-error", "0"], r"no width is within --max-error 0.0"),
        (["--sigma-rel", "0.1", "--step", "85"], r"no snapshot of step 85; there are 10, 20, 30, "),
        (["--sigma-rel", "0.1", "--out", "RUN/bundle"], r"--out: .* is the run's own bundle"),
        (["--sigma-rel", "0.1", "--out", "RUN"], r"--out: .* exists and is no bundle"),
    ],
)
def test_what_cannot_be_made_is_one_line_and_exit_code_two(
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


def test_a_run_without_what_it_takes_is_refused(run: Path) -> None:
    for snapshot in posthoc.find_folders(run / "snapshots"):
        record = json.loads((snapshot / posthoc.SNAPSHOT_FILE).read_text())
        record["sigma_rels"] = [0.05]
        (snapshot / posthoc.SNAPSHOT_FILE).write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"of sigma_rel 0.05 only; another length needs"):
        synthesise(run, 0.1)
    shutil.rmtree(run / "snapshots")
    with pytest.raises(ValueError, match=r"--run: no snapshots in .*; train with ema.sigma_rels"):
        synthesise(run, 0.1)
    shutil.rmtree(run / "bundle")
    with pytest.raises(ValueError, match=r"--run: no finished bundle in .*; it is written when"):
        synthesise(run, 0.1)
    with pytest.raises(ValueError, match=r"--run: no folder 'runs/nobody' here or in the project"):
        synthesise("runs/nobody", 0.1)


def spoil(run: Path, **changes: Any) -> Path:
    """Puts other tensors into one average of the fourth snapshot."""
    path = posthoc.folder_of(run / "snapshots", 40) / "sigma_rel-0.1.safetensors"
    save_file({**load_file(path), **changes}, path)
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"conv_in.bias": torch.zeros(5)},
            r"sigma_rel-0.1.safetensors: another network's snapshot: conv_in.bias has shape \[5\], "
            r"in the bundle \[16\]",
        ),
        ({"more": torch.zeros(5)}, r"another network's snapshot: more has .* the bundle none"),
        ({"conv_in.bias": torch.full((16,), torch.nan)}, r"0.1.safetensors: holds .* not finite"),
    ],
)
def test_a_snapshot_of_another_network_or_of_no_use_is_named(
    run: Path, changes: dict[str, Tensor], message: str
) -> None:
    spoil(run, **changes)
    with pytest.raises(ValueError, match=message):
        synthesise(run, 0.15)
    assert not (run / "bundle-0.15").exists()


def test_another_runs_snapshot_is_named_with_both_values(run: Path) -> None:
    path = posthoc.folder_of(run / "snapshots", 40) / posthoc.SNAPSHOT_FILE
    record = json.loads(path.read_text())
    record["config"]["seed"] = 9
    path.write_text(json.dumps(record))
    message = r"step-00000040: another run's snapshot: seed is 9, the bundle's 0; delete"
    with pytest.raises(ValueError, match=message):
        synthesise(run, 0.15)
    shutil.rmtree(path.parent)
    _, mixture = synthesise(run, 0.15)
    assert len(mixture.profiles) == 22


@pytest.mark.parametrize("name", ["sigma_rel-0.1.safetensors", posthoc.SNAPSHOT_FILE])
def test_a_truncated_snapshot_is_named_with_the_remedy(run: Path, name: str) -> None:
    path = posthoc.folder_of(run / "snapshots", 40) / name
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"step-00000040.*: damaged \(.*\); delete the folder"):
        synthesise(run, 0.15)


def test_the_module_is_the_command(run: Path) -> None:
    command = [sys.executable, "-W", "error", "-m", "latent_t2i.model.ema", "--run", str(run)]
    done = subprocess.run(
        [*command, "--sigma-rel", "0.12"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "the profile is matched to" in done.stdout
    assert read_info(run / "bundle-0.12")["ema"]["sigma_rel"] == 0.12
