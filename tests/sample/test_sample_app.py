"""What the page does, without a browser: bundles, previews, images one by one, stopping, errors."""

import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from latent_t2i.model.bundle import digest
from latent_t2i.model.encoders import encode_images, load_vae
from latent_t2i.model.grid import read_settings
from latent_t2i.sample import sampler, studio
from latent_t2i.sample.config import DrawSettings
from latent_t2i.sample.latent_preview import fit_latent_to_rgb, preview
from latent_t2i.sample.settings import AppConfig, EditConfig
from latent_t2i.sample.studio import Finished, Progress, Studio, Waiting, parse_scales
from latent_t2i.scenes.dataset import render
from latent_t2i.scenes.world import WORLDS, make_scene
from tests.bundles import COMPUTED, make_bundle

pytestmark = pytest.mark.usefixtures("load_once")

SETTINGS = DrawSettings(num_steps=3)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("mine") / "bundle")


@pytest.fixture(scope="module")
def page(bundle: Path) -> Studio:
    return Studio(AppConfig(bundle=str(bundle), out=str(bundle.parent / "pictures")))


def test_pictures_arrive_one_by_one_with_previews(page: Studio, bundle: Path) -> None:
    name = next(iter(page.bundles()))
    events = list(page.draw(name, "a red circle", [(5, SETTINGS), (6, SETTINGS)]))
    finished = [event for event in events if isinstance(event, Finished)]
    assert [event.number for event in finished] == [0, 1]
    for event in finished:
        before = events[: events.index(event)]
        shown = [e for e in before if isinstance(e, Progress) and e.number == event.number]
        assert shown[0].step == 1
        assert {e.num_steps for e in shown} == {3}
        assert all(e.picture.size == event.picture.size == (64, 64) for e in shown)
    pipeline = sampler.load(bundle, device="cpu", dtype="float32")
    expected = sampler.draw(pipeline, ["a red circle"], [6], num_steps=3)
    assert (np.asarray(finished[1].picture) == np.asarray(expected[0])).all()
    found = read_settings(finished[1].path)
    assert (found["prompt"], found["seed"], found["num_steps"]) == ("a red circle", 6, 3)
    assert len(found["bundle_sha256"]) == 64
    assert found.keys() >= COMPUTED
    assert [event.path.name for event in finished] == ["000000.png", "000001.png"]


def test_a_bundle_that_was_trained_again_is_loaded_again(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    page = Studio(AppConfig(bundle=str(bundle), out=str(tmp_path / "pictures")))
    name = next(iter(page.bundles()))
    digests = []
    for seed in (0, 0, 1):
        if seed:
            make_bundle(bundle, seed=seed)
        *_, last = page.draw(name, "a red circle", [(5, SETTINGS)])
        assert isinstance(last, Finished)
        found = read_settings(last.path)["bundle_sha256"]
        assert found == digest(bundle)
        digests.append(found)
    assert digests[0] == digests[1] != digests[2]


def test_a_closed_request_stops_at_the_next_step(page: Studio) -> None:
    name = next(iter(page.bundles()))
    long = DrawSettings(num_steps=500)
    events = page.draw(name, "x", [(0, long)] * 100)
    next(events)
    events.close()
    # The next request waits for the thread of the closed one, which has 50,000 steps to go.
    after = list(page.draw(name, "x", [(0, DrawSettings(num_steps=1))]))
    assert [type(event) for event in after if not isinstance(event, Waiting)] == [
        Progress,
        Finished,
    ]


def test_a_stopped_request_ends_with_what_is_finished(page: Studio) -> None:
    name, stop = next(iter(page.bundles())), threading.Event()
    events = page.draw(name, "x", [(0, DrawSettings(num_steps=1))] * 1000, stop)
    finished = 0
    for event in events:
        finished += isinstance(event, Finished)
        if finished == 2:
            stop.set()
    assert finished == 2


def test_a_request_waits_for_its_turn_and_can_be_closed_meanwhile(page: Studio) -> None:
    name = next(iter(page.bundles()))
    with page._lock:
        events = page.draw(name, "x", [(0, SETTINGS)])
        assert next(events) == Waiting(reason="Waiting for another picture ...")
        assert next(events) == Waiting()
        events.close()
    assert list(page.draw(name, "x", [(0, SETTINGS)]))


def test_errors_of_the_drawing_thread_reach_the_page(page: Studio) -> None:
    name = next(iter(page.bundles()))
    with pytest.raises(ValueError, match="DDIM leaves noise"):
        list(page.draw(name, "x", [(0, DrawSettings(scheduler="ddim", num_steps=7))]))
    with pytest.raises(ValueError, match="bundle: found '/etc', which is not in runs/"):
        page.draw("/etc", "x", [(0, SETTINGS)])


def test_image_to_image_keeps_what_the_mask_keeps(page: Studio, tmp_path: Path) -> None:
    Image.effect_noise((64, 64), 60).convert("RGB").save(tmp_path / "image.png")
    mask = Image.new("L", (64, 64))
    mask.paste(255, (32, 0, 64, 64))
    mask.save(tmp_path / "mask.png")
    config = EditConfig(
        bundle=next(iter(page.bundles())),
        init_image=str(tmp_path / "image.png"),
        mask=str(tmp_path / "mask.png"),
        num_images=2,
        num_steps=2,
        batch_size=1,
    )
    events = list(page.edit("a red circle", config))
    finished = [event for event in events if isinstance(event, Finished)]
    assert len(finished) == 2
    assert any(isinstance(event, Progress) for event in events)
    with Image.open(tmp_path / "image.png") as original:
        kept = np.asarray(original)[:, :32]
    for event in finished:
        assert (np.asarray(event.picture)[:, :32] == kept).all()
    found = read_settings(finished[1].path)
    assert (found["seed"], found["strength"], found["num_steps"]) == (1, 0.6, 2)
    assert len(found["init_image_sha256"]) == len(found["mask_sha256"]) == 64


def test_the_runs_bundles_are_listed_newest_first(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(studio, "output_root", lambda: tmp_path)
    for age, name in enumerate(("new/bundle", "old/bundle-0.05", "unfinished/logs")):
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        if "bundle" in name:
            (folder / "model_index.json").touch()
            os.utime(folder / "model_index.json", (10**9 - age, 10**9 - age))
    names = list(Studio(AppConfig(bundle=str(bundle))).bundles())
    assert names[:3] == [str(bundle), "runs/new/bundle", "runs/old/bundle-0.05"]
    assert names[3].endswith("scenes/bundle")
    assert len(names) == 4


def test_previews_resemble_the_pictures() -> None:
    vae = load_vae("scenes/encoders/vae")
    matrix = fit_latent_to_rgb(vae)
    assert matrix.shape == (9, 3)
    scenes = [make_scene(WORLDS["full"], np.random.default_rng(n), "val") for n in range(16)]
    pixels = torch.tensor(render(scenes)).permute(0, 3, 1, 2).float() / 127.5 - 1
    latents = encode_images(vae, pixels)[:, :8] * vae.config.scaling_factor
    shown = torch.stack([_to_tensor(preview(latent, matrix, (8, 8))) for latent in latents])
    target = nn.functional.avg_pool2d(pixels, 8)
    spread = (target - target.mean((0, 2, 3), keepdim=True)).square().sum()
    # 0.65 is the most that a linear map of these latents explains.
    assert 1 - (shown - target).square().sum() / spread > 0.4


def _to_tensor(image: Image.Image) -> torch.Tensor:
    return torch.tensor(np.asarray(image)).permute(2, 0, 1).float() / 127.5 - 1


def test_previews_of_broken_latents_are_pictures() -> None:
    broken = torch.full((4, 2, 2), float("nan"))
    assert preview(broken, torch.zeros(5, 3), (16, 8)).size == (16, 8)


@pytest.mark.parametrize(
    ("text", "scales"), [("1, 2,4 7.5", [1, 2, 4, 7.5]), ("3", [3]), (" 1\n2 ", [1, 2])]
)
def test_guidance_scales_are_numbers_with_commas_or_spaces(text: str, scales: list[float]) -> None:
    assert parse_scales(text) == scales


@pytest.mark.parametrize("text", ["", "a", "1, b", "1 " * 17])
def test_other_guidance_scales_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="guidance scales: expected 1 to 16 numbers"):
        parse_scales(text)


@pytest.mark.parametrize("values", [{"port": 65536}, {"port": -1}, {"max_images": 0}])
def test_impossible_settings_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected"):
        AppConfig(**values)
