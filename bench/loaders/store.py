"""Writes the records in the format of some contenders: a process of its own, whose memory goes.

python -m bench.loaders.store '{"names": ["map", "litdata"], "content": {...}, "folder": ...}'
"""

import json
import sys
from pathlib import Path

from bench.loaders.contenders import ENTRIES, make
from bench.loaders.contents import Content


def main(names: list[str], content: Content, folder: Path) -> None:
    """Writes each format once."""
    for store, name in {ENTRIES[name].store: name for name in reversed(names)}.items():
        print(f"  writing {store}", file=sys.stderr, flush=True)
        make(name).write(folder / store, content)


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    main(asked["names"], Content(**asked["content"]), Path(asked["folder"]))
