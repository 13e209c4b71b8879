"""The walkthrough notebook: its stored outputs are clean, and it runs from a bare checkout."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

NOTEBOOK = Path(__file__).resolve().parent.parent.parent / "docs" / "walkthrough.ipynb"


def outputs(notebook: Path) -> list[dict[str, Any]]:
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return [output for cell in cells for output in cell.get("outputs", [])]


def test_stored_outputs_are_small_and_clean() -> None:
    assert NOTEBOOK.stat().st_size < 400_000
    found = outputs(NOTEBOOK)
    assert sum("image/png" in output.get("data", {}) for output in found) >= 4
    assert all(output.get("name") != "stderr" for output in found)
    text = json.dumps(found)
    assert "Traceback" not in text
    assert "/tmp/" not in text and "/home/" not in text


@pytest.mark.slow
def test_notebook_runs_from_a_bare_checkout(checkout: Path, tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"WALKTHROUGH_STEPS": "30", "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-m", "jupyter", "execute", "--inplace", "--timeout=1200"]
    notebook = checkout / "docs" / "walkthrough.ipynb"
    done = subprocess.run(
        [*command, str(notebook)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    text = json.dumps(outputs(notebook))
    assert "30/30" in text
    assert "clip_score" in text
    (work,) = (path.parent for path in tmp_path.glob("*/train.log"))
    assert {"bundle", "samples.png", "report.html"} <= {
        path.name for path in (work / "run").iterdir()
    }
