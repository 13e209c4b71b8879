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
import json
import os
import re
import shutil
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from io import BytesIO
from pathlib import Path
from types import TracebackType
from typing import IO, Any, NamedTuple, Self, cast

import numpy as np
from numpy.typing import NDArray

from latent_t2i.shards.files import (
    HashingFile,
    hash_on_disk,
    remove_stale_attempts,
    write_file,
    write_first,
    write_listed,
)
from latent_t2i.shards.latent_stats import LatentSums, latent_statistics
from latent_t2i.shards.layout import check_fields, member_of
from latent_t2i.shards.parsing import from_json
from latent_t2i.shards.quarantine import QUARANTINE_NAME, Quarantined
from latent_t2i.shards.schema import (
    KEY_PATTERN,
    MANIFEST_NAME,
    MEMBERS,
    PROGRESS_DIR,
    Example,
    FieldSpec,
    FileEntry,
    FormatError,
    LatentKind,
    Layout,
    Manifest,
    Part,
    Provenance,
    TextScale,
    differences,
    encode_meta,
    read_document,
)
from latent_t2i.shards.shard_sums import SUMS_NAME, sums_dtype
from latent_t2i.shards.shard_table import TABLE_DTYPE, ShardTable, shard_name

PROVENANCE_NAME = "provenance.json"
TEXT_SCALE_NAME = "text_scale.json"
TABLE_NAME = "shards.npy"
STAGING_DIR = "extend"
"""In a finished set's progress folder: the files of its extension (extend.py)."""


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
    begun_ns: int
    """When its first image was read; later changes of an image show in its own time."""


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
    files. With `in_use`, another process uses the set, which must match even without shards, and
    whose locks stay.
    """
    check_fields(str(folder), provenance.fields)
    remove_stale_attempts(folder)
    remove_stale_attempts(folder / PROGRESS_DIR)
    if (folder / MANIFEST_NAME).exists():
        manifest = Manifest.load(folder)
        # Nothing is encoded any more, so this run's device does not matter.
        if differences(manifest, without_device(provenance)):
            _require_same(folder, manifest, provenance)
        _remove_leftovers(folder, in_use=in_use)
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


def without_device(provenance: Provenance) -> Provenance:
    """Returns what determines the content of a set, to compare it on any kind of device."""
    settings = {name: v for name, v in provenance.preprocessing.items() if name != "device"}
    return replace(provenance, preprocessing=settings)


def _remove_leftovers(folder: Path, *, in_use: bool) -> None:
    """Deletes what a process left that was killed after it wrote the manifest.

    Locks stay if other processes use the set, and so does an extension of it, which was
    interrupted or is being written.
    """
    progress = folder / PROGRESS_DIR
    if not in_use and not (progress / STAGING_DIR).exists():
        remove_progress(folder)
        return
    for path in progress.glob("*.json"):  # the reports, and what they have in common
        path.unlink(missing_ok=True)


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
    """Returns the report of a shard that is finished and still on disk or at a URL, else None."""
    path = _report_path(folder, index)
    if not path.exists():
        return None
    report = from_json(ShardReport, read_document(path), str(path))
    if report.name != f"{path.stem}.tar" or not _is_complete(report):
        raise FormatError(f"{path}: damaged report: delete it and run the command again")
    shard = folder / report.name
    if not report.records or _put_path(folder, report).exists():
        return report
    return report if shard.is_file() and shard.stat().st_size == report.bytes else None


def mark_put(folder: Path, report: ShardReport) -> None:
    """Deletes a finished shard that was put at a URL; `read_report` still counts it as finished."""
    _put_path(folder, report).touch()
    (folder / report.name).unlink(missing_ok=True)


def _is_complete(report: ShardReport) -> bool:
    """Returns whether the values of a report fit together."""
    sums, layout = report.sums, report.layout
    if report.num_truncated < 0 or list(layout.fields)[: len(MEMBERS)] != list(MEMBERS):
        return False
    if not report.records:
        return True
    return (
        report.records > 0
        and len(sums.total) == len(sums.squares) > 0 < sums.count
        and re.fullmatch("[0-9a-f]{64}", report.sha256) is not None
        and report.bytes == layout.shard_bytes(report.records)
        and min(layout.fields["tokens"].shape, default=0) > 0
    )


def finish_set(
    folder: Path,
    provenance: Provenance,
    *,
    num_shards: int,
    quarantined: Mapping[str, str],
    empty_text: NDArray[np.float16],
    empty_tokens: NDArray[np.int32],
    text_scale: FoundScale | None = None,
    field_scales: Mapping[str, NDArray[np.float32]] | None = None,
) -> Manifest:
    """Merges the reports of shards 0 to num_shards - 1 into the manifest and writes it.

    The reports are read one after the other, because a set may have a million of them.

    Args:
        folder: The folder of the set.
        provenance: The same as for `begin_set`.
        num_shards: Number of shards; each must have a report.
        quarantined: The reason for each image that is in no shard, by key.
        empty_text: Hidden states (T, D) of the empty prompt.
        empty_tokens: Token ids (T,) of the empty prompt.
        text_scale: A `FoundScale` for int8 text, else None.
        field_scales: The scale of int8 further fields over their last axis, by field.

    Raises:
        ValueError: The folder is of another command, a shard has no report, no image was
            written, or the fields in the shards or the scales do not match `provenance`.
    """
    _require_same(folder, _read_provenance(folder), provenance)
    manifest = merge_reports(
        folder,
        provenance,
        _read_reports(folder, num_shards),
        num_shards=num_shards,
        quarantined=quarantined,
        small_files={
            "fields": _write_field_scales(folder, provenance.fields, field_scales or {}),
            "empty_text": _write_array(folder / "empty_text.npy", empty_text),
            "empty_tokens": _write_array(folder / "empty_tokens.npy", empty_tokens),
            "text_scale": text_scale and _write_text_scale(folder, *text_scale),
        },
    )
    _require_text(folder, provenance, manifest.layouts, text_scale)
    manifest.check(folder / MANIFEST_NAME)
    remove_stale_attempts(folder, is_finished=True)
    write_file(folder / MANIFEST_NAME, manifest.dump().encode())
    remove_progress(folder)
    return manifest


def merge_reports(
    folder: Path,
    provenance: Provenance,
    reports: Iterable[ShardReport],
    *,
    num_shards: int,
    quarantined: Mapping[str, str],
    small_files: Mapping[str, Any],
    parts: Sequence[Part] = (),
) -> Manifest:
    """Writes the tables of a set; returns its manifest, neither checked nor written yet.

    Args:
        folder: Where the tables are written.
        provenance: What determines the content of the set.
        reports: One per shard, in order.
        num_shards: Number of shards.
        quarantined: The reason for each image that is in no shard, by key.
        small_files: Values for the manifest: `fields` and the files beside the shards.
        parts: The runs that made the set, if there are several.

    Raises:
        ValueError: No image was written, or a report differs from the others.
    """
    merged = _Merged(num_shards)
    # Other names than those of the set before, which stays readable until the manifest is replaced.
    ending = f"-{len(parts)}" if parts else ""
    quarantine, table, sums = (
        folder / f"{Path(name).stem}{ending}{Path(name).suffix}"
        for name in (QUARANTINE_NAME, TABLE_NAME, SUMS_NAME)
    )
    quarantine_entry = write_listed(quarantine, _merge(reports, quarantined, merged))
    if merged.sums_rows is None:
        raise ValueError(f"{folder}: no image was written, all of them were quarantined")
    rows = merged.rows[merged.rows["records"] > 0]
    shards = ShardTable(rows, [layout.record_bytes for layout in merged.layouts])
    num_records = int(shards.records.sum())
    return Manifest(
        **{name: getattr(provenance, name) for name in Provenance.__dataclass_fields__}
        | dict(small_files),
        layouts=tuple(merged.layouts),
        shard_table=_write_array(table, rows),
        quarantine=quarantine_entry,
        shard_sums=_write_array(sums, merged.sums_rows),
        num_source=num_records + merged.num_quarantined,
        num_records=num_records,
        num_quarantined=merged.num_quarantined,
        num_captions=int(merged.sums_rows["captions"].sum()),
        num_truncated=int(merged.sums_rows["truncated"].sum()),
        latent_statistics=latent_statistics(merged.sums),
        parts=tuple(parts),
        shards=shards,
        folder=folder,
    )


def discard_shard(folder: Path, report: ShardReport) -> None:
    """Deletes a finished shard of an unfinished set, so that it is written again."""
    (folder / report.name).unlink(missing_ok=True)  # first: a report without it is not finished
    _put_path(folder, report).unlink(missing_ok=True)
    (folder / PROGRESS_DIR / f"{Path(report.name).stem}.json").unlink()


def remove_progress(folder: Path) -> None:
    """Deletes a finished set's progress folder, in which other processes may create lock files."""
    remove_tree(folder / PROGRESS_DIR)


def remove_tree(folder: Path) -> None:
    """Deletes a folder, in which other processes may create and delete files."""
    while folder.exists():
        try:
            shutil.rmtree(folder)
        except FileNotFoundError:
            continue  # another process has just deleted a file, or all of it
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise


class ShardWriter:
    """Writes one shard. Leaving its `with` block publishes it, or discards it after an error."""

    def __init__(
        self,
        folder: Path,
        index: int,
        layout: Layout,
        kind: LatentKind,
        *,
        begun_ns: int | None = None,
    ) -> None:
        """`begun_ns` becomes the file's time; later changes of an image show in its own."""
        self._begun_ns = begun_ns
        self._folder = folder
        self._index = index
        self._layout = layout
        self._kind: LatentKind = kind
        self._name = shard_name(index)
        self._keys: set[str] = set()
        self._quarantined: dict[str, str] = {}
        self._num_truncated = 0
        self._sums = LatentSums()

    def __enter__(self) -> Self:
        self._file = HashingFile(self._folder / self._name)
        self._tar = tarfile.open(
            fileobj=cast(IO[bytes], self._file), mode="w|", format=tarfile.USTAR_FORMAT
        )
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
                if self._begun_ns is not None:
                    with contextlib.suppress(FileNotFoundError):  # `publish` handles this
                        os.utime(self._file.path, ns=(self._begun_ns, self._begun_ns))
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
        members = self._encode(place, example)
        # All checks come before the write, so that a rejected example leaves no bytes.
        sums = LatentSums.of(example.latent, self._kind)
        if not np.isfinite(sums.squares).all():
            raise FormatError(
                f"{place}: field latent: expected finite values, found NaN or infinity"
            )
        for name, content in members.items():
            self._tar.addfile(_tar_header(f"{example.key}.{name}", len(content)), BytesIO(content))
        self._keys.add(example.key)
        self._num_truncated += len(example.meta["truncated"])
        self._sums += sums

    def quarantine(self, key: str, reason: str) -> None:
        """Records that an image is not written, and why."""
        self._quarantined[key] = reason

    def _encode(self, place: str, example: Example) -> dict[str, bytes]:
        """Returns the members of a record, by extension in the order of the layout."""
        arrays = {"latent": example.latent, "text": example.text, "tokens": example.tokens}
        further = self._layout.fields.keys() - MEMBERS.keys()
        if example.extra.keys() != further:
            raise FormatError(
                f"{place}: further fields: expected {sorted(further)}, "
                f"found {sorted(example.extra)}"
            )
        arrays |= example.extra
        return {
            member_of(name): self._encode_meta(place, example.meta)
            if name == "json"
            else self._encode_array(place, name, arrays[name])
            for name in self._layout.fields
        }

    def _encode_array(self, place: str, name: str, array: NDArray[Any]) -> bytes:
        part = self._layout.fields[name]
        if (array.dtype, array.shape) != (np.dtype(part.dtype), part.shape):
            raise FormatError(
                f"{place}: field {name}: expected {part.dtype} {part.shape}, "
                f"found {array.dtype} {array.shape}"
            )
        if name not in MEMBERS and part.dtype.startswith("float") and not np.isfinite(array).all():
            raise FormatError(
                f"{place}: field {name}: expected finite values, found NaN or infinity"
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
            begun_ns=self._begun_ns or 0,
        )
        try:
            _publish_report(self._folder, self._index, report)
        except FileNotFoundError:
            # Another process of this rank, on another host, has just finished the set and deleted
            # the reports: it found the shard that this one has compared its own with.
            if not (self._folder / MANIFEST_NAME).exists():
                raise


def _publish_report(folder: Path, index: int, report: ShardReport) -> None:
    """Writes the report of a shard, unless there is one, of this process's rank on another host.

    One that does not fit the shard that is there is replaced, if this one does. Raises FormatError
    if neither does.
    """
    path, content = _report_path(folder, index), json.dumps(asdict(report)).encode()
    if write_first(path, content):
        return
    there = from_json(ShardReport, read_document(path), str(path))
    if there.sha256 == report.sha256:
        return
    shard = folder / report.name
    found = hash_on_disk(shard) if shard.exists() else ""
    if found == report.sha256:
        write_file(path, content)  # the other one is of a shard that was deleted since
    elif found != there.sha256:
        raise FormatError(
            f"{shard}: sha256: expected {report.sha256}, found {found}: another process wrote "
            "another shard under this name; delete it and run the command again"
        )


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


def _tar_header(name: str, num_bytes: int) -> tarfile.TarInfo:
    """Returns a header with constant time, mode and owner: equal records have equal bytes."""
    info = tarfile.TarInfo(name)
    info.size, info.mode = num_bytes, 0o444
    info.uname = info.gname = "bigdata"
    return info


class _Merged:
    """The sum of the reports of a set's planned shards."""

    def __init__(self, num_shards: int) -> None:
        self.layouts: list[Layout] = []
        self.rows = np.zeros(num_shards, TABLE_DTYPE)
        self.sums_rows: NDArray[Any] | None = None
        """None until a shard has records, which tell the number of channels."""
        self.sums = LatentSums()
        self.num_quarantined = 0

    def add(self, index: int, report: ShardReport) -> None:
        """Adds the report of a shard."""
        if not report.records:
            return
        if report.layout not in self.layouts:
            self.layouts.append(report.layout)
        layout, sums = self.layouts.index(report.layout), report.sums
        self.rows[index] = (index, layout, report.records, bytes.fromhex(report.sha256))
        if self.sums_rows is None:
            self.sums_rows = np.zeros(len(self.rows), sums_dtype(len(sums.total)))
        if len(sums.total) != len(self.sums_rows["total"][0]):
            raise FormatError(f"{report.name}: expected as many channels as in the shards before")
        captions = report.records * report.layout.num_captions
        values = (captions, report.num_truncated, sums.count, sums.total, sums.squares)
        self.sums_rows[index] = values
        self.sums += sums


def _merge(
    reports: Iterable[ShardReport], quarantined: Mapping[str, str], merged: _Merged
) -> Iterator[bytes]:
    """Adds all reports to `merged` and yields the lines of the quarantine."""
    merged.num_quarantined += len(quarantined)
    for key, reason in quarantined.items():
        yield Quarantined(key=key, reason=reason, shard=None).line()
    for index, report in enumerate(reports):
        merged.add(index, report)
        merged.num_quarantined += len(report.quarantined)
        for key, reason in report.quarantined.items():
            yield Quarantined(key=key, reason=reason, shard=index).line()


def _read_reports(folder: Path, num_shards: int) -> Iterator[ShardReport]:
    """Yields the reports of a set. Raises ValueError for a shard without one."""
    for index in range(num_shards):
        report = read_report(folder, index)
        if report is None:
            raise ValueError(f"{folder}: shard {index} of {num_shards} is not finished")
        yield report


def _read_provenance(folder: Path) -> Provenance:
    path = folder / PROGRESS_DIR / PROVENANCE_NAME
    return from_json(Provenance, read_document(path), f"{path}: written by another release")


def _report_path(folder: Path, index: int) -> Path:
    return folder / PROGRESS_DIR / f"shard-{index:06d}.json"


def _put_path(folder: Path, report: ShardReport) -> Path:
    return folder / PROGRESS_DIR / f"{Path(report.name).stem}.put"


def _write_text_scale(
    folder: Path, scale: NDArray[np.float32], relative_error: float, num_captions: int
) -> TextScale:
    return TextScale(
        file=_write_array(folder / "text_scale.npy", scale),
        relative_error=float(relative_error),
        num_captions=int(num_captions),
    )


def _write_field_scales(
    folder: Path, specs: Sequence[FieldSpec], scales: Mapping[str, NDArray[np.float32]]
) -> tuple[FieldSpec, ...]:
    """Writes the scales of further fields; returns the fields with their files."""
    expected = {spec.name: spec.shape[-1:] for spec in specs if spec.dtype == "int8"}
    for name, scale in scales.items():
        if scale.dtype != np.float32 or scale.shape != expected.get(name):
            raise ValueError(
                f"{folder}: field_scales: expected float32 for int8 fields only, with the last "
                f"axes {expected}, found {scale.dtype} {scale.shape} for {name}"
            )
        if not (np.isfinite(scale) & (scale > 0)).all():
            raise ValueError(f"{folder}: field_scales: {name}: expected finite values above 0")
    files = {name: _write_array(folder / f"{name}_scale.npy", s) for name, s in scales.items()}
    return tuple(replace(spec, scale=files.get(spec.name)) for spec in specs)


def _write_array(path: Path, array: NDArray[Any]) -> FileEntry:
    stream = BytesIO()
    np.save(stream, array)
    return write_listed(path, [stream.getvalue()])
