"""Finds and reads preset files: YAML with plain values, of limited size and depth."""

import difflib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

import yaml

PRESETS_DIR = Path(__file__).resolve().parent
MAX_BYTES = 10_000_000
MAX_NODES = 100_000
"""Largest number of values in a preset, with all aliases expanded."""
MAX_DEPTH = 50


class ConfigError(ValueError):
    """Settings that the user has to correct: an unknown name, a wrong type, a missing preset."""


def find_preset(name: str) -> Path:
    """Returns the file of a preset, by name or path (relative to here or to the project root).

    Raises ConfigError, with the names of all presets, if there is no such file.
    """
    candidates = [Path(name), PRESETS_DIR.parent / name, PRESETS_DIR / f"{name}.yaml"]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    names = preset_names()
    raise ConfigError(
        f"--config: no preset {name!r}; expected a path, or one of {', '.join(names)}"
        f"{suggest(name, names)}"
    )


def preset_names() -> list[str]:
    """Returns the names of all presets that are part of the package."""
    return sorted(path.stem for path in PRESETS_DIR.glob("*.yaml"))


def load_yaml(path: Path) -> Any:
    """Returns the content of a YAML file; raises ConfigError if it is invalid or too large."""
    if (num_bytes := path.stat().st_size) > MAX_BYTES:
        raise ConfigError(f"{path}: expected at most {MAX_BYTES:,} bytes, found {num_bytes:,}")
    try:
        return yaml.load(path.read_bytes(), Loader=_PresetLoader)
    except yaml.MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f" in line {error.problem_mark.line + 1}"
        problem = ", ".join(text for text in (error.context, error.problem) if text)
        raise ConfigError(f"{path}: invalid YAML{line}: {problem}") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: such as the date 2024-13-01
        raise ConfigError(f"{path}: invalid YAML: {' '.join(str(error).split())}") from None


class _PresetLoader(yaml.SafeLoader):
    """Refuses duplicate keys, of which PyYAML silently keeps the last, and unbounded content."""

    def __init__(self, stream: bytes) -> None:
        super().__init__(stream)
        self._depth = 0
        self._sizes: dict[int, int] = {}

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if getattr(event, "tag", None) is not None:
            self._refuse(f"expected plain values, found the tag {event.tag!r}", event)
        self._depth += 1
        if self._depth > MAX_DEPTH:
            self._refuse(f"expected at most {MAX_DEPTH} nested levels", event)
        node = super().compose_node(parent, index)
        self._depth -= 1
        if isinstance(event, yaml.AliasEvent):
            if id(node) not in self._sizes:
                self._refuse(f"the alias {event.anchor!r} refers to itself", event)
            return node
        # An alias is one object for PyYAML, but later code visits its content each time.
        children = node.value if isinstance(node, yaml.CollectionNode) else []
        if isinstance(node, yaml.MappingNode):
            children = [part for pair in children for part in pair]
        size = 1 + sum(self._sizes[id(child)] for child in children)
        if size > MAX_NODES:
            self._refuse(f"expected at most {MAX_NODES:,} values, with aliases expanded", event)
        self._sizes[id(node)] = size
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                self._refuse("expected a name as key, found a list or mapping", key)
            if key.value in seen:
                self._refuse(f"duplicate key {key.value!r}", key)
            seen.add(key.value)
        return super().construct_mapping(node, deep)

    def _refuse(self, problem: str, position: Any) -> NoReturn:
        raise yaml.MarkedYAMLError(problem=problem, problem_mark=position.start_mark)


def suggest(name: str, known: Iterable[str]) -> str:
    """Returns a "did you mean" hint, or "" if no known name is similar.

    Similar are names with the same last part (`verify`: `data.verify`) or its initials (`lr`:
    `optim.learning_rate`), then the most similar spelling.
    """
    bare = {_normalise(candidate): candidate for candidate in known}
    name = _normalise(name)
    last = name.rpartition(".")[2]
    leaves = {candidate: candidate.rpartition(".")[2] for candidate in bare}
    near = (
        [candidate for candidate, leaf in leaves.items() if leaf == last]
        or [candidate for candidate, leaf in leaves.items() if _initials(leaf) == last]
        or difflib.get_close_matches(name, bare, n=1)
    )
    return f", did you mean {bare[near[0]]}?" if near else ""


def _normalise(name: str) -> str:
    return name.removeprefix("--").replace("-", "_")


def _initials(name: str) -> str:
    return "".join(re.findall(r"(?:^|_)(\w)", name)) if "_" in name else ""
