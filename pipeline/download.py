"""Downloads and unpacks COCO: `python -m pipeline.download coco2014 --images train val`.

Each zip is downloaded, checked by SHA-256, unpacked and deleted before the next one. The same
command resumes a download. A folder is complete if it has all files; their content is not checked.
"""

import hashlib
import http.client
import shutil
import subprocess
import sys
import urllib.request
import zipfile
from pathlib import Path
from typing import Literal

import tyro
from tqdm import tqdm

from latent_t2i.model.paths import complete_or_absent, format_bytes, free_bytes, output_root
from latent_t2i.pipeline.processes import folder_lock

BASE_URL = "http://images.cocodataset.org"  # its https certificate is for another name
DEFAULT_FOLDER = output_root() / "data" / "coco"
CURL = "curl --fail --location --progress-bar --retry 8 --speed-time 60 --continue-at - --output"
# Unpacked files, bytes and SHA-256 of each zip. The hashes are those of TensorFlow Datasets.
TABLE = """
train2014 82783 13510573713 ede4087e640bddba550e090eae701092534b554b42b05ac33f0300b984b31775
val2014 40504 6645013297 fe9be816052049c34717e077d9e34aa60814a55679f804cd043e3cbee3b9fde0
annotations_trainval2014 6 252872794 031296bbc80c45a1d1f76bf9a90ead27e94e99ec629208449507a4917a3bf009
train2017 118287 19336861798 69a8bb58ea5f8f99d24875f21416de2e9ded3178e903f1f7603e283b9e06d929
val2017 5000 815585330 4f7e2ccb2866ec5041993c9cf2a952bbed69647b115d0f74da7ce8f4bef82f05
annotations_trainval2017 6 252907541 113a836d90195ee1f884e704da6304dfaaecff1f023f49b6ca93c4aaae470268
"""  # noqa: E501
ARCHIVES = {
    name: (int(num_files), int(num_bytes), sha256)
    for name, num_files, num_bytes, sha256 in map(str.split, TABLE.strip().splitlines())
}


def download(
    release: tyro.conf.Positional[Literal["coco2014", "coco2017"]],
    images: tuple[Literal["train", "val"], ...] = ("train", "val"),
    to: Path = DEFAULT_FOLDER,
    base_url: str = BASE_URL,
    force: bool = False,
    dry_run: bool = False,
) -> None:
    """Downloads COCO's annotations and images, where they are not complete.

    Args:
        images: splits to download; empty for the annotations only.
        to: folder for the unpacked files; zips that a user puts there are used and kept.
        base_url: mirror with zips/ and annotations/ below it.
        force: start although the disk seems too small.
        dry_run: print what is missing and the disk space it needs, then stop.
    """
    names = [f"{part}{release.removeprefix('coco')}" for part in (*images, "annotations_trainval")]
    missing = [name for name in names if not _is_complete(to, name)]
    for name in names:
        todo = format_bytes(ARCHIVES[name][1]) if name in missing else "complete, no"
        print(f"{name}: {todo} download")
    needed, free = _bytes_needed(to, missing), free_bytes(to)
    room = f"needs {format_bytes(needed)} of disk space, found {format_bytes(free)} free in {to}"
    print(f"{release} {room}")
    if needed > free and not force and not dry_run:
        raise ValueError(f"--to: {release} {room}; choose another disk, or try with --force")
    for name in () if dry_run else names:
        with folder_lock(to):
            _download_and_unpack(to, name, base_url)


def _is_complete(to: Path, name: str) -> bool:
    pattern = f"annotations/*{name[-4:]}.json" if "_" in name else f"{name}/*.jpg"
    return len(list(to.glob(pattern))) >= ARCHIVES[name][0]


def _bytes_needed(to: Path, names: list[str]) -> int:
    """Returns how much disk usage grows at most. JPEGs do not compress further, but JSON does."""
    used = most = 0
    for name in names:
        num_files, num_bytes, _ = ARCHIVES[name]
        used += num_bytes - sum(path.stat().st_size for path in to.glob(f"{name}.zip*"))
        used += num_bytes * 4 if "_" in name else num_bytes + 4096 * num_files  # whole disk blocks
        most = max(most, used)
        used -= 0 if (to / f"{name}.zip").exists() else num_bytes  # a user's zip is kept
    return most


def _download_and_unpack(to: Path, name: str, base_url: str) -> None:
    given, part = to / f"{name}.zip", to / f"{name}.zip.part"
    if not _is_complete(to, name):  # another process may have completed it by now
        url = f"{base_url.rstrip('/')}/{'annotations' if '_' in name else 'zips'}/{name}.zip"
        path = given if given.exists() else _fetch(url, part, ARCHIVES[name][1])
        with path.open("rb") as file:
            found = path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()
        if found != ARCHIVES[name][1:]:
            part.unlink(missing_ok=True)  # else the next run would resume a wrong file
            raise ValueError(f"{path}: size, sha256: expected {ARCHIVES[name][1:]}, found {found}")
        _unpack(path, to / name.partition("_")[0])
    part.unlink(missing_ok=True)


def _fetch(url: str, part: Path, num_bytes: int) -> Path:
    """Downloads the rest of a file over as many connections as make progress."""
    part.touch()
    while (start := part.stat().st_size) < num_bytes:
        if shutil.which("curl"):
            code = subprocess.run([*CURL.split(), part, url], check=False).returncode
            error = f"curl failed with exit code {code}"
        else:
            error = _urllib(url, part, start)
        if part.stat().st_size <= start:
            raise OSError(f"{url}: {error} at byte {start}; the same command resumes from there")
    return part


def _urllib(url: str, part: Path, start: int) -> str:
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"})
    try:
        with urllib.request.urlopen(request, timeout=60) as response, part.open("ab") as file:
            if not start or response.status == http.HTTPStatus.PARTIAL_CONTENT:
                shutil.copyfileobj(response, file)
            return f"HTTP status {response.status} without new data"
    except (OSError, http.client.HTTPException) as error:
        return str(error)


def _unpack(path: Path, folder: Path) -> None:
    """Unpacks a zip under a temporary name, then renames its folder, or each file in it."""
    unpacked = folder.with_name(f".{path.name}.unpacked")
    with zipfile.ZipFile(path) as file, complete_or_absent(unpacked) as temporary:
        for member in tqdm(file.namelist(), f"unpacking {folder.name}", unit=" files"):
            file.extract(member, temporary)
    is_new = not folder.exists()
    for source in [unpacked / folder.name] if is_new else (unpacked / folder.name).iterdir():
        source.replace(folder if is_new else folder / source.name)
    shutil.rmtree(unpacked)


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    try:
        tyro.cli(download, args=argv, config=(tyro.conf.FlagCreatePairsOff,), description=__doc__)
    except (ValueError, OSError, zipfile.BadZipFile, KeyboardInterrupt) as error:
        print(f"error: {str(error) or 'interrupted; the same command resumes'}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
