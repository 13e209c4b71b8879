"""What the wheel contains, and that it works beside a user's own `model.py` and `configs/`."""

import json
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.packaging.conftest import build

FOREIGN = ("model.py", "train.py", "configs/__init__.py", "shards.py", "sample/__init__.py")
SMALL_LAUNCH = ("--num_machines=1", "--num_processes=1", "--mixed_precision=no",
                "--dynamo_backend=no", "--num_cpu_threads_per_process=1")  # fmt: skip
SMALL_TRAIN = ("--batch-size=8", "--log-every-steps=1", "--num-steps")


def run(folder: Path, *command: str | Path) -> str:
    """Runs a command in `folder` without the checkout on the path, and returns its output."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "1"}
    done = subprocess.run(
        list(map(str, command)), cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def wheel_names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_wheel_contains_the_package_and_nothing_else(checkout: Path, wheel: Path) -> None:
    names = wheel_names(wheel)
    packaged = {name for name in names if not name.split("/")[0].endswith(".dist-info")}
    assert {name.split("/")[0] for name in packaged} == {"latent_t2i"}
    links = [path for path in (checkout / "latent_t2i").iterdir() if path.is_symlink()]
    files = {path for link in links for path in link.resolve().rglob("*") if path.is_file()}
    files |= set((checkout / "latent_t2i").glob("*.py"))
    on_disk = {str(path.relative_to(checkout)).removeprefix("latent_t2i/") for path in files}
    assert {name.removeprefix("latent_t2i/") for name in packaged} == {
        name for name in on_disk if "__pycache__" not in name and not name.startswith("shards/data")
    }


def test_wheel_has_the_command(wheel: Path) -> None:
    (entry_points,) = (name for name in wheel_names(wheel) if name.endswith("entry_points.txt"))
    with zipfile.ZipFile(wheel) as archive:
        text = archive.read(entry_points).decode()
    assert "latent-t2i = latent_t2i.cli:main" in text


@pytest.mark.slow
def test_sdist_builds_the_same_wheel(checkout: Path, wheel: Path, tmp_path: Path) -> None:
    with tarfile.open(build(checkout, "sdist", tmp_path / "sdist")) as archive:
        archive.extractall(tmp_path / "source", filter="data")
    (source,) = (tmp_path / "source").iterdir()
    assert wheel_names(build(source, "wheel", tmp_path / "wheel")) == wheel_names(wheel)


@pytest.mark.slow
def test_installed_commands_run_the_demo(environment: Path, tmp_path: Path) -> None:
    for name in FOREIGN:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("raise ImportError('a module of the user was imported')\n")
    command, python = environment / "latent-t2i", environment / "python"
    demo = ("--config", "demo", "--name", "walk")
    shards = Path("shards", "data", "walk")

    where = run(tmp_path, python, "-c", "import latent_t2i; print(latent_t2i.__file__)")
    assert Path(where).is_relative_to(environment.parent)
    run(tmp_path, command, "encode", *demo, "--source.num-images", "64")
    run(tmp_path, command, "encode", *demo, "--source.num-images", "16", "--split", "val")
    launch = (python, "-m", "accelerate.commands.launch", *SMALL_LAUNCH)
    run(tmp_path, *launch, "-m", "latent_t2i.train.run", *demo, *SMALL_TRAIN, "3")
    run(tmp_path, command, "train", *demo, *SMALL_TRAIN, "2", "--out", "again")
    run(tmp_path, command, "sample", *demo, "--num-steps", "2")
    run(tmp_path, command, "evaluate", *demo, "--num-prompts", "2", "--num-steps", "2")
    run(tmp_path, command, "verify", shards / "train")
    assert "64 " in run(tmp_path, command, "summary", shards / "train")

    left = {path.name for path in (tmp_path / "runs" / "walk").iterdir()}
    assert {"bundle", "samples.png", "report.html", "metrics.json"} <= left
    lines = [
        (tmp_path / folder / "metrics.jsonl").read_text().splitlines()
        for folder in ("runs/walk", "again")
    ]
    losses = [[json.loads(line)["loss"] for line in each] for each in lines]
    assert losses[0][:2] == losses[1]  # launched or not, the run is the same


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        ("-m", "pipeline.run"),
        ("-m", "latent_t2i.pipeline.run"),
        ("-m", "latent_t2i", "encode"),
        ("-m", "accelerate.commands.launch", *SMALL_LAUNCH, "train/run.py"),
        ("-m", "accelerate.commands.launch", *SMALL_LAUNCH, "-m", "latent_t2i.train.run"),
        ("-m", "shards.verify"),
        ("-m", "latent_t2i.shards.summary"),
        ("bench/sizes.py",),
    ],
    ids=" ".join,
)
def test_commands_of_a_bare_checkout(
    checkout: Path, environment: Path, tmp_path: Path, command: tuple[str, ...]
) -> None:
    """From the checkout's folder, in an environment where nothing of ours is installed."""
    python = without_the_package(environment, tmp_path)
    assert "usage:" in run(checkout, python, *command, "--help")


@pytest.mark.slow
def test_train_script_runs_from_another_folder(
    checkout: Path, environment: Path, tmp_path: Path
) -> None:
    python = without_the_package(environment, tmp_path)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    launch = (python, "-m", "accelerate.commands.launch", *SMALL_LAUNCH)
    text = run(elsewhere, *launch, checkout / "train" / "run.py", "--help")
    assert "usage: python -m train.run" in text


def without_the_package(environment: Path, folder: Path) -> Path:
    """Makes an environment with the dependencies only and returns its Python."""
    subprocess.run(
        [sys.executable, "-m", "venv", "--without-pip", str(folder / "bare")], check=True
    )
    (source,) = (environment.parent / "lib").glob("python*/site-packages/dependencies.pth")
    (target,) = (folder / "bare" / "lib").glob("python*/site-packages")
    (target / source.name).write_bytes(source.read_bytes())
    return folder / "bare" / "bin" / "python"
