"""An average of the weights of any length, made after training from snapshots of two others.

    runs/NAME/snapshots/step-00000500/
        sigma_rel-0.05.safetensors  sigma_rel-0.1.safetensors  snapshot.json

A snapshot is a known mixture of the weights of all steps so far. The mixture of snapshots nearest
to the wanted one is a least-squares problem in as many unknowns as there are snapshots; how near it
comes is known without looking at a single weight, and said. Karras et al. 2024 (2312.02696),
section 3.2 and algorithm 3. Disk is the price: 4 bytes per parameter and snapshot of two averages
in float16; memory while mixing is 8 bytes per parameter, on the CPU.

    python -m model.ema --run runs/NAME --sigma-rel 0.1 [--step N] [--out DIR]
"""

import argparse
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from latent_t2i.model.bundle import INFO_FILE, read_info
from latent_t2i.model.ema import EMAConfig, check_sigma_rel, gamma_of
from latent_t2i.model.paths import complete_or_absent, find_path

SNAPSHOT_FILE = "snapshot.json"
MAX_CELLS = 16384
"""Steps up to which the profiles are compared step by step, and in this many pieces beyond."""
MAX_ERROR = 0.1
"""A profile missed by more than this share is refused."""
SAME_RUN = ("seed", "batch_size", "shards_sha256", "objective")
"""Settings by which the snapshots of an earlier run in the same folder are told."""
ROUNDING = {"float16": 2.0**-12, "float32": 2.0**-25}
"""Mean size of the rounding error of a stored weight, relative, roughly."""


@dataclass(frozen=True, kw_only=True)
class Profile:
    """A power-function average of the weights of steps 1 to `step`."""

    step: int
    sigma_rel: float


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """How to mix snapshots into a profile."""

    wanted: Profile
    profiles: tuple[Profile, ...]
    shares: tuple[float, ...]
    """Each profile's; their sum is 1."""
    error: float
    """The mixture's distance from the wanted profile over all steps, relative, in the 2-norm."""

    @property
    def gain(self) -> float:
        """By what the snapshots' rounding errors, taken as independent, grow."""
        return float(np.linalg.norm(self.shares))


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A folder of snapshots of one step."""

    folder: Path
    step: int
    train_s: float
    sigma_rels: tuple[float, ...]
    dtype: str
    config: Mapping[str, Any]

    def file(self, sigma_rel: float) -> Path:
        """Returns the path of one average."""
        return self.folder / f"sigma_rel-{sigma_rel}.safetensors"


def folder_of(snapshots: Path, step: int) -> Path:
    """Returns where the snapshot of a step lies."""
    return snapshots / f"step-{step:08d}"


def save_snapshot(
    snapshots: Path,
    config: EMAConfig,
    powers: Mapping[float, Mapping[str, Tensor]],
    *,
    step: int,
    train_s: float,
    settings: Mapping[str, Any],
) -> None:
    """Writes the power-function averages after `step` updates, complete or not at all.

    Takes them as `EMA.powers` has them, and the run's resolved settings.

    Later snapshots go: they are of a run since taken back to an earlier step, or of another one.
    """
    for leftover in snapshots.glob(".step-*"):  # of a run killed while it saved
        shutil.rmtree(leftover)
    for later in find_folders(snapshots):
        if later.name > folder_of(snapshots, step).name:
            shutil.rmtree(later)
    snapshot = Snapshot(
        folder=folder_of(snapshots, step),
        step=step,
        train_s=train_s,
        sigma_rels=config.sigma_rels,
        dtype=config.snapshot_dtype,
        config=settings,
    )
    dtype = getattr(torch, snapshot.dtype)
    with complete_or_absent(snapshot.folder) as temporary:
        for sigma_rel, average in powers.items():
            packed = {name: tensor.to(dtype).contiguous() for name, tensor in average.items()}
            save_file(packed, temporary / snapshot.file(sigma_rel).name)
        record = {key: value for key, value in asdict(snapshot).items() if key != "folder"}
        (temporary / SNAPSHOT_FILE).write_text(json.dumps(record, indent=1) + "\n")


def find_folders(snapshots: Path) -> list[Path]:
    """Returns the complete snapshots' folders, oldest first."""
    return sorted(path for path in snapshots.glob("step-*") if path.is_dir())


def read_snapshots(snapshots: Path) -> list[Snapshot]:
    """Returns a run's snapshots, oldest first.

    Raises ValueError where there are none, or only of one profile.
    """
    folders = find_folders(snapshots)
    if not folders:
        raise ValueError(
            f"--run: no snapshots in {snapshots}; train with ema.sigma_rels 0.05 0.1 and "
            "ema.snapshot_every_steps"
        )
    found = [_read_snapshot(folder) for folder in folders]
    profiles = {sigma_rel for snapshot in found for sigma_rel in snapshot.sigma_rels}
    if len(profiles) < 2:
        raise ValueError(
            f"--run: the snapshots in {snapshots} are of sigma_rel {min(profiles)} only; another "
            "length needs those of two or more, as training with ema.sigma_rels 0.05 0.1 keeps"
        )
    return found


def _read_snapshot(folder: Path) -> Snapshot:
    """Returns one snapshot, its tensors unread; raises ValueError for a damaged one."""
    try:
        record = json.loads((folder / SNAPSHOT_FILE).read_text())
        record["sigma_rels"] = tuple(record["sigma_rels"])
        return Snapshot(folder=folder, **record)
    except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise _damaged(folder, error) from error


def _damaged(place: Path, error: Exception) -> ValueError:
    """Returns the error of a file that something has changed since it was written."""
    return ValueError(
        f"{place}: damaged ({error}); delete the folder: other snapshots do without one, and "
        "training writes a bundle again"
    )


def mix(profiles: Sequence[Profile], wanted: Profile) -> Mixture:
    """Returns the least-squares mixture of `profiles` nearest to `wanted`, in float64.

    The paper's algorithm 3 solves the normal equations of the profiles taken as functions of a
    continuous time (equation 151). This solves the problem itself, by singular values, for what
    each step's weights count for, so the error is that of the mixture of weights as it is made.
    Shares are scaled to a sum of 1, as in the authors' code.
    """
    return mix_all(profiles, [wanted])[0]


def mix_all(profiles: Sequence[Profile], wanted: Sequence[Profile]) -> list[Mixture]:
    """Returns what `mix` does for each of several, in little more time than one takes."""
    edges = _cell_edges([profile.step for profile in (*profiles, *wanted)])
    columns = np.stack([_cells(edges, profile) for profile in profiles], axis=1)
    targets = np.stack([_cells(edges, profile) for profile in wanted], axis=1)
    shares = np.linalg.lstsq(columns, targets, rcond=None)[0]
    shares /= shares.sum(axis=0)
    errors = np.linalg.norm(columns @ shares - targets, axis=0) / np.linalg.norm(targets, axis=0)
    return [
        Mixture(
            wanted=each,
            profiles=tuple(profiles),
            shares=tuple(shares[:, number].tolist()),
            error=float(errors[number]),
        )
        for number, each in enumerate(wanted)
    ]


def _cell_edges(steps: Sequence[int]) -> NDArray[np.float64]:
    """Returns the ends of the pieces of the run: its steps, or about MAX_CELLS runs of steps."""
    last = max(steps)
    even = np.linspace(0, last, min(last, MAX_CELLS) + 1).round()
    return np.union1d(even, np.asarray(steps, np.float64))


def _cells(edges: NDArray[np.float64], profile: Profile) -> NDArray[np.float64]:
    """Returns what each piece counts for in a profile, over the square root of its length.

    So the 2-norm is that of what each step counts for, were the profile flat in a piece.
    """
    gamma = gamma_of(profile.sigma_rel)
    before: NDArray[np.float64] = np.minimum(edges / profile.step, 1.0) ** (gamma + 1)
    return np.diff(before) / np.sqrt(np.diff(edges))


def reachable(profiles: Sequence[Profile], step: int, max_error: float) -> list[float]:
    """Returns the widths from 0.01 to 0.28, in steps of 0.01, whose profile is matched."""
    wanted = [Profile(step=step, sigma_rel=number / 100) for number in range(1, 29)]
    mixtures = mix_all(profiles, wanted)
    return [each.wanted.sigma_rel for each in mixtures if each.error <= max_error]


def choose(
    snapshots: Sequence[Snapshot], sigma_rel: float, step: int | None, max_error: float
) -> Mixture:
    """Returns the mixture for a width at a snapshot's step; None: at the newest one's.

    Raises ValueError for a step without a snapshot and a width that the snapshots cannot give.
    """
    check_sigma_rel("--sigma-rel", sigma_rel)
    steps = [snapshot.step for snapshot in snapshots]
    step = steps[-1] if step is None else step
    if step not in steps:
        raise ValueError(f"--step: no snapshot of step {step}; there are {_shorten(steps)}")
    profiles = [
        Profile(step=snapshot.step, sigma_rel=each)
        for snapshot in snapshots
        if snapshot.step <= step
        for each in snapshot.sigma_rels
    ]
    mixture = mix(profiles, Profile(step=step, sigma_rel=sigma_rel))
    if mixture.error > max_error:
        widths = reachable(profiles, step, max_error)
        raise ValueError(
            f"--sigma-rel: {sigma_rel} at step {step} is out of reach of {len(profiles)} averages "
            f"in {steps.index(step) + 1} snapshots: the profile would be missed by "
            f"{mixture.error:.1%} (--max-error {max_error}); they reach from {widths[0]} to "
            f"{widths[-1]}, more snapshots reach further"
            if widths
            else f"--sigma-rel: no width is within --max-error {max_error} at step {step}; "
            f"{sigma_rel} would be missed by {mixture.error:.1%}"
        )
    return mixture


def _shorten(steps: Sequence[int]) -> str:
    """Returns a list of steps for people, its middle left out."""
    shown = [str(step) for step in steps]
    return ", ".join(shown if len(shown) <= 8 else [*shown[:4], "...", *shown[-3:]])


def blend(mixture: Mixture, snapshots: Sequence[Snapshot]) -> dict[str, Tensor]:
    """Returns the mixture of the snapshots' tensors, summed in float64, as float32.

    Raises ValueError, naming the file, for one that is damaged or not finite.
    """
    by_step = {snapshot.step: snapshot for snapshot in snapshots}
    total: dict[str, Tensor] = {}
    for profile, share in zip(mixture.profiles, mixture.shares, strict=True):
        path = by_step[profile.step].file(profile.sigma_rel)
        try:
            tensors = load_file(path)
        except (OSError, SafetensorError) as error:
            raise _damaged(path, error) from error
        if not total:
            total = {name: torch.zeros_like(t, dtype=torch.float64) for name, t in tensors.items()}
        for name, tensor in tensors.items():
            total[name].add_(tensor.double(), alpha=share)
        if not all(tensor.isfinite().all() for tensor in tensors.values()):
            raise ValueError(f"{path}: holds weights that are not finite; delete its folder")
    return {name: tensor.float() for name, tensor in total.items()}


def _check_network(path: Path, wanted: Mapping[str, list[int]]) -> None:
    """Raises ValueError, naming a tensor, unless a file's names and shapes are the bundle's."""
    found = _shapes([path])
    for name in sorted(found.keys() | wanted.keys()):
        theirs, ours = found.get(name), wanted.get(name)
        if theirs != ours:
            raise ValueError(
                f"{path}: another network's snapshot: {name} has shape {theirs or 'none'}, in the "
                f"bundle {ours or 'none'}"
            )


def _shapes(paths: Sequence[Path]) -> dict[str, list[int]]:
    """Returns the shapes of files' tensors by name, without reading them."""
    shapes: dict[str, list[int]] = {}
    for path in paths:
        try:
            with safe_open(path, framework="pt") as file:
                shapes |= {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise _damaged(path, error) from error
    return shapes


def _weights_files(bundle: Path) -> list[Path]:
    return sorted((bundle / "unet").glob("*.safetensors"))


def synthesise(
    name: str | Path,
    sigma_rel: float,
    *,
    step: int | None = None,
    out: Path | None = None,
    max_error: float = MAX_ERROR,
) -> tuple[Path, Mixture]:
    """Writes a copy of a run's bundle with another average; returns its folder and the mixture.

    The default folder is `bundle-SIGMA_REL` in the run's, `bundle-SIGMA_REL-step-N` with a step.
    Raises ValueError, naming what is wrong, for a run without a bundle or snapshots to make it of.
    """
    run = find_path(name)
    if run is None:
        raise ValueError(f"--run: no folder {str(name)!r} here or in the project")
    bundle = run / "bundle"
    if not (bundle / INFO_FILE).is_file():
        raise ValueError(f"--run: no finished bundle in {run}; it is written when the run ends")
    snapshots = read_snapshots(run / "snapshots")
    mixture = choose(snapshots, sigma_rel, step, max_error)
    used = [snapshot for snapshot in snapshots if snapshot.step <= mixture.wanted.step]
    info, shapes = read_info(bundle), _shapes(_weights_files(bundle))
    for snapshot in used:
        _check(snapshot, info["config"], shapes)
    suffix = "" if step is None else f"-step-{step:08d}"
    out = out or run / f"bundle-{sigma_rel}{suffix}"
    _check_out(out, bundle)
    weights = blend(mixture, used)
    with complete_or_absent(out) as temporary:
        shutil.copytree(bundle, temporary, dirs_exist_ok=True)
        for path in _weights_files(temporary):
            _replace(path, weights)
        text = json.dumps(_describe(info, used[-1], mixture), indent=1)
        (temporary / INFO_FILE).write_text(text + "\n")
    return out, mixture


def _check(snapshot: Snapshot, config: Mapping[str, Any], shapes: Mapping[str, list[int]]) -> None:
    """Raises ValueError, naming both values, for a snapshot of another network or run."""
    for sigma_rel in snapshot.sigma_rels:
        _check_network(snapshot.file(sigma_rel), shapes)
    for name in SAME_RUN:
        theirs, ours = snapshot.config.get(name), config.get(name)
        if theirs != ours:
            raise ValueError(
                f"{snapshot.folder}: another run's snapshot: {name} is {theirs!r}, the bundle's "
                f"{ours!r}; delete its folder"
            )


def _check_out(out: Path, bundle: Path) -> None:
    """Raises ValueError where writing would destroy something other than a bundle made before."""
    if out.resolve() == bundle.resolve():
        raise ValueError(f"--out: {out} is the run's own bundle; name another folder")
    if out.exists() and not (out / INFO_FILE).is_file():
        raise ValueError(f"--out: {out} exists and is no bundle; name another folder")


def _replace(path: Path, weights: Mapping[str, Tensor]) -> None:
    """Rewrites a weights file with other values of the same names and types."""
    old = load_file(path)
    new = {name: weights[name].to(tensor.dtype).contiguous() for name, tensor in old.items()}
    save_file(new, path, metadata={"format": "pt"})


def _describe(info: Mapping[str, Any], snapshot: Snapshot, mixture: Mixture) -> dict[str, Any]:
    """Returns bundle.json of the copy; figures of the run's last step go where it is another."""
    last = snapshot.step == info["step"]
    return {
        **info,
        "step": snapshot.step,
        "train_seconds": snapshot.train_s,
        "metrics": info["metrics"] if last else {},
        "ema": {
            "sigma_rel": mixture.wanted.sigma_rel,
            "num_averages": len(mixture.profiles),
            "profile_error": mixture.error,
            "rounding_gain": mixture.gain,
            "snapshot_dtype": snapshot.dtype,
        },
    }


def _parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m model.ema",
        description="Make a bundle with an average of another length from a run's snapshots.",
    )
    parser.add_argument("--run", required=True, help="folder of the run, runs/NAME")
    parser.add_argument(
        "--sigma-rel",
        type=float,
        required=True,
        help="width of the average as a share of the run, 0.05 for instance",
    )
    parser.add_argument("--step", type=int, help="end at this snapshot; default: the newest")
    parser.add_argument("--out", type=Path, help="folder of the bundle; default: in the run's")
    parser.add_argument(
        "--max-error",
        type=float,
        default=MAX_ERROR,
        help="refuse a profile missed by more than this share; default: %(default)s",
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line; an error is one line and exit code 2."""
    given = _parse_arguments(arguments)
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
        f"{len(mixture.profiles)} averages; the profile is matched to {mixture.error:.2%}, "
        f"rounding of {dtype} snapshots is about {mixture.gain * ROUNDING[dtype]:.4%} of a weight"
    )
