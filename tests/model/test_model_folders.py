"""Only the required files are downloaded from the Hub, and never pickles."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from latent_t2i.model import encoders, folders

PIPELINE = (
    "model_index.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
    "vae/diffusion_pytorch_model.fp16.safetensors",
    "vae/diffusion_pytorch_model.bin",
    "text_encoder/config.json",
    "text_encoder/model-00001-of-00002.safetensors",
    "text_encoder/model-00002-of-00002.safetensors",
    "text_encoder/model.safetensors.index.json",
    "text_encoder/pytorch_model.bin",
    "tokenizer/merges.txt",
    "tokenizer/tokenizer_config.json",
    "tokenizer/vocab.json",
    "tokenizer_2/vocab.json",
)
ALONE = (
    "README.md",
    "config.json",
    "diffusion_pytorch_model.safetensors",
    "other/diffusion_pytorch_model.safetensors",
)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """A fake hub with one repository; records downloads."""
    hub = SimpleNamespace(names=PIPELINE, downloads=[], cached=None)

    def snapshot(name: str, *, revision: str | None, **options: Any) -> str:
        if options.get("local_files_only"):
            if hub.cached is None:
                raise LocalEntryNotFoundError("not cached")
            return str(hub.cached)
        hub.downloads.append((name, revision, sorted(options["allow_patterns"])))
        return str(tmp_path)

    def model_info(self: object, name: str, **options: Any) -> Any:
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=n) for n in hub.names])

    monkeypatch.setattr(folders, "snapshot_download", snapshot)
    monkeypatch.setattr(folders.HfApi, "model_info", model_info)
    return hub


def fetch_vae() -> Path:
    return folders.fetch("some/vae", "v1", encoders.VAE_FILES, flag="--vae", parts=("vae",))


def make(folder: Path, names: Sequence[str]) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def test_only_the_required_parts_of_a_pipeline_are_downloaded(hub: Any) -> None:
    fetch_vae()
    parts = ("text_encoder", "tokenizer")
    folders.fetch("some/pipeline", None, encoders.TEXT_FILES, flag="--text-encoder", parts=parts)
    vae, text = hub.downloads
    assert vae == ("some/vae", "v1", [PIPELINE[3], PIPELINE[4]])
    assert text == ("some/pipeline", None, [*PIPELINE[7:11], *PIPELINE[12:15]])


def test_only_the_network_of_its_own_repository_is_downloaded(hub: Any) -> None:
    hub.names = ALONE
    fetch_vae()
    assert hub.downloads == [("some/vae", "v1", ["config.json", ALONE[2]])]
    hub.names = ("model.safetensors", "tokenizer.json", "tokenizer/vocab.json")
    folders.fetch("some/clip", None, ("*.safetensors", "tokenizer*"), flag="--clip")
    assert hub.downloads[1] == ("some/clip", None, ["model.safetensors", "tokenizer.json"])


def test_pickles_on_the_hub_are_refused(hub: Any) -> None:
    hub.names = ("config.json", "diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match=r"--vae: .*has none of .*pytorch_model.bin, a pickle"):
        fetch_vae()
    hub.names = ("README.md",)
    with pytest.raises(ValueError, match=r"'some/vae' at revision 'v1' on the Hub has none of"):
        fetch_vae()
    assert hub.downloads == []


def test_a_complete_cache_is_not_downloaded_again(hub: Any, tmp_path: Path) -> None:
    for number, names in enumerate((ALONE, PIPELINE)):
        hub.cached = make(tmp_path / str(number), names)
        assert fetch_vae() == hub.cached
    assert hub.downloads == []
    for number, names in enumerate((PIPELINE[:3], ALONE[:2]), start=1):  # without the VAE's weights
        hub.cached = make(tmp_path / f"part-{number}", names)
        fetch_vae()
        assert len(hub.downloads) == number


def test_the_error_names_files_parts_and_command() -> None:
    with pytest.raises(ValueError, match=r"no network; download config.json, .*safetensors") as e:
        fetch_vae()
    assert "(in a whole pipeline, from vae)" in str(e.value)
    assert "hf download some/vae --revision v1 --local-dir FOLDER" in str(e.value)
