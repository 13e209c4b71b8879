"""Builds dataclasses from JSON documents and checks the type of every value.

    manifest = from_json(Manifest, load_json(content, "manifest.json"), "manifest.json")

Files come from other machines, so size, nesting, keys and types are all checked.
"""

import dataclasses
import functools
import json
import math
import re
import reprlib
import types
from io import BufferedIOBase
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

T = TypeVar("T")

MAX_DOCUMENT_BYTES = 2**30
"""Upper bound for a JSON document. A manifest takes about 200 bytes per shard."""
INT_LIMIT = 2**63
SURROGATES = re.compile("[\ud800-\udfff]")

# Shows a value in a message, without the full length or depth of the value.
show = reprlib.repr


class FormatError(ValueError):
    """A file of a set differs from the format; the message names the file and the place in it."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


def printable(text: str) -> str:
    """Returns text with control characters escaped, which a terminal would execute."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def read_limited(file: BufferedIOBase, place: str) -> bytes:
    """Reads a small file to its end. Raises FormatError if it exceeds MAX_DOCUMENT_BYTES."""
    content = file.read(MAX_DOCUMENT_BYTES + 1)
    if len(content) > MAX_DOCUMENT_BYTES:
        raise FormatError(f"{place}: expected at most {MAX_DOCUMENT_BYTES} bytes, found more")
    return content


def load_json(content: bytes, place: str) -> Any:
    """Parses JSON. Raises FormatError if it is not JSON, or nested too deeply."""
    try:
        return json.loads(content)
    except RecursionError:
        raise FormatError(f"{place}: JSON nested too deeply") from None
    except ValueError as error:
        raise FormatError(f"{place}: not JSON: {error}") from error


def from_json(kind: type[T], document: Any, place: str) -> T:
    """Returns a `kind`, usually a dataclass, made from parsed JSON.

    Raises FormatError with the path to the first value that does not match the annotations, the
    expected type and the value found.
    """
    return cast(T, _convert(kind, document, place, ""))


def _convert(kind: Any, value: Any, place: str, path: str) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if dataclasses.is_dataclass(kind):
        return _convert_dataclass(kind, value, place, path)
    if origin in (Union, types.UnionType):
        if value is None and types.NoneType in arguments:
            return None
        options = [option for option in arguments if option is not types.NoneType]
        matching = [option for option in options if type(value) is (get_origin(option) or option)]
        return _convert((matching or options)[0], value, place, path)
    if origin is Literal and isinstance(value, str | int) and value in arguments:
        return value
    if origin in (tuple, list) and isinstance(value, list):
        return origin(
            _convert(arguments[0], item, place, f"{path}[{index}]")
            for index, item in enumerate(value)
        )
    if origin is dict and isinstance(value, dict):
        for key in value:
            _convert(str, key, place, f"{path}: a key")
        return {
            key: _convert(arguments[1], item, place, _join(path, key))
            for key, item in value.items()
        }
    if _is_scalar(kind, value):
        return kind(value)
    raise FormatError(f"{_at(place, path)}: expected {_name(kind)}, found {show(value)}")


def _is_scalar(kind: Any, value: Any) -> bool:
    if kind is int:
        return type(value) is int and -INT_LIMIT < value < INT_LIMIT
    if kind is float:
        return type(value) in (int, float) and abs(value) < INT_LIMIT and math.isfinite(value)
    # JSON can hold half of a surrogate pair, UTF-8 cannot.
    return kind is str and type(value) is str and not SURROGATES.search(value)


def _convert_dataclass(kind: Any, value: Any, place: str, path: str) -> Any:
    if not isinstance(value, dict):
        raise FormatError(f"{_at(place, path)}: expected a JSON object, found {show(value)}")
    hints = _hints(kind)
    for key in value:
        if key not in hints:
            raise FormatError(f"{_at(place, path)}: unknown key {show(key)}")
    for name in hints:  # in order; defaults are for callers, a document holds every key
        if name not in value:
            raise FormatError(f"{_at(place, path)}: missing key {name!r}")
    return kind(
        **{
            name: _convert(hints[name], item, place, _join(path, name))
            for name, item in value.items()
        }
    )


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    hints = get_type_hints(kind)  # class variables included
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _at(place: str, path: str) -> str:
    return f"{place}: {path}" if path else place


def _name(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return " or ".join(map(repr, get_args(kind)))
    names = {
        int: "an integer",
        float: "a finite number",
        str: "text",
        tuple: "a list",
        list: "a list",
    }
    return names.get(get_origin(kind) or kind, "a JSON object")
