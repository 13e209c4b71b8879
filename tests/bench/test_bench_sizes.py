"""The table of what presets take: the demo's row is that of the bundle that ships with it."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


def test_the_demo_is_told_without_shards(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "bench" / "sizes.py"), "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    *_, row, last = done.stdout.splitlines()
    assert row.startswith("| `demo` | 8 x 8 x 8 | 6.")
    (demo,) = json.loads(last)["presets"]
    info = json.loads((ROOT / "scenes" / "bundle" / "bundle.json").read_text())
    assert demo["num_parameters"] == info["num_parameters"]
    assert demo["record_bytes"] % 512 == 0
