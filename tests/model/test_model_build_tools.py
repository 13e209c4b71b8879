"""The tools of torch.compile are looked for before anything is built or loaded."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from latent_t2i.model import build_tools
from latent_t2i.pipeline import stage
from latent_t2i.pipeline.config import SourceConfig
from latent_t2i.sample import sampler
from tests.stage_one import make_config


@pytest.mark.parametrize(
    ("device_type", "missing"),
    [("cpu", r"a C\+\+ compiler .* found no C\+\+"), ("cuda", "a C compiler .* found no C comp")],
)
def test_compilation_without_a_compiler_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, device_type: str, missing: str
) -> None:
    build_tools.require_build_tools(device_type)
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    unet: Any = SimpleNamespace(device=torch.device(device_type))
    encode = make_config(
        SourceConfig(images="i", captions="c"), tmp_path / "shards", vae="no/such", compile=True
    )
    for check in (
        lambda: build_tools.require_build_tools(device_type),
        lambda: sampler.speed_up(unet, compiled=True),
        lambda: stage.load_encoders(encode, torch.device(device_type)),
    ):
        with pytest.raises(ValueError, match=f"compile: .*{missing}.*apt install.*--no-compile"):
            check()


def test_python_headers_are_needed_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(
        build_tools.sysconfig, "get_paths", lambda scheme: {"include": str(tmp_path)}
    )
    with pytest.raises(ValueError, match=r"found no Python.h; install"):
        build_tools.require_build_tools("cuda")
