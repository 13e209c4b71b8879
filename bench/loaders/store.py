"""Writes the records in the formats of some contenders.

python -m bench.loaders.store '{"names": ["map", "litdata"], "content": {...}, "folder": ...}'

Runs as a subprocess, so that its memory does not count in the benchmark.
"""

import json
import sys
from pathlib import Path

from bench.loaders.contenders import ENTRIES, make
from bench.loaders.contents import Content


def main(names: list[str], content: Content, folder: Path) -> None:
    """Writes each format once, also if several contenders read it."""
    for store, name in {ENTRIES[name].store: name for name in reversed(names)}.items():
        print(f"  writing {store}", file=sys.stderr, flush=True)
        make(name).write(folder / store, content)


if __name__ == "__main__":
    request = json.loads(sys.argv[1])
    main(request["names"], Content(**request["content"]), Path(request["folder"]))
