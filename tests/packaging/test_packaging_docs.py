"""The documentation site: links between repository files, and the notebook as a page."""

import subprocess
import sys
from pathlib import Path

import pytest

from docs.site_pages import PAGES, render_notebook, resolve_links

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.mark.parametrize(
    ("source", "markdown", "expected"),
    [
        ("README.md", "[a](docs/recipes.md#own)", "[a](recipes.md#own)"),
        ("README.md", "![a](docs/scenes.png)", "![a](scenes.png)"),
        ("README.md", "[a](docs/walkthrough.ipynb)", "[a](walkthrough.md)"),
        ("docs/format.md", "[a](../shards/README.md)", "[a](shards.md)"),
        ("docs/format.md", "[a](log.md), [b](#c)", "[a](log.md), [b](#c)"),
        ("shards/README.md", "[a](../docs/format.md)", "[a](format.md)"),
        ("docs/objective.md", "[diffusion](../model/diffusion.py)", "diffusion"),
        ("docs/format.md", "[a](https://x.org/a.md)", "[a](https://x.org/a.md)"),
    ],
)
def test_links(source: str, markdown: str, expected: str) -> None:
    assert resolve_links(markdown, source) == expected


def test_notebook_page() -> None:
    outputs = [
        {"output_type": "stream", "name": "stdout", "text": ["one\n", "two\n"]},
        {"output_type": "display_data", "data": {"image/png": "QUJD\n"}},
    ]
    cells = [
        {"cell_type": "markdown", "source": ["# Title\n", "text"]},
        {"cell_type": "code", "source": "print(1)", "outputs": outputs},
    ]
    assert render_notebook({"cells": cells}) == (
        "# Title\ntext\n\n```python\nprint(1)\n```\n\n```text\none\ntwo\n```\n\n"
        "![output](data:image/png;base64,QUJD)\n"
    )


def test_site_builds_without_warnings(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name in PAGES:
        page = tmp_path / ("index.html" if name == "index.md" else f"{Path(name).stem}/index.html")
        assert page.is_file()
