"""mkdocs hook: adds the pages that are kept outside docs/, and resolves links between them.

GitHub shows README.md and shards/README.md in place, so the site generates pages from them instead
of holding copies. Links to source files, which the site does not contain, become plain text.
"""

import json
import logging
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
# Page of the site: its source in the repository.
PAGES = {
    "index.md": "README.md",
    "shards.md": "shards/README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
    "walkthrough.md": "docs/walkthrough.ipynb",
}
LOG = logging.getLogger("mkdocs.hooks")  # --strict counts the warnings of mkdocs' loggers
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")


def on_files(files: Any, config: Any) -> Any:
    """Adds the generated pages to mkdocs' files."""
    for name, source in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        content = render_notebook(json.loads(text)) if source.endswith(".ipynb") else text
        files.append(File.generated(config, name, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Resolves the links of a page."""
    return resolve_links(markdown, PAGES.get(page.file.src_uri, f"docs/{page.file.src_uri}"))


def resolve_links(markdown: str, source: str) -> str:
    """Returns the page with links between repository files turned into links within the site."""

    def replace(match: re.Match[str]) -> str:
        image, text, target = match.groups()
        if "://" in target or target.startswith(("#", "data:", "mailto:")):
            return match[0]
        path, _, anchor = target.partition("#")
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        names = {repository_path: name for name, repository_path in PAGES.items()}
        inside = path.removeprefix("docs/") if path.startswith("docs/") else None
        name = names.get(path, inside)
        if name is None and not (ROOT / path).exists():
            LOG.warning("%s has a link to %s, which does not exist", source, target)
        return f"{image}[{text}]({name}{'#' * bool(anchor)}{anchor})" if name else text

    return LINK.sub(replace, markdown)


def render_notebook(notebook: dict[str, Any]) -> str:
    """Returns a notebook as Markdown, with the outputs stored in it."""
    parts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        parts += [_render_output(output) for output in cell["outputs"]]
    return "\n\n".join(filter(None, parts)) + "\n"


def _render_output(output: dict[str, Any]) -> str:
    data = output.get("data", {})
    if "image/png" in data:
        return f"![output](data:image/png;base64,{''.join(data['image/png']).strip()})"
    text = "".join(output.get("text", data.get("text/plain", "")))
    return f"```text\n{text.rstrip()}\n```" if text.strip() else ""
