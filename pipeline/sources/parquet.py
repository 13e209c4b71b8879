"""Parquet files with images and captions in columns, as on the Hugging Face Hub.

The image column is a struct of `bytes` and `path`, or plain bytes; a caption is a text or a list of
texts. Listing reads captions and other small columns only. Images are read later, in whole row
groups. Columns that JSON cannot hold, such as bytes and times, are omitted from the shards' JSON.

Needs pyarrow: pip install 'latent-t2i[parquet]'
"""

import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from latent_t2i.pipeline.sources.locators import (
    ParquetLocator,
    file_name_of,
    import_parquet,
    open_parquet,
    read_row_group,
    with_retries,
    without_query,
)
from latent_t2i.pipeline.sources.record import (
    Record,
    SourceError,
    extra_fields,
    find_caption_column,
    make_key,
    parse_captions,
)
from latent_t2i.shards.remote.transport import RemoteError

IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp")
TEXT_TYPES = ("string", "large_string", "string_view")
NO_IMAGE = "no image in this row"
ROWS_PER_BATCH = 1024


@dataclass(frozen=True, kw_only=True)
class Columns:
    """The columns that are read, as dotted paths."""

    image: str
    """The image's bytes."""
    path: str | None
    """The image's file name, if there is such a column."""
    caption: str
    others: tuple[str, ...]

    @property
    def listed(self) -> list[str]:
        """All columns but the image."""
        return [self.caption, *self.others, *([self.path] if self.path else [])]


class RowGroup(NamedTuple):
    """A row group, as the file's footer describes it."""

    num_rows: int
    has_nulls: bool
    """Whether rows have no image. Without statistics they are found when they are encoded."""


def records(
    files: Sequence[tuple[str, str]],
    *,
    image_column: str | None = None,
    caption_column: str | None = None,
) -> Iterator[Record]:
    """Yields a record for each row of the files, given as (path or URL, short name), in order.

    The key is the short name with the row's number in the file. Raises SourceError for a file that
    is not parquet or lacks a column, and RemoteError for one that cannot be downloaded.
    """
    for url, short_name in files:
        columns, groups = _inspect(url, image_column, caption_column)
        first = 0
        for row_group, group in enumerate(groups):
            without_image = _find_nulls(url, row_group, columns.image) if group.has_nulls else set()
            for row, fields in enumerate(_rows(url, row_group, columns)):
                key = make_key(f"{short_name}_{first + row:07d}")
                locator = ParquetLocator(url, row_group, row, columns.image)
                problem = NO_IMAGE if row in without_image else None
                yield _record(key, locator, columns, fields, problem)
            first += group.num_rows


def _record(
    key: str,
    locator: ParquetLocator,
    columns: Columns,
    fields: dict[str, Any],
    image_problem: str | None,
) -> Record:
    captions, problem = parse_captions(fields[columns.caption])
    struct, _, name = (columns.path or "").partition(".")
    path = (fields[struct] or {}).get(name) if columns.path else None
    others = {column: fields[column] for column in columns.others}
    return Record(
        key=key,
        locator=locator,
        captions=captions,
        extra=extra_fields(others, path or file_name_of(locator.url)),
        problem=image_problem or problem,
    )


def _find_nulls(url: str, row_group: int, column: str) -> set[int]:
    """Returns the rows of a group whose image is null. Reads the group's images."""
    cells = _read(url, lambda: read_row_group(url, row_group, [column])).column(0)
    compute = importlib.import_module("pyarrow.compute")
    values = compute.struct_field(cells, [0]) if _struct_fields(cells.type) else cells
    return {row for row, is_null in enumerate(compute.is_null(values).to_pylist()) if is_null}


def _rows(url: str, row_group: int, columns: Columns) -> Iterator[dict[str, Any]]:
    table = _read(url, lambda: read_row_group(url, row_group, columns.listed))
    for batch in table.to_batches(ROWS_PER_BATCH):
        yield from batch.to_pylist()


def _inspect(
    url: str, image_column: str | None, caption_column: str | None
) -> tuple[Columns, list[RowGroup]]:
    """Returns which columns of a file to read, and its row groups."""

    def read() -> tuple[Columns, list[RowGroup]]:
        file = open_parquet(url)
        try:
            name = without_query(url)
            columns = _find_columns(name, file.schema_arrow, image_column, caption_column)
            paths = [file.schema.column(n).path for n in range(len(file.schema))]
            image = paths.index(columns.image)
            numbers = range(file.metadata.num_row_groups)
            return columns, [_describe(file.metadata.row_group(n), image) for n in numbers]
        finally:
            file.close(force=True)

    found: tuple[Columns, list[RowGroup]] = _read(url, lambda: with_retries(url, read))
    return found


def _describe(row_group: Any, column: int) -> RowGroup:
    # Only this column: pyarrow 26 aborts the process on some broken metadata of a column.
    statistics = row_group.column(column).statistics
    has_nulls = statistics is not None and statistics.has_null_count and statistics.null_count > 0
    return RowGroup(row_group.num_rows, has_nulls)


def _read(url: str, read: Callable[[], Any]) -> Any:
    """Returns `read()`. Raises SourceError with the file's name for a missing or broken file."""
    import_parquet()
    arrow_error: type[Exception] = importlib.import_module("pyarrow").ArrowException
    try:
        return read()
    except FileNotFoundError:
        raise SourceError(f"{without_query(url)}: no such file") from None
    except RemoteError:
        raise
    except (OSError, arrow_error) as error:
        raise SourceError(f"{without_query(url)}: not parquet, or broken: {error}") from None


def _find_columns(
    file: str, schema: Any, image_column: str | None, caption_column: str | None
) -> Columns:
    names = (image_column,) if image_column else IMAGE_COLUMNS
    image = next((name for name in names if name in schema.names), None)
    if image is None:
        raise SourceError(
            f"--source.image-column: {file} has no column {' or '.join(map(repr, names))}, "
            f"only {', '.join(map(repr, schema.names))}"
        )
    caption = find_caption_column(schema.names, caption_column, file)
    _require_text(file, schema.field(caption))
    inner, path = _find_bytes(file, schema.field(image))
    others = (f.name for f in schema if f.name not in (image, caption) and _is_json(f.type))
    return Columns(image=inner, path=path, caption=caption, others=tuple(others))


def _find_bytes(file: str, field: Any) -> tuple[str, str | None]:
    """Returns the dotted paths of an image column's bytes and file names."""
    if _is_bytes(field.type):
        return field.name, None
    inner = {part.name: part.type for part in _struct_fields(field.type)}
    if not _is_bytes(inner.get("bytes")):
        raise SourceError(
            f"--source.image-column: {file}: {field.name!r} is {field.type}, expected bytes, or a "
            "struct with a field 'bytes'"
        )
    has_path = str(inner.get("path")) in TEXT_TYPES
    return f"{field.name}.bytes", f"{field.name}.path" if has_path else None


def _require_text(file: str, field: Any) -> None:
    text = field.type
    if _is_list(text):
        text = text.value_type
    if _is_dictionary(text):
        text = text.value_type
    if str(text) not in (*TEXT_TYPES, "null"):
        raise SourceError(
            f"--source.caption-column: {file}: {field.name!r} is {field.type}, expected text or a "
            "list of texts"
        )


def _is_json(kind: Any) -> bool:
    """Returns whether a column's type is text, number, bool, or composed of these."""
    if _is_list(kind) or _is_dictionary(kind):
        return _is_json(kind.value_type)
    if _struct_fields(kind):
        return all(_is_json(field.type) for field in _struct_fields(kind))
    name = str(kind)
    plain = (*TEXT_TYPES, "bool", "double", "float", "null")
    return name in plain or name.startswith(("int", "uint"))


def _struct_fields(kind: Any) -> list[Any]:
    return list(kind) if str(kind).startswith("struct<") else []


def _is_bytes(kind: Any) -> bool:
    return str(kind) in ("binary", "large_binary", "binary_view")


def _is_list(kind: Any) -> bool:
    return str(kind).startswith(("list<", "large_list<", "fixed_size_list<", "list_view<"))


def _is_dictionary(kind: Any) -> bool:
    return str(kind).startswith("dictionary<")
