"""Writes a set of shards that is complete or absent, and resumes after a kill.

    manifest = begin_set(folder, provenance)                # refuses a folder of another set
    with ShardWriter(folder, index, layout, kind) as shard: # for each index that has no report yet
        shard.write(example)  # or shard.quarantine(key, reason)
    finish_set(folder, provenance, num_shards=..., ...)

Each finished shard has a report in FOLDER/progress, and the manifest is the sum of the reports, so
the same examples result in the same bytes whether or not a run was interrupted. All state is on
disk: several processes may each write their own shards, and any of them may finish the set.
"""

import contextlib
import errno
import hashlib
import io
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
import webdataset
from numpy.typing import NDArray

from latent_t2i.shards.files import HashingFile, remove_stale_attempts, write_file
from latent_t2i.shards.latent_stats import LatentSums, latent_statistics
from latent_t2i.shards.parsing import from_json
from latent_t2i.shards.schema import (
    KEY_PATTERN,
    MANIFEST_NAME,
    MEMBERS,
    PROGRESS_DIR,
    Example,
    FileEntry,
    FormatError,
    LatentKind,
    Layout,
    Manifest,
    Provenance,
    ShardEntry,
    TextScale,
    differences,
    encode_meta,
    read_document,
)

PROVENANCE_NAME = "provenance.json"
TEXT_SCALE_NAME = "text_scale.json"


@dataclass(frozen=True, kw_only=True)
class ShardReport:
    """The outcome of one shard; it is written after the shard is on disk."""

    name: str
    bytes: int
    sha256: str
    layout: Layout
    records: int
    num_truncated: int
    quarantined: dict[str, str]
    sums: LatentSums


@dataclass(frozen=True, kw_only=True)
class _StoredScale:
    """`FoundScale` in progress/text_scale.json."""

    scale: tuple[float, ...]
    relative_error: float
    num_captions: int


class FoundScale(NamedTuple):
    """A scale for int8 text, with the error measured on the sample of captions that gave it."""

    scale: NDArray[np.float32]  # (D,)
    relative_error: float
    num_captions: int


def begin_set(folder: Path, provenance: Provenance, *, in_use: bool = False) -> Manifest | None:
    """Prepares a folder for a set; returns the manifest if the same set is already finished.

    Raises ValueError, naming both values, if the folder holds another set, a part of one, or other
    files. With `in_use`, another process writes the set, which must match even without shards.
    """
    remove_stale_attempts(folder)
    remove_stale_attempts(folder / PROGRESS_DIR)
    if (folder / MANIFEST_NAME).exists():
        manifest = Manifest.load(folder)
        # Nothing is encoded any more, so this run's device does not matter.
        settings = {name: v for name, v in provenance.preprocessing.items() if name != "device"}
        _require_same(folder, manifest, replace(provenance, preprocessing=settings))
        remove_progress(folder)  # of a process killed after it wrote the manifest
        return manifest
    progress = folder / PROGRESS_DIR
    path = progress / PROVENANCE_NAME
    has_shards = any(progress.glob("shard-*.json"))
    if path.exists() and (has_shards or in_use):
        _require_same(folder, _read_provenance(folder), provenance)
        missing = not (progress / TEXT_SCALE_NAME).exists()
        if has_shards and provenance.text_dtype == "int8" and missing:
            raise ValueError(
                f"{progress / TEXT_SCALE_NAME}: missing, but finished shards depend on this scale: "
                "choose another folder, or delete this one"
            )
        if not in_use:
            _delete_unreported(folder)
        return None
    if not path.exists() and folder.is_dir() and {*folder.iterdir()} - {progress}:
        raise ValueError(f"{folder}: contains files but no shards: choose an empty folder")
    progress.mkdir(parents=True, exist_ok=True)
    content = json.dumps(asdict(provenance)).encode()
    if not path.exists() or path.read_bytes() != content:
        (progress / TEXT_SCALE_NAME).unlink(missing_ok=True)  # of another set, without a shard
    _delete_unreported(folder)
    write_file(path, content)
    return None


def _delete_unreported(folder: Path) -> None:
    """Deletes shards without a report, of a process killed between the two.

    They are written again. On a GPU the new bytes may differ, and a shard is never overwritten.
    """
    for shard in folder.glob("shard-*.tar"):
        if not (folder / PROGRESS_DIR / f"{shard.stem}.json").exists():
            shard.unlink()


def keep_text_scale(folder: Path, found: FoundScale) -> None:
    """Stores the scale of int8 text for this run and for runs that resume it.

    Call it before the first shard is written, because all shards share one scale.
    """
    document = {**found._asdict(), "scale": found.scale.tolist()}
    write_file(folder / PROGRESS_DIR / TEXT_SCALE_NAME, json.dumps(document).encode())


def read_text_scale(folder: Path) -> FoundScale | None:
    """Returns the stored scale of an unfinished set, bit for bit; None if there is none."""
    path = folder / PROGRESS_DIR / TEXT_SCALE_NAME
    if not path.exists():
        return None
    stored = from_json(_StoredScale, read_document(path), str(path))
    scale = np.array(stored.scale, np.float32)
    return FoundScale(scale, stored.relative_error, stored.num_captions)


def read_report(folder: Path, index: int) -> ShardReport | None:
    """Returns the report of a shard that is finished and still on disk, else None."""
    path = _report_path(folder, index)
    if not path.exists():
        return None
    report = from_json(ShardReport, read_document(path), str(path))
    sums = report.sums
    is_complete = list(report.layout.fields) == list(MEMBERS) and (
        not report.records or len(sums.total) == len(sums.squares) > 0 < sums.count
    )
    if report.name != f"{path.stem}.tar" or not is_complete:
        raise FormatError(f"{path}: damaged report: delete it and run the command again")
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
    text_scale: FoundScale | None = None,
) -> Manifest:
    """Merges the reports of shards 0 to num_shards - 1 into the manifest and writes it.

    Args:
        folder: The folder of the set.
        provenance: The same as for `begin_set`.
        num_shards: Number of shards; each must have a report.
        quarantined: The reason for each image that is in no shard, by key.
        empty_text: Hidden states (T, D) of the empty prompt.
        empty_tokens: Token ids (T,) of the empty prompt.
        text_scale: A `FoundScale` for int8 text, else None.

    Raises:
        ValueError: The folder is of another command, a shard has no report, no image was
            written, or `text_scale` and the text in the shards do not match `provenance`.
    """
    _require_same(folder, _read_provenance(folder), provenance)
    done = _read_reports(folder, num_shards)
    written = [report for report in done if report.records]
    if not written:
        raise ValueError(f"{folder}: no image was written, all of them were quarantined")
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
        shards=tuple(
            ShardEntry(
                name=report.name,
                layout=layouts.index(report.layout),
                records=report.records,
                bytes=report.bytes,
                sha256=report.sha256,
            )
            for report in written
        ),
        num_source=num_records + len(reasons),
        num_records=num_records,
        quarantined=reasons,
        num_captions=sum(report.records * report.layout.num_captions for report in written),
        num_truncated=sum(report.num_truncated for report in written),
        latent_statistics=latent_statistics([report.sums for report in written]),
        empty_text=_write_array(folder / "empty_text.npy", empty_text),
        empty_tokens=_write_array(folder / "empty_tokens.npy", empty_tokens),
        text_scale=text_scale and _write_text_scale(folder, *text_scale),
    )
    manifest.check(folder / MANIFEST_NAME)
    remove_stale_attempts(folder, is_finished=True)
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
    """Writes one shard. Leaving its `with` block publishes it, or discards it after an error."""

    def __init__(self, folder: Path, index: int, layout: Layout, kind: LatentKind) -> None:
        self._folder = folder
        self._index = index
        self._layout = layout
        self._kind: LatentKind = kind
        self._name = f"shard-{index:06d}.tar"
        self._keys: set[str] = set()
        self._quarantined: dict[str, str] = {}
        self._num_truncated = 0
        self._sums = LatentSums()

    def __enter__(self) -> Self:
        self._file = HashingFile(self._folder / self._name)
        # Constant time and mode, so that equal records have equal bytes.
        self._tar = webdataset.TarWriter(self._file, encoder=False, mtime=0, mode=0o444)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if error is None:
                self._tar.close()
                self._file.sync()
                self._publish()
        except BaseException:
            self._discard()
            raise
        if error is not None:
            self._discard()

    def write(self, example: Example) -> None:
        """Adds an example. Raises FormatError if it does not match the layout."""
        place = f"{self._name}: key {example.key!r}"
        if not KEY_PATTERN.fullmatch(example.key):
            raise FormatError(f"{place}: expected a key of the form {KEY_PATTERN.pattern}")
        if example.key in self._keys:
            raise FormatError(f"{place}: expected unique keys, found this one twice")
        members: dict[str, Any] = {"__key__": example.key}
        for name in ("latent", "text", "tokens"):
            members[MEMBERS[name]] = self._encode_array(place, name, getattr(example, name))
        members[MEMBERS["json"]] = self._encode_meta(place, example.meta)
        # All checks come before the write, so that a rejected example leaves no bytes.
        sums = LatentSums.of(example.latent, self._kind)
        if not np.isfinite(sums.squares).all():
            raise FormatError(
                f"{place}: field latent: expected finite values, found NaN or infinity"
            )
        self._tar.write(members)
        self._keys.add(example.key)
        self._num_truncated += len(example.meta["truncated"])
        self._sums += sums

    def quarantine(self, key: str, reason: str) -> None:
        """Records that an image is not written, and why."""
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
        (size,) = self._layout.fields["json"].shape
        content = encode_meta(meta)
        if len(content) > size:
            raise FormatError(
                f"{place}: field json: expected at most {size} bytes, found {len(content)}"
            )
        return content.ljust(size)

    def _discard(self) -> None:
        self._file.mute()  # closing the tar writes to it
        self._tar.close()
        with contextlib.suppress(OSError):  # of a full disk; the first error is being raised
            self._file.close()
        self._file.path.unlink(missing_ok=True)

    def _publish(self) -> None:
        """Gives the shard its final name, if it has records, and writes its report."""
        records = len(self._keys)
        # The shard before its report: a report without its shard counts as unfinished.
        sha256 = self._file.publish(self._folder / self._name) if records else ""
        self._file.close()
        self._file.path.unlink(missing_ok=True)
        report = ShardReport(
            name=self._name,
            bytes=self._file.num_bytes if records else 0,
            sha256=sha256,
            layout=self._layout,
            records=records,
            num_truncated=self._num_truncated,
            quarantined=self._quarantined,
            sums=self._sums,
        )
        content = json.dumps(asdict(report)).encode()
        try:
            write_file(_report_path(self._folder, self._index), content)
        except FileNotFoundError:
            # Another process of this rank, on another host, has just finished the set and deleted
            # the reports: it found the shard that this one has compared its own with.
            if not (self._folder / MANIFEST_NAME).exists():
                raise


def _require_same(folder: Path, found: Provenance, expected: Provenance) -> None:
    lines = differences(found, expected)
    if lines:
        raise ValueError(
            f"{folder}: contains other shards than those of this command: {'; '.join(lines)}: "
            "choose another folder, or delete this one"
        )


def _require_text(
    folder: Path, provenance: Provenance, layouts: Sequence[Layout], text_scale: FoundScale | None
) -> None:
    """Raises ValueError if layouts or scale do not match the text's dtype in the provenance."""
    dtype = provenance.text_dtype
    for found in {layout.fields["text"].dtype for layout in layouts} - {dtype}:
        raise ValueError(f"{folder}: text: the provenance has {dtype}, the shards have {found}")
    if (dtype == "int8") != (text_scale is not None):
        found_scale = "none" if text_scale is None else "one"
        raise ValueError(
            f"{folder}: text_scale: expected one for int8 text and none for float16, "
            f"found {found_scale} for {dtype}"
        )
    if text_scale is None:
        return
    scale, shape = text_scale[0], layouts[0].fields["text"].shape[2:]
    if scale.dtype != np.float32 or scale.shape != shape:
        raise ValueError(
            f"{folder}: text_scale: expected float32 {shape}, found {scale.dtype} {scale.shape}"
        )
    if not (np.isfinite(scale) & (scale > 0)).all():
        raise ValueError(
            f"{folder}: text_scale: expected finite values above 0, found {scale.min()}"
        )


def _read_reports(folder: Path, num_shards: int) -> list[ShardReport]:
    reports = [read_report(folder, index) for index in range(num_shards)]
    missing = [index for index, report in enumerate(reports) if report is None]
    if missing:
        raise ValueError(f"{folder}: shard {missing[0]} of {num_shards} is not finished")
    return [report for report in reports if report is not None]


def _read_provenance(folder: Path) -> Provenance:
    path = folder / PROGRESS_DIR / PROVENANCE_NAME
    return from_json(Provenance, read_document(path), f"{path}: written by another release")


def _report_path(folder: Path, index: int) -> Path:
    return folder / PROGRESS_DIR / f"shard-{index:06d}.json"


def _write_text_scale(
    folder: Path, scale: NDArray[np.float32], relative_error: float, num_captions: int
) -> TextScale:
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
