"""`sample.export`: a bundle's copy with model card, samples and float16 files, and its upload.

The copy is complete or absent. The upload is one commit, so the repository never has a part of a
model; nothing is uploaded without --push.
"""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils._validators import validate_repo_id
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from latent_t2i.model.bundle import INFO_FILE, digest, find_bundle, read_info
from latent_t2i.model.checks import read_json_object
from latent_t2i.model.grid import label_seeds, labelled_grid, save_png
from latent_t2i.model.paths import complete_or_absent, find_path, format_bytes
from latent_t2i.sample import sampler
from latent_t2i.sample.card import MARK, write_card
from latent_t2i.sample.folder import describe_computation
from latent_t2i.sample.settings import ExportConfig
from latent_t2i.sample.stock import output_size

CARD_FILE, GRID_FILE = "README.md", "samples.png"
SCHEDULER = "dpmpp"
# The part of the mark before the version.
_WRITTEN = MARK.partition(" of ")[0]
MAX_PROMPTS = 16


def export(config: ExportConfig, api: HfApi | None = None) -> Path:
    """Writes the folder, uploads it with --push, and returns it. `api` is the Hub's by default."""
    source, out = find_bundle(config.bundle), Path(config.out)
    check_out(out, source)
    if config.repo is not None:
        _check_repo(config.repo)
    info = read_info(source) if (source / INFO_FILE).is_file() else None
    identity = digest(source)
    metrics = read_metrics(config.metrics, source, identity)
    pipeline = sampler.load(source, device="cpu", dtype="float32")
    with complete_or_absent(out) as folder:
        _copy(source, folder)
        has_fp16 = config.fp16 and add_fp16(folder)
        grid = _draw_grid(pipeline, config, info, folder / GRID_FILE)
        card = write_card(
            title=config.title or (info or {}).get("name") or source.name,
            license_name=config.license,
            info=info,
            metrics=metrics,
            size=output_size(pipeline, None),
            digest=identity,
            has_fp16=has_fp16,
            grid=grid,
        )
        (folder / CARD_FILE).write_text(card, "utf-8")
    _report(out, config)
    if config.push and config.repo is not None:
        print(f"uploaded: {push(out, config.repo, private=config.private, api=api)}")
    return out


def check_out(out: Path, source: Path) -> None:
    """Raises ValueError if writing to `out` would destroy anything but an earlier export."""
    if source.resolve() in (out.resolve(), *out.resolve().parents):
        raise ValueError(f"--out: {out} is the bundle itself or inside it; expected another folder")
    if out.resolve() in source.resolve().parents:
        raise ValueError(f"--out: {out} contains the bundle {source}; expected another folder")
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out: {out} is a file; expected a folder")
    if out.exists() and any(out.iterdir()):
        card = out / CARD_FILE
        if not card.is_file() or _WRITTEN not in card.read_text("utf-8", errors="replace"):
            raise ValueError(
                f"--out: {out} exists and is not an earlier export; expected a new folder"
            )


def read_metrics(name: str | None, source: Path, identity: str) -> dict[str, Any] | None:
    """Returns evaluation's metrics of the bundle; None if there are none and `name` is None.

    Raises ValueError if they are of another bundle, or of an unknown one.
    """
    path = source.parent / "metrics.json" if name is None else find_path(name)
    if path is None or (name is not None and not path.is_file()):
        raise ValueError(f"--metrics: no file {name!r} in the current directory or the project")
    if not path.is_file():
        print(f"no {path}: the card says that the model was not evaluated")
        return None
    metrics = read_json_object(path)
    found = metrics.get("bundle_sha256")
    if found == identity:
        return metrics
    text = f"{path} has the metrics of bundle {found}, not of {identity}"
    if name is None:
        print(f"{text}: the card says that the model was not evaluated")
        return None
    raise ValueError(f"--metrics: {text}; evaluate this bundle with evaluation.run")


def add_fp16(folder: Path) -> bool:
    """Adds `NAME.fp16.safetensors` to each `NAME.safetensors`, for `variant="fp16"`.

    Returns False, and adds nothing, if a network has other weights only. Raises ValueError for
    weights in several files, beyond the range of float16, or in a damaged file.
    """
    paths = sorted(folder.rglob("*.safetensors"))
    others = sorted(folder.rglob("*.bin"))
    if other := [path for path in others if path.parent not in {p.parent for p in paths}]:
        print(
            f"--fp16: {other[0].relative_to(folder)} is not a safetensors file: no float16 files "
            "were added"
        )
        return False
    for path in paths:
        if path.name.endswith(".fp16.safetensors"):
            continue
        if path.with_name(f"{path.name}.index.json").exists() or "-of-" in path.stem:
            raise ValueError(
                f"--fp16: {path.relative_to(folder)} is a part of weights in several files, which "
                "is not supported; expected one file per network, or --no-fp16"
            )
        try:
            tensors = load_file(path)
        except SafetensorError as error:
            raise ValueError(f"--fp16: {path.relative_to(folder)} is damaged: {error}") from error
        halved = {
            name: tensor.half() if tensor.is_floating_point() else tensor
            for name, tensor in tensors.items()
        }
        for name, tensor in halved.items():
            if not bool(tensor.isfinite().all()):
                raise ValueError(
                    f"--fp16: {name} of {path.relative_to(folder)} has values beyond the range of "
                    "float16; expected --no-fp16"
                )
        save_file(halved, path.with_suffix(".fp16.safetensors"), metadata={"format": "pt"})
    return True


def push(folder: Path, repo: str, *, private: bool, api: HfApi | None = None) -> str:
    """Uploads an export in one commit and returns the commit's URL.

    Weights of an earlier version that the export lacks are removed in the same commit. Raises
    ValueError with the Hub's reason.
    """
    api = api or HfApi()
    with _hub_errors(repo):
        api.create_repo(repo, private=private, exist_ok=True)
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        names = [path.relative_to(folder).as_posix() for path in paths]
        stale = [
            name
            for name in api.list_repo_files(repo)
            if name.endswith(".safetensors") and name not in names
        ]
        # Not `upload_folder`, which may split a large folder into several commits.
        commit = api.create_commit(
            repo,
            [
                *map(CommitOperationAdd, names, paths),
                *(CommitOperationDelete(name) for name in stale),
            ],
            commit_message=f"Upload {folder.name}",
        )
    return str(commit.commit_url)


@contextmanager
def _hub_errors(repo: str) -> Iterator[None]:
    hint = "log in with `hf auth login`, or set HF_TOKEN to a token that may write"
    try:
        yield
    except HfHubHTTPError as error:
        raise ValueError(f"--push: the Hub refused {repo}: {error}; {hint}") from error
    except (OSError, httpx_error()) as error:
        raise ValueError(f"--push: the Hub was not reached for {repo}: {error}") from error


def httpx_error() -> type[Exception]:
    """Returns the base class of connection errors, of whichever client huggingface_hub uses."""
    bases = [base for base in HfHubHTTPError.__mro__ if base.__name__ == "HTTPError"]
    return bases[0]


def _check_repo(repo: str) -> None:
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ValueError(f"--repo: expected USER/NAME, found {repo!r}: {error}") from error


def _copy(source: Path, folder: Path) -> None:
    """Copies the bundle without its own card."""
    shutil.copytree(
        source, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(CARD_FILE, ".*")
    )


def _draw_grid(
    pipeline: Any, config: ExportConfig, info: Mapping[str, Any] | None, path: Path
) -> dict[str, Any] | None:
    """Draws samples.png and returns its settings; None without prompts."""
    prompts = config.prompts or _own_prompts(info)
    if not prompts:
        print("no --prompt: the card has no sample images")
        return None
    settings: dict[str, Any] = {"guidance_scale": config.guidance_scale}
    settings |= {"num_steps": config.num_steps, "scheduler": SCHEDULER}
    seeds = range(config.seed, config.seed + len(prompts))
    size = min(len(prompts), MAX_PROMPTS)
    images = sampler.draw(pipeline, prompts, list(seeds), batch_size=size, **settings)
    settings |= {"prompts": list(prompts), "seed": config.seed}
    computed = describe_computation(pipeline, batch_size=size)
    save_png(labelled_grid(images, label_seeds(prompts, seeds)), path, settings | computed)
    return settings


def _own_prompts(info: Mapping[str, Any] | None) -> Sequence[str]:
    """Returns the prompts of the run's previews."""
    preview = (info or {}).get("config", {}).get("preview")
    prompts = preview.get("prompts") if isinstance(preview, Mapping) else None
    return [str(prompt) for prompt in prompts or ()][:MAX_PROMPTS]


def _report(out: Path, config: ExportConfig) -> None:
    files = sorted(path for path in out.rglob("*") if path.is_file())
    total = sum(path.stat().st_size for path in files)
    print(f"{out}: {len(files)} files, {format_bytes(total)}")
    if not config.push:
        for path in files:
            print(f"  {path.relative_to(out)}  {format_bytes(path.stat().st_size)}")
        to = config.repo or "USER/NAME"
        print(f"nothing was uploaded; --repo {to} --push uploads these files in one commit")
