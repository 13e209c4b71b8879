"""Folders of pictures: interrupted, continued, shared by processes, and refused."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from latent_t2i.configs.cli import parse
from latent_t2i.model.grid import read_settings
from latent_t2i.model.paths import ROOT
from latent_t2i.sample import folder as folders
from latent_t2i.sample import sampler
from latent_t2i.sample.config import DrawSettings, SampleConfig
from latent_t2i.sample.folder import Picture, draw_folder, picture_path
from latent_t2i.sample.pictures import sample
from tests.bundles import COMPUTED

IDENTITY = {"bundle": "here", "bundle_sha256": "ab", "dtype": "float32"}
ANCESTRAL = DrawSettings(scheduler="euler-ancestral", num_steps=2)
SDE = DrawSettings(scheduler="dpmpp-sde", num_steps=3, guidance_rescale=0.5)
PICTURES = [
    Picture(prompt=f"picture {number % 3}", seed=number, settings=SDE if number % 4 else ANCESTRAL)
    for number in range(11)
]


def names_and_bytes(folder: Path) -> dict[str, bytes]:
    """Returns the content of each file, hidden ones too."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def pipeline(bundle: Path) -> Any:
    return sampler.load(bundle)


@pytest.fixture(scope="module")
def whole(pipeline: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("whole")
    draw_folder(pipeline, PICTURES, folder, batch_size=3, identity=IDENTITY)
    return names_and_bytes(folder)


def test_every_picture_is_drawn_with_its_own_settings(
    pipeline: Any, whole: dict[str, bytes], tmp_path: Path
) -> None:
    assert sorted(whole) == [f"{number:06d}.png" for number in range(11)]
    (tmp_path / "4.png").write_bytes(whole["000004.png"])
    found = read_settings(tmp_path / "4.png")
    assert (found["scheduler"], found["num_steps"], found["seed"]) == ("euler-ancestral", 2, 4)
    assert found.items() >= IDENTITY.items()
    assert found.keys() >= COMPUTED
    names = {"latent-t2i", "torch", "diffusers", "transformers"}
    assert (found["batch_size"], found["versions"].keys()) == (3, names)


@pytest.mark.parametrize("world_size", [2, 8])
def test_processes_share_out_the_pictures(
    pipeline: Any, whole: dict[str, bytes], tmp_path: Path, world_size: int
) -> None:
    for rank in reversed(range(world_size)):
        draw_folder(
            pipeline,
            PICTURES,
            tmp_path,
            batch_size=3,
            identity=IDENTITY,
            rank=rank,
            world_size=world_size,
        )
    assert names_and_bytes(tmp_path) == whole


def test_an_interrupted_folder_continues_and_keeps_what_is_there(
    pipeline: Any, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[Path] = []

    def save(image: Image.Image, path: Path, record: Any) -> None:
        if len(saved) == 5:
            (path.parent / f".{path.name}").write_bytes(b"half a PNG")
            raise OSError("disk full")
        saved.append(path)
        save_whole(image, path, record)

    save_whole = folders.save_whole
    monkeypatch.setattr(folders, "save_whole", save)
    with pytest.raises(OSError, match="disk full"):
        draw_folder(pipeline, PICTURES, tmp_path, batch_size=3, identity=IDENTITY)
    monkeypatch.undo()
    times = {path: path.stat().st_mtime_ns for path in saved}
    assert len(list(tmp_path.glob("[0-9]*"))) == 5
    draw_folder(pipeline, PICTURES, tmp_path, batch_size=3, identity=IDENTITY)
    assert names_and_bytes(tmp_path) == whole
    assert times == {path: path.stat().st_mtime_ns for path in saved}


def test_a_finished_folder_is_not_drawn_again(
    pipeline: Any, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, content in whole.items():
        (tmp_path / name).write_bytes(content)
    monkeypatch.setattr(pipeline.unet, "forward", None)
    moved = IDENTITY | {"bundle": "elsewhere"}  # only its digest counts
    draw_folder(pipeline, PICTURES, tmp_path, batch_size=3, identity=moved)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": "another"}, "prompt 'picture 0', this one has 'another'"),
        ({"seed": 99}, "seed 0, this one has 99"),
        ({"settings": SDE}, "guidance_rescale 0.0, this one has 0.5"),
    ],
)
def test_a_different_picture_is_refused_by_both_values(
    pipeline: Any, whole: dict[str, bytes], tmp_path: Path, changes: Any, message: str
) -> None:
    picture_path(tmp_path, 0).write_bytes(whole["000000.png"])
    first = Picture(**(PICTURES[0].__dict__ | changes))
    with pytest.raises(ValueError, match=rf"000000\.png: an earlier call drew it with {message}"):
        draw_folder(pipeline, [first], tmp_path, batch_size=3, identity=IDENTITY)
    with pytest.raises(ValueError, match="dtype 'float32', this one has 'bfloat16'"):
        identity = IDENTITY | {"dtype": "bfloat16"}
        draw_folder(pipeline, PICTURES, tmp_path, batch_size=3, identity=identity)


@pytest.mark.parametrize("num_bytes", [0, 900, -100])
def test_a_damaged_picture_is_named_and_replaced_with_overwrite(
    pipeline: Any, whole: dict[str, bytes], tmp_path: Path, num_bytes: int
) -> None:
    path = picture_path(tmp_path, 0)
    path.write_bytes(whole["000000.png"][:num_bytes])
    with pytest.raises(ValueError, match=r"000000\.png: not a whole image: .*; .*--overwrite"):
        draw_folder(pipeline, PICTURES[:1], tmp_path, batch_size=3, identity=IDENTITY)
    settings: dict[str, Any] = {"batch_size": 3, "identity": IDENTITY, "overwrite": True}
    draw_folder(pipeline, PICTURES[:1], tmp_path, **settings)
    assert read_settings(path)["seed"] == 0
    path.write_bytes(whole["000000.png"][:20])  # may be anybody's
    with pytest.raises(ValueError, match=r"000000\.png: not a whole image"):
        draw_folder(pipeline, PICTURES[:1], tmp_path, **settings)


def test_unsuitable_settings_are_refused_before_anything_is_drawn(
    pipeline: Any, tmp_path: Path
) -> None:
    last = Picture(prompt="x", seed=0, settings=DrawSettings(scheduler="ddim", num_steps=30))
    with pytest.raises(ValueError, match=r"--num-steps: DDIM .* divisor"):
        draw_folder(pipeline, [*PICTURES, last], tmp_path, batch_size=3, identity=IDENTITY)
    assert not list(tmp_path.iterdir())


KILL = """
import os, signal, sys

pictures = []

def hook(event, arguments):
    if event == "os.rename" and str(arguments[1]).endswith(".png"):
        pictures.append(arguments[1])
        if len(pictures) == 4:
            os.killpg(0, signal.SIGKILL)

sys.addaudithook(hook)
"""
"""A `sitecustomize` module: the first process to finish a fourth picture kills all of them."""


def launch(folder: Path, *arguments: str, num_processes: int = 2) -> "subprocess.Popen[bytes]":
    """Starts `sample.run` in `folder`, under the launcher if there are several processes."""
    flags = "-m accelerate.commands.launch --cpu --num_machines 1 --mixed_precision no"
    flags += f" --dynamo_backend no --num_cpu_threads_per_process 1 --num_processes {num_processes}"
    start = [sys.executable, *(flags.split() if num_processes > 1 else []), "-m", "sample.run"]
    path = os.pathsep.join([str(folder / "site"), str(ROOT)])
    return subprocess.Popen(
        [*start, *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": path},
        start_new_session=True,
        stderr=subprocess.PIPE,
    )


def finish(process: "subprocess.Popen[bytes]") -> None:
    """Waits for a process and requires its success."""
    _, errors = process.communicate()
    assert process.returncode == 0, errors.decode()


def test_killed_under_the_launcher_the_same_command_continues(bundle: Path, tmp_path: Path) -> None:
    """Two processes, killed once: the files are those of one process that is not interrupted."""
    (tmp_path / "prompts.txt").write_text("\n".join(f"a red circle {n}" for n in range(4)))
    flags = f"--prompt-file {tmp_path}/prompts.txt --num-images 5 --num-steps 2 --batch-size 2"
    arguments = [*flags.split(), "--scheduler", "dpmpp-sde", "--bundle", str(bundle)]
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(KILL)
    process = launch(tmp_path, *arguments, "--out", "killed")
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    left = names_and_bytes(tmp_path / "killed")
    assert 3 <= sum(not Path(name).name.startswith(".") for name in left) < 20
    (tmp_path / "site" / "sitecustomize.py").unlink()
    finish(launch(tmp_path, *arguments, "--out", "killed"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        sample(parse(SampleConfig, "sample", [*arguments, "--out", str(tmp_path / "whole")]))
    finally:
        torch.set_num_threads(threads)
    killed, whole = (names_and_bytes(tmp_path / name) for name in ("killed", "whole"))
    assert len(whole) == 22
    assert killed == whole


def until_drawn(out: Path, num: int) -> Iterator[None]:
    """Yields until there are that many pictures."""
    end = time.monotonic() + 300
    while len(list((out / "samples").glob("[0-9]*.png"))) < num:
        assert time.monotonic() < end
        yield
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.parametrize("num_processes", [1, 2])
def test_killed_while_drawing_200_pictures(tmp_path: Path, num_processes: int) -> None:
    """The shipped bundle, killed three times, by hand or under the launcher."""
    settings = "--prompt-file prompts.txt --num-images 20 --num-steps 2 --batch-size 8"
    flags = settings.split()
    (tmp_path / "prompts.txt").write_text("\n".join(f"a red circle {n}" for n in range(10)))

    def run(out: str) -> "subprocess.Popen[bytes]":
        arguments = [*flags, "--bundle", str(ROOT / "scenes" / "bundle"), "--out", out]
        return launch(tmp_path, *arguments, num_processes=num_processes)

    for num in (1, 70, 140):
        process = run("killed")
        for _ in until_drawn(tmp_path / "killed", num):
            assert process.poll() is None
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        assert not (tmp_path / "killed" / "samples.png").exists()
    for out in ("killed", "whole"):
        finish(run(out))
    killed, whole = (names_and_bytes(tmp_path / name) for name in ("killed", "whole"))
    assert len(whole) == 202
    assert killed == whole
