"""What decides a GPU's kernels: one shape per image size, TF32 in the manifest, no benchmarking."""

import json
import shutil
import signal
from collections.abc import Sequence
from dataclasses import replace
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from latent_t2i.pipeline import workers
from latent_t2i.pipeline.config import PipelineConfig, ViewsConfig
from latent_t2i.pipeline.encode import (
    BYTES_PER_PIXEL,
    ENCODER_CHANNELS,
    Encoders,
    default_batch_size,
    encode_views,
    fitting_batch_size,
    fixed_kernels,
    supports_tf32,
)
from latent_t2i.pipeline.processes import ProcessInfo
from latent_t2i.pipeline.producers import vae
from latent_t2i.pipeline.stage import load_encoders, make_shards
from tests import on_device
from tests.coco_folders import CocoFolder, make_coco
from tests.stage_one import make_config, run

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> CocoFolder:
    return make_coco(tmp_path_factory.mktemp("coco"), [2] * 7)


@pytest.fixture(scope="module")
def encoders(folder: CocoFolder) -> Encoders:
    return load_encoders(make_config(folder, Path("out"), views=ViewsConfig(flip=True)), CPU)


def noise(num: int, width: int) -> NDArray[np.uint8]:
    return np.random.default_rng(num).integers(0, 256, (1, num, 64, width, 3), np.uint8)


def compiled(config: PipelineConfig, backend: Any) -> Encoders:
    """Loads encoders and compiles the VAE's by a backend that is faster than inductor."""
    original = torch.nn.Module.compile

    def compile_with_backend(module: torch.nn.Module, *, dynamic: bool, options: Any) -> None:
        original(module, backend=backend, dynamic=dynamic)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.Module, "compile", compile_with_backend)
        return load_encoders(replace(config, compile=True), CPU)


def test_a_compiled_encoder_is_called_with_one_shape_per_size(
    folder: CocoFolder, encoders: Encoders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with a last batch of three images, and with one that contains a broken image."""
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **how: asked.append(how))
    config = make_config(folder, tmp_path / "shards", views=ViewsConfig(flip=True), compile=True)
    config = replace(config, records_per_shard=7, max_quarantined=0.5)
    made = load_encoders(config, CPU)
    assert [how["dynamic"] for how in asked] == [False]
    shapes = set()
    made.vae.network.encoder.register_forward_pre_hook(
        lambda _, inputs: shapes.add(inputs[0].shape)
    )
    shutil.copytree(folder.images, tmp_path / "images")
    (tmp_path / "images/000000000002.png").write_text("no picture")
    source = replace(config.source, images=str(tmp_path / "images"))
    (manifest,) = make_shards(replace(config, source=source), made, ProcessInfo()).values()
    assert (manifest.num_records, manifest.num_quarantined) == (6, 1)
    assert shapes == {(4, 3, 64, 64)}
    found, expected = (encode_views(e, noise(3, 96))["latent"] for e in (made, encoders))
    np.testing.assert_allclose(found, expected, rtol=2e-3, atol=2e-3)
    assert shapes == {(4, 3, 64, 64), (4, 3, 64, 96)}


@pytest.mark.slow
def test_every_size_is_compiled_once_by_many_threads(folder: CocoFolder) -> None:
    """Ten sizes are more than PyTorch's limit of eight, after which it would stop compiling."""
    graphs = []

    def backend(module: torch.fx.GraphModule, _: Sequence[Any]) -> Any:
        graphs.append(module)
        return module.forward

    made = compiled(make_config(folder, Path("out")), backend)
    with workers.ThreadPoolExecutor(3) as pool:
        widths = [64 + 8 * (number % 10) for number in range(30)]
        list(pool.map(lambda width: encode_views(made, noise(1 + width % 3, width)), widths))
    assert len(graphs) == 10


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_killed_run_ends_with_the_same_bytes(
    tmp_path: Path, forks: ForkServerContext, compiled: bool
) -> None:
    """The resumed run begins with the batch of three images, which the other compiles last."""
    on_device.check_that_a_killed_set_ends_with_the_same_bytes(
        tmp_path, forks, "cpu", compiled=compiled
    )


def test_kernels_are_fixed_while_shards_are_written(
    folder: CocoFolder, encoders: Encoders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = set()
    original = vae.encode_images

    def spy(*args: Any) -> torch.Tensor:
        cudnn = torch.backends.cudnn
        seen.add((cudnn.benchmark, cudnn.deterministic, torch.get_float32_matmul_precision()))
        return original(*args)

    monkeypatch.setattr(vae, "encode_images", spy)
    with torch.backends.cudnn.flags(enabled=True, benchmark=True):
        for tf32, precision in ((False, "highest"), (True, "high")):
            seen.clear()
            config = make_config(folder, tmp_path / precision)
            make_shards(config, replace(encoders, tf32=tf32, views=ViewsConfig()), ProcessInfo())
            assert seen == {(False, True, precision)}
        assert torch.backends.cudnn.benchmark


def test_settings_of_kernels_are_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    # An actor of another test keeps its own settings for as long as it lives.
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    before = torch.get_float32_matmul_precision()
    with fixed_kernels(tf32=True):
        assert torch.backends.cudnn.allow_tf32 and torch.backends.cuda.matmul.allow_tf32
    with fixed_kernels(tf32=False):
        assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32
    assert torch.get_float32_matmul_precision() == before
    assert torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize("first", [True, False])
def test_a_set_is_resumed_with_the_same_products(
    folder: CocoFolder, encoders: Encoders, tmp_path: Path, first: bool
) -> None:
    config = make_config(folder, tmp_path / "shards")
    with_and_without = {
        tf32: replace(encoders, tf32=tf32, views=ViewsConfig()) for tf32 in (True, False)
    }
    (manifest,) = make_shards(config, with_and_without[first], ProcessInfo()).values()
    assert manifest.preprocessing.get("float32_products") == ("tf32" if first else None)
    with pytest.raises(ValueError, match="float32_products"):
        make_shards(config, with_and_without[not first], ProcessInfo())


def test_a_set_is_resumed_on_the_same_kind_of_device(
    folder: CocoFolder, encoders: Encoders, tmp_path: Path, forks: ForkServerContext
) -> None:
    config = make_config(folder, tmp_path / "shards", views=ViewsConfig(flip=True))
    assert run(forks, config, kill_at="shard-000001.tar") == -signal.SIGKILL
    other = replace(encoders, device_name="NVIDIA H100")
    with pytest.raises(
        ValueError, match=r"preprocessing\.device: found 'cpu', expected 'NVIDIA H100': choose"
    ):
        make_shards(config, other, ProcessInfo())
    progress = tmp_path / "shards/progress/provenance.json"
    before = progress.read_text()
    document = json.loads(before)
    assert document["preprocessing"].pop("device") == "cpu"
    progress.write_text(json.dumps(document))  # as older releases began it
    assert not make_shards(config, encoders, ProcessInfo(num_processes=2, rank=1))
    progress.write_text(before)
    (manifest,) = make_shards(config, encoders, ProcessInfo()).values()
    assert manifest.preprocessing["device"] == "cpu"
    # A finished set is the same set on any device: nothing is left to encode.
    assert make_shards(config, other, ProcessInfo()) == {"": manifest}


def test_tf32_is_not_used_on_a_cpu(folder: CocoFolder) -> None:
    assert not supports_tf32(CPU)
    assert not load_encoders(make_config(folder, Path("out"), tf32=True), CPU).tf32


def test_the_default_batch_size_depends_on_the_device(folder: CocoFolder) -> None:
    config = make_config(folder, Path("out"), batch_size=None)
    assert load_encoders(config, CPU).batch_size == default_batch_size(CPU, 64**2) == 32
    sizes = {
        (gib, side): fitting_batch_size(gib << 30, side**2)
        for gib in (16, 24, 80, 139)
        for side in (64, 256, 512, 1024)
    }
    assert [sizes[24, side] for side in (64, 256, 512, 1024)] == [256, 32, 8, 2]
    assert [sizes[80, side] for side in (64, 256, 512, 1024)] == [256, 128, 32, 8]
    # Memory would allow 256 at 256 px: 2**31 numbers at 128 channels.
    assert [sizes[139, side] for side in (64, 256, 512, 1024)] == [256, 128, 32, 8]


@settings(max_examples=30)
@given(st.integers(1 << 30, 1 << 38), st.integers(1, 1 << 24))
def test_two_batches_fit_into_half_of_the_memory(memory_bytes: int, num_pixels: int) -> None:
    size = fitting_batch_size(memory_bytes, num_pixels)
    assert 1 <= size <= 256 and size & (size - 1) == 0
    assert size == 1 or size * num_pixels * ENCODER_CHANNELS < 2**31
    assert size == 1 or 2 * size * num_pixels * BYTES_PER_PIXEL <= memory_bytes / 2
