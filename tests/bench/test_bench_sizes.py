"""The size table of the presets: the demo's row matches the shipped bundle."""

import json
from pathlib import Path

import pytest

from bench import sizes

ROOT = Path(__file__).resolve().parent.parent.parent


def test_demo_is_sized_without_shards(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["sizes", "--quick"])
    sizes.main()
    *_, row, last = capsys.readouterr().out.splitlines()
    assert row.startswith("| `demo` | 8 x 8 x 8 | 6.")
    (demo,) = json.loads(last)["presets"]
    info = json.loads((ROOT / "scenes" / "bundle" / "bundle.json").read_text())
    assert demo["num_parameters"] == info["num_parameters"]
    assert demo["record_bytes"] % 512 == 0
