"""`evaluation.compare`: equal protocols only, paired intervals, and readable refusals."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from latent_t2i.evaluation import compare
from latent_t2i.evaluation.compare import (
    differences,
    paired_differences,
    read_per_image,
    read_results,
)
from tests.evaluations import make_evaluation
from tests.shard_sets import run_main


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluations")
    make_evaluation(folder / "one")
    make_evaluation(folder / "other", shift=2.0)
    make_evaluation(folder / "clean", shift=1.0, resize="clean", num_images=30_000)
    return folder


def lines_of(folder: Path, *names: str, force: bool = False) -> list[str]:
    return list(compare.compare([str(folder / name) for name in names], force=force))


def test_the_table_has_the_figures_of_both_and_fits_80_columns(folder: Path) -> None:
    lines = lines_of(folder, "one", "other")
    text = "\n".join(lines)
    assert max(map(len, lines)) <= 80
    assert re.search(r"clip_score +70\.00 +72\.00", text)
    assert re.search(r"95 % interval, or deviation +69\.0\.\.71\.0 +71\.0\.\.73\.0", text)
    assert re.search(r"kid: \+0, deviations over 3 disjoint sets 0\.0002 and 0\.0002", text)
    assert "cmmd: +0, without an interval" in text
    assert text.index("\nkid ") < text.index("\nfid "), "18 images"
    assert "≠" not in text


def test_a_difference_of_every_image_is_clear_and_none_is_not(folder: Path) -> None:
    text = " ".join(" ".join(lines_of(folder, "one", "other")).split())
    assert "clip_score: +2, 95 % interval +2 to +2: clear" in text
    assert "oracle/single/shape_and_colour: +0 %, 95 % interval +0 to +0: within" in text


def test_different_protocols_are_refused_by_field_and_both_values(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [str(folder / name) for name in ("one", "clean")]
    assert run_main(compare, monkeypatch, *runs) == 2
    found = capsys.readouterr()
    assert found.out == ""
    assert "differ in 2 fields" in found.err
    assert "resize: legacy against clean" in found.err
    assert "num_images: 18 against 30000" in found.err
    assert found.err.count("\n") == 1
    assert run_main(compare, monkeypatch, *runs, "--force") == 0
    forced = capsys.readouterr().out
    assert re.search(r"clip_score ≠ +70\.00 +71\.00", forced)
    assert "resize: A legacy, B clean" in forced


def test_one_run_alone_is_an_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        run_main(compare, monkeypatch, folder / "one")
    assert "expected two or more runs" in capsys.readouterr().err


def test_many_runs_are_printed_a_few_at_a_time(folder: Path) -> None:
    lines = lines_of(folder, *["one"] * 6)
    assert max(map(len, lines)) <= 80
    assert sum(line.startswith("figure ") for line in lines) == 2
    assert "F - A" in lines


def test_networks_of_a_metric_that_one_run_lacks_are_no_difference() -> None:
    with_fid = {"protocol": {"n": 1, "metrics/fid/weights": "a"}}
    other_fid = {"protocol": {"n": 1, "metrics/fid/weights": "b"}}
    without = {"protocol": {"n": 1}}
    assert differences([with_fid, without]) == {}
    assert differences([with_fid, other_fid, without]) == {
        "metrics/fid/weights": ["a", "b", "(absent)"]
    }
    assert differences([with_fid, {"protocol": {"metrics/fid/weights": "a"}}]) == {
        "n": ["1", "(absent)"]
    }


def test_models_of_different_training_sets_can_be_compared() -> None:
    runs = [{"protocol": {"metrics/memorisation/train_sha256": digest}} for digest in "ab"]
    assert differences(runs) == {}


def line(position: int, prompt: str, **values: float | None) -> dict[str, Any]:
    return {"position": position, "prompt": prompt, "values": values}


def test_images_are_paired_by_position_and_prompt() -> None:
    one = [line(0, "a", clip=1.0), line(1, "b", clip=2.0), line(2, "c", clip=None, own=1.0)]
    other = [line(0, "a", clip=4.0), line(1, "x", clip=5.0), line(2, "c", clip=1.0)]
    assert paired_differences(one, other) == {"clip": {(0, "a"): 3.0}}


def test_pairing_shows_a_small_difference_that_the_intervals_hide() -> None:
    rng = np.random.default_rng(0)
    base = rng.normal(0, 10, 200)
    one = [line(n, f"p{n}", clip=float(value)) for n, value in enumerate(base)]
    noise = rng.normal(0.5, 1, 200)
    other = [
        line(n, f"p{n}", clip=float(v + d))
        for n, (v, d) in enumerate(zip(base, noise, strict=True))
    ]
    paired = list(paired_differences(one, other)["clip"].values())
    low, high = compare.interval(paired)
    assert 0 < low < 0.5 < high < 1
    single = compare.interval(base.tolist())
    assert single[1] - single[0] > 5 * (high - low)


def in_one_line(lines: list[str]) -> str:
    """Returns a text without the line breaks and indentation of wrapped lines."""
    return " ".join(" ".join(lines).split())


def test_contamination_is_marked(folder: Path, tmp_path: Path) -> None:
    results = json.loads((folder / "one/evaluation.json").read_text())
    results["contamination"] = {"count": 7, "examples": ["42"]}
    path = tmp_path / "evaluation.json"
    path.write_text(json.dumps(results))
    text = in_one_line(compare.compare([str(folder / "one"), str(path)]))
    assert "CONTAMINATED: 7 images" in text
    assert "contamination not" not in text


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (None, "contamination not recorded"),
        ({"status": "not checked", "reason": "unknown", "count": 0}, "not checked: unknown"),
        ({"status": "not needed", "reason": "scenes", "count": 0}, ""),
    ],
)
def test_what_was_not_checked_for_contamination_is_said(
    folder: Path, tmp_path: Path, found: Any, expected: str
) -> None:
    results = json.loads((folder / "one/evaluation.json").read_text())
    path = tmp_path / "evaluation.json"
    path.write_text(json.dumps(results | {"contamination": found}))
    text = in_one_line(compare.compare([str(folder / "one"), str(path)]))
    assert expected in text
    assert text.count("contamination") == bool(expected)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist; expected the output folder"),
        ("[1]", "expected a JSON object, found list"),
        ("{}", "protocol: expected dict, found nothing"),
        ('{"protocol": {}, "protocol_id": "a", "rows": {}}', "rows.samples: expected numbers"),
        (
            '{"protocol": {}, "protocol_id": "a", "rows": {"samples": {"fid": "low"}}}',
            "rows.samples: expected numbers",
        ),
        (
            '{"protocol": {}, "protocol_id": "a", "rows": {"samples": {}}, "spread": 3}',
            "spread: expected an object, found 3",
        ),
    ],
)
def test_unusable_results_are_errors(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "evaluation.json").write_text(content)
    with pytest.raises(ValueError, match=rf"evaluation\.json.*{re.escape(message)}"):
        read_results(str(tmp_path))


@pytest.mark.parametrize("text", ["{", "[]", '{"position": "0", "values": {}}', '{"position": 0}'])
def test_an_unusable_line_of_the_images_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "per_image.jsonl").write_text('{"position": 0, "values": {}}\n' + text + "\n")
    with pytest.raises(ValueError, match=r"per_image\.jsonl, line 2: "):
        read_per_image(tmp_path)
