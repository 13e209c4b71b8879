"""Statistics of real images: every kind of source, the cache, and what is refused."""

import io
import re
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from latent_t2i.evaluation import reference
from latent_t2i.evaluation.feature_stats import FeatureStats, frechet_distance
from latent_t2i.evaluation.reference import ReferenceConfig, main, make_reference
from tests.coco_folders import CocoFolder, make_coco
from tests.feature_networks import RandomNetwork

NUM = 6


@pytest.fixture(autouse=True)
def network(monkeypatch: pytest.MonkeyPatch) -> RandomNetwork:
    """The feature network that every name stands for."""
    found = RandomNetwork()
    monkeypatch.setattr(reference, "load_extractor", lambda name, context: found)
    return found


@pytest.fixture
def coco(tmp_path: Path) -> CocoFolder:
    return make_coco(tmp_path / "coco", size_px=24)


def statistics(images: Path | str, out: Path, **settings: Any) -> FeatureStats:
    config = ReferenceConfig(images=str(images), out=str(out), batch_size=4, **settings)
    assert make_reference(config) == out
    return FeatureStats.load(out)


def contents(coco: CocoFolder) -> list[bytes]:
    return [path.read_bytes() for path in sorted(coco.images.iterdir())]


def write_tars(folder: Path, images: list[bytes]) -> Path:
    folder.mkdir()
    with tarfile.open(folder / "00000.tar", "w") as tar:
        for number, content in enumerate(images):
            for name, data in ((f"{number}.png", content), (f"{number}.txt", b"noise")):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return folder


def write_parquet(folder: Path, images: list[bytes]) -> Path:
    folder.mkdir()
    column = [{"bytes": content, "path": f"{n}.png"} for n, content in enumerate(images)]
    table = pa.table({"image": column, "text": ["noise"] * len(images)})
    pq.write_table(table, folder / "a.parquet")
    return folder


def test_all_kinds_of_sources_give_the_same_statistics(coco: CocoFolder, tmp_path: Path) -> None:
    whole = statistics(coco.images, tmp_path / "folder.npz")
    assert whole.count == NUM
    sources = {
        "coco": (coco.images, {"captions": str(coco.captions)}),
        "webdataset": (write_tars(tmp_path / "tars", contents(coco)), {}),
        "parquet": (write_parquet(tmp_path / "parquet", contents(coco)), {}),
    }
    for kind, (images, settings) in sources.items():
        found = statistics(images, tmp_path / f"{kind}.npz", kind=kind, **settings)
        assert found.count == NUM
        np.testing.assert_array_equal(found.features, whole.features)
        assert found.identity["images"].startswith(kind)
        assert found.identity["images_left_out"] == "0"
    assert abs(frechet_distance(whole, found)) < 1e-9


def test_images_are_cropped_and_then_resized(coco: CocoFolder, tmp_path: Path) -> None:
    found = statistics(coco.images, tmp_path / "a.npz", size=16)
    assert found.identity["images_size"] == "16 x 16, centre crop, then Lanczos"
    with Image.open(sorted(coco.images.iterdir())[0]) as image:
        left = (image.width - image.height) // 2
        cropped = image.convert("RGB").crop((left, 0, left + image.height, image.height))
    resized = np.asarray(cropped.resize((16, 16), Image.Resampling.LANCZOS))
    np.testing.assert_allclose(
        found.features[0], RandomNetwork().extract(resized[None])[0], rtol=1e-5
    )


def test_statistics_have_halves_for_the_ceiling(coco: CocoFolder, tmp_path: Path) -> None:
    halves = statistics(coco.images, tmp_path / "a.npz").split(2)
    assert [part.count for part in halves] == [3, 3]


def test_a_second_call_finds_the_file(
    coco: CocoFolder,
    network: RandomNetwork,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(reference, "output_root", lambda: tmp_path)
    config = ReferenceConfig(images=str(coco.images))
    path = make_reference(config)
    assert path.parent == tmp_path / "data" / "reference"
    assert path.name.startswith("images-")
    network.num_calls = 0
    assert make_reference(config) == path
    assert network.num_calls == 0
    assert "found, nothing to do" in capsys.readouterr().out
    # Other bytes of the same length, another size or fewer images: another file.
    image = sorted(coco.images.iterdir())[0]
    image.write_bytes(sorted(coco.images.iterdir())[1].read_bytes())
    changed = {make_reference(config)}
    changed.add(make_reference(ReferenceConfig(images=str(coco.images), size=8)))
    changed.add(make_reference(ReferenceConfig(images=str(coco.images), num_images=4)))
    assert len(changed | {path}) == 4


def test_an_output_file_of_other_images_is_kept(coco: CocoFolder, tmp_path: Path) -> None:
    statistics(coco.images, tmp_path / "a.npz")
    with pytest.raises(ValueError, match=r"--out: .* statistics of other images or settings"):
        statistics(coco.images, tmp_path / "a.npz", num_images=3)


def test_statistics_of_other_tools_are_stamped(network: RandomNetwork, tmp_path: Path) -> None:
    path = tmp_path / "val2014_30k_stats.npz"
    np.savez(path, mu=np.zeros(network.dim), sigma=np.eye(network.dim))
    found = statistics(path, tmp_path / "a.npz", resize="pytorch")
    assert found.identity.items() >= network.identity().items()
    assert found.identity["images"] == path.name
    with pytest.raises(ValueError, match=r"was made by evaluation\.reference"):
        statistics(tmp_path / "a.npz", tmp_path / "b.npz")
    np.savez(path, mu=np.zeros(3), sigma=np.eye(3))
    with pytest.raises(ValueError, match=f"has 3 features, but inception has {network.dim}"):
        statistics(path, tmp_path / "b.npz")


def test_unusable_images_of_a_source_are_counted(
    coco: CocoFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = coco.read("captions")["images"]
    coco.change("captions", images=[*images, {"id": 99, "file_name": "../outside.png"}])
    found = statistics(coco.images, tmp_path / "a.npz", kind="coco", captions=str(coco.captions))
    assert (found.count, found.identity["images_left_out"]) == (NUM, "1")
    assert "left out 1 of 7 images" in capsys.readouterr().out


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["reference", *map(str, arguments)])
    return main()


def test_command(
    coco: CocoFolder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "new" / "a.npz"
    assert run(monkeypatch, coco.images, "--out", out, "--device", "cpu") == 0
    assert f"{out}: 6 images, 16 features" in capsys.readouterr().out


def break_png(coco: CocoFolder) -> str:
    path = sorted(coco.images.iterdir())[2]
    path.write_bytes(path.read_bytes()[:200])
    return rf"{path.name}: not a readable image"


def make_another_size(coco: CocoFolder) -> str:
    Image.new("RGB", (9, 9)).save(coco.images / "z.png")
    return r"z\.png has 9 x 9 pixels and .* 33 x 24; expected one size: give --size"


def keep_one(coco: CocoFolder) -> str:
    for path in sorted(coco.images.iterdir())[1:]:
        path.unlink()
    return "has 1 images; expected two or more"


def keep_none(coco: CocoFolder) -> str:
    for path in coco.images.iterdir():
        path.unlink()
    return "has 0 images; expected two or more"


@pytest.mark.parametrize("damage", [break_png, make_another_size, keep_one, keep_none])
def test_bad_folders_give_one_line_and_no_file(
    damage: Any,
    coco: CocoFolder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    expected = damage(coco)
    assert run(monkeypatch, coco.images, "--out", tmp_path / "a.npz") == 2
    captured = capsys.readouterr()
    assert re.search(expected, captured.err)
    assert captured.err.count("\n") == 1
    assert not list(tmp_path.glob("*a.npz*"))


def test_mixed_sizes_of_a_source(coco: CocoFolder, tmp_path: Path) -> None:
    Image.new("RGB", (9, 9)).save(sorted(coco.images.iterdir())[3])
    settings: dict[str, Any] = {"kind": "coco", "captions": str(coco.captions)}
    with pytest.raises(ValueError, match="has 9 x 9 pixels and the first image 33 x 24"):
        statistics(coco.images, tmp_path / "a.npz", **settings)
    assert statistics(coco.images, tmp_path / "a.npz", size=8, **settings).count == NUM


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"images": "nowhere"}, "no folder 'nowhere'"),
        ({"images": "nowhere.npz", "kind": "statistics"}, "no file 'nowhere.npz'"),
        ({"images": ".", "captions": "x.json"}, "--captions: has no effect with --kind images"),
        ({"images": ".", "size": 0}, "--size: expected a whole number, 1 or more, found 0"),
        ({"images": ".", "kind": "coco"}, "captions: required for a coco source"),
    ],
)
def test_wrong_settings(settings: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        make_reference(ReferenceConfig(**settings))


def test_output_must_be_npz(coco: CocoFolder) -> None:
    with pytest.raises(ValueError, match=r"--out: expected a file that ends in \.npz"):
        make_reference(ReferenceConfig(images=str(coco.images), out="stats"))
