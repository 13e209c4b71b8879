"""The page in headless Chromium. Needs the extra `app`, playwright and chromium: .ci/app."""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from latent_t2i.model.grid import read_settings
from latent_t2i.model.paths import ROOT

pytestmark = pytest.mark.slow
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytest.importorskip("gradio", reason="the page needs gradio: pip install '.[app]'")
sync_api = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
if CHROMIUM is None:
    pytest.skip("no chromium to open the page with", allow_module_level=True)

FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
]
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
STEP = re.compile(r"step \d+ of")
RECORD = """() => {
  window.recorded = "";
  const add = () => { window.recorded += document.body.innerText; };
  const everything = {childList: true, subtree: true, characterData: true};
  new MutationObserver(add).observe(document.body, everything);
}"""
"""Keeps all texts of the page, because a waiting test may miss one that is soon replaced."""
LONG_MS = 90_000
"""Time for a few pictures on a busy machine."""


class Served:
    """The page's server, in a process of its own."""

    def __init__(self, folder: Path) -> None:
        self.out = folder / "pictures"
        self.log = folder / "log.txt"
        command = [sys.executable, "-m", "latent_t2i.sample.app", "--port", "0"]
        command += ["--bundle", "scenes/bundle"]  # not that of a demo run here
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*command, "--out", str(self.out)],
                cwd=ROOT,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | {"PYTHONPATH": str(ROOT), "GRADIO_TEMP_DIR": str(folder / "tmp")},
            )
        self.url = ""

    def wait(self) -> None:
        """Waits for the page's address, which the server prints when it listens."""
        for _ in range(3000):
            if found := re.search(r"^page: (http://127\.0\.0\.1:\d+/)$", self.text(), re.M):
                self.url = found[1]
                return
            assert self.process.poll() is None, self.text()
            time.sleep(0.1)
        raise AssertionError(f"the page did not start: {self.text()}")

    def text(self) -> str:
        return self.log.read_text()

    def pictures(self) -> list[Path]:
        return sorted(self.out.glob("*.png"))


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    served = Served(tmp_path_factory.mktemp("page"))
    try:
        served.wait()
        yield served
    finally:
        served.process.terminate()
        served.process.wait(60)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any, served: Served, request: pytest.FixtureRequest) -> Iterator[Any]:
    """The page, whose requests and errors are checked after the test."""
    context = browser.new_context(viewport=getattr(request, "param", DESKTOP))
    page = context.new_page()
    page.set_default_timeout(LONG_MS)
    requests, errors = [], []
    page.on("request", lambda request: requests.append(request.url))
    page.on("console", lambda line: errors.append(line.text) if line.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(served.url)
    button(page, "Generate").wait_for()
    yield page
    context.close()
    foreign = [url for url in requests if not url.startswith((served.url, "data:", "blob:"))]
    assert foreign == []
    assert errors == []
    assert "Traceback" not in served.text()


def button(page: Any, name: str) -> Any:
    return page.get_by_role("button", name=name, exact=True)


def field(page: Any, label: str) -> Any:
    return page.get_by_label(label, exact=False).locator("visible=true").first


def choose(page: Any, **values: Any) -> None:
    """Fills in fields by their label, with spaces for underscores."""
    for label, value in values.items():
        field(page, label.replace("_", " ")).fill(str(value))


def draw(page: Any, label: str, count: int) -> list[str]:
    """Presses a button, waits for its pictures and returns their addresses."""
    button(page, label).click()
    done = page.get_by_text(f"{count} of {count} pictures, saved in").locator("visible=true")
    done.wait_for()
    images = page.locator(".gallery img:visible")
    images.nth(count - 1).wait_for()
    return [images.nth(number).get_attribute("src") for number in range(count)]


def message(page: Any, text: str) -> None:
    """Waits for an error message with this text, and closes it."""
    page.locator(".toast-body", has_text=text).first.wait_for()
    page.locator(".toast-close").first.click()


def test_a_prompt_gives_a_picture_and_another_seed_another(page: Any, served: Served) -> None:
    before = len(served.pictures())
    choose(page, Prompt="a large green square on the left", Steps=6, Images=1, Seed=3)
    (first,) = draw(page, "Generate", 1)
    choose(page, Seed=4, Steps=30)
    page.evaluate(RECORD)
    button(page, "Generate").click()
    page.get_by_text("seed 4", exact=True).wait_for()  # previews have "seed 4 ..."
    assert STEP.search(page.evaluate("window.recorded"))
    second = page.locator(".gallery img").first.get_attribute("src")
    assert first != second
    one, other = served.pictures()[before:]
    # The browser gets the file itself, with its settings.
    assert page.request.get(first).body() == one.read_bytes()
    found = read_settings(one)
    assert found["prompt"] == "a large green square on the left"
    assert (found["seed"], found["num_steps"], found["bundle"]) == (3, 6, "scenes/bundle")
    assert (read_settings(other)["seed"], read_settings(other)["num_steps"]) == (4, 30)
    with Image.open(one) as image, Image.open(other) as another:
        assert (np.asarray(image) != np.asarray(another)).any()


def test_guidance_scales_are_compared_in_a_row(page: Any, served: Served) -> None:
    before = len(served.pictures())
    choose(page, Steps=4)
    page.get_by_role("tab", name="Compare").click()
    choose(page, Guidance_scales="1, 4")
    assert len(set(draw(page, "Compare", 2))) == 2
    found = [read_settings(path) for path in served.pictures()[before:]]
    assert [settings["guidance_scale"] for settings in found] == [1, 4]
    assert {settings["seed"] for settings in found} == {0}


def test_an_image_is_changed_inside_the_mask(page: Any, served: Served, tmp_path: Path) -> None:
    Image.effect_noise((64, 64), 60).convert("RGB").save(tmp_path / "image.png")
    mask = Image.new("L", (64, 64))
    mask.paste(255, (32, 0, 64, 64))
    mask.save(tmp_path / "mask.png")
    choose(page, Steps=3, Images=1)
    page.get_by_role("tab", name="Edit").click()
    inputs = page.locator("input[type=file]")
    inputs.nth(0).set_input_files(tmp_path / "image.png")
    page.locator(".image-frame img").nth(0).wait_for()
    inputs.last.set_input_files(tmp_path / "mask.png")
    page.locator(".image-frame img").nth(1).wait_for()
    draw(page, "Change the image", 1)
    with Image.open(served.pictures()[-1]) as made, Image.open(tmp_path / "image.png") as given:
        made_pixels, given_pixels = np.asarray(made), np.asarray(given)
    assert (made_pixels[:, :32] == given_pixels[:, :32]).all()
    assert (made_pixels[:, 32:] != given_pixels[:, 32:]).any()


def test_bad_input_gives_a_message(page: Any, tmp_path: Path) -> None:
    choose(page, Prompt=" ", Steps=2, Images=1)
    button(page, "Generate").click()
    message(page, "prompt: expected what the picture shows, found an empty text")
    choose(page, Prompt="a red circle")
    page.get_by_role("tab", name="Compare").click()
    choose(page, Guidance_scales="strong")
    button(page, "Compare").click()
    message(page, "guidance scales: expected 1 to 16 numbers, such as 1, 2, 4, 7, found 'strong'")
    page.get_by_role("tab", name="Edit").click()
    button(page, "Change the image").click()
    message(page, "image: none given")
    (tmp_path / "text.png").write_text("no image")
    page.locator("input[type=file]").nth(0).set_input_files(tmp_path / "text.png")
    page.wait_for_timeout(2000)
    button(page, "Change the image").click()
    message(page, "cannot identify image file")


@pytest.mark.parametrize("begun", [False, True], ids=["at once", "while drawing"])
def test_a_drawing_is_stopped_and_the_next_one_starts(page: Any, begun: bool) -> None:
    choose(page, Steps=100, Images=16)
    button(page, "Generate").click()
    if begun:
        page.get_by_text(STEP).first.wait_for()
    button(page, "Stop").click()
    page.get_by_text("Stopped. ").wait_for()
    choose(page, Steps=2, Images=1)
    draw(page, "Generate", 1)


@pytest.mark.parametrize("page", [PHONE], indirect=True)
def test_the_page_fits_a_phone(page: Any, tmp_path: Path) -> None:
    choose(page, Steps=2, Images=2)
    draw(page, "Generate", 2)
    widths = page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
    assert widths[0] <= widths[1] == PHONE["width"]
    for name in ("Generate", "Stop", "Random seed"):
        box = button(page, name).bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= PHONE["width"]
