"""The one config loader: a dataclass per command, a YAML preset per recipe, flags on top.

    python -m pipeline.run --config scenes --source.num-images 100

A preset is a mapping with the shared keys (`SHARED_KEYS`) and one section per command. The shared
keys a command knows and its section are turned into flags, the user's own flags replace those they
name, and one parser (tyro) reads the result: a value is checked in the same way wherever it was
written, and `1e-3` is a number in both places. The price is that a preset holds plain values only:
no class names, no interpolation.

Errors are one line naming the flag, what was found and what would be right; the exit code is 2.
`python -X dev -m pipeline.run ...` shows the traceback as well.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
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
import yaml

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")

SHARED_KEYS = ("name", "vae", "text_encoder", "image_size_px", "seed")
SECTIONS = ("pipeline", "train", "sample", "evaluation")
PRESETS_DIR = Path(__file__).resolve().parent


class ConfigError(ValueError):
    """Settings the user can put right: an unknown name, a wrong type, a missing preset."""


def main(run: Callable[[T], object], cls: type[T], section: str, prog: str | None = None) -> None:
    """Parse the command line into a `cls`, then `run` it, ending as a command should.

    A `ValueError` or `OSError`, from the settings or from `run`, is printed as one line and exits
    with 2 (with its traceback under `python -X dev`); an interrupt exits with 130, and a reader of
    the output that leaves early, such as `head`, with 141, as a shell's own commands do.
    """
    try:
        run(parse(cls, section, prog=prog))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        sys.exit(141)
    except (ValueError, OSError) as error:
        if sys.flags.dev_mode:
            raise
        print(f"error: {_describe(error)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def parse(
    cls: type[T], section: str, argv: Sequence[str] | None = None, prog: str | None = None
) -> T:
    """A `cls` from its defaults, then the preset named by `--config`, then the flags.

    Args:
        cls: A frozen dataclass; nested dataclasses give dotted flags (`--data.verify`).
        section: The preset's section for this command, one of `SECTIONS`.
        argv: The user's arguments; those of the process when None.
        prog: The command's name in its help; `python -m SECTION.run` when None.

    Raises:
        ConfigError: An unknown flag, key or preset, or a value that does not fit.
        SystemExit: After `--help`.
    """
    assert section in SECTIONS, section
    argv = sys.argv[1:] if argv is None else argv
    prog = prog or f"python -m {section}.run"
    if "-h" in argv or "--help" in argv:
        _call_tyro(cls, ["--help"], prog)
    fields = _fields_of(cls)
    preset_name, given = _read_flags(argv, fields)
    preset = None if preset_name is None else find_preset(preset_name)
    settings = {} if preset is None else _read_preset(preset, section, fields)
    try:
        return _parse_settings(cls, {**settings, **given}, fields, prog)
    except ConfigError as error:
        origin = _origin(error, preset, settings.keys() - given.keys())
        raise ConfigError(f"{error}{origin} (see --help)") from None


def dump(config: DataclassInstance) -> dict[str, Any]:
    """The config as nested plain values, fit for YAML, JSON and a preset's section.

    `parse` of a preset with this section gives an equal config.
    """
    return {field.name: _plain(getattr(config, field.name)) for field in dataclasses.fields(config)}


def find_preset(name: str) -> Path:
    """The file of a preset: a path from here, a path from the project's root, or a bare name.

    Raises:
        ConfigError: There is no such file; the message lists the presets there are.
    """
    candidates = [Path(name), PRESETS_DIR.parent / name, PRESETS_DIR / f"{name}.yaml"]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise ConfigError(f"--config: no preset {name!r}; give a path, or one of {_preset_names()}")


def _preset_names() -> str:
    return ", ".join(sorted(path.stem for path in PRESETS_DIR.glob("*.yaml")))


@dataclass(frozen=True, kw_only=True)
class _Field:
    """A leaf of a config dataclass, which is one flag; `path` is dotted, as in `data.verify`."""

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
        return get_origin(self.annotation) is tuple

    @property
    def num_values(self) -> int | None:
        """How many values the flag takes, None for any number."""
        parts = get_args(self.annotation) if self.takes_many else (self.annotation,)
        return None if Ellipsis in parts else len(parts)

    def accepts(self, kind: type) -> bool:
        """Whether the annotation, or a part of it (of a union, a tuple), is `kind`."""
        return kind is self.annotation or kind in get_args(self.annotation)


Settings = dict[str, list[str]]
"""Values as text by the path of their field."""


def _fields_of(cls: type[Any], prefix: str = "", *, required: bool = True) -> dict[str, _Field]:
    """Every leaf of `cls` by path, in order."""
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
    """The preset's name, and the values of the user's flags; a later flag replaces an earlier one,
    but a repeatable one adds to it."""
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
            raise ConfigError(f"unknown flag {flag}{_suggest(flag, flags)} (see --help)")
        path, value = names[key]
        field = fields[path]
        if value is not None and values:
            on, off = (_spell_bool(field, switch) for switch in ("True", "False"))
            raise ConfigError(f"{flag} takes no value, found {values[0]!r}: write {on} or {off}")
        if value is not None:
            given[path] = [value]
        elif field.takes_many:
            given[path] = given.get(path, []) + values if field.repeatable else values
        else:
            given[path] = [_only(flag, values)]
    return preset_name, given


def _spellings(fields: Mapping[str, _Field]) -> dict[str, tuple[str, str | None]]:
    """The path meant by each flag's name and, for a switch, the value it stands for."""
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
    """Each flag of the command line with the values after it."""
    groups: list[tuple[str, list[str]]] = []
    for token in argv:
        if token.startswith("--"):
            flag, equals, value = token.partition("=")
            groups.append((flag, [value] if equals else []))
        elif groups:
            groups[-1][1].append(token)
        else:
            raise ConfigError(f"unexpected argument {token!r}: settings begin with -- (see --help)")
    return groups


def _only(flag: str, values: Sequence[str]) -> str:
    if len(values) != 1:
        found = " ".join(map(repr, values)) or "none"
        raise ConfigError(f"{flag} takes one value, found {found} (see --help)")
    return values[0]


class _UniqueKeyLoader(yaml.SafeLoader):
    """PyYAML keeps the last of two equal keys without a word; here the second is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key.value!r} stands twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _read_preset(path: Path, section: str, fields: Mapping[str, _Field]) -> Settings:
    """The settings a preset has for a command: the shared keys it knows, then its section."""
    try:
        document = yaml.load(path.read_bytes(), Loader=_UniqueKeyLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML: {_one_line(str(error))}") from None
    document = _mapping(document, str(path))
    for key in document:
        if key not in SHARED_KEYS and key not in SECTIONS:
            known = [*SHARED_KEYS, *SECTIONS]
            raise ConfigError(f"{path}: unknown key {key!r}{_suggest(str(key), known)}")
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
    """Nested values of a preset as settings, each checked against the field's kind."""
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
            raise ConfigError(f"{place}: unknown key{_suggest(path, _siblings(prefix, fields))}")
    return settings


def _siblings(prefix: str, fields: Iterable[str]) -> list[str]:
    """The keys that may stand where a key of this prefix stands, and every path."""
    heads = {prefix + path.removeprefix(prefix).partition(".")[0] for path in fields}
    return [*sorted(head for head in heads if head.startswith(prefix)), *fields]


def _mapping(value: object, place: str) -> dict[Any, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ConfigError(f"{place}: expected keys with values, found {value!r}")
    return value


def _to_text(value: object, field: _Field, place: str) -> list[str]:
    """A preset's value as the text of a flag. What text cannot tell apart is checked here: `null`,
    the booleans that YAML makes of a bare `no`, and lists."""
    if value is None and not field.accepts(NoneType):
        raise ConfigError(f"{place}: expected a value, found null")
    if isinstance(value, dict):
        raise ConfigError(f"{place}: expected a value, found the keys {', '.join(map(str, value))}")
    if isinstance(value, list) != field.takes_many and value is not None:
        raise ConfigError(
            f"{place}: expected {'a list' if field.takes_many else 'one value'}, found {value!r}"
        )
    items = value if isinstance(value, list) else [value]
    for item in items:
        if isinstance(item, bool) != field.accepts(bool) and item is not None:
            expected = "true or false" if field.accepts(bool) else "a text or number (quote it)"
            raise ConfigError(f"{place}: expected {expected}, found {str(item).lower()}")
    return [str(item) for item in items]


def _check_counts(settings: Settings, fields: Mapping[str, _Field]) -> None:
    missing = [
        field.flag for path, field in fields.items() if field.required and path not in settings
    ]
    if missing:
        raise ConfigError(f"missing {', '.join(missing)}: give it, or a preset with --config")
    for path, values in settings.items():
        wanted = fields[path].num_values
        if wanted is not None and len(values) != wanted:
            raise ConfigError(f"{fields[path].flag} takes {wanted} values, found {len(values)}")


def _to_tokens(settings: Settings, fields: Mapping[str, _Field]) -> list[str]:
    """Settings as one command line for tyro."""
    tokens: list[str] = []
    for path, values in settings.items():
        field = fields[path]
        if field.annotation is bool:
            tokens.append(_spell_bool(field, values[0]))
        elif field.takes_many and not field.repeatable:
            tokens += [field.flag, *values]
        else:  # with "=", a value may begin with a dash
            tokens += [f"{field.flag}={value}" for value in values]
    return tokens


def _spell_bool(field: _Field, value: str) -> str:
    parent, dot, leaf = field.flag.removeprefix("--").rpartition(".")
    return f"--{parent}{dot}{'' if value == 'True' else 'no-'}{leaf}"


def _parse_settings(cls: type[T], settings: Settings, fields: Mapping[str, _Field], prog: str) -> T:
    """tyro's parse, with its boxed error message made one line."""
    _check_counts(settings, fields)
    box = io.StringIO()  # for both: tyro draws and colours the box by what stdout can show
    try:
        with contextlib.redirect_stdout(box), contextlib.redirect_stderr(box):
            return _call_tyro(cls, _to_tokens(settings, fields), prog)
    except SystemExit as stop:
        raise ConfigError(_unbox(box.getvalue(), stop, cls.__name__)) from None


def _call_tyro(cls: type[T], tokens: Sequence[str], prog: str) -> T:
    # tyro joins lines of a description that begin with a letter and never wraps them itself.
    wrap = functools.partial(textwrap.fill, width=80, initial_indent="  ", subsequent_indent="  ")
    summary = (cls.__doc__ or "").strip().partition("\n\n")[0]
    presets = (
        f"--config PRESET reads a YAML file first, by path or by name ({_preset_names()});"
        " the flags below replace what it says."
    )
    description = "\n".join(map(wrap, (_one_line(summary), presets)))
    return tyro.cli(cls, args=tokens, prog=prog, description=description)


def _unbox(box: str, stop: SystemExit, root: str) -> str:
    """The message in tyro's box: title, rule, message, rule, hints. The box wraps at 80 columns, in
    the middle of a long path if need be, so where a `ValueError` led to it that text is taken."""
    _, *parts = re.split(r"^ *-{3,} *$", box, flags=re.MULTILINE)
    message = _one_line(parts[0] if parts else box)
    place, colon, _ = message.removeprefix("Error parsing ").partition(": ")
    cause = stop.__context__
    while cause is not None and not isinstance(cause, ValueError | TypeError):
        cause = cause.__context__
    if cause is None or not colon:
        return message
    text = _one_line(str(cause))
    says_where = place == root or text.startswith(("--", f"{place}."))
    return text if says_where else f"{place}: {text}"


def _origin(error: ConfigError, preset: Path | None, from_preset: Set[str]) -> str:
    """The preset's name, where the error is about a setting that came from it: one that the message
    names as a flag, or before its colon."""
    flags = re.findall(r"--([\w-]+(?:\.[\w-]+)*)", str(error))
    subjects = re.findall(r"[\w.]+", str(error).partition(":")[0])
    named = {name.replace("-", "_") for name in (*flags, *subjects)}
    return f" (in {preset})" if named & from_preset else ""


def _suggest(name: str, known: Iterable[str]) -> str:
    """The name that may have been meant: one with the same last part, else the nearest."""
    bare = {candidate.removeprefix("--"): candidate for candidate in known}
    name = name.removeprefix("--")
    last = name.rpartition(".")[2]
    same = [candidate for candidate in bare if candidate.rpartition(".")[2] == last]
    near = same or difflib.get_close_matches(name, bare, n=1)
    return f", did you mean {bare[near[0]]}?" if near else ""


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dump(value)
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _describe(error: ValueError | OSError) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return _one_line(str(error))


def _one_line(text: str) -> str:
    return " ".join(text.split())
