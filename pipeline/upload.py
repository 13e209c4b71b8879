"""Writes a set to a URL through a local working folder: put, reported, deleted, shard by shard.

A URL has no file locks and no renames. So the truth is what is there: a shard is finished if its
report and its object, of the reported size, are. Each process of a run has a working folder of its
own, which is emptied and filled from the URL at the start, and from then on the stage runs in it
as in any folder. The cost: the reports of all shards are read once at the start and at the end.
"""

import hashlib
import re
import shutil
import socket
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

from latent_t2i.pipeline.hub import HubFolder, in_repository
from latent_t2i.pipeline.plan import SetPlan, ShardPlan
from latent_t2i.pipeline.processes import ProcessInfo
from latent_t2i.shards.buckets import Buckets
from latent_t2i.shards.parsing import from_json, load_json
from latent_t2i.shards.remote.store import default_cache_dir
from latent_t2i.shards.remote.transport import (
    Retry,
    fetch_document,
    fetch_file,
    fetch_small_files,
    join,
)
from latent_t2i.shards.remote.upload import PARTIAL_PATTERN, RemoteFolder
from latent_t2i.shards.schema import (
    BUCKET_PATTERN,
    BUCKETS_NAME,
    MANIFEST_NAME,
    PROGRESS_DIR,
    FormatError,
    Manifest,
)
from latent_t2i.shards.writer import (
    PROVENANCE_NAME,
    TEXT_SCALE_NAME,
    ShardReport,
    mark_put,
    read_report,
)

NUM_LOCAL_SHARDS = 2
"""One that is being written, and one that is being put."""
NUM_OTHER_FILES = 20
"""Room beside the shards or their reports, where a store limits the files in a folder."""
REPORT_PATTERN = re.compile(r"shard-(\d{6,})\.json")
SHARD_PATTERN = re.compile(r"shard-\d{6,}\.tar")
FILES_OF_HUB = {".gitattributes", "README.md"}
"""Files of a repository on the Hub that may lie beside a set."""
POLL_S = 5.0
READ_ATTEMPTS = 3
"""A process that finishes the set deletes the reports, perhaps while this one reads them."""


def is_url(out: str | None) -> bool:
    """Returns whether `--out` is a URL; file:// is a local folder, with its locks and renames."""
    return "://" in (out or "") and not (out or "").startswith("file://")


def work_folder(url: str, work_dir: str | None, rank: int) -> Path:
    """Returns the working folder of one process of a run that writes to `url`.

    It has the host in its name: a cache folder in a shared home may have no locks between hosts.
    """
    root = Path(work_dir).expanduser() if work_dir else default_cache_dir().with_name("work")
    name = hashlib.sha256(url.rstrip("/").encode()).hexdigest()[:16]
    return root.absolute() / name / f"rank-{rank}-{socket.gethostname()}"


def open_remote(url: str, retry: Retry | None = None, *, num_processes: int = 1) -> RemoteFolder:
    """Returns the folder at a URL. Raises ValueError for one that cannot be written to."""
    if in_repository(url):
        return HubFolder(url, retry, num_processes=num_processes)
    return RemoteFolder(url, retry)


def remove_if_empty(folder: Path) -> None:
    """Removes a folder, unless it contains something."""
    with suppress(OSError):
        folder.rmdir()


@contextmanager
def naming_url(folder: Path, url: str) -> Iterator[None]:
    """Names the URL in place of its working folder in errors about the set."""
    try:
        yield
    except ValueError as error:
        text = re.sub(rf"{re.escape(str(folder))}(?![\w.-])", lambda match: url, str(error))
        if text == str(error):
            raise
        raise (FormatError if isinstance(error, FormatError) else ValueError)(text) from error


@contextmanager
def open_mirror(url: str, folder: Path, processes: ProcessInfo) -> Iterator["Mirror"]:
    """Yields the mirror of a URL in a working folder, which is empty afterwards.

    The caller owns the folder. Raises RemoteError for a URL that cannot be read.
    """
    mirror = Mirror(open_remote(url, num_processes=processes.num_processes), folder, processes)
    try:
        mirror.pull()
        yield mirror
        mirror.flush()
    finally:
        mirror.close()


class Mirror:
    """A set at a URL, and the working folder in which one process writes its shards."""

    def __init__(self, remote: RemoteFolder, folder: Path, processes: ProcessInfo) -> None:
        self.remote = remote
        self._folder = folder
        self._processes = processes
        self._provenance: dict[str, bytes] = {}
        self._discarded: set[str] = set()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="upload")
        self._upload: Future[None] | None = None

    @property
    def url(self) -> str:
        """The set's URL."""
        return self.remote.url

    def pull(self) -> None:
        """Empties the working folder and fetches everything but the shards.

        Raises ValueError if the URL holds files and no set.
        """
        self._clear()
        names = self.remote.list()
        buckets = [name for name in names if BUCKET_PATTERN.fullmatch(name)]
        for name in ["", *buckets]:
            (self._folder / name / PROGRESS_DIR).mkdir(parents=True, exist_ok=True)
            self._pull_set(name)
        if BUCKETS_NAME in names:
            self._pull_buckets()
        is_set = bool(buckets) or BUCKETS_NAME in names or self._holds_set("")
        foreign = sorted(names.keys() - FILES_OF_HUB - {PROGRESS_DIR})[:3]
        if any((self._folder / PROGRESS_DIR).glob("shard-*.json")):
            foreign.append(PROGRESS_DIR)
        if foreign and not is_set:
            raise ValueError(
                f"{self.url}: contains other files ({', '.join(foreign)} ...) and no shards: "
                "choose an empty folder for --out"
            )
        for name in buckets:
            remove_if_empty(self._folder / name / PROGRESS_DIR)

    def begin(self, sets: Sequence[SetPlan]) -> None:
        """Puts what the shards of unfinished sets have in common, their provenance.

        Without a shard, rank 0 may replace the provenance of other settings, and the other ranks
        wait until it has. Raises ValueError if the store limits the number of files too much.
        """
        for part in sets:
            name = self._name(part.folder)
            if (part.folder / MANIFEST_NAME).exists():
                if PROGRESS_DIR in self.remote.list(name):
                    self.remote.delete_folder(_in(name, PROGRESS_DIR))
                continue
            self.require_few_shards(part)
            self._begin_set(name, part.folder)
        self.remote.commit()

    def require_few_shards(self, part: SetPlan) -> None:
        """Raises ValueError if the store does not allow a set's number of files in one folder."""
        limit = self.remote.max_files
        if limit is not None and len(part.shards) + NUM_OTHER_FILES > limit:
            raise ValueError(
                f"{join(self.url, part.bucket) if part.bucket else self.url}: the set has "
                f"{len(part.shards)} shards, but a folder there holds at most {limit} files: use "
                "larger shards (--records-per-shard, --max-shard-bytes), or another --out"
            )

    def wait_for_scale(self, sets: Sequence[SetPlan]) -> None:
        """Fetches the scale of int8 text that rank 0 decides, unless this is rank 0."""
        for part in sets:
            path = part.folder / PROGRESS_DIR / TEXT_SCALE_NAME
            if self._processes.is_first or path.exists() or not path.parent.exists():
                continue
            name = _in(self._name(part.folder), PROGRESS_DIR, TEXT_SCALE_NAME)
            path.write_bytes(self._wait_for(name, None, "decides the scale of int8 text"))

    def put_scale(self, sets: Sequence[SetPlan]) -> None:
        """Puts the scale of int8 text for the other ranks, unless it is there."""
        for part in sets:
            path = part.folder / PROGRESS_DIR / TEXT_SCALE_NAME
            name = _in(self._name(part.folder), PROGRESS_DIR, TEXT_SCALE_NAME)
            if path.exists() and self.remote.find(name) is None:
                self.remote.put_bytes(name, path.read_bytes())
        self.remote.commit()

    def put(self, shard: ShardPlan) -> None:
        """Puts a finished shard and its report in the background; waits for the one before it."""
        self._wait_for_upload()
        self._upload = self._pool.submit(self._put, shard.folder, shard.index)

    @contextmanager
    def fetched(self, path: Path) -> Iterator[None]:
        """Fetches a shard into the working folder temporarily."""
        self.remote.get(_in(self._name(path.parent), path.name), path)
        try:
            yield
        finally:
            path.unlink()

    def discard(self, shard: ShardPlan) -> None:
        """Deletes the report of a shard that is written again."""
        name = self._report_name(shard.folder, shard.index)
        self.remote.delete(name)
        self._discarded.add(name)  # on the Hub the report stays until the next commit

    def flush(self) -> None:
        """Waits until every finished shard of this process is visible at the URL."""
        self._wait_for_upload()
        self.remote.commit()

    def refresh(self, sets: Sequence[SetPlan]) -> None:
        """Fetches the reports, and the list of buckets, that others have put since the start.

        Raises ValueError if the URL has become that of other settings.
        """
        self.flush()
        is_listed = bool(sets[0].bucket) and self.remote.find(BUCKETS_NAME) is not None
        listed = self._pull_buckets() if is_listed else None
        for part in sets:
            name = self._name(part.folder)
            if listed is not None and name not in listed:
                continue  # without records, so that it was deleted
            for attempt in range(READ_ATTEMPTS):
                try:
                    self._pull_set(name)
                    if not (part.folder / MANIFEST_NAME).exists():
                        self._require_mine(name)
                    break
                except (FileNotFoundError, ValueError):
                    if attempt + 1 == READ_ATTEMPTS:
                        raise

    def put_set(self, folder: Path) -> None:
        """Puts the small files of a finished set and then its manifest, unless it is there.

        Raises ValueError if a shard is missing at the URL.
        """
        name = self._name(folder)
        there = self.remote.list(name)
        if MANIFEST_NAME not in there:
            manifest = Manifest.load(folder)
            shards = {entry.name: entry.bytes for entry in manifest.shards}
            changed = [found for found, size in shards.items() if there.get(found) != size]
            if changed:
                raise ValueError(
                    f"{join(self.url, _in(name, changed[0]))}: expected {shards[changed[0]]} "
                    f"bytes, found {there.get(changed[0], 'no file')}: start the same command again"
                )
            for found in there:  # of processes that were killed before they put a report
                if SHARD_PATTERN.fullmatch(found) and found not in shards:
                    self.remote.delete(_in(name, found))
            for entry in (*manifest.small_files, *manifest.other_files):
                self.remote.put(_in(name, entry.name), folder / entry.name)
            self.remote.put(_in(name, MANIFEST_NAME), folder / MANIFEST_NAME)
        self._delete_partial(name)
        if PROGRESS_DIR in there:
            self.remote.delete_folder(_in(name, PROGRESS_DIR))
        self.remote.commit()

    def delete_set(self, folder: Path) -> None:
        """Deletes a set without records."""
        self.remote.delete_folder(self._name(folder))
        self.remote.commit()

    def put_buckets(self) -> None:
        """Puts the list of buckets, after their manifests, unless it is there."""
        path = self._folder / BUCKETS_NAME
        if self.remote.find(BUCKETS_NAME) != path.read_bytes():
            if entry := Buckets.load(self._folder).quarantine:
                self.remote.put(entry.name, self._folder / entry.name)
            self.remote.put(BUCKETS_NAME, path)
        self._delete_partial("")
        self.remote.commit()

    def close(self) -> None:
        """Ends the upload and empties the working folder, except for its locks."""
        self._pool.shutdown()
        with suppress(OSError, ValueError):  # after an error, finished shards should not be lost
            for name in self._provenance:
                self._require_mine(name)
            self.remote.commit()
        self._clear()

    def _name(self, folder: Path) -> str:
        """Returns a set's folder, relative to the URL: the bucket's name, or ""."""
        return folder.relative_to(self._folder).as_posix().removeprefix(".")

    def _report_name(self, folder: Path, index: int) -> str:
        return _in(self._name(folder), PROGRESS_DIR, f"shard-{index:06d}.json")

    def _pull_set(self, name: str) -> None:
        """Fetches a finished set's small files, or the reports that are not here yet."""
        folder = self._folder / name
        there = self.remote.list(name)
        if MANIFEST_NAME in there:
            location = join(self.url, name) if name else self.url
            manifest = fetch_document(Manifest, location, folder, retry=self.remote.retry)
            fetch_small_files(location, folder, manifest, retry=self.remote.retry)
            for entry in manifest.other_files:
                fetch_file(location, folder, entry, retry=self.remote.retry)
            return
        progress = folder / PROGRESS_DIR
        found = self.remote.list(_in(name, PROGRESS_DIR)) if PROGRESS_DIR in there else {}
        new = [file for file in found if file.endswith(".json") and not (progress / file).exists()]
        contents = self.remote.read([_in(name, PROGRESS_DIR, file) for file in new])
        for file, content in zip(new, contents.values(), strict=True):
            (progress / file).write_bytes(content)
        self._keep_complete(folder, there)

    def _pull_buckets(self) -> set[str]:
        """Fetches the list of buckets with its quarantine; returns the names in it."""
        found = fetch_document(Buckets, self.url, self._folder, retry=self.remote.retry)
        if found.quarantine is not None:
            fetch_file(self.url, self._folder, found.quarantine, retry=self.remote.retry)
        return {bucket.name for bucket in found.buckets}

    def _keep_complete(self, folder: Path, there: dict[str, int | None]) -> None:
        """Marks the reported shards as put, and deletes reports of shards that are not there."""
        for path in (folder / PROGRESS_DIR).glob("shard-*.json"):
            index = int(REPORT_PATTERN.fullmatch(path.name)[1])  # type: ignore[index]
            marker = path.with_suffix(".put")
            marker.touch()  # so that the report is read without its shard
            report = read_report(folder, index)
            assert report is not None
            if report.records and there.get(report.name) != report.bytes:
                path.unlink()
                marker.unlink()

    def _holds_set(self, name: str) -> bool:
        folder = self._folder / name
        provenance = folder / PROGRESS_DIR / PROVENANCE_NAME
        return (folder / MANIFEST_NAME).exists() or provenance.exists()

    def _begin_set(self, name: str, folder: Path) -> None:
        path = _in(name, PROGRESS_DIR, PROVENANCE_NAME)
        mine = (folder / PROGRESS_DIR / PROVENANCE_NAME).read_bytes()
        found = self.remote.find(path)
        has_shards = any((folder / PROGRESS_DIR).glob("shard-*.json"))
        if found is None or (found != mine and not has_shards and self._processes.is_first):
            if found is not None:  # a scale that belongs to the other settings
                self.remote.delete(_in(name, PROGRESS_DIR, TEXT_SCALE_NAME))
            self.remote.put_bytes(path, mine)
            found = mine
        elif found != mine and not has_shards:
            found = self._wait_for(path, mine, "replaces the settings of a run without shards")
        self._provenance[name] = found

    def _wait_for(self, name: str, expected: bytes | None, why: str) -> bytes:
        """Returns the content of a file that rank 0 puts, once it is there."""
        is_told = False
        while (found := self.remote.find(name)) is None or found != (expected or found):
            if not is_told:
                print(f"{join(self.url, name)}: waiting for rank 0, which {why}", flush=True)
                is_told = True
            time.sleep(POLL_S)
        return found

    def _require_mine(self, name: str) -> None:
        """Raises ValueError if another command has put its provenance since this one began."""
        path = _in(name, PROGRESS_DIR, PROVENANCE_NAME)
        found = self.remote.find(path)
        if found == self._provenance[name]:
            return
        change = "is gone" if found is None else "was replaced"
        raise ValueError(
            f"{join(self.url, path)}: {change} while this process wrote shards, so another run "
            "finished, deleted or began this set: let one command write to one --out, then start "
            "this one again"
        )

    def _wait_for_upload(self) -> None:
        upload, self._upload = self._upload, None
        if upload is not None:
            upload.result()

    def _put(self, folder: Path, index: int) -> None:
        """Puts one shard and then its report, and deletes the local shard.

        A shard that is finished at the URL stays: this rank was started twice.
        """
        self._require_mine(self._name(folder))
        report = read_report(folder, index)
        assert report is not None
        name = self._report_name(folder, index)
        path = folder / PROGRESS_DIR / Path(name).name
        found = self._find_finished(folder, name)
        if found is None:
            if report.records:
                self.remote.put(_in(self._name(folder), report.name), folder / report.name)
            self.remote.put_bytes(name, path.read_bytes())
            self.remote.commit(now=False)
        else:
            path.write_bytes(found)
        mark_put(folder, report)

    def _delete_partial(self, name: str) -> None:
        """Deletes the temporary files of killed processes; a process that puts one repeats it."""
        for found in self.remote.list(name):
            if PARTIAL_PATTERN.fullmatch(found):
                self.remote.delete(_in(name, found))

    def _find_finished(self, folder: Path, name: str) -> bytes | None:
        """Returns the report at the URL if its shard is there too, with the reported size.

        Deletes the report of a shard that is not, so that it never describes other bytes.
        """
        content = None if name in self._discarded else self.remote.find(name)
        if content is None:
            return None
        place = join(self.url, name)
        report = from_json(ShardReport, load_json(content, place), place)
        there = self.remote.list(self._name(folder))
        if not report.records or there.get(report.name) == report.bytes:
            return content
        self.remote.delete(name)
        return None

    def _clear(self) -> None:
        """Empties the working folder, except for its locks."""
        for path in [*self._folder.glob("*"), *(self._folder / PROGRESS_DIR).glob("*")]:
            if path.is_dir() and path.name != PROGRESS_DIR:
                shutil.rmtree(path)
            elif path.is_file() and not path.name.endswith("lock"):
                path.unlink()


def _in(*names: str) -> str:
    return "/".join(filter(None, names))
