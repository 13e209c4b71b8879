"""Post-hoc EMA: a bundle with an average of another width, made after training from snapshots.

Karras et al. 2024 (2312.02696), section 3.2 and algorithm 3. A snapshot is a known linear
combination of the weights of all steps so far. The combination of snapshots that is nearest to the
wanted average is a small least-squares problem, and its error is known without reading any weights.

    python -m model.posthoc --run runs/NAME --sigma-rel 0.1 [--step N] [--out DIR]
"""

import argparse
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from latent_t2i.model.bundle import INFO_FILE, read_info
from latent_t2i.model.checks import read_json_object
from latent_t2i.model.config import EMAConfig, check_sigma_rel
from latent_t2i.model.ema import gamma_of
from latent_t2i.model.paths import complete_or_absent, find_path

SNAPSHOT_FILE = "snapshot.json"
MAX_CELLS = 16384
"""Longer runs are divided into this many intervals to compare profiles."""
MAX_ERROR = 0.1
"""Largest accepted relative error of a profile."""
SAME_RUN = ("seed", "batch_size", "shards_sha256", "objective")
"""Settings that must be equal in a snapshot and the bundle; otherwise it is from another run."""
ROUNDING = {"float16": 2.0**-12, "float32": 2.0**-25}
"""Approximate mean relative rounding error of a stored weight."""


@dataclass(frozen=True, kw_only=True)
class Profile:
    """A power-function average of the weights of steps 1 to `step`."""

    step: int
    sigma_rel: float


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """A linear combination of profiles that approximates the wanted one."""

    wanted: Profile
    profiles: tuple[Profile, ...]
    shares: tuple[float, ...]
    """Coefficient of each profile; they sum to 1."""
    error: float
    """Relative error of the mixture, in the 2-norm over all steps."""

    @property
    def gain(self) -> float:
        """Factor by which independent rounding errors of the snapshots grow."""
        return float(np.linalg.norm(self.shares))


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """The saved averages of one step: snapshot.json, and a file of weights for each width."""

    folder: Path
    step: int
    train_s: float
    sigma_rels: tuple[float, ...]
    dtype: str
    config: Mapping[str, Any]


def folder_of(snapshots: Path, step: int) -> Path:
    """Returns the folder of a step's snapshot."""
    return snapshots / f"step-{step:08d}"


def average_file(folder: Path, sigma_rel: float) -> Path:
    """Returns the file of one average in a snapshot's folder."""
    return folder / f"sigma_rel-{sigma_rel}.safetensors"


def find_folders(snapshots: Path) -> list[Path]:
    """Returns the folders of the complete snapshots, oldest first."""
    return sorted(path for path in snapshots.glob("step-*") if path.is_dir())


def save_snapshot(
    snapshots: Path,
    config: EMAConfig,
    powers: Mapping[float, Mapping[str, Tensor]],
    *,
    step: int,
    train_s: float,
    settings: Mapping[str, Any],
) -> None:
    """Writes the power-function averages (`EMA.powers`) after `step` updates.

    `settings` is the run's resolved config. Snapshots of later steps are deleted.
    """
    folder = folder_of(snapshots, step)
    # Partial snapshots are from a killed run. Later ones are from before the run returned to an
    # earlier checkpoint, or from a previous run in this folder.
    later = [path for path in find_folders(snapshots) if path.name > folder.name]
    for path in [*snapshots.glob(".step-*"), *later]:
        shutil.rmtree(path)
    dtype = getattr(torch, config.snapshot_dtype)
    record = {
        "step": step,
        "train_s": train_s,
        "sigma_rels": config.sigma_rels,
        "dtype": config.snapshot_dtype,
        "config": dict(settings),
    }
    with complete_or_absent(folder) as temporary:
        for sigma_rel, average in powers.items():
            packed = {name: tensor.to(dtype).contiguous() for name, tensor in average.items()}
            save_file(packed, average_file(temporary, sigma_rel))
        (temporary / SNAPSHOT_FILE).write_text(json.dumps(record, indent=1) + "\n")


def read_snapshots(snapshots: Path) -> list[Snapshot]:
    """Returns a run's snapshots, oldest first; raises ValueError for fewer than two widths."""
    found = [read_snapshot(folder) for folder in find_folders(snapshots)]
    widths = {sigma_rel for snapshot in found for sigma_rel in snapshot.sigma_rels}
    if len(widths) < 2:
        present = f"snapshots of sigma_rel {min(widths)} only" if widths else "no snapshots"
        raise ValueError(
            f"--run: {snapshots} has {present}; expected snapshots of two or more widths: train "
            "with --ema.sigma-rels 0.05 0.1 and --ema.snapshot-every-steps"
        )
    return found


def read_snapshot(folder: Path) -> Snapshot:
    """Returns one snapshot without its tensors; raises ValueError if it is damaged."""
    types = {"step": int, "train_s": float, "sigma_rels": list, "dtype": str, "config": dict}
    try:
        record = read_json_object(folder / SNAPSHOT_FILE, types)
        for sigma_rel in record["sigma_rels"]:
            check_sigma_rel("sigma_rels", sigma_rel)
        if folder_of(folder.parent, record["step"]) != folder or record["dtype"] not in ROUNDING:
            raise ValueError(f"unexpected step {record['step']} or dtype {record['dtype']!r:.80}")
    except (OSError, ValueError) as error:
        raise _damaged(folder, error) from error
    return Snapshot(
        folder=folder,
        step=record["step"],
        train_s=record["train_s"],
        sigma_rels=tuple(record["sigma_rels"]),
        dtype=record["dtype"],
        config=record["config"],
    )


def _damaged(path: Path, error: Exception) -> ValueError:
    return ValueError(
        f"{path}: damaged ({error}); delete the folder: one missing snapshot only lowers the "
        "accuracy, and training writes the bundle again"
    )


def mix(profiles: Sequence[Profile], *wanted: Profile) -> list[Mixture]:
    """Returns the least-squares mixture of `profiles` for each wanted profile, in float64."""
    edges = _cell_edges([profile.step for profile in (*profiles, *wanted)])
    columns = np.stack([_cells(edges, profile) for profile in profiles], axis=1)
    targets = np.stack([_cells(edges, profile) for profile in wanted], axis=1)
    # Algorithm 3 solves the normal equations of continuous profiles (equation 151). The SVD of the
    # discrete problem is more accurate, and the error is that of the weights as they are combined.
    shares = np.linalg.lstsq(columns, targets, rcond=None)[0]
    shares /= shares.sum(axis=0)  # as in the authors' code
    errors = np.linalg.norm(columns @ shares - targets, axis=0) / np.linalg.norm(targets, axis=0)
    return [
        Mixture(
            wanted=profile,
            profiles=tuple(profiles),
            shares=tuple(shares[:, number].tolist()),
            error=float(errors[number]),
        )
        for number, profile in enumerate(wanted)
    ]


def _cell_edges(steps: Sequence[int]) -> NDArray[np.float64]:
    """Returns the edges of the intervals of the run: single steps, or about MAX_CELLS intervals."""
    last = max(steps)
    even = np.linspace(0, last, min(last, MAX_CELLS) + 1).round()
    return np.union1d(even, np.asarray(steps, np.float64))


def _cells(edges: NDArray[np.float64], profile: Profile) -> NDArray[np.float64]:
    """Returns each interval's weight in a profile, divided by the square root of its length.

    The 2-norm is then that over single steps if the profile is constant within an interval.
    """
    gamma = gamma_of(profile.sigma_rel)
    cumulative: NDArray[np.float64] = np.minimum(edges / profile.step, 1.0) ** (gamma + 1)
    return np.diff(cumulative) / np.sqrt(np.diff(edges))


def choose_mixture(
    snapshots: Sequence[Snapshot], sigma_rel: float, step: int | None, max_error: float
) -> Mixture:
    """Returns the mixture for a width at a snapshot's step; None means the newest.

    Raises ValueError for a step without a snapshot, or a width with too large an error.
    """
    check_sigma_rel("--sigma-rel", sigma_rel)
    steps = [snapshot.step for snapshot in snapshots]
    step = steps[-1] if step is None else step
    if step not in steps:
        known = [str(each) for each in steps]
        shown = known if len(known) <= 8 else [*known[:4], "...", *known[-3:]]
        raise ValueError(f"--step: no snapshot of step {step}; expected one of {', '.join(shown)}")
    profiles = [
        Profile(step=snapshot.step, sigma_rel=width)
        for snapshot in snapshots
        if snapshot.step <= step
        for width in snapshot.sigma_rels
    ]
    mixture = mix(profiles, Profile(step=step, sigma_rel=sigma_rel))[0]
    if mixture.error > max_error:
        candidates = [Profile(step=step, sigma_rel=number / 100) for number in range(1, 29)]
        reached = [m.wanted.sigma_rel for m in mix(profiles, *candidates) if m.error <= max_error]
        text = f"possible are {reached[0]} to {reached[-1]}" if reached else "no width is possible"
        raise ValueError(
            f"--sigma-rel: {sigma_rel} at step {step} cannot be synthesised from {len(profiles)} "
            f"averages in {steps.index(step) + 1} snapshots: the error is {mixture.error:.1%}, "
            f"expected at most --max-error {max_error}; {text}, and more snapshots extend the range"
        )
    return mixture


def blend(
    mixture: Mixture, snapshots: Sequence[Snapshot], network: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Returns the mixture of the snapshots' tensors, summed in float64, with `network`'s dtypes.

    Raises ValueError with the file's name if one is damaged, has non-finite weights, or has other
    names or shapes than `network`.
    """
    by_step = {snapshot.step: snapshot for snapshot in snapshots}
    total = {name: torch.zeros_like(t, dtype=torch.float64) for name, t in network.items()}
    for profile, share in zip(mixture.profiles, mixture.shares, strict=True):
        path = average_file(by_step[profile.step].folder, profile.sigma_rel)
        tensors = _load(path)
        _check_shapes(path, tensors, network)
        if not all(tensor.isfinite().all() for tensor in tensors.values()):
            raise ValueError(f"{path}: contains weights that are not finite; delete its folder")
        for name, tensor in tensors.items():
            total[name].add_(tensor.double(), alpha=share)
    return {name: tensor.to(network[name].dtype) for name, tensor in total.items()}


def _load(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise _damaged(path, error) from error


def _check_shapes(path: Path, found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    for name in sorted(found.keys() | expected.keys()):
        ours, theirs = (
            list(each[name].shape) if name in each else None for each in (found, expected)
        )
        if ours != theirs:
            raise ValueError(
                f"{path}: snapshot of another network: the shape of {name} is {ours}, in the "
                f"bundle {theirs}; delete its folder"
            )


def synthesise(
    name: str | Path,
    sigma_rel: float,
    *,
    step: int | None = None,
    out: Path | None = None,
    max_error: float = MAX_ERROR,
) -> tuple[Path, Mixture]:
    """Writes a copy of a run's bundle with another average; returns its folder and the mixture.

    `out` is by default `bundle-SIGMA_REL` in the run's folder, or `bundle-SIGMA_REL-step-N` if a
    step is given. Raises ValueError if the run has no bundle or no suitable snapshots.
    """
    run = find_path(name)
    if run is None:
        raise ValueError(f"--run: no folder {str(name)!r} in the current directory or the project")
    bundle = run / "bundle"
    if not (bundle / INFO_FILE).is_file():
        raise ValueError(f"--run: no finished bundle in {run}; it is written when the run ends")
    snapshots = read_snapshots(run / "snapshots")
    mixture = choose_mixture(snapshots, sigma_rel, step, max_error)
    used = [snapshot for snapshot in snapshots if snapshot.step <= mixture.wanted.step]
    info = read_info(bundle)
    for snapshot in used:
        _check_run(snapshot, info["config"])
    suffix = "" if step is None else f"-step-{step:08d}"
    out = out or run / f"bundle-{sigma_rel}{suffix}"
    _check_out(out, bundle)
    files = {path.name: _load(path) for path in (bundle / "unet").glob("*.safetensors")}
    network = {name: tensor for tensors in files.values() for name, tensor in tensors.items()}
    weights = blend(mixture, used, network)
    with complete_or_absent(out) as temporary:
        shutil.copytree(bundle, temporary, dirs_exist_ok=True)
        for file, old in files.items():
            new = {name: weights[name] for name in old}
            save_file(new, temporary / "unet" / file, metadata={"format": "pt"})
        text = json.dumps(_describe(info, used[-1], mixture), indent=1)
        (temporary / INFO_FILE).write_text(text + "\n")
    return out, mixture


def _check_run(snapshot: Snapshot, config: Mapping[str, Any]) -> None:
    """Raises ValueError with both values if the snapshot is from another run than the bundle."""
    for name in SAME_RUN:
        found, expected = snapshot.config.get(name), config.get(name)
        if found != expected:
            raise ValueError(
                f"{snapshot.folder}: snapshot of another run: {name} is {found!r}, in the bundle "
                f"{expected!r}; delete its folder"
            )


def _check_out(out: Path, bundle: Path) -> None:
    """Raises ValueError if writing to `out` would destroy the run's bundle or another folder."""
    if out.resolve() == bundle.resolve():
        raise ValueError(f"--out: {out} is the run's own bundle; expected another folder")
    if out.exists() and not (out / INFO_FILE).is_file():
        raise ValueError(f"--out: {out} exists and is not a bundle; expected another folder")


def _describe(info: Mapping[str, Any], snapshot: Snapshot, mixture: Mixture) -> dict[str, Any]:
    """Returns bundle.json of the copy; the run's final metrics stay only for the final step."""
    return {
        **info,
        "step": snapshot.step,
        "train_seconds": snapshot.train_s,
        "metrics": info["metrics"] if snapshot.step == info["step"] else {},
        "ema": {
            "sigma_rel": mixture.wanted.sigma_rel,
            "num_averages": len(mixture.profiles),
            "profile_error": mixture.error,
            "rounding_gain": mixture.gain,
            "snapshot_dtype": snapshot.dtype,
        },
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line; errors are printed as one line and exit with code 2."""
    parser = argparse.ArgumentParser(
        prog="python -m model.posthoc",
        description="Make a bundle with an average of another width from a run's snapshots.",
    )
    add = parser.add_argument
    add("--run", required=True, help="folder of the run, runs/NAME")
    width = "width as a share of the run, such as 0.05"
    add("--sigma-rel", type=float, required=True, help=width)
    add("--step", type=int, help="step of the last snapshot; default: the newest")
    add("--out", type=Path, help="folder of the bundle; default: in the run")
    error = "largest relative error of the profile; default: %(default)s"
    add("--max-error", type=float, default=MAX_ERROR, help=error)
    given = parser.parse_args(arguments)
    try:
        out, mixture = synthesise(
            given.run, given.sigma_rel, step=given.step, out=given.out, max_error=given.max_error
        )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    dtype = read_info(out)["ema"]["snapshot_dtype"]
    print(
        f"{out}: sigma_rel {mixture.wanted.sigma_rel} at step {mixture.wanted.step} from "
        f"{len(mixture.profiles)} averages; error of the profile {mixture.error:.2%}, rounding "
        f"error of {dtype} snapshots about {mixture.gain * ROUNDING[dtype]:.4%} of a weight"
    )


if __name__ == "__main__":
    main()
