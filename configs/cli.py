"""The config loader: one dataclass per command, one YAML preset per recipe, flags on top.

    python -m pipeline.run --config scenes --source.num-images 100

A preset has the shared keys (`SHARED_KEYS`) and one section per command. Its values are converted
to flags, the user's flags replace them, and tyro parses the result, so that a value is checked in
the same way in a file and on the command line. Presets therefore contain plain values only.

Errors are one line, with exit code 2; `python -X dev -m pipeline.run ...` adds the traceback.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import io
import os
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

import tyro

from latent_t2i.configs.presets import (
    ConfigError,
    find_preset,
    load_yaml,
    preset_names,
    suggest,
)

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")

SHARED_KEYS = ("name", "vae", "text_encoder", "image_size_px", "seed")
EXTRAS = {
    "app": ("gradio",),
    "parquet": ("pyarrow",),
    "track": ("tensorboard",),
    "eval": ("jinja2", "matplotlib", "scipy", "torchmetrics"),
    "metrics": ("timm", "torch_fidelity", "torchvision"),
    "8bit": ("bitsandbytes",),
    "remote": ("aiohttp", "s3fs"),
}
"""The optional packages of each extra in pyproject.toml."""
SECTIONS = ("pipeline", "train", "sample", "evaluation")


def main(
    run: Callable[[T], object] | str, cls: type[T], section: str | None, *, prog: str | None = None
) -> None:
    """Parses the command line into a `cls` and calls `run` with it.

    `run` is a function or its name, "module:function", which is imported after parsing, so that
    `--help` and typos do not wait for torch. `prog` is as in `parse`. A `ValueError`, an `OSError`
    or a missing package is printed as one line, with exit code 2. The code is 130 after an
    interrupt and 141 if the reader of the output, such as `head`, exits first.
    """
    try:
        config = parse(cls, section, prog=prog)
        function: Any = run
        if isinstance(run, str):
            module, _, name = run.partition(":")
            function = getattr(importlib.import_module(module), name)
        function(config)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        sys.exit(141)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        own = isinstance(error, ModuleNotFoundError) and f"{error.name}.".startswith("latent_t2i.")
        if own or sys.flags.dev_mode:
            raise
        print(f"error: {_describe(error)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def parse(
    cls: type[T], section: str | None, argv: Sequence[str] | None = None, *, prog: str | None = None
) -> T:
    """Returns a `cls` with its defaults, replaced by the `--config` preset, replaced by flags.

    Args:
        cls: A frozen dataclass; nested dataclasses give dotted flags (`--data.verify`). Its
            optional ClassVar `EXCLUSIVE` lists groups of settings that replace each other. Flags
            of one group in `REPLACES_PRESET` may be combined, but replace the preset's values of
            the whole group.
        section: The preset's section for this command, one of `SECTIONS`; None for a command that
            takes no preset, whose `prog` is required.
        argv: The user's arguments, by default those of the process.
        prog: The command's name in help texts, by default `python -m SECTION.run`.

    Raises:
        ConfigError: An unknown flag, key or preset, or an invalid value.
        SystemExit: After `--help`.
    """
    assert section in SECTIONS or (section is None and prog), (section, prog)
    argv = sys.argv[1:] if argv is None else argv
    if "-h" in argv or "--help" in argv:
        name = prog or f"python -m {section}.run"
        _call_tyro(cls, ["--help"], name, takes_preset=section is not None)
    fields = _fields_of(cls)
    preset_name, given = _read_flags(argv, fields)
    if section is None and preset_name is not None:
        raise ConfigError("unknown flag --config: this command takes no preset (see --help)")
    preset = None if preset_name is None else find_preset(preset_name)
    settings = _read_preset(preset, section, fields) if preset and section else {}
    _drop_replaced(settings, given, getattr(cls, "EXCLUSIVE", ()))
    for group in getattr(cls, "REPLACES_PRESET", ()):
        if any(_is_chosen(path, given) for path in group):
            _drop(settings, group)
    try:
        return _parse_settings(cls, {**settings, **given}, fields)
    except ConfigError as error:
        origin = _origin(error, preset, settings.keys() - given.keys())
        raise ConfigError(f"{error}{origin} (see --help)") from None


def dump(config: DataclassInstance) -> dict[str, Any]:
    """Returns the config as nested plain values, for YAML, JSON or a preset's section.

    `parse` of a preset with this section returns an equal config.
    """
    return {field.name: _plain(getattr(config, field.name)) for field in dataclasses.fields(config)}


@dataclass(frozen=True, kw_only=True)
class _Field:
    """One setting, which is one flag. `path` is dotted, as in `data.verify`."""

    path: str
    annotation: Any
    required: bool
    repeatable: bool
    aliases: tuple[str, ...]

    @property
    def flag(self) -> str:
        return "--" + self.path.replace("_", "-")

    @property
    def takes_many(self) -> bool:
        return self.pair_or_list is not None

    @property
    def pair_or_list(self) -> Any:
        """The tuple in the annotation, which may be in a union with None."""
        options = (self.annotation, *get_args(self.annotation))
        return next((option for option in options if get_origin(option) is tuple), None)

    @property
    def num_values(self) -> int | None:
        """Number of values of the flag, None if it is variable."""
        parts = get_args(self.pair_or_list) if self.takes_many else (self.annotation,)
        return None if Ellipsis in parts else len(parts)

    def accepts(self, kind: type) -> bool:
        """Returns whether the annotation, or an element of its union or tuple, is `kind`."""
        return kind is self.annotation or kind in get_args(self.annotation)


Settings = dict[str, list[str]]
"""Values as text, by the path of their field."""


def _fields_of(cls: type[Any], prefix: str = "", *, required: bool = True) -> dict[str, _Field]:
    """Returns all settings of `cls` by path, in order."""
    hints = get_type_hints(cls, include_extras=True)
    missing = dataclasses.MISSING
    found: dict[str, _Field] = {}
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        annotation, *extras = get_args(hint) if get_origin(hint) is Annotated else (hint,)
        needed = required and field.default is missing and field.default_factory is missing
        path = prefix + field.name
        if isinstance(annotation, type) and dataclasses.is_dataclass(annotation):
            found |= _fields_of(annotation, f"{path}.", required=needed)
            continue
        found[path] = _Field(
            path=path,
            annotation=annotation,
            required=needed,
            repeatable=tyro.conf.UseAppendAction in extras,
            aliases=tuple(name for extra in extras for name in getattr(extra, "aliases", ()) or ()),
        )
    return found


def _read_flags(argv: Sequence[str], fields: Mapping[str, _Field]) -> tuple[str | None, Settings]:
    """Returns the preset's name, and the values of the user's flags.

    A later flag replaces an earlier one, except that repeatable flags are appended.
    """
    names = _spellings(fields)
    preset_name: str | None = None
    given: Settings = {}
    for flag, values in _group(argv):
        if flag == "--config":
            preset_name = _only(flag, values)
            continue
        key = flag.removeprefix("--").replace("-", "_")
        if key not in names:
            flags = ["--config", *(name.replace("_", "-") for name in map("--{}".format, names))]
            raise ConfigError(f"unknown flag {flag}{suggest(flag, flags)} (see --help)")
        path, value = names[key]
        field = fields[path]
        if value is not None and values:
            on, off = (_spell_bool(field, switch) for switch in ("True", "False"))
            raise ConfigError(f"{flag}: expected no value, found {values[0]!r}: use {on} or {off}")
        if value is not None:
            given[path] = [value]
        elif field.takes_many:
            given[path] = given.get(path, []) + values if field.repeatable else values
        else:
            given[path] = [_only(flag, values)]
    return preset_name, given


def _drop_replaced(settings: Settings, given: Settings, exclusive: Iterable[Sequence[str]]) -> None:
    """Removes the preset's values that a flag of the same group replaces.

    Raises ConfigError for two flags of one group.
    """
    for group in exclusive:
        chosen = [path for path in group if _is_chosen(path, given)]
        if len(chosen) > 1:
            flags = " and ".join("--" + path.replace("_", "-") for path in chosen)
            raise ConfigError(f"{flags}: expected one of them, found both (see --help)")
        if chosen:
            _drop(settings, group)


def _is_chosen(path: str, given: Settings) -> bool:
    """Returns whether a flag sets this path to a value other than None."""
    return given.get(path, ["None"]) != ["None"]


def _drop(settings: Settings, group: Iterable[str]) -> None:
    for path in group:
        settings.pop(path, None)


def _spellings(fields: Mapping[str, _Field]) -> dict[str, tuple[str, str | None]]:
    """Returns the path of each flag's name and, for a switch, the value it sets."""
    names: dict[str, tuple[str, str | None]] = {}
    for path, field in fields.items():
        if field.annotation is bool:
            parent, dot, leaf = path.rpartition(".")
            names |= {path: (path, "True"), f"{parent}{dot}no_{leaf}": (path, "False")}
        else:
            aliases = [alias.removeprefix("--").replace("-", "_") for alias in field.aliases]
            names |= dict.fromkeys([path, *aliases], (path, None))
    return names


def _group(argv: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Returns each flag of the command line with the values after it."""
    groups: list[tuple[str, list[str]]] = []
    for token in argv:
        if token.startswith("--"):
            flag, equals, value = token.partition("=")
            groups.append((flag, [value] if equals else []))
        elif groups:
            groups[-1][1].append(token)
        else:
            raise ConfigError(f"unexpected argument {token!r}: flags start with -- (see --help)")
    return groups


def _only(flag: str, values: Sequence[str]) -> str:
    if len(values) != 1:
        found = " ".join(map(repr, values)) or "none"
        raise ConfigError(f"{flag}: expected one value, found {found} (see --help)")
    return values[0]


def _read_preset(path: Path, section: str, fields: Mapping[str, _Field]) -> Settings:
    """Returns a preset's settings for a command: shared keys that it has, then its section."""
    document = _mapping(load_yaml(path), str(path))
    for key in document:
        if key not in SHARED_KEYS and key not in SECTIONS:
            known = [*SHARED_KEYS, *SECTIONS]
            raise ConfigError(f"{path}: unknown key {key!r}{suggest(str(key), known)}")
    shared = {key: document[key] for key in SHARED_KEYS if key in document and key in fields}
    own = _flatten(_mapping(document.get(section), f"{path}: {section}"), fields, path, section)
    return _flatten(shared, fields, path, "") | own


def _flatten(
    values: Mapping[Any, Any],
    fields: Mapping[str, _Field],
    file: Path,
    section: str,
    prefix: str = "",
) -> Settings:
    """Returns nested values of a preset as settings, each checked against its field."""
    settings: Settings = {}
    for key, value in values.items():
        path = f"{prefix}{key}"
        place = f"{file}: {section}{'.' if section else ''}{path}"
        inner = [name for name in fields if name.startswith(f"{path}.")]
        if inner:
            nested = _mapping(value, place)
            settings |= _flatten(nested, fields, file, section, f"{path}.")
        elif path in fields:
            settings[path] = _to_text(value, fields[path], place)
        else:
            raise ConfigError(f"{place}: unknown key{suggest(path, _siblings(prefix, fields))}")
    return settings


def _siblings(prefix: str, fields: Iterable[str]) -> list[str]:
    """Returns the keys that are possible after this prefix, then all paths."""
    heads = {prefix + path.removeprefix(prefix).partition(".")[0] for path in fields}
    return [*sorted(head for head in heads if head.startswith(prefix)), *fields]


def _mapping(value: object, place: str) -> dict[Any, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ConfigError(f"{place}: expected a mapping, found {value!r:.80}")
    return value


def _to_text(value: object, field: _Field, place: str) -> list[str]:
    """Returns a preset's value as the text of a flag.

    Checks what the text cannot express: `null`, lists, and booleans such as YAML's bare `no`.
    """
    if value is None and not field.accepts(NoneType):
        raise ConfigError(f"{place}: expected a value, found null")
    if isinstance(value, dict):
        raise ConfigError(f"{place}: expected a value, found the mapping {value!r:.80}")
    if isinstance(value, list) != field.takes_many and value is not None:
        expected = "a list" if field.takes_many else "one value"
        raise ConfigError(f"{place}: expected {expected}, found {value!r:.80}")
    items = value if isinstance(value, list) else [value]
    for item in items:
        if isinstance(item, list | dict):
            raise ConfigError(f"{place}: expected a list of values, found {item!r:.80} in it")
        if isinstance(item, bool) != field.accepts(bool) and item is not None:
            expected = "true or false" if field.accepts(bool) else "a string or number (quote it)"
            raise ConfigError(f"{place}: expected {expected}, found {str(item).lower()}")
    return [str(item) for item in items]


def _check_counts(settings: Settings, fields: Mapping[str, _Field]) -> None:
    missing = [
        field.flag for path, field in fields.items() if field.required and path not in settings
    ]
    if missing:
        raise ConfigError(f"missing {', '.join(missing)}: set it, or choose a preset with --config")
    for path, values in settings.items():
        wanted = fields[path].num_values
        is_null = values == ["None"] and fields[path].accepts(NoneType)
        if wanted is not None and len(values) != wanted and not is_null:
            raise ConfigError(f"{fields[path].flag}: expected {wanted} values, found {len(values)}")


def _to_tokens(settings: Settings, fields: Mapping[str, _Field]) -> list[str]:
    """Returns settings as a command line for tyro."""
    tokens: list[str] = []
    for path, values in settings.items():
        field = fields[path]
        if field.annotation is bool:
            tokens.append(_spell_bool(field, values[0]))
        elif field.takes_many and not field.repeatable:
            tokens += [field.flag, *values]
        else:  # with "=", a value may start with a dash
            tokens += [f"{field.flag}={value}" for value in values]
    return tokens


def _spell_bool(field: _Field, value: str) -> str:
    parent, dot, leaf = field.flag.removeprefix("--").rpartition(".")
    return f"--{parent}{dot}{'' if value == 'True' else 'no-'}{leaf}"


def _parse_settings(cls: type[T], settings: Settings, fields: Mapping[str, _Field]) -> T:
    """Parses with tyro; raises ConfigError with tyro's message as one line."""
    _check_counts(settings, fields)
    box = io.StringIO()  # stdout, too: its encoding and colours decide how tyro draws the box
    try:
        with contextlib.redirect_stdout(box), contextlib.redirect_stderr(box):
            return _call_tyro(cls, _to_tokens(settings, fields))
    except SystemExit as stop:
        raise ConfigError(_unbox(box.getvalue(), stop, cls.__name__)) from None


def _call_tyro(
    cls: type[T], tokens: Sequence[str], prog: str = "", *, takes_preset: bool = True
) -> T:
    # tyro does not wrap a description, and joins lines that start with a letter.
    wrap = functools.partial(textwrap.fill, width=80, initial_indent="  ", subsequent_indent="  ")
    summary = (cls.__doc__ or "").strip().partition("\n\n")[0]
    names = ", ".join(preset_names())
    presets = (
        f"--config PRESET reads a YAML file first, by path or by name ({names}); the flags below "
        "override it."
    )
    paragraphs = (_one_line(summary), presets) if takes_preset else (_one_line(summary),)
    description = "\n".join(map(wrap, paragraphs))
    return tyro.cli(cls, args=tokens, prog=prog, description=description)


def _unbox(box: str, stop: SystemExit, root: str) -> str:
    """Returns the message in tyro's error box, which has a title, a message and hints.

    The box is wrapped at 80 columns, even within a path. If a `ValueError` is the cause, its
    unwrapped text is returned instead.
    """
    _, *parts = re.split(r"^ *-{3,} *$", box, flags=re.MULTILINE)
    message = _one_line(parts[0] if parts else box)
    place, colon, _ = message.removeprefix("Error parsing ").partition(": ")
    cause = stop.__context__
    while cause is not None and not isinstance(cause, ValueError | TypeError):
        cause = cause.__context__
    if cause is None or not colon:
        return message
    text = _one_line(str(cause))
    names_setting = place == root or text.startswith(("--", f"{place}."))
    return text if names_setting else f"{place}: {text}"


def _origin(error: ConfigError, preset: Path | None, from_preset: Set[str]) -> str:
    """Returns " (in PRESET)" if the error is about a setting from the preset, else "".

    Such a setting is named in the message as a flag, or before the colon.
    """
    flags = re.findall(r"--([\w-]+(?:\.[\w-]+)*)", str(error))
    subjects = re.findall(r"[\w.]+", str(error).partition(":")[0])
    named = {name.replace("-", "_") for name in (*flags, *subjects)}
    return f" (in {preset})" if named & from_preset else ""


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dump(value)
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _describe(error: ValueError | OSError | ModuleNotFoundError) -> str:
    if isinstance(error, ModuleNotFoundError):
        package = (error.name or "").partition(".")[0]
        extras = [extra for extra, names in EXTRAS.items() if package in names]
        name = f"latent-t2i[{extras[0]}]" if extras else package
        return f"the package {package} is not installed; install it: pip install '{name}'"
    if isinstance(error, OSError) and error.filename is not None:
        return _escape(f"{error.filename}: {error.strerror}")
    return _escape(_one_line(str(error)))


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _escape(text: str) -> str:
    """Escapes control characters, which could change the terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
