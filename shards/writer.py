"""Writes a set of shards so that it is complete or absent, and survives being killed.

    manifest = begin_set(folder, provenance)                # refuses a folder of another set
    with ShardWriter(folder, index, layout) as shard:       # for each index that has no report yet
        shard.write(example)  # or shard.quarantine(key, reason)
    finish_set(folder, provenance, empty_text=..., empty_tokens=...)

A shard is written under a temporary name, synced, renamed, and then reported in a small JSON
beside it; a run that was killed goes on after the last report. The manifest is the sum of the
reports, so the same examples give the same bytes, killed or not. The scale of int8 text is kept
before the first shard (`keep_text_scale`), so that all shards share one. All state is on disk:
several processes may each write shards of their own, and any of them may finish the set.
"""

import contextlib
import errno
import hashlib
import io
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
import webdataset
from numpy.typing import NDArray

from latent_t2i.shards.schema import (
    KEY_PATTERN,
    MANIFEST_NAME,
    MEMBERS,
    PROGRESS_DIR,
    Example,
    FileEntry,
    FormatError,
    LatentKind,
    LatentStatistics,
    Layout,
    Manifest,
    Provenance,
    ShardEntry,
    TextScale,
    differences,
    encode_meta,
    parse_layout,
    parse_provenance,
)

PROVENANCE_NAME = "provenance.json"
TEXT_SCALE_NAME = "text_scale.json"
LOG_VARIANCE_RANGE = (-30.0, 20.0)
"""diffusers clamps the posterior's log-variance to it before sampling."""


@dataclass(frozen=True, kw_only=True)
class LatentSums:
    """Sums per channel over the values of sampled latents, from which statistics add up."""

    count: int
    total: tuple[float, ...]
    squares: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class ShardReport:
    """What became of the source's records of one shard; the shard is on disk when this is."""

    name: str
    bytes: int
    sha256: str
    layout: Layout
    records: int
    num_truncated: int
    quarantined: dict[str, str]
    sums: LatentSums


class FoundScale(NamedTuple):
    """A scale for int8 text, with what was measured when it was found."""

    scale: NDArray[np.float32]  # (D,)
    relative_error: float
    num_captions: int


def begin_set(folder: Path, provenance: Provenance, *, in_use: bool = False) -> Manifest | None:
    """Prepares a folder for a set; returns the manifest if that set is already finished there.

    Raises ValueError, naming both values, if the folder holds another set or a part of one, and for
    a folder that holds something else. A set that another process writes (`in_use`) is refused
    even before its first shard.
    """
    if (folder / MANIFEST_NAME).exists():
        manifest = Manifest.load(folder)
        _require_same(folder, manifest, provenance)
        remove_progress(folder)  # of a process killed after it wrote the manifest
        return manifest
    progress = folder / PROGRESS_DIR
    noted = progress / PROVENANCE_NAME
    has_shards = any(progress.glob("shard-*.json"))
    if noted.exists() and (has_shards or in_use):
        _require_same(folder, _read_provenance(noted), provenance)
        if has_shards:
            _require_scale(folder, provenance)
        return None
    if not noted.exists() and folder.is_dir() and {*folder.iterdir()} - {progress}:
        raise ValueError(f"{folder}: holds other files and no shards: choose an empty folder")
    progress.mkdir(parents=True, exist_ok=True)
    content = json.dumps(asdict(provenance)).encode()
    if not noted.exists() or noted.read_bytes() != content:
        (progress / TEXT_SCALE_NAME).unlink(missing_ok=True)  # of another set, without a shard
    write_file(noted, content)
    return None


def keep_text_scale(folder: Path, found: FoundScale) -> None:
    """Notes the scale of a set's int8 text for this run and any that goes on after it.

    Call it before the first shard is written: values of another scale would be another text.
    """
    document = {**found._asdict(), "scale": found.scale.tolist()}
    write_file(folder / PROGRESS_DIR / TEXT_SCALE_NAME, json.dumps(document).encode())


def read_text_scale(folder: Path) -> FoundScale | None:
    """Returns the scale that was kept for an unfinished set, bit for bit; None if there is none."""
    path = folder / PROGRESS_DIR / TEXT_SCALE_NAME
    if not path.exists():
        return None
    document = _read_json(path)
    return FoundScale(**{**document, "scale": np.array(document["scale"], np.float32)})


def read_report(folder: Path, index: int) -> ShardReport | None:
    """Returns the report of a shard that is finished and still on disk, else None."""
    path = _report_path(folder, index)
    if not path.exists():
        return None
    document = _read_json(path)
    sums = document["sums"]
    report = ShardReport(
        **{
            **document,
            "layout": parse_layout(document["layout"]),
            "sums": LatentSums(
                count=sums["count"], total=tuple(sums["total"]), squares=tuple(sums["squares"])
            ),
        }
    )
    shard = folder / report.name
    if report.records and (not shard.is_file() or shard.stat().st_size != report.bytes):
        return None
    return report


def finish_set(
    folder: Path,
    provenance: Provenance,
    *,
    num_shards: int,
    quarantined: Mapping[str, str],
    empty_text: NDArray[np.float16],
    empty_tokens: NDArray[np.int32],
    text_scale: tuple[NDArray[np.float32], float, int] | None = None,
) -> Manifest:
    """Adds the reports of shards 0..num_shards-1 up to the manifest and writes it, last of all.

    `quarantined` are the records that were in no shard to begin with; `empty_text` (T, D) and
    `empty_tokens` (T,) are the empty prompt's; `text_scale` is a `FoundScale` for int8 text.
    Raises ValueError if nothing was written, or text of another kind than `provenance` says.
    """
    done = _read_reports(folder, num_shards)
    written = [report for report in done if report.records]
    if not written:
        raise ValueError(f"{folder}: no image could be written, every one was quarantined")
    layouts: list[Layout] = []
    for report in written:
        if report.layout not in layouts:
            layouts.append(report.layout)
    _require_text(folder, provenance, layouts, text_scale)
    reasons = dict(quarantined)
    for report in done:
        reasons |= report.quarantined
    num_records = sum(report.records for report in written)
    manifest = Manifest(
        **{name: getattr(provenance, name) for name in Provenance.__dataclass_fields__},
        layouts=tuple(layouts),
        shards=tuple(_entry(report, layouts) for report in written),
        num_source=num_records + len(reasons),
        num_records=num_records,
        quarantined=reasons,
        num_captions=sum(report.records * report.layout.num_captions for report in written),
        num_truncated=sum(report.num_truncated for report in written),
        latent_statistics=_statistics([report.sums for report in written]),
        empty_text=_write_array(folder / "empty_text.npy", empty_text),
        empty_tokens=_write_array(folder / "empty_tokens.npy", empty_tokens),
        text_scale=_write_text_scale(folder, text_scale),
    )
    write_file(folder / MANIFEST_NAME, manifest.dump().encode())
    remove_progress(folder)
    return manifest


def discard_shard(folder: Path, report: ShardReport) -> None:
    """Deletes a finished shard of an unfinished set, so that it is written again."""
    (folder / report.name).unlink(missing_ok=True)  # first: a report without it is not finished
    (folder / PROGRESS_DIR / f"{Path(report.name).stem}.json").unlink()


def remove_progress(folder: Path) -> None:
    """Deletes a finished set's progress folder, in which other processes may create lock files."""
    while (folder / PROGRESS_DIR).exists():
        try:
            shutil.rmtree(folder / PROGRESS_DIR)
        except FileNotFoundError:
            continue  # another process has just deleted its lock file
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise


class ShardWriter:
    """Writes one shard; leaving its `with` block finishes it, or discards it after an error."""

    def __init__(self, folder: Path, index: int, layout: Layout, kind: LatentKind) -> None:
        self._folder = folder
        self._index = index
        self._layout = layout
        self._kind: LatentKind = kind
        self._name = f"shard-{index:06d}.tar"
        self._keys: set[str] = set()
        self._quarantined: dict[str, str] = {}
        self._num_truncated = 0
        channels = layout.fields["latent"].shape[1] // (2 if kind == "moments" else 1)
        self._sums = _Sums(channels)

    def __enter__(self) -> Self:
        self._file = _HashingFile(self._temporary())
        self._tar = webdataset.TarWriter(self._file, encoder=False, mtime=0, mode=0o444)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            self._discard()
            return
        try:
            self._tar.close()
            self._file.sync()
            self._file.close()
        except BaseException:
            self._discard()
            raise
        self._publish()

    def write(self, example: Example) -> None:
        """Adds an example. Raises FormatError if it is not of the shard's layout."""
        place = f"{self._name}: key {example.key!r}"
        if not KEY_PATTERN.fullmatch(example.key):
            raise FormatError(f"{place}: expected a key of the form {KEY_PATTERN.pattern}")
        if example.key in self._keys:
            raise FormatError(f"{place}: there are two records of this key")
        members: dict[str, Any] = {"__key__": example.key}
        for name in ("latent", "text", "tokens"):
            members[MEMBERS[name]] = self._encode_array(place, name, getattr(example, name))
        members[MEMBERS["json"]] = self._encode_meta(place, example.meta)
        self._tar.write(members)
        self._keys.add(example.key)
        self._num_truncated += len(example.meta["truncated"])
        self._sums.add(example.latent, self._kind)

    def quarantine(self, key: str, reason: str) -> None:
        """Notes that a record is left out, and why."""
        self._quarantined[key] = reason

    def _encode_array(self, place: str, name: str, array: NDArray[Any]) -> bytes:
        part = self._layout.fields[name]
        if (array.dtype, array.shape) != (np.dtype(part.dtype), part.shape):
            raise FormatError(
                f"{place}: field {name}: expected {part.dtype} {part.shape}, "
                f"found {array.dtype} {array.shape}"
            )
        data = array.astype(array.dtype.newbyteorder("<"), copy=False)
        return part.header + data.tobytes()

    def _encode_meta(self, place: str, meta: Mapping[str, Any]) -> bytes:
        captions = self._layout.num_captions
        if len(meta["captions"]) != captions:
            raise FormatError(
                f"{place}: field json: expected {captions} captions, found {len(meta['captions'])}"
            )
        (room,) = self._layout.fields["json"].shape
        content = encode_meta(meta)
        if len(content) > room:
            raise FormatError(
                f"{place}: field json: expected at most {room} bytes, found {len(content)}"
            )
        return content.ljust(room)

    def _discard(self) -> None:
        self._file.mute()  # closing a tar writes to it
        self._tar.close()
        with contextlib.suppress(OSError):  # a full disk, say, of which the error above told
            self._file.close()
        self._temporary().unlink()

    def _temporary(self) -> Path:
        return self._folder / f"{self._name}.part"

    def _publish(self) -> None:
        """Gives the shard its name, then reports it; one without records leaves only its report."""
        records = len(self._keys)
        if records:
            self._temporary().replace(self._folder / self._name)
            sync_folder(self._folder)
        else:
            self._temporary().unlink()
        report = ShardReport(
            name=self._name,
            bytes=self._file.num_bytes if records else 0,
            sha256=self._file.hexdigest() if records else "",
            layout=self._layout,
            records=records,
            num_truncated=self._num_truncated,
            quarantined=self._quarantined,
            sums=self._sums.result(),
        )
        content = json.dumps(asdict(report)).encode()
        write_file(_report_path(self._folder, self._index), content)


class _HashingFile:
    """A file that knows the size and sha256 of what was written to it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("wb")
        self._hash = hashlib.sha256()
        self._muted = False
        self.num_bytes = 0

    def write(self, data: bytes) -> int:
        if self._muted:
            return len(data)
        self._hash.update(data)
        self.num_bytes += len(data)
        with _naming(self._path):
            return self._file.write(data)

    def mute(self) -> None:
        """Makes what is written from now on vanish."""
        self._muted = True

    def sync(self) -> None:
        with _naming(self._path):
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        with _naming(self._path):
            self._file.close()

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


class _Sums:
    """Adds latents up, in float64."""

    def __init__(self, channels: int) -> None:
        self._count = 0
        self._total = np.zeros(channels)
        self._squares = np.zeros(channels)

    def add(self, latent: NDArray[np.float16], kind: LatentKind) -> None:
        """Adds the views of a latent: z = mean + std * noise has E[z²] = mean² + variance."""
        values = latent.astype(np.float64)  # (views, 2C, h, w) or (views, C, h, w)
        squares = np.zeros(len(self._total))
        if kind == "moments":
            values, log_variance = np.split(values, 2, axis=1)
            squares = np.exp(np.clip(log_variance, *LOG_VARIANCE_RANGE)).sum((0, 2, 3))
        self._count += values.size // values.shape[1]
        self._total += values.sum((0, 2, 3))
        self._squares += squares + np.square(values).sum((0, 2, 3))

    def result(self) -> LatentSums:
        return LatentSums(
            count=self._count,
            total=tuple(self._total.tolist()),
            squares=tuple(self._squares.tolist()),
        )


def _statistics(sums: Sequence[LatentSums]) -> LatentStatistics:
    count = sum(part.count for part in sums)
    mean = np.sum([part.total for part in sums], axis=0) / count
    second = np.sum([part.squares for part in sums], axis=0) / count
    std = np.sqrt(np.maximum(second - mean**2, 0.0))
    overall = math.sqrt(max(float(second.mean() - mean.mean() ** 2), 0.0))
    return LatentStatistics(
        mean=tuple(mean.tolist()),
        std=tuple(std.tolist()),
        scaling_factor=1 / overall if overall else 1.0,
    )


def _entry(report: ShardReport, layouts: Sequence[Layout]) -> ShardEntry:
    return ShardEntry(
        name=report.name,
        layout=layouts.index(report.layout),
        records=report.records,
        bytes=report.bytes,
        sha256=report.sha256,
    )


def _require_same(folder: Path, found: Provenance, asked: Provenance) -> None:
    lines = differences(found, asked)
    if lines:
        raise ValueError(
            f"{folder}: holds shards of another kind: {'; '.join(lines)}: "
            "choose another folder, or delete this one"
        )


def _require_scale(folder: Path, provenance: Provenance) -> None:
    path = folder / PROGRESS_DIR / TEXT_SCALE_NAME
    if provenance.text_dtype == "int8" and not path.exists():
        raise ValueError(
            f"{path}: missing, expected the scale of the shards that are finished: "
            "choose another folder, or delete this one"
        )


def _require_text(
    folder: Path,
    provenance: Provenance,
    layouts: Sequence[Layout],
    text_scale: tuple[NDArray[np.float32], float, int] | None,
) -> None:
    """Holds the layouts and the scale to the dtype of the text."""
    asked = provenance.text_dtype
    for found in {layout.fields["text"].dtype for layout in layouts} - {asked}:
        raise ValueError(f"{folder}: text: expected {asked}, as the provenance says, found {found}")
    if (asked == "int8") != (text_scale is not None):
        found = "none" if text_scale is None else "one"
        raise ValueError(
            f"{folder}: text_scale: expected one for int8 and none for float16, "
            f"found {found} for {asked}"
        )
    if text_scale is None:
        return
    scale, shape = text_scale[0], layouts[0].fields["text"].shape[2:]
    if scale.dtype != np.float32 or scale.shape != shape:
        raise ValueError(
            f"{folder}: text_scale: expected float32 {shape}, found {scale.dtype} {scale.shape}"
        )
    if not (np.isfinite(scale) & (scale > 0)).all():
        raise ValueError(f"{folder}: text_scale: expected finite values above 0, found {scale}")


def _read_reports(folder: Path, num_shards: int) -> list[ShardReport]:
    reports = [read_report(folder, index) for index in range(num_shards)]
    missing = [index for index, report in enumerate(reports) if report is None]
    if missing:
        raise ValueError(f"{folder}: shard {missing[0]} of {num_shards} is not finished")
    return [report for report in reports if report is not None]


def _report_path(folder: Path, index: int) -> Path:
    return folder / PROGRESS_DIR / f"shard-{index:06d}.json"


def _read_provenance(path: Path) -> Provenance:
    try:
        return Provenance(**parse_provenance(_read_json(path)))
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: begun by another release ({error!r}): delete the folder and start again"
        ) from error


def _read_json(path: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(path.read_bytes())
    return document


def _write_text_scale(
    folder: Path, text_scale: tuple[NDArray[np.float32], float, int] | None
) -> TextScale | None:
    if text_scale is None:
        return None
    scale, relative_error, num_captions = text_scale
    return TextScale(
        file=_write_array(folder / "text_scale.npy", scale),
        relative_error=float(relative_error),
        num_captions=int(num_captions),
    )


def _write_array(path: Path, array: NDArray[Any]) -> FileEntry:
    stream = io.BytesIO()
    np.save(stream, array)
    content = stream.getvalue()
    write_file(path, content)
    digest = hashlib.sha256(content).hexdigest()
    return FileEntry(name=path.name, bytes=len(content), sha256=digest)


def write_file(path: Path, content: bytes) -> None:
    """Writes a small file completely or not at all."""
    temporary = path.with_name(f"{path.name}.part")
    with _naming(temporary), temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_folder(path.parent)


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Adds the path to an error of writing to an open file, which comes without: a full disk's."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def sync_folder(folder: Path) -> None:
    """Makes a rename last: it is the folder's content that changed."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
