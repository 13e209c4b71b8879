"""The report's page: what it shows, in which order, that it is self-contained, and in a browser."""

import json
import re
import shutil
import subprocess
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from latent_t2i.evaluation import gallery, report
from latent_t2i.evaluation.data_card import data_card
from latent_t2i.evaluation.report import render_report
from tests.evaluations import INFO, history, make_evaluation
from tests.shard_sets import make_examples, write_buckets, write_set

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
ALLOWED_LOADS = ("data:image/", "data:,", "#")


class Page(HTMLParser):
    """Collects what a page loads, its images, anchors and ids."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.ids: list[str] = []
        self.charts: list[str | None] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.loads += [
            str(value) for name, value in attrs if name in ("src", "href", "xlink:href", "srcset")
        ]
        if tag == "img":
            self.images.append(values)
        if tag == "svg":
            self.charts.append(values.get("aria-label"))
        if "id" in values:
            self.ids.append(str(values["id"]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two evaluations, shards, and the first one's page beside the second."""
    folder = tmp_path_factory.mktemp("report")
    results = make_evaluation(folder / "run", with_sweeps=True)
    other = make_evaluation(folder / "other", shift=1.0, resize="clean")
    write_set(
        folder / "shards", [make_examples(4)], quarantined={"a": "no caption", "b": "no caption"}
    )
    others = [(str(folder / "other"), other)]
    page = render_report(
        results, folder / "run", history=history(), info=INFO, others=others,
        train_shards=[str(folder / "shards")],
    )  # fmt: skip
    (folder / "report.html").write_text(page)
    return folder


@pytest.fixture(scope="module")
def text(folder: Path) -> str:
    return (folder / "report.html").read_text()


def test_the_page_is_one_file_without_scripts(text: str) -> None:
    page = Page(text)
    assert all(load.startswith(ALLOWED_LOADS) for load in page.loads)
    assert not re.search(r"url\(\s*['\"]?http|@import|<script|<iframe", text)
    assert len(page.ids) == len(set(page.ids))
    anchors = {load[1:] for load in page.loads if load.startswith("#")}
    assert anchors <= set(page.ids)
    assert {"guidance", "guidance-interval", "guide", "sampler", "convergence"} <= anchors


def test_every_picture_and_chart_has_a_text_alternative(text: str) -> None:
    page = Page(text)
    assert all(image["alt"] and image["width"] and image["height"] for image in page.images)
    assert len(page.charts) > 10
    assert all(page.charts)
    assert 'class="bar" role="img" aria-label="denoise 90.0 %' in text


def test_headlines_have_interval_floor_and_ceiling(text: str) -> None:
    card = between(text, "<span>CLIP score ↑</span>", '<div class="figure')
    assert "<b>70.0</b>" in card
    assert "95\u00a0% interval: 69.0 to 71.0" in card
    assert "<dt>shuffled captions</dt><dd>55.0</dd>" in card
    assert "<dt>real images</dt><dd>70.9</dd>" in card
    assert "0.00130 ± 0.00020" in between(text, "<span>KID ↓</span>", '<div class="figure')


def test_fid_of_few_images_is_grey_and_comes_after_kid(text: str) -> None:
    assert text.index("<span>KID ↓") < text.index("<span>Coverage ↑") < text.index("<span>FID ↓")
    assert '<div class="figure grey"><span>FID ↓' in text
    assert "Biased with 18 images: needs 10,000." in text


def test_fid_of_many_images_leads(folder: Path) -> None:
    results = json.loads((folder / "run/evaluation.json").read_text())
    results["num_images"]["samples"] = 30_000
    titles = [figure["title"] for figure in report.headlines(results)]
    assert titles.index("FID") < titles.index("KID")
    assert not any(figure["is_grey"] for figure in report.headlines(results))


def test_pictures_are_the_best_random_and_worst(text: str) -> None:
    best, random, worst = (
        between(text, f"<h3>{title}</h3>", "<h3>" if title != "Worst" else "<h2")
        for title in ("Best", "Random", "Worst")
    )
    assert best.count("<img") == random.count("<img") == worst.count("<img") == 8
    assert "✗" not in best
    assert "CLIP score 77.0" in best, "the last image"
    assert "✗ shape" in worst
    assert worst.index("CLIP score 60.0") < worst.index("CLIP score 63.0"), "the worst first"


def test_sweeps_show_charts_tables_and_strips(text: str) -> None:
    guidance = between(text, '<h2 id="guidance">', "<h2")
    for label in ("guidance 1", "guidance 2", "guidance 4", "guidance 8"):
        assert guidance.count(f">{label}\n") == 4, "a strip per prompt"
    assert "Pareto front: guide 1, 4." in guidance
    samplers = between(text, '<h2 id="sampler">', "<h2")
    assert "dpmpp, 20 steps" in samplers
    assert 'class="best">0.00148 ✓' in samplers


def test_convergence_marks_the_best_checkpoint(text: str) -> None:
    convergence = between(text, '<h2 id="convergence">', "<h2")
    assert re.search(
        r"<td>CMMD</td><td>0\.683</td><td>1,200</td><td>76,800</td><td>0\.167</td><td>\+1\.00</td>",
        convergence,
    )
    assert "hours of training" in convergence


def test_training_is_shown(text: str) -> None:
    training = between(text, '<h2 id="training">', "<h2")
    assert "2 steps were skipped" in training
    for title in ("Loss", "Validation loss by timestep", "Throughput", "Skipped steps"):
        assert f"<h3>{title}</h3><svg" in training
    assert re.search(r'<i class="key" style="background:#3b7dd8"></i>denoise', training)


def test_categories_have_their_ceiling(text: str) -> None:
    table = between(text, '<h2 id="categories">', "<h2")
    assert "<td>dog</td><td>12</td><td>75\u00a0%</td><td>90\u00a0%</td><td>33\u00a0%</td>" in table


def test_memorisation_shows_pairs_and_groups(text: str) -> None:
    section = between(text, '<h2 id="memorisation">', "<h2")
    assert "Searched 100 of 8,000 training images" in section
    assert "a red cross | training image train-7" in section
    assert "<td>held out</td>" in section


def test_descriptions_and_details_of_the_metrics(text: str) -> None:
    section = between(text, '<h2 id="descriptions">', "<h2")
    assert "<td>0.png</td><td>a cross</td><td>a red cross | a plus</td>" in section
    details = between(text, "<summary>Details of the metrics", "</details>")
    assert "<td>fid.samples.fid_infinity</td><td>27.5</td>" in details
    assert "categories" not in details


def test_runs_side_by_side_name_the_difference(text: str) -> None:
    section = between(text, '<h2 id="runs">', "<h2")
    assert "Not comparable with other:" in section
    assert "<code>resize</code>: legacy against clean" in section
    assert section.count("<img") == 8
    assert "<th>other</th>" in text


def test_contamination_marks_every_result(folder: Path) -> None:
    results = json.loads((folder / "run/evaluation.json").read_text())
    results |= {"contamination": {"count": 3, "examples": ["000000000042"]}, "sweeps": {}}
    page = render_report(results, folder / "run", history=None, info=None)
    assert "<b>Contaminated:</b> 3 of the prompts" in page
    assert page.count('<span class="mark">contaminated</span>') == len(
        re.findall(r'<div class="figure[" ]', page)
    )
    assert "000000000042" in page


def test_contamination_that_was_not_checked_is_said(folder: Path) -> None:
    results = json.loads((folder / "run/evaluation.json").read_text()) | {"sweeps": {}}
    line = "Images of the training set among the prompts and the reference: "
    clean = render_report(results, folder / "run", history=None, info=None)
    assert f"{line}0 of 18." in clean
    results["contamination"] = {"status": "not checked", "reason": "remote shards", "count": 0}
    page = render_report(results, folder / "run", history=None, info=None)
    assert f"{line}not checked: remote shards." in page
    assert "contaminated" not in page.lower()


def test_a_folder_of_images_has_a_report_too(tmp_path: Path) -> None:
    results = {
        "name": "images", "protocol": {"resize": "clean"}, "protocol_id": "abc",
        "rows": {"samples": {"fid": 3.0, "novel/figure": 2.0}}, "num_images": {"samples": 12},
    }  # fmt: skip
    page = render_report(results, tmp_path, history=None, info=None)
    assert "novel/figure" in page
    assert "No picture of per_image.jsonl" in page
    assert "The run folder has no metrics.jsonl" in page
    assert "No data card: no training shards are known" in page
    empty = render_report(results, tmp_path, history=[{"step": 1, "loss": None}], info=INFO)
    assert "No line of metrics.jsonl has a loss" in empty


def test_texts_are_escaped(tmp_path: Path) -> None:
    results = make_evaluation(tmp_path) | {"name": "<b>&", "details": {}}
    lines = (tmp_path / "per_image.jsonl").read_text().replace('"prompt": "', '"prompt": "<i>&"')
    lines = re.sub(r'"prompt": "<i>&"[^"]*"', '"prompt": "<i>&"', lines)
    (tmp_path / "per_image.jsonl").write_text(lines)
    page = render_report(results, tmp_path, history=None, info=None)
    assert "<title>&lt;b&gt;&amp;: evaluation report" in page
    assert 'alt="&lt;i&gt;&amp;"' in page


def test_large_pictures_are_reduced(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (300, 600, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    card = gallery.picture(tmp_path / "a.png", "noise")
    assert (card.width, card.height) == (256, 128)
    assert card.source.startswith("data:image/jpeg")
    (tmp_path / "b.png").write_bytes(b"not an image")
    with pytest.raises(ValueError, match=r"b\.png: not a readable image"):
        gallery.picture(tmp_path / "b.png", "broken")


def test_the_data_card_counts_captions_and_reasons(folder: Path, text: str) -> None:
    card = data_card([str(folder / "shards")])
    assert card["rows"]["records"].startswith("4 in 1 shards")
    assert card["rows"]["captions"].startswith("12, of which 2 are truncated at 7 tokens")
    assert card["reasons"] == [("no caption", 2)]
    assert sum(count for _, count in card["lengths"]) == card["num_sampled"] == 12
    section = between(text, '<h2 id="data">', "<details")
    assert "<td>2</td><td>no caption</td>" in section
    assert "captions in the sample by tokens per caption" in section


def test_the_data_card_of_buckets_and_of_missing_shards(tmp_path: Path) -> None:
    write_buckets(tmp_path / "set", {"64x64": [2], "128x32": [3]}, quarantined={"k": "too narrow"})
    card = data_card([str(tmp_path / "set")])
    assert card["rows"]["records"].startswith("5 in 2 shards")
    assert card["reasons"] == [("too narrow", 1)]
    assert "not on this machine" in data_card([str(tmp_path / "none")])["missing"]
    assert "remote" in data_card(["s3://bucket/set"])["missing"]
    (tmp_path / "empty").mkdir()
    assert "cannot be read" in data_card([str(tmp_path / "empty")])["missing"]


def between(text: str, start: str, end: str) -> str:
    rest = text[text.index(start) + len(start) :]
    return rest[: rest.index(end)]


def browse(page: Path, profile: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Opens a page in headless Chromium, without a network."""
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine")
    flags = [
        "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        "--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr", "--v=0",
        f"--user-data-dir={profile}",
    ]  # fmt: skip
    command = [CHROMIUM, *flags, *arguments, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


def console_lines(stderr: str) -> Sequence[str]:
    return [line for line in stderr.splitlines() if "CONSOLE" in line or "net_error" in line]


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width_px", [1280, 390])
def test_the_page_in_a_browser(folder: Path, tmp_path: Path, scheme: str, width_px: int) -> None:
    """It renders in its colours, fits the width, and loads nothing."""
    shot = tmp_path / "page.png"
    preferred = "1" if scheme == "light" else "0"
    found = browse(
        folder / "report.html", tmp_path / "profile", f"--window-size={width_px},2000",
        f"--blink-settings=preferredColorScheme={preferred}", f"--screenshot={shot}",
    )  # fmt: skip
    assert not console_lines(found.stderr)
    pixels = np.asarray(Image.open(shot).convert("L"), np.float64)
    assert pixels.shape == (2000, width_px)
    assert (np.median(pixels) > 128) == (scheme == "light")
    assert pixels.std() > 10, "not blank"


@pytest.mark.slow
@pytest.mark.parametrize("width_px", [1280, 390])
def test_the_page_is_no_wider_than_the_window(folder: Path, tmp_path: Path, width_px: int) -> None:
    page = tmp_path / "page.html"
    measure = "document.title = [document.documentElement.scrollWidth, innerWidth,\n"
    measure += (
        "performance.getEntriesByType('resource').filter(e => !e.name.startsWith('data:')).length]"
    )
    text = (
        (folder / "report.html")
        .read_text()
        .replace("</body>", f"<script>{measure}</script></body>")
    )
    page.write_text(text)
    found = browse(page, tmp_path / "profile", f"--window-size={width_px},2000", "--dump-dom")
    title = re.search(r"<title>(\d+),(\d+),(\d+)</title>", found.stdout)
    assert title is not None
    scroll_px, window_px, num_requests = map(int, title.groups())
    assert scroll_px <= window_px
    assert num_requests == 0
    assert not console_lines(found.stderr)


def test_console_lines_are_found() -> None:
    lines = '[1:1:ERROR:CONSOLE(3)] "x"\n[1:2:ERROR:dbus/bus.cc(4)] no bus\n'
    assert len(console_lines(lines)) == 1


def test_missing_ceilings_and_warnings_are_shown(folder: Path) -> None:
    results: dict[str, Any] = json.loads((folder / "run/evaluation.json").read_text())
    results["missing_rows"] = [
        {"row": "real", "metrics": ["clip_score", "r_precision"], "reason": "no images"},
        {"row": "diverse", "metrics": ["lpips"], "reason": "no model"},
    ]
    results["warnings"] = {"clip_score": "the scorer is the text encoder"}
    del results["details"]["memorisation"]["samples"]["groups"]["held_out"]
    page = render_report(results, folder / "run", history=None, info=INFO)
    card = between(page, "<span>CLIP score ↑</span>", '<div class="figure')
    assert "Warning: the scorer is the text encoder." in card
    assert page.count("Warning:") == 1
    missing = between(page, "<h3>Missing floors and ceilings</h3>", "</table>")
    assert "<td>real images: clip_score, r_precision</td><td>no images</td>" in missing
    assert "<td>diverse: lpips</td><td>no model</td>" in missing
    section = between(page, '<h2 id="memorisation">', "<h2")
    assert "the ratios have no meaning on their own" in section


def test_results_without_sweeps_or_details(folder: Path) -> None:
    results: dict[str, Any] = json.loads((folder / "run/evaluation.json").read_text())
    results |= {"sweeps": {}, "details": {}}
    page = render_report(results, folder / "run", history=None, info=INFO)
    for key in ("guidance", "sampler", "convergence", "categories", "memorisation", "runs"):
        assert f'id="{key}"' not in page
        assert f'href="#{key}"' not in page
