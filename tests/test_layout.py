"""Rules of the repository: imports, names, function lengths, and the documented tree of files."""

import ast
import statistics
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NAMESPACE = ROOT / "latent_t2i"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))

ALLOWED = {
    "configs": set(),
    "scenes": set(),
    "shards": set(),
    "model": set(),
    "pipeline": {"shards", "model", "scenes"},
    "train": {"shards", "model"},
    "sample": {"model"},
    # Statistics of real images are made from any source of stage one.
    "evaluation": {"model", "pipeline", "sample", "scenes", "shards"},
}
"""The packages of ours that each package may import, besides itself."""
WIRES = {
    *(f"{package}/run.py" for package in ("pipeline", "train", "sample", "evaluation")),
    *(f"sample/{name}.py" for name in ("app", "edit", "export", "grid", "interpolate")),
}
"""The modules that connect a command line to a function, and contain no logic."""
ALLOWED_BY_SHARDS = {"fsspec", "numpy", "tenacity", "torch", "tqdm", "webdataset"}
"""The format must be readable without the networks, so shards imports nothing else."""


def package_files(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def all_files() -> list[Path]:
    return [path for package in ALLOWED for path in package_files(package)]


def top_names(module: str, names: list[str]) -> set[str]:
    """The packages that `from module import names` imports from, without our prefix."""
    first, _, rest = module.partition(".")
    if first != "latent_t2i":
        return {first}
    return {rest.partition(".")[0]} if rest else set(names)


def imported_names(source: str) -> set[str]:
    """The top-level names of a module's absolute imports, ours without `latent_t2i.`."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {name for alias in node.names for name in top_names(alias.name, [])}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module is not None:
            names |= top_names(node.module, [alias.name for alias in node.names])
    return names


def forbidden_imports(package: str, file: str, source: str) -> set[str]:
    """The imports of a module of `package` that the dependency rule forbids."""
    names = imported_names(source)
    allowed = {package, *ALLOWED[package], *({"configs"} if f"{package}/{file}" in WIRES else ())}
    ours = names & ALLOWED.keys() - allowed
    if package == "shards":
        ours |= names - sys.stdlib_module_names - ALLOWED_BY_SHARDS - allowed
    return ours


def functions(source: str) -> Iterator[tuple[str, int]]:
    """Every function's name and number of lines."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            yield node.name, node.end_lineno - node.lineno + 1


def test_packages_are_those_of_pyproject() -> None:
    on_disk = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"latent_t2i"}
    assert on_disk == set(ALLOWED)
    folders = [path.parent for name in on_disk for path in (ROOT / name).rglob("__init__.py")]
    names = sorted(".".join(folder.relative_to(ROOT).parts) for folder in folders)
    listed = PROJECT["tool"]["setuptools"]["packages"]
    assert listed == ["latent_t2i", *(f"latent_t2i.{name}" for name in names)]


def test_latent_t2i_links_to_each_package() -> None:
    links = {path.name: path.readlink() for path in NAMESPACE.iterdir() if path.is_symlink()}
    assert links == {name: Path("..") / name for name in ALLOWED}


@pytest.mark.parametrize("package", ALLOWED)
def test_dependency_rule(package: str) -> None:
    for path in package_files(package):
        forbidden = forbidden_imports(package, path.name, path.read_text(encoding="utf-8"))
        assert not forbidden, f"{path.relative_to(ROOT)} imports {forbidden}"


def test_packages_are_imported_by_their_full_names() -> None:
    """`from train import loop` would load a second copy of `latent_t2i.train.loop`."""
    command = ["git", "grep", "-nE", rf"^ *(from|import) ({'|'.join(ALLOWED)})\b", "--", "*.py"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.stdout == ""


@pytest.mark.parametrize(
    ("package", "file", "source", "forbidden"),
    [
        ("train", "loop.py", "import latent_t2i.pipeline.encode", {"pipeline"}),
        ("train", "loop.py", "def f():\n    from latent_t2i.sample import sampler", {"sample"}),
        ("sample", "sampler.py", "if TYPE_CHECKING:\n    import latent_t2i.shards", {"shards"}),
        ("model", "ema.py", "from latent_t2i.shards.schema import Example", {"shards"}),
        ("train", "loop.py", "from latent_t2i.configs.cli import dump", {"configs"}),
        ("train", "run.py", "from latent_t2i.configs.cli import main", set()),
        (
            "train",
            "loop.py",
            "from latent_t2i.shards.reader import open_shards\nimport torch",
            set(),
        ),
        ("shards", "reader.py", "import json, numpy, diffusers, webdataset", {"diffusers"}),
        (
            "shards",
            "reader.py",
            "from . import schema\nfrom latent_t2i.shards import writer",
            set(),
        ),
        ("shards", "reader.py", "def f():\n    import diffusers", {"diffusers"}),
    ],
)
def test_dependency_rule_finds_violations(
    package: str, file: str, source: str, forbidden: set[str]
) -> None:
    assert forbidden_imports(package, file, source) == forbidden


def functions_with_parameter(annotation: str, source: str) -> list[str]:
    """The functions with a parameter of this annotation, also inside another, as in `X | None`."""
    return [
        node.name
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef)
        and annotation in {part.id for part in ast.walk(node.args) if isinstance(part, ast.Name)}
    ]


def test_only_the_top_function_of_stage_one_receives_the_config() -> None:
    for path in sorted((ROOT / "pipeline").rglob("*.py")):
        found = functions_with_parameter("PipelineConfig", path.read_text(encoding="utf-8"))
        assert not found or path.name == "stage.py", f"{path.relative_to(ROOT)}: {found}"
    source = "def f(*, c: PipelineConfig | None = None): ...\ndef g(c: SourceConfig): ...\n"
    assert functions_with_parameter("PipelineConfig", source) == ["f"]


@pytest.mark.parametrize("file", sorted(WIRES))
def test_command_modules_only_wire(file: str) -> None:
    source = (ROOT / file).read_text(encoding="utf-8")
    kinds = (ast.ClassDef, ast.For, ast.While, ast.Try)
    assert not [node for node in ast.walk(ast.parse(source)) if isinstance(node, kinds)]


def test_no_module_hides_another() -> None:
    installed = {
        name
        for name, owners in packages_distributions().items()
        if PROJECT["project"]["name"] not in owners
    }
    modules = [path for path in all_files() if path.stem != "__init__"]
    names = {*ALLOWED, *(path.stem for path in modules)}
    assert not names & (installed | sys.stdlib_module_names)


def test_functions_are_short() -> None:
    lengths = {
        f"{path.relative_to(ROOT)} {name}": lines
        for path in [*all_files(), *NAMESPACE.glob("*.py")]
        for name, lines in functions(path.read_text(encoding="utf-8"))
    }
    assert not {place: lines for place, lines in lengths.items() if lines > 80}
    assert statistics.median(lengths.values()) <= 10
    assert statistics.quantiles(lengths.values(), n=10)[-1] <= 30


def test_function_lengths_are_measured() -> None:
    source = "class A:\n  def f(self):\n    pass\n\nasync def g():\n  def h(): pass\n\n  return h\n"
    assert dict(functions(source)) == {"f": 2, "g": 4, "h": 1}


def test_test_files_are_named_for_what_they_test() -> None:
    names = Counter(path.name for path in (ROOT / "tests").rglob("*.py"))
    assert "__init__.py" not in names
    assert not [name for name, count in names.items() if count > 1 and name != "conftest.py"]
    for path in (ROOT / "tests").glob("*/test_*.py"):
        assert path.name.startswith(f"test_{path.parent.name}_"), path


def documented_tree(text: str) -> list[str]:
    """The paths in the tree of a page's section "Layout"; folders end with a slash."""
    block = text.partition("## Layout")[2].split("```")[1]
    paths: list[str] = []
    parents: list[str] = []
    for line in filter(str.strip, block.splitlines()[1:]):
        name, *about = line.split(maxsplit=1)
        assert about, f"{name} has no description"
        depth = (len(line) - len(line.lstrip())) // 2
        parents[depth:] = [name]
        paths.append("".join(parents))
    return paths


def undocumented(files: list[str], tree: list[str]) -> list[str]:
    """The files that have neither a line nor a folder that is described in one line."""
    folders = [path for path in tree if path.endswith("/")]
    whole = tuple(f for f in folders if sum(path.startswith(f) for path in tree) == 1)
    return [
        path
        for path in files
        if path not in tree and not path.startswith(whole) and not path.endswith("/__init__.py")
    ]


def files_of_checkout() -> list[str]:
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (FileNotFoundError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return [path for path in listed.stdout.splitlines() if (ROOT / path).is_file()]


def test_documented_tree_is_the_disk() -> None:
    tree = documented_tree((ROOT / "docs/architecture.md").read_text(encoding="utf-8"))
    assert not [path for path in tree if not (ROOT / path).exists()], "only in the tree"
    assert not [path for path, count in Counter(tree).items() if count > 1], "twice in the tree"
    assert not undocumented(files_of_checkout(), tree), "not in the tree"


def test_undocumented_files_are_found() -> None:
    text = "## Layout\n```\na/     code\n  b.py one\n  c/   whole\nd.md   text\n```\n"
    tree = documented_tree(text)
    assert tree == ["a/", "a/b.py", "a/c/", "d.md"]
    files = ["a/__init__.py", "a/b.py", "a/c/x/y.bin", "a/new.py", "d.md", "e.md"]
    assert undocumented(files, tree) == ["a/new.py", "e.md"]
