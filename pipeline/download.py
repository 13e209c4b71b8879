"""Fetches COCO 2014 or 2017 and unpacks it as the presets expect it: `make coco2014`, or

    python -m pipeline.download coco2014 --images train val --to data/coco

The plan comes first, and a disk that is too small for it is refused. One zip after another is
fetched, checked (size, SHA-256), unpacked (each file's CRC-32) and deleted, so that there need
never be room for all of them. Killed, it goes on with the same command; when all is there it does
nothing. A folder counts as complete by its number of images, so that this takes no time; a file
damaged later is found by stage one.
"""

import argparse
import os
import shutil
import sys
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from latent_t2i.model.paths import output_root
from latent_t2i.pipeline import fetch
from latent_t2i.pipeline.fetch import RemoteFile
from latent_t2i.pipeline.processes import folder_lock
from latent_t2i.pipeline.unpack import BLOCK_BYTES, Contents, open_zip, tidy, unpack
from latent_t2i.shards.remote.transport import Retry, join

BASE_URL = "http://images.cocodataset.org"
"""Its https is that of Amazon's storage, whose certificate has another name."""
MAX_THREADS = 8
GB = 1e9
FORCE = "--force starts all the same"


@dataclass(frozen=True, kw_only=True)
class Archive:
    """One of COCO's zips, and what there is once it is unpacked."""

    path: str
    """Below the base URL."""
    num_bytes: int
    sha256: str
    folder: str
    num_images: int = 0
    names: tuple[str, ...] = ()
    """Files that must be there."""
    unpacked_bytes: int
    """About; the zip itself tells it exactly."""

    @property
    def name(self) -> str:
        """The zip's file name."""
        return self.path.rpartition("/")[2]

    def lacks(self, names: Iterable[str]) -> str:
        """Returns what is missing among a folder's names; nothing if all is there."""
        there = set(names)
        missing = [name for name in self.names if name not in there]
        num_images = sum(name.endswith(".jpg") for name in there)
        if num_images < self.num_images:
            missing.append(f"{self.num_images - num_images} of {self.num_images} images")
        return ", ".join(missing)


def _images(part: str, num_images: int, num_bytes: int, sha256: str) -> Archive:
    return Archive(
        path=f"zips/{part}.zip",
        num_bytes=num_bytes,
        sha256=sha256,
        folder=part,
        num_images=num_images,
        unpacked_bytes=round(num_bytes * 1.01) + num_images * BLOCK_BYTES,  # JPEGs hardly shrink
    )


def _annotations(year: int, num_bytes: int, sha256: str) -> Archive:
    kinds, parts = ("captions", "instances", "person_keypoints"), ("train", "val")
    return Archive(
        path=f"annotations/annotations_trainval{year}.zip",
        num_bytes=num_bytes,
        sha256=sha256,
        folder="annotations",
        names=tuple(f"{kind}_{part}{year}.json" for kind in kinds for part in parts),
        unpacked_bytes=10**9,
    )


# COCO publishes no checksums; these are those of TensorFlow Datasets (url_checksums/coco.txt).
RELEASES = {
    "coco2014": {
        "train": _images(
            "train2014",
            82_783,
            13_510_573_713,
            "ede4087e640bddba550e090eae701092534b554b42b05ac33f0300b984b31775",
        ),
        "val": _images(
            "val2014",
            40_504,
            6_645_013_297,
            "fe9be816052049c34717e077d9e34aa60814a55679f804cd043e3cbee3b9fde0",
        ),
        "annotations": _annotations(
            2014,
            252_872_794,
            "031296bbc80c45a1d1f76bf9a90ead27e94e99ec629208449507a4917a3bf009",
        ),
    },
    "coco2017": {
        "train": _images(
            "train2017",
            118_287,
            19_336_861_798,
            "69a8bb58ea5f8f99d24875f21416de2e9ded3178e903f1f7603e283b9e06d929",
        ),
        "val": _images(
            "val2017",
            5_000,
            815_585_330,
            "4f7e2ccb2866ec5041993c9cf2a952bbed69647b115d0f74da7ce8f4bef82f05",
        ),
        "annotations": _annotations(
            2017,
            252_907_541,
            "113a836d90195ee1f884e704da6304dfaaecff1f023f49b6ca93c4aaae470268",
        ),
    },
}


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is left to do for a zip."""

    archive: Archive
    zip_path: Path
    here_bytes: int
    """Of the zip, or of the part of it that has come."""
    keep: bool
    """The zip stays once it is unpacked."""

    @property
    def fetch_bytes(self) -> int:
        """What has yet to come."""
        return max(self.archive.num_bytes - self.here_bytes, 0)


@dataclass(frozen=True, kw_only=True)
class Room:
    """What a disk has to have free, and what it has."""

    fetched: int
    unpacked: int
    most: int
    """At one time."""
    free: int

    @property
    def arithmetic(self) -> str:
        """Says how the figure comes about."""
        deleted = self.fetched + self.unpacked - self.most
        off = f" - {_gb(deleted)} as zips are deleted in turn" if deleted else ""
        return f"{_gb(self.fetched)} to fetch + {_gb(self.unpacked)} unpacked{off}"

    @property
    def verdict(self) -> str:
        """Says what is needed, and what there is."""
        return f"{_gb(self.most)} needed at one time, {_gb(self.free)} free"


def download(
    release: str,
    parts: Sequence[str],
    to: Path,
    *,
    base_url: str = BASE_URL,
    keep_zips: bool = False,
    force: bool = False,
    dry_run: bool = False,
    retry: Retry | None = None,
) -> None:
    """Brings the images of `parts` and the annotations into `to`, or what is missing of them.

    Waits while another process does so. Raises ValueError for a disk too small and for a zip that
    is not COCO's or is damaged, RemoteError (an OSError) for a server that does not give it.
    """
    archives = [RELEASES[release][part] for part in (*parts, "annotations")]
    with nullcontext() if dry_run else folder_lock(to):
        jobs = [_job(archive, to, keep_zips) for archive in archives if _lack(archive, to)]
        if not dry_run:
            _tidy_all([archive for archive in archives if not _lack(archive, to)], to, keep_zips)
        if not jobs:
            print(f"{to}: {', '.join(map(_describe, archives))}: all there, nothing to do")
            return
        room = _find_room(jobs, to)
        print(plan_lines(release, archives, jobs, to, room))
        if dry_run:
            return
        if room.most > room.free and not force:
            raise ValueError(f"--to {to}: {room.arithmetic} = {room.verdict}: too little. {FORCE}")
        for job in jobs:
            _bring(job, to, join(base_url, job.archive.path), force, retry or Retry())
        print(f"{to}: {', '.join(map(_describe, archives))}: all there")


def plan_lines(
    release: str, archives: Sequence[Archive], jobs: Sequence[Job], to: Path, room: Room
) -> str:
    """Says what will be fetched and what room it takes, before anything is."""
    waiting = {job.archive.name: job for job in jobs}
    lines = [f"{release} to {to}"]
    for archive in archives:
        job = waiting.get(archive.name)
        if job is None:
            lines.append(f"  {archive.folder:<12}is there")
            continue
        here = f", {_gb(job.here_bytes)} are here" if job.here_bytes else ""
        sizes = (
            f"{_gb(archive.num_bytes)} zipped{here}, about {_gb(archive.unpacked_bytes)} unpacked"
        )
        lines.append(f"  {archive.folder:<12}{sizes}")
    return "\n".join([*lines, room.arithmetic, f"= {room.verdict}"])


def _find_room(jobs: Sequence[Job], to: Path) -> Room:
    """Adds up, zip after zip, what will lie on the disk beyond what does now."""
    most = held = 0
    for job in jobs:
        held += job.fetch_bytes + job.archive.unpacked_bytes
        most = max(most, held)
        held -= 0 if job.keep else job.fetch_bytes + job.here_bytes
    return Room(
        fetched=sum(job.fetch_bytes for job in jobs),
        unpacked=sum(job.archive.unpacked_bytes for job in jobs),
        most=most,
        free=_free_bytes(to),
    )


def _free_bytes(folder: Path) -> int:
    """The room on the disk where a folder is, or will be."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(there).free


def _job(archive: Archive, to: Path, keep_zips: bool) -> Job:
    path = to / archive.name
    part = fetch.part_of(path)
    brought = not path.exists() or fetch.version_of(path).exists()
    return Job(
        archive=archive,
        zip_path=path,
        here_bytes=fetch.size_of(path) or fetch.size_of(part),
        keep=keep_zips or not brought,
    )


def _lack(archive: Archive, to: Path) -> str:
    folder = to / archive.folder
    return archive.lacks(path.name for path in folder.iterdir()) if folder.is_dir() else "all"


def _tidy_all(archives: Sequence[Archive], to: Path, keep_zips: bool) -> None:
    """Removes what a kill left between a folder's completion and the end of the run."""
    for archive in archives:
        tidy(to / archive.folder)
        _let_go(to / archive.name, keep=keep_zips)


def _bring(job: Job, to: Path, url: str, force: bool, retry: Retry) -> None:
    """Fetches a zip, unpacks it and lets it go."""
    archive, path = job.archive, job.zip_path
    file = RemoteFile(url=url, num_bytes=archive.num_bytes, sha256=archive.sha256)
    if path.exists():
        fetch.check(file, path, make_bar=_make_bar)
    else:
        fetch.fetch(file, path, retry=retry, make_bar=_make_bar)
    with open_zip(path, archive.folder) as contents:
        _require(archive, contents, path)
        if not force:
            _require_room(contents, to, archive)
        unpack(
            contents,
            to / archive.folder,
            num_threads=min(os.cpu_count() or 1, MAX_THREADS),
            make_bar=_make_bar,
        )
    _let_go(path, keep=job.keep)


def _require(archive: Archive, contents: Contents, path: Path) -> None:
    """Raises ValueError for a zip that lacks files, before it is unpacked."""
    if lack := archive.lacks(contents.members):
        raise ValueError(f"{path}: {archive.folder}/ in it lacks {lack}")
    if contents.num_outside:
        print(f"{path.name}: {contents.num_outside} files outside {archive.folder}/ left out")


def _require_room(contents: Contents, to: Path, archive: Archive) -> None:
    free = _free_bytes(to)
    if contents.num_bytes > free:
        raise ValueError(
            f"--to {to}: {archive.folder} is {_gb(contents.num_bytes)} unpacked, "
            f"free there {_gb(free)}: too little. {FORCE}"
        )


def _let_go(path: Path, *, keep: bool) -> None:
    """Deletes a zip that was fetched here; with `keep`, it is the user's from now on."""
    version = fetch.version_of(path)
    if version.exists() and not keep:
        path.unlink(missing_ok=True)
        fetch.part_of(path).unlink(missing_ok=True)
    version.unlink(missing_ok=True)


def _describe(archive: Archive) -> str:
    return f"{archive.folder} ({archive.num_images or len(archive.names)} files)"


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / GB:.1f} GB"


def _make_bar(task: str, total: int, done: int) -> Any:
    interval_s = 0.2 if sys.stderr.isatty() else 30.0  # a log needs fewer lines than a terminal
    return tqdm(
        total=total,
        initial=done,
        desc=task.removesuffix(".zip"),
        unit="B",
        unit_scale=True,
        ncols=80,
        mininterval=interval_s,
        delay=0.5,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Downloads for the command line; returns the exit code."""
    args = _parse_arguments(argv)
    parts = [part for part in args.images if part != "none"]
    try:
        download(
            args.release,
            parts,
            args.to.expanduser(),
            base_url=args.base_url,
            keep_zips=args.keep_zips,
            force=args.force,
            dry_run=args.dry_run,
        )
    except (ValueError, OSError) as error:
        if sys.flags.dev_mode:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from here", file=sys.stderr)
        return 130
    return 0


def _parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.download",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("release", choices=RELEASES)
    parser.add_argument(
        "--images",
        nargs="+",
        choices=["train", "val", "none"],
        default=["train", "val"],
        help="which images; none: the annotations only (default: train val)",
    )
    parser.add_argument(
        "--to", type=Path, default=output_root() / "data" / "coco", help="default: data/coco"
    )
    parser.add_argument("--base-url", default=BASE_URL, help=f"a mirror; default: {BASE_URL}")
    parser.add_argument("--keep-zips", action="store_true", help="do not delete them once unpacked")
    parser.add_argument("--force", action="store_true", help="even if the disk seems too small")
    parser.add_argument("--dry-run", action="store_true", help="stop after the plan")
    args = parser.parse_args(argv)
    if "none" in args.images and len(set(args.images)) > 1:
        parser.error(f"--images: none goes with nothing else, found {' '.join(args.images)}")
    if not args.base_url.startswith(("http://", "https://")):
        parser.error(f"--base-url: expected http:// or https://, found {args.base_url!r}")
    args.images = list(dict.fromkeys(args.images))
    return args


if __name__ == "__main__":
    sys.exit(main())
