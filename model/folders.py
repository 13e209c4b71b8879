"""Where a network's files are: a local folder, the Hugging Face cache, or the hub.

A name may mean a network's own folder or a whole pipeline, of which only the sub-folders that are
needed are read or downloaded. Weights are read as safetensors only: a pickle (.bin, .ckpt) can run
any code when it is read, so it is refused with a way to convert it. What is not to be had is told
with what to download and how.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError

from latent_t2i.model.paths import find_path

CONNECT_TIMEOUT_S = 10.0
PICKLES = (".bin", ".ckpt", ".pt", ".pth")


def fetch(
    name: str,
    revision: str | None,
    files: Sequence[str],
    *,
    flag: str,
    parts: Sequence[str] = (),
) -> Path:
    """Returns the local folder of `name`: a path, a cached hub repository or a fresh download.

    `files` are patterns of the files' own names; `parts` are the sub-folders that hold them where
    `name` is a whole pipeline, the network's first. Raises ValueError, with the remedy, where the
    folder is not to be had.
    """
    local = find_path(name)
    if local is not None and local.is_file():
        raise ValueError(f"{flag}: {_no_folder(local)}")
    if local is not None:
        return local
    try:
        folder = Path(snapshot_download(name, revision=revision, local_files_only=True))
        if _is_complete(folder, parts):
            return folder
    except LocalEntryNotFoundError:
        pass  # not in the cache: ask the hub below
    except HFValidationError:
        raise ValueError(
            f"{flag}: no folder {name!r} here or in the project (and it is no hub name)"
        ) from None
    return _download(name, revision, files, flag, parts)


def find_part(folder: Path, part: str, *, flag: str) -> Path:
    """Returns the folder that holds a network: `folder` itself, or its `part` in a pipeline.

    Raises ValueError where neither holds a config.json.
    """
    if (folder / "config.json").is_file():
        return folder
    if (folder / part / "config.json").is_file():
        return folder / part
    raise ValueError(
        f"{flag}: {folder} holds no config.json; expected one there, or a whole pipeline with one "
        f"in {part}/"
    )


def read_config(folder: Path, field: str, expected: Sequence[str], *, flag: str) -> str:
    """Returns what config.json says of `field`; raises ValueError if that is none of `expected`."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{flag}: {path} is not JSON: {error}") from error
    found = str(config.get(field)) if isinstance(config, dict) else "None"
    if found not in expected:
        raise ValueError(
            f"{flag}: {path} says {field} {found!r}, expected {' or '.join(map(repr, expected))}"
        )
    return found


def require_weights(folder: Path, stem: str, *, flag: str) -> None:
    """Raises ValueError, with the remedy, where the weights are no safetensors (or in several)."""
    names = (f"{stem}.safetensors", f"{stem}.safetensors.index.json")
    if any((folder / name).is_file() for name in names):
        return
    found = sorted(path.name for path in folder.iterdir() if path.is_file())
    pickles = [name for name in found if Path(name).suffix in PICKLES]
    if pickles:
        raise ValueError(
            f"{flag}: {folder} holds {pickles[0]}, a pickle, which can run any code when it is "
            f"read, and no {names[0]}: where you trust it, load the folder and save it again "
            f"(save_pretrained writes safetensors), or look for a revision that has them"
        )
    others = [name for name in found if name.endswith(".safetensors")]
    hint = f", but {others[0]}: rename it if these are the weights that you mean" if others else ""
    raise ValueError(f"{flag}: {folder} holds no {names[0]}{hint}")


@contextmanager
def loading(folder: Path, *, flag: str) -> Iterator[None]:
    """Turns what the libraries raise for broken files into a ValueError that names the folder."""
    try:
        yield
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{flag}: {folder} does not load: {reason}") from error


def require_complete(report: Any, folder: Path, what: str, *, flag: str) -> None:
    """Raises ValueError where a loading report tells of weights that the files lack."""
    missing = sorted(report["missing_keys"])
    if missing:
        raise ValueError(
            f"{flag}: {folder} lacks {len(missing)} weights of {what}, {missing[0]} first"
        )


def _no_folder(path: Path) -> str:
    """Says what to do with a single file of weights."""
    if path.suffix in PICKLES:
        return (
            f"{path} is a pickle, which can run any code when it is read; expected a folder with "
            "config.json and safetensors"
        )
    return (
        f"{path} is a file; expected a folder with config.json and safetensors, as diffusers' "
        "from_single_file(FILE).save_pretrained(FOLDER) makes it"
    )


def _is_complete(folder: Path, parts: Sequence[str]) -> bool:
    """Returns whether a cached repository holds a network, and the parts that go with it."""
    if (folder / "config.json").is_file():
        return any(folder.glob("*.safetensors"))
    return bool(parts) and all(
        any((folder / part).glob(pattern))
        for part, pattern in zip(parts, ("*.safetensors", "*.json"), strict=False)
    )


def _download(
    name: str, revision: str | None, files: Sequence[str], flag: str, parts: Sequence[str]
) -> Path:
    """Downloads the named files of a hub repository; asks first whether the hub can be reached."""
    found = f"{name!r} at revision {revision!r}" if revision else repr(name)
    at = f" --revision {revision}" if revision else ""
    of_parts = f" (of a whole pipeline, those in {' and '.join(parts)})" if parts else ""
    remedy = (
        f"download {', '.join(files)} of https://huggingface.co/{name}{of_parts} on a machine "
        f"with a network (hf download {name}{at} --local-dir FOLDER takes all there is) and point "
        f"{flag} to that folder"
    )
    try:  # one short question: a download alone would retry for half a minute per file
        info = HfApi().model_info(name, revision=revision, timeout=CONNECT_TIMEOUT_S)
    except HfHubHTTPError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{flag}: the hub refuses {found}: {reason}; {remedy}") from error
    except _connection_errors() as error:
        raise ValueError(
            f"{flag}: no folder {found}, not in the cache, no network; {remedy}"
        ) from error
    names = [sibling.rfilename for sibling in info.siblings or ()]
    chosen = _choose(names, files, parts)
    if not any(file.endswith(".safetensors") for file in chosen):
        pickles = [other for other in names if Path(other).suffix in PICKLES]
        held = f"; {pickles[0]} is a pickle, which can run any code when read" if pickles else ""
        raise ValueError(f"{flag}: {found} on the hub holds none of {', '.join(files[1:])}{held}")
    return Path(snapshot_download(name, revision=revision, allow_patterns=chosen))


def _choose(names: Sequence[str], files: Sequence[str], parts: Sequence[str]) -> list[str]:
    """Returns which of a repository's files are wanted: never a whole pipeline for its VAE."""
    folders = [""] if "config.json" in names or not parts else [f"{part}/" for part in parts]
    wanted = [f"{folder}{pattern}" for folder in folders for pattern in files]
    return [
        name
        for name in names
        if any(fnmatch(name, p) and name.count("/") == p.count("/") for p in wanted)
    ]


def _connection_errors() -> tuple[type[BaseException], ...]:
    """Returns what the hub's client raises without a network, whatever library it is built on."""
    return (OSError, *(kind for kind in HfHubHTTPError.__mro__ if kind.__name__ == "HTTPError"))
