"""Finds a network's files: in a local folder, the Hugging Face cache, or on the Hub.

A name may refer to a network's own folder or to a whole pipeline; of a pipeline, only the required
sub-folders are read or downloaded. Weights are loaded from safetensors only, because loading a
pickle (.bin, .ckpt) can run arbitrary code. If files are unavailable, the error says what to
download and where to put it.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError

from latent_t2i.model.checks import read_json_object
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
    """Returns the local folder of `name`: a path, a cached Hub repository or a new download.

    `files` are patterns of file names, in the sub-folders `parts` of a whole pipeline, the
    network's first. Raises ValueError, with instructions, if nothing is found.
    """
    local = find_path(name)
    if local is not None and local.is_file():
        raise ValueError(f"{flag}: {_describe_file(local)}")
    if local is not None:
        return local
    try:
        folder = Path(snapshot_download(name, revision=revision, local_files_only=True))
        if _is_complete(folder, parts):
            return folder
    except LocalEntryNotFoundError:
        pass  # not in the cache: try the Hub below
    except HFValidationError:
        raise ValueError(
            f"{flag}: no folder {name!r} here or in the project, and not a valid Hub name"
        ) from None
    return _download(name, revision, files, flag, parts)


def find_part(folder: Path, part: str, *, flag: str) -> Path:
    """Returns a network's folder: `folder` itself, or its sub-folder `part` in a pipeline.

    Raises ValueError if neither has a config.json.
    """
    if (folder / "config.json").is_file():
        return folder
    if (folder / part / "config.json").is_file():
        return folder / part
    raise ValueError(
        f"{flag}: {folder} has no config.json; expected one there, or a whole pipeline with one "
        f"in {part}/"
    )


def read_config(folder: Path, field: str, expected: Sequence[str], *, flag: str) -> str:
    """Returns `field` of config.json; raises ValueError unless it is one of `expected`."""
    path = folder / "config.json"
    try:
        found = str(read_json_object(path).get(field))
    except ValueError as error:
        raise ValueError(f"{flag}: {error}") from error
    if found not in expected:
        raise ValueError(
            f"{flag}: {path}: expected {field} {' or '.join(map(repr, expected))}, found {found!r}"
        )
    return found


def require_weights(folder: Path, stem: str, *, flag: str) -> None:
    """Raises ValueError, with instructions, if there is no safetensors file (or index of them)."""
    names = (f"{stem}.safetensors", f"{stem}.safetensors.index.json")
    if any((folder / name).is_file() for name in names):
        return
    found = sorted(path.name for path in folder.iterdir() if path.is_file())
    pickles = [name for name in found if Path(name).suffix in PICKLES]
    if pickles:
        raise ValueError(
            f"{flag}: {folder} has no {names[0]}, only {pickles[0]}, a pickle, which can run "
            "arbitrary code when it is loaded: if you trust it, load the folder and save it again "
            "(save_pretrained writes safetensors), or use a revision that has safetensors"
        )
    others = [name for name in found if name.endswith(".safetensors")]
    hint = f", only {others[0]}: rename it if it contains the weights you want" if others else ""
    raise ValueError(f"{flag}: {folder} has no {names[0]}{hint}")


@contextmanager
def loading(folder: Path, *, flag: str) -> Iterator[None]:
    """Turns the libraries' errors for broken files into a ValueError that names the folder."""
    try:
        yield
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{flag}: {folder} does not load: {reason}") from error


def require_complete(report: Any, folder: Path, what: str, *, flag: str) -> None:
    """Raises ValueError if a loading report lists weights that are missing in the files."""
    missing = sorted(report["missing_keys"])
    if missing:
        raise ValueError(
            f"{flag}: {folder} is missing {len(missing)} weights of {what}, first {missing[0]}"
        )


def _describe_file(path: Path) -> str:
    """Returns the error text for a single file of weights."""
    expected = "expected a folder with config.json and safetensors"
    if path.suffix in PICKLES:
        return f"{path} is a pickle, which can run arbitrary code when it is loaded; {expected}"
    return (
        f"{path} is a file; {expected}: convert it with diffusers' "
        "from_single_file(FILE).save_pretrained(FOLDER)"
    )


def _is_complete(folder: Path, parts: Sequence[str]) -> bool:
    """Returns whether a cached repository has the network and all other parts."""
    if (folder / "config.json").is_file():
        return any(folder.glob("*.safetensors"))
    return bool(parts) and all(
        any((folder / part).glob(pattern))
        for part, pattern in zip(parts, ("*.safetensors", "*.json"), strict=False)
    )


def _download(
    name: str, revision: str | None, files: Sequence[str], flag: str, parts: Sequence[str]
) -> Path:
    """Downloads files of a Hub repository."""
    found = f"{name!r} at revision {revision!r}" if revision else repr(name)
    at = f" --revision {revision}" if revision else ""
    of_parts = f" (in a whole pipeline, from {' and '.join(parts)})" if parts else ""
    remedy = (
        f"download {', '.join(files)} of https://huggingface.co/{name}{of_parts} on a machine "
        f"with a network (hf download {name}{at} --local-dir FOLDER gets all files) and point "
        f"{flag} to that folder"
    )
    try:  # fails quickly without a network, where a download retries half a minute per file
        info = HfApi().model_info(name, revision=revision, timeout=CONNECT_TIMEOUT_S)
    except HfHubHTTPError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{flag}: the Hub rejected {found}: {reason}; {remedy}") from error
    except _connection_errors() as error:
        raise ValueError(
            f"{flag}: no folder {found}, not in the cache, no network; {remedy}"
        ) from error
    names = [sibling.rfilename for sibling in info.siblings or ()]
    chosen = _choose(names, files, parts)
    if not any(file.endswith(".safetensors") for file in chosen):
        pickles = [other for other in names if Path(other).suffix in PICKLES]
        hint = f", only {pickles[0]}, a pickle, which can run arbitrary code" if pickles else ""
        raise ValueError(f"{flag}: {found} on the Hub has none of {', '.join(files[1:])}{hint}")
    return Path(snapshot_download(name, revision=revision, allow_patterns=chosen))


def _choose(names: Sequence[str], files: Sequence[str], parts: Sequence[str]) -> list[str]:
    """Returns the repository's files to download; of a pipeline, only those in `parts`."""
    folders = [""] if "config.json" in names or not parts else [f"{part}/" for part in parts]
    wanted = [f"{folder}{pattern}" for folder in folders for pattern in files]
    return [
        name
        for name in names
        if any(fnmatch(name, p) and name.count("/") == p.count("/") for p in wanted)
    ]


def _connection_errors() -> tuple[type[BaseException], ...]:
    """Returns the exceptions of the Hub's client without a network."""
    # huggingface_hub 1 is based on httpx, earlier versions on requests.
    return (OSError, *(kind for kind in HfHubHTTPError.__mro__ if kind.__name__ == "HTTPError"))
