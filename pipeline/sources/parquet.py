"""Parquet files with images and captions in columns, as the Hugging Face hub holds them.

The image column is a struct of `bytes` and `path`, or plain bytes; captions are text or a list of
texts. For the listing only the captions and other small columns are read, a row group at a time;
the images come later through `pipeline.places`, again by row groups. Columns that hold bytes, times
or anything else that is not JSON are left out of the shards' JSON.

Needs pyarrow: pip install 'latent-t2i[parquet]'
"""

import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from latent_t2i.pipeline.sources.locators import (
    ParquetLocator,
    import_parquet,
    last_name,
    open_parquet,
    read_row_group,
    with_retries,
    without_query,
)
from latent_t2i.pipeline.sources.record import (
    Record,
    find_column,
    make_extra,
    make_key,
    read_captions,
)
from latent_t2i.shards.remote.transport import RemoteError

IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp")
ROWS_AT_ONCE = 1024


@dataclass(frozen=True, kw_only=True)
class Columns:
    """What is read of a file, by dotted paths."""

    image: str
    """The bytes."""
    path: str | None
    """The image's file name, where there is one."""
    caption: str
    others: tuple[str, ...]

    @property
    def listed(self) -> list[str]:
        """All but the image."""
        return [self.caption, *self.others, *([self.path] if self.path else [])]


def records(
    files: Sequence[tuple[str, str]],
    *,
    image_column: str | None = None,
    caption_column: str | None = None,
) -> Iterator[Record]:
    """Yields a record for each row of the files, given as (path or URL, short name), in order.

    The key is the short name with the row's number in the file.
    Raises ValueError for a file that is not parquet or has no such columns, and RemoteError for one
    that cannot be had.
    """
    for url, short_name in files:
        columns, num_rows = _inspect(url, image_column, caption_column)
        first = 0
        for row_group, number in enumerate(num_rows):
            for row, fields in enumerate(_rows(url, row_group, columns)):
                key = make_key(f"{short_name}_{first + row:07d}")
                locator = ParquetLocator(url, row_group, row, columns.image)
                yield _record(key, locator, columns, fields)
            first += number


def _record(key: str, locator: ParquetLocator, columns: Columns, fields: dict[str, Any]) -> Record:
    captions, problem = read_captions(fields[columns.caption])
    struct, _, name = (columns.path or "").partition(".")
    path = (fields[struct] or {}).get(name) if columns.path else None
    return Record(
        key=key,
        locator=locator,
        captions=captions,
        extra=make_extra(
            {column: fields[column] for column in columns.others}, path or last_name(locator.url)
        ),
        problem=problem,
    )


def _rows(url: str, row_group: int, columns: Columns) -> Iterator[dict[str, Any]]:
    table = _read(url, lambda: read_row_group(url, row_group, columns.listed))
    for batch in table.to_batches(ROWS_AT_ONCE):
        yield from batch.to_pylist()


def _inspect(
    url: str, image_column: str | None, caption_column: str | None
) -> tuple[Columns, list[int]]:
    """Returns which columns of a file are read, and how many rows each of its row groups has."""

    def read() -> tuple[Any, list[int]]:
        file = open_parquet(url)
        try:
            metadata = file.metadata
            groups = range(metadata.num_row_groups)
            return file.schema_arrow, [metadata.row_group(group).num_rows for group in groups]
        finally:
            file.close(force=True)

    schema, num_rows = _read(url, lambda: with_retries(url, read))
    return _find_columns(without_query(url), schema, image_column, caption_column), num_rows


def _read(url: str, read: Callable[[], Any]) -> Any:
    """Calls `read`; what is wrong with the file is then a ValueError that names it."""
    import_parquet()
    arrow_error: type[Exception] = importlib.import_module("pyarrow").ArrowException
    try:
        return read()
    except FileNotFoundError:
        raise ValueError(f"{without_query(url)}: no such file") from None
    except RemoteError:
        raise
    except (OSError, arrow_error) as error:
        raise ValueError(f"{without_query(url)}: not parquet, or broken: {error}") from None


def _find_columns(
    shown: str, schema: Any, image_column: str | None, caption_column: str | None
) -> Columns:
    names = (image_column,) if image_column else IMAGE_COLUMNS
    image = next((name for name in names if name in schema.names), None)
    if image is None:
        raise ValueError(
            f"--source.image-column: {shown} has no {' or '.join(map(repr, names))}, "
            f"only {', '.join(map(repr, schema.names))}"
        )
    caption = find_column(schema.names, caption_column, shown)
    _require_text(shown, schema.field(caption))
    inner, path = _find_bytes(shown, schema.field(image))
    kept = (f.name for f in schema if f.name not in (image, caption) and _is_json(f.type))
    return Columns(image=inner, path=path, caption=caption, others=tuple(kept))


def _find_bytes(shown: str, field: Any) -> tuple[str, str | None]:
    """Returns the dotted paths of an image column's bytes and of its file names."""
    if _is_bytes(field.type):
        return field.name, None
    inner = {part.name: part.type for part in _parts(field.type)}
    if not _is_bytes(inner.get("bytes")):
        raise ValueError(
            f"--source.image-column: {shown}: {field.name!r} is {field.type}, expected bytes, or a "
            "struct with a field 'bytes'"
        )
    return f"{field.name}.bytes", f"{field.name}.path" if "path" in inner else None


def _require_text(shown: str, field: Any) -> None:
    text = field.type
    if _is_list(text):
        text = text.value_type
    if _is_dictionary(text):
        text = text.value_type
    if str(text) not in ("string", "large_string", "string_view", "null"):
        raise ValueError(
            f"--source.caption-column: {shown}: {field.name!r} is {field.type}, expected text or a "
            "list of texts"
        )


def _is_json(kind: Any) -> bool:
    """Returns whether a column's values are text, numbers, truth values, or made of these."""
    if _is_list(kind) or _is_dictionary(kind):
        return _is_json(kind.value_type)
    if _parts(kind):
        return all(_is_json(part.type) for part in _parts(kind))
    name = str(kind)
    plain = ("string", "large_string", "string_view", "bool", "double", "float", "null")
    return name in plain or name.startswith(("int", "uint"))


def _parts(kind: Any) -> list[Any]:
    """Returns a struct's fields, none of any other type."""
    return list(kind) if str(kind).startswith("struct<") else []


def _is_bytes(kind: Any) -> bool:
    return str(kind) in ("binary", "large_binary", "binary_view")


def _is_list(kind: Any) -> bool:
    return str(kind).startswith(("list<", "large_list<", "fixed_size_list<", "list_view<"))


def _is_dictionary(kind: Any) -> bool:
    return str(kind).startswith("dictionary<")
