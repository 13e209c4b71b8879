"""`evaluation.run`: bundles and folders, floors and ceilings, resuming, several processes."""

import json
import shutil
import socket
from dataclasses import replace
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from numpy.typing import NDArray
from PIL import Image

from latent_t2i.evaluation import clip_model, compare, draws, inputs
from latent_t2i.evaluation.config import EvaluationConfig, SweepConfig, WeightsConfig
from latent_t2i.evaluation.evaluate import evaluate
from latent_t2i.evaluation.feature_stats import stats_of
from latent_t2i.evaluation.metrics import METRICS, lpips, metric_class
from latent_t2i.evaluation.metrics.metric import Batch, Item
from latent_t2i.evaluation.rows import Panel, rotate_captions
from latent_t2i.model.bundle import digest
from latent_t2i.model.config import EMAConfig
from latent_t2i.model.posthoc import save_snapshot
from latent_t2i.sample import pictures
from latent_t2i.scenes.dataset import write_coco
from tests.bundles import make_bundle
from tests.evaluation.processes import work
from tests.shard_sets import make_examples, write_set

QUICK = ("oracle", "clip_score", "cmmd")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("bundle") / "bundle")


def config(bundle: Path, out: Path, **settings: Any) -> EvaluationConfig:
    chosen = {"num_prompts": 4, "num_steps": 2, "guidance_scales": (4.0,), "metrics": QUICK}
    return EvaluationConfig(name="tiny", bundle=str(bundle), out=str(out), **chosen | settings)


def results(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "evaluation.json").read_text())
    return found


@pytest.fixture(scope="module")
def evaluated(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of all metrics on scenes, with sweeps."""
    out = tmp_path_factory.mktemp("evaluated")
    snapshots = tmp_path_factory.mktemp("snapshots")
    unet = UNet2DConditionModel.from_pretrained(bundle / "unet")
    weaker = {name: tensor.detach() * 0.9 for name, tensor in unet.named_parameters()}
    averages = {0.05: weaker, 0.1: weaker}
    average = EMAConfig(sigma_rels=(0.05, 0.1), snapshot_every_steps=2)
    save_snapshot(snapshots, average, averages, step=2, train_s=1.0, settings={"batch_size": 4})
    sweep = SweepConfig(
        guidance_intervals=((0.1, 5.0),),
        guides=(str(make_bundle(snapshots.parent / "guide", seed=1)), str(snapshots)),
        num_steps=(1, 2),
        checkpoints=(str(bundle), str(snapshots)),
    )
    settings = config(
        bundle, out, metrics=("all",), guidance_scales=(1.0, 4.0), sweep=sweep, started_at=1
    )
    evaluate(settings)
    return out


def test_metrics_are_flat_and_complete(evaluated: Path, bundle: Path) -> None:
    metrics = json.loads((evaluated / "metrics.json").read_text())
    for name in ("oracle/single/shape_and_colour", "oracle/pair/all", "clip_score", "cmmd"):
        assert {name, f"{name}@g1", f"{name}/real"} <= metrics.keys()
        assert f"{name}@g4" not in metrics, "the main guidance scale has no suffix"
    assert metrics["oracle/pair/all/real"] == 1.0
    assert metrics["clip_score"] < metrics["clip_score/real"] <= 100
    assert metrics["train_seconds"] == 1.5
    assert metrics["total_seconds"] > 1e9
    assert (metrics["bundle"], metrics["bundle_sha256"]) == (str(bundle), digest(bundle))


def test_rows_have_floors_and_ceilings(evaluated: Path) -> None:
    found = results(evaluated)
    assert {"samples", "real", "reconstruction", "shuffled"} <= found["rows"].keys()
    assert set(found["num_images"].values()) == {12}
    assert found["rows"]["shuffled"].keys() <= found["rows"]["samples"].keys()
    assert found["protocol"]["drawn/scheduler_class"] == "DPMSolverMultistepScheduler"
    assert found["protocol"]["drawn/solver_order"] == 2
    low, high = found["intervals"]["clip_score"]
    assert low <= found["rows"]["samples"]["clip_score"] <= high
    assert found["intervals"]["oracle/single/shape_and_colour"][1] > 0, "of a share of 0 %"
    assert len(found["spread"]["cmmd"]["values"]) == 3
    lines = (evaluated / "per_image.jsonl").read_text().splitlines()
    assert not [line for line in lines if "NaN" in line], "not JSON"
    assert [json.loads(line)["position"] for line in lines] == list(range(12))
    assert all((evaluated / json.loads(line)["file"]).is_file() for line in lines)


def test_skipped_metrics_have_a_reason(evaluated: Path) -> None:
    skipped = results(evaluated)["skipped"]
    assert "weights-inception-2015-12-05" in skipped["fid"]
    assert "needs the training set: --train-shards" in skipped["memorisation"]
    computed = {metric.partition("/")[0] for metric in results(evaluated)["rows"]["samples"]}
    assert not computed & skipped.keys()


def test_the_conditioning_clip_is_a_warning_in_the_results(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clip_model, "is_text_encoder_of", lambda *_: True)
    metrics = ("clip_score", "r_precision", "cmmd")
    evaluate(config(bundle, tmp_path, metrics=metrics, num_prompts=2))
    warnings = results(tmp_path)["warnings"]
    assert warnings.keys() == {"clip_score", "r_precision"}
    assert "is also the text encoder of the bundle" in warnings["clip_score"]
    page = (tmp_path / "report.html").read_text()
    assert page.count("Warning: --weights.clip: ") == 2, "beside each figure"
    printed = " ".join(" ".join(compare.compare([str(tmp_path)] * 2)).split())
    assert printed.count("warning, clip_score and r_precision: --weights.clip: ") == 2


def test_no_warning_without_a_reason(evaluated: Path) -> None:
    assert results(evaluated)["warnings"] == {}
    assert "Warning:" not in (evaluated / "report.html").read_text()


class NoDistance:
    """LPIPS of images that all look the same."""

    def measure(self, one: NDArray[np.uint8], other: NDArray[np.uint8]) -> NDArray[np.float64]:
        return np.zeros(len(one))

    def identity(self) -> dict[str, str]:
        return {"net": "none"}


@pytest.fixture
def no_distance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lpips, "load_distance", lambda _: NoDistance())


@pytest.mark.usefixtures("no_distance")
def test_lpips_alone_has_no_figure_of_the_samples(bundle: Path, tmp_path: Path) -> None:
    settings = config(bundle, tmp_path, metrics=("lpips",), num_prompts=2, num_diverse_prompts=1)
    evaluate(settings)
    found = results(tmp_path)
    assert found["rows"] == {
        "samples": {}, "reconstruction": {"lpips": 0.0}, "diverse": {"lpips": 0.0}
    }  # fmt: skip
    assert found["skipped"] == {}
    (missing,) = found["missing_rows"]
    assert missing["metrics"] == ["lpips/diverse"]
    assert "no several real images of one prompt" in (tmp_path / "report.html").read_text()
    assert next(compare.compare([str(tmp_path), str(tmp_path)]))


@pytest.mark.usefixtures("no_distance")
def test_lpips_needs_a_row(bundle: Path, folders: tuple[Path, Path], tmp_path: Path) -> None:
    statistics = tmp_path / "real.npz"
    stats_of(np.ones((4, 8), np.float32)).save(statistics)
    out = tmp_path / "out"
    drawn = config(bundle, out, metrics=("lpips",), reference=str(statistics))
    for settings, message in (
        (of_folders(folders, out, metrics=("cmmd", "lpips")), "needs a bundle: --bundle"),
        (replace(drawn, num_diverse_prompts=0), "statistics only: .*--num-diverse-prompts is 0"),
    ):
        with pytest.raises(ValueError, match=f"--metrics lpips: .*{message}"):
            evaluate(settings)
    assert not out.exists()


def test_sweeps(evaluated: Path) -> None:
    sweeps = results(evaluated)["sweeps"]
    assert [point["value"] for point in sweeps["guidance_scale"]] == [1.0, 4.0]
    assert [point["num_steps"] for point in sweeps["sampler"]] == [1, 2]
    assert {point["num_images"] for points in sweeps.values() for point in points} == {6}
    assert len(sweeps["guidance_interval"]) == 1, "a single point is a result, too"
    guided = [point["folder"] for point in sweeps["guide"]]
    assert [Path(point["value"]).name for point in sweeps["guide"]] == ["guide", "step-00000002"]
    assert all((evaluated / folder / "000000.png").is_file() for folder in guided)
    assert [(p["step"], p["images_seen"]) for p in sweeps["checkpoints"]] == [(2, 8), (3, None)]
    assert len({p["figures"]["clip_score"] for p in sweeps["checkpoints"]}) == 2
    main = {p["value"]: p["folder"] for p in sweeps["guidance_scale"]}[4.0]
    assert main == results(evaluated)["pictures"], "the main images are not drawn again"


def test_a_second_evaluation_draws_nothing_and_agrees(
    evaluated: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = results(evaluated)
    monkeypatch.setattr("latent_t2i.sample.folder.generate", lambda *_, **__: pytest.fail("drawn"))
    evaluate(config(bundle, evaluated))
    after = results(evaluated)
    assert after["rows"]["samples"].items() <= before["rows"]["samples"].items()


def test_an_interrupted_evaluation_continues(
    evaluated: Path, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second call draws only what the first lacks; the figures are those of one call."""
    settings = config(bundle, tmp_path, batch_size=3)
    whole = draws.draw_folder

    def interrupted(*args: Any, **settings: Any) -> None:
        whole(*args, **settings)
        for path in sorted(args[2].glob("*.png"))[5:]:
            path.unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(draws, "draw_folder", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate(settings)
    assert not (tmp_path / "evaluation.json").exists()
    monkeypatch.setattr(draws, "draw_folder", whole)
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.png")}
    assert len(kept) == 5
    evaluate(settings)
    assert kept.items() <= {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.png")}.items()
    expected = results(evaluated)["rows"]["samples"]
    for name, value in results(tmp_path)["rows"]["samples"].items():
        assert value == pytest.approx(expected[name], rel=1e-4), name


def test_two_processes_give_the_same_figures(
    evaluated: Path, bundle: Path, tmp_path: Path, forks: ForkServerContext
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = config(bundle, tmp_path)
    group = [forks.Process(target=work, args=(settings, rank, 2, port)) for rank in range(2)]
    for process in group:
        process.start()
    for process in group:
        process.join(120)
        assert process.exitcode == 0
    expected = results(evaluated)["rows"]["samples"]
    for name, value in results(tmp_path)["rows"]["samples"].items():
        assert value == pytest.approx(expected[name], rel=1e-4), name


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two folders of drawn scenes; the first with captions."""
    root = tmp_path_factory.mktemp("folders")
    return tuple(write_coco(root / n, "easy", n, 8, 64, 0).images for n in ("train", "val"))  # type: ignore[return-value]


def of_folders(folders: tuple[Path, Path], out: Path, **settings: Any) -> EvaluationConfig:
    captions = folders[0].parent / "annotations" / "captions_train.json"
    chosen = {"metrics": ("clip_score", "cmmd", "prdc"), "captions": str(captions)}
    return EvaluationConfig(
        name="folders", images=str(folders[0]), reference=str(folders[1]), out=str(out),
        **chosen | settings,
    )  # fmt: skip


def test_two_folders_of_images(folders: tuple[Path, Path], tmp_path: Path) -> None:
    evaluate(of_folders(folders, tmp_path))
    found = results(tmp_path)
    assert found["rows"]["samples"]["clip_score"] > found["rows"]["shuffled"]["clip_score"]
    assert {"cmmd", "coverage"} <= found["rows"]["real"].keys()
    assert found["protocol"]["reference/count"] == 8
    assert found["sweeps"] == {}
    assert (tmp_path / "report.html").stat().st_size > 10_000


def test_missing_floors_and_ceilings_have_a_reason(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    real = tmp_path / "real"
    real.mkdir()
    for path in folders[1].iterdir():  # names without captions
        shutil.copy(path, real / f"real-{path.name}")
    evaluate(of_folders((folders[0], real), tmp_path, metrics=("clip_score", "cmmd")))
    missing = results(tmp_path)["missing_rows"]
    assert [(row["row"], row["metrics"]) for row in missing] == [
        ("real", ["clip_score"]),
        ("reconstruction", ["clip_score", "cmmd"]),
    ]
    assert "none of its images has the captions" in missing[0]["reason"]
    assert "no VAE that reconstructs images: --bundle" in missing[1]["reason"]
    assert "real images: clip_score" in (tmp_path / "report.html").read_text()
    assert "no row reconstruction" in capsys.readouterr().out


def test_a_folder_against_itself_has_no_distance(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    same = (folders[0], folders[0])
    evaluate(of_folders(same, tmp_path, metrics=("frechet_distance", "prdc"), captions=None))
    figures = results(tmp_path)["rows"]["samples"]
    assert figures["frechet_distance"] == pytest.approx(0, abs=1e-3)
    assert figures["precision"] == figures["recall"] == figures["coverage"] == 1.0


def test_faulty_inputs_are_named(folders: tuple[Path, Path], tmp_path: Path) -> None:
    settings = of_folders(folders, tmp_path / "out")
    few = tmp_path / "few.jsonl"
    few.write_text('{"text": "a red circle"}\n{"text": "a blue square"}\n')
    (tmp_path / "images").mkdir()
    one, corrupt, mixed = (tmp_path / name for name in ("one", "corrupt", "mixed"))
    for folder in (corrupt, mixed):
        shutil.copytree(folders[0], folder)
    first, *_, last = sorted(corrupt.iterdir())
    one.mkdir()
    shutil.copy(first, one)
    last.write_bytes(last.read_bytes()[:60])
    Image.new("RGB", (32, 32)).save(mixed / last.name)
    statistics = tmp_path / "other.npz"
    stats = stats_of(np.random.default_rng(0).standard_normal((8, 16)).astype(np.float32))
    stats.identity = {"network": "other", "weights_sha256": "0" * 64}
    stats.save(statistics)
    wrong = tmp_path / "wrong.pth"
    torch.save({"conv.weight": torch.zeros(2)}, wrong)
    plain = {"captions": None, "metrics": ("cmmd",)}
    for changes, message in (
        ({"captions": str(few)}, r"--captions: .* captions of 2 images, .* none of the 8 images"),
        ({"images": str(tmp_path / "images")}, r"--images: .* has 0 images; expected two or more"),
        ({"reference": "absent"}, r"--reference: no folder or file 'absent'"),
        ({"compare": ("absent",)}, r"^absent does not exist; expected the output folder of"),
        ({"metrics": ("fid",)}, r"--metrics fid: --weights.inception: .* download"),
        ({"metrics": ("oracle",)}, r"--metrics oracle: needs generated scenes: --oracle"),
        (plain | {"images": str(one)}, r"^--images: .*one has 1 images; expected two or more"),
        (plain | {"images": str(corrupt)}, rf"{last.name}"),
        (plain | {"reference": str(corrupt)}, rf"{last.name}"),
        (plain | {"images": str(mixed)}, rf"{last.name}.* 32 x 32"),
        (plain | {"reference": str(statistics)}, r"--reference: .*other\.npz"),
        (
            {"metrics": ("clip_score",), "weights": WeightsConfig(clip=str(wrong))},
            r"--weights.clip: .*wrong\.pth",
        ),
        (plain | {"weights": WeightsConfig(features=str(one))}, r"--weights.features: .*one"),
        ({"metrics": ("fidd",)}, r"--metrics: found 'fidd', expected all or some of oracle, "),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            evaluate(replace(settings, **changes))
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "out").exists(), "nothing is half-written"


def test_images_of_the_training_set_are_refused(folders: tuple[Path, Path], tmp_path: Path) -> None:
    train = [
        replace(example, key=f"COCO_val2014_{number:012d}")
        for number, example in enumerate(make_examples(3), start=7)
    ]
    write_set(tmp_path / "shards", [train])
    settings = of_folders(
        folders, tmp_path / "out", captions=None, metrics=("cmmd",),
        train_shards=(str(tmp_path / "shards"),),
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"2 of the images are in the training set .*such as 0*7"):
        evaluate(settings)
    assert not (tmp_path / "out").exists()
    evaluate(replace(settings, allow_contamination=True))
    assert results(tmp_path / "out")["contamination"]["count"] == 2
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["contaminated_images"] == 2


def test_sweeps_that_cannot_be_drawn_are_refused_before_drawing(
    bundle: Path, tmp_path: Path
) -> None:
    for sweep, message in (
        (SweepConfig(checkpoints=("absent",)), r"--sweep.checkpoints: no folder 'absent'"),
        (SweepConfig(guides=("absent",)), r"--bundle: no folder 'absent'"),
        (SweepConfig(guides=(str(bundle),)), r"--guide: .* has the same weights as the bundle"),
        (SweepConfig(guidance_intervals=((2e6, 3e6),)), r"--guidance-interval: none of the 2"),
        (SweepConfig(num_steps=(5000,)), r"--num-steps: expected at most the 1000"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate(config(bundle, tmp_path / "out", sweep=sweep))
    assert not (tmp_path / "out").exists()


def test_the_training_set_of_a_run_is_found_by_its_hash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = Path("shards/data/tiny/train")
    sha256 = write_set(folder, [make_examples(3)]).sha256
    info = {"name": "tiny", "config": {"shards": None}, "shards_sha256": sha256}
    settings = EvaluationConfig(name="tiny")
    assert inputs.train_shards_of(settings, info) == ((folder,), "")
    for changes, fault in (
        ({"shards_sha256": "0"}, "is another set by now"),
        ({"config": {"shards": "s3://bucket/train"}}, "is not a folder here"),
    ):
        found, reason = inputs.train_shards_of(settings, info | changes)
        assert found == ()
        assert fault in reason
        assert f"memorisation: not checked: {reason}" in capsys.readouterr().out
    assert inputs.train_shards_of(settings, None)[0] == ()
    more = write_set(Path("more"), [make_examples(2, seed=5)]).sha256
    several = {"config": {"shards": [str(folder), "more"]}, "shards_sha256": [sha256, more]}
    assert inputs.train_shards_of(settings, info | several)[0] == (folder, Path("more"))
    one = {"config": {"shards": str(folder)}}
    assert inputs.train_shards_of(settings, info | one)[0] == (folder,)


def test_a_bundle_or_images_but_not_both() -> None:
    with pytest.raises(ValueError, match=r"--images: found 'x' beside --bundle 'y'"):
        EvaluationConfig(name="a", images="x", bundle="y")


def test_a_run_without_a_bundle_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pictures, "output_root", lambda: tmp_path)
    with pytest.raises(ValueError, match=r"--bundle: .*runs/untrained/bundle does not exist"):
        evaluate(EvaluationConfig(name="untrained", out=str(tmp_path / "out")))


def test_every_metric_is_a_module_with_its_name() -> None:
    for name in METRICS:
        cls = metric_class(name)
        assert cls.rows, name
        assert cls.__doc__, name


def test_captions_are_rotated_within_their_group() -> None:
    texts = ["a", "a", "b", "c"]
    items = [
        Item(position=n, key=str(n), captions=(text,), group="one" if n < 4 else "two")
        for n, text in enumerate([*texts, "x", "y"])
    ]
    rotated = rotate_captions(items)
    assert [item.key for item in rotated] == [item.key for item in items]
    for before, after in zip(items, rotated, strict=True):
        assert after.captions != before.captions
        assert after.group == before.group
        assert after.captions[0] in [i.captions[0] for i in items if i.group == before.group]


def test_seeds_do_not_depend_on_other_groups() -> None:
    items = [Item(position=n, key="", group=group) for n, group in enumerate("aabab")]
    assert draws.seeds_of(items, 7) == [7, 8, 7, 9, 8]
    assert draws.part_of(items, 1) == [0, 2]


def test_features_are_cached_by_batch_and_not_by_caption() -> None:
    batch = Batch(images=np.zeros((1, 2, 2, 3), np.uint8), items=[Item(position=0, key="a")])
    calls: list[int] = []
    other = batch.with_items([Item(position=0, key="b")])
    for one in (batch, batch, other):
        one.cached("features", lambda: calls.append(1))
    assert len(calls) == 1


def test_metrics_of_all_are_chosen_by_their_needs(tmp_path: Path) -> None:
    settings = EvaluationConfig(name="a", images="x")
    panel = Panel(config=settings, device="cpu", inputs=frozenset())
    panel.choose()
    assert panel.names == ()
    assert panel.skipped["cmmd"] == "needs real images: --reference"
    Image.new("RGB", (2, 2)).save(tmp_path / "a.png")
