"""The documentation site: links between repository files, and the notebook as a page."""

import shutil
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


def build(project: Path, site: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)]
    return subprocess.run(command, cwd=project, capture_output=True, text=True, check=False)


def test_site_builds_without_warnings(tmp_path: Path) -> None:
    done = build(ROOT, tmp_path)
    assert done.returncode == 0, done.stderr
    for name in PAGES:
        page = tmp_path / ("index.html" if name == "index.md" else f"{Path(name).stem}/index.html")
        assert page.is_file()


def test_site_refuses_broken_links(checkout: Path, tmp_path: Path) -> None:
    project = tmp_path / "project"
    shutil.copytree(checkout, project, symlinks=True)
    with (project / "docs" / "log.md").open("a") as page:
        page.write("[a](nowhere.md) [b](format.md#nowhere) [c](../model/nowhere.py)\n")
    done = build(project, tmp_path / "site")
    assert done.returncode != 0
    assert "'nowhere.md'" in done.stderr
    assert "'#nowhere'" in done.stderr
    assert "docs/log.md has a link to ../model/nowhere.py" in done.stderr
