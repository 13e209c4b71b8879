"""Export: model card, float16 variants, what is overwritten, and the upload to a stand-in Hub."""

import base64
import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from huggingface_hub import HfApi, ModelCard
from safetensors.torch import load_file, save_file

from latent_t2i.configs.cli import parse
from latent_t2i.model.bundle import INFO_FILE, digest
from latent_t2i.model.grid import read_settings
from latent_t2i.sample import publishing, sampler
from latent_t2i.sample.card import write_card
from latent_t2i.sample.settings import ExportConfig
from tests.bundles import COMPUTED

pytestmark = pytest.mark.usefixtures("load_once")

PROMPTS = ("a red circle", "a blue star")
REPO = "someone/scenes"


PICKLED = {"text_encoder": "pytorch_model.bin"} | dict.fromkeys(
    ("unet", "vae"), "diffusion_pytorch_model.bin"
)


@pytest.fixture(scope="module")
def exported(bundle: Path) -> Path:
    """An export with metrics beside the bundle, samples and float16 files."""
    metrics = {
        "clip_score": 31.25,
        "oracle/single@g7": 0.5,
        "protocol_id": "own-1a2b",
        "bundle_sha256": digest(bundle),
        "train_seconds": 3.0,
    }
    (bundle.parent / "metrics.json").write_text(json.dumps(metrics))
    out = bundle.parent / "export"
    argv = ["--bundle", str(bundle), "--out", str(out), "--license", "apache-2.0"]
    argv += ["--title", "Tiny scenes", "--prompt", *PROMPTS, "--num-steps", "2"]
    return publishing.export(parse(ExportConfig, None, argv, prog="export"))


def config(bundle: Path, out: Path, **values: Any) -> ExportConfig:
    return ExportConfig(bundle=str(bundle), out=str(out), **values)


def test_the_card_says_what_is_known_and_what_is_not(exported: Path, bundle: Path) -> None:
    card = ModelCard.load(exported / "README.md")
    data = card.data.to_dict()
    assert (data["license"], data["pipeline_tag"]) == ("apache-2.0", "text-to-image")
    assert data["library_name"] == "diffusers"
    text = card.text
    for expected in (
        "# Tiny scenes",
        "![Samples with their prompts](samples.png)",
        "trained for 3 steps",
        "Images have 64 x 64 pixels",
        "| Learning rate | 0.1 |",
        "| Prediction | not recorded |",
        "| VAE | not recorded |",
        "Protocol: `own-1a2b`",
        "| clip_score | 31.25 |",
        "| oracle/single@g7 | 0.5 |",
        "apache-2.0, chosen by the publisher",
        "## Intended use",
        digest(bundle),
    ):
        assert expected in text
    assert "train_seconds" not in text


def test_the_samples_are_the_first_seeds_of_the_prompts(exported: Path, bundle: Path) -> None:
    found = read_settings(exported / "samples.png")
    assert (found["prompts"], found["seed"], found["num_steps"]) == (list(PROMPTS), 0, 2)
    assert found.keys() >= COMPUTED


def test_the_export_holds_the_bundle_and_float16_variants(exported: Path, bundle: Path) -> None:
    own = {path.relative_to(bundle) for path in bundle.rglob("*") if path.is_file()}
    found = {path.relative_to(exported) for path in exported.rglob("*") if path.is_file()}
    weights = {path for path in own if path.suffix == ".safetensors"}
    halves = {path.with_suffix(".fp16.safetensors") for path in weights}
    assert len(halves) == 3
    assert found == own | halves | {Path("README.md"), Path("samples.png")}
    for path in own:
        assert (exported / path).read_bytes() == (bundle / path).read_bytes()
    for path in halves:
        assert {tensor.dtype for tensor in load_file(exported / path).values()} <= {
            torch.float16,
            torch.int64,
        }


def test_diffusers_loads_the_float16_variant_and_draws_nearly_the_same(exported: Path) -> None:
    def draw(folder: Path, **variant: str) -> np.ndarray[Any, Any]:
        pipeline = StableDiffusionPipeline.from_pretrained(
            folder, local_files_only=True, dtype=torch.float32, **variant
        )
        (image,) = sampler.draw(pipeline, ["a red circle"], [0], num_steps=2)
        return np.asarray(image, int)

    for path in exported.rglob("*.safetensors"):
        if ".fp16." not in path.name:
            path.rename(path.with_suffix(".hidden"))
    try:
        half = draw(exported, variant="fp16")
    finally:
        for path in exported.rglob("*.hidden"):
            path.rename(path.with_suffix(".safetensors"))
    assert np.abs(half - draw(exported)).max() <= 8


def test_weights_beyond_float16_are_refused_and_nothing_is_left(
    bundle: Path, tmp_path: Path
) -> None:
    large = shutil.copytree(bundle, tmp_path / "large")
    path = large / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights["conv_in.bias"] = torch.full_like(weights["conv_in.bias"], 1e6)
    save_file(weights, path)
    with pytest.raises(ValueError, match=r"--fp16: conv_in\.bias of unet/.* beyond the range"):
        publishing.export(config(large, tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["large"]


def test_the_card_names_float16_files_only_if_there_are_some(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pickled = shutil.copytree(bundle, tmp_path / "pickled")
    for path in pickled.rglob("*.safetensors"):
        torch.save(load_file(path), path.with_name(PICKLED[path.parent.name]))
        path.unlink()
    out = publishing.export(config(pickled, tmp_path / "out"))
    assert "--fp16: text_encoder/pytorch_model.bin is not a safetensors" in capsys.readouterr().out
    assert 'variant="fp16"' not in (out / "README.md").read_text()
    assert not list(out.rglob("*.fp16.*"))


def test_damaged_weights_are_refused(bundle: Path, tmp_path: Path) -> None:
    cut = shutil.copytree(bundle, tmp_path / "cut")
    path = cut / "text_encoder" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"--bundle: .*cut does not load"):
        publishing.export(config(cut, tmp_path / "out"))
    with pytest.raises(ValueError, match=r"--fp16: text_encoder/.* is damaged"):
        publishing.add_fp16(cut)


def test_an_export_replaces_an_earlier_one_and_nothing_else(
    exported: Path, bundle: Path, tmp_path: Path
) -> None:
    out = shutil.copytree(exported, tmp_path / "out")
    (out / "unet" / "stale.fp16.safetensors").touch()
    publishing.check_out(out, bundle)
    other = tmp_path / "other"
    other.mkdir()
    publishing.check_out(other, bundle)
    (other / "thesis.tex").touch()
    (tmp_path / "file").touch()
    for path, error in (
        (other, "exists and is not an earlier export"),
        (bundle, "is the bundle itself or inside it"),
        (bundle / "new", "is the bundle itself or inside it"),
        (bundle.parent, "contains the bundle"),
        (tmp_path / "file", "is a file"),
        (shutil.copytree(bundle, tmp_path / "copy"), "is not an earlier export"),
    ):
        with pytest.raises(ValueError, match=f"--out: .*{error}"):
            publishing.check_out(path, bundle)


def test_metrics_of_another_bundle_are_refused(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "metrics.json"
    path.write_text(json.dumps({"clip_score": 1.0, "bundle_sha256": "0" * 64}))
    with pytest.raises(ValueError, match=r"--metrics: .*metrics of bundle 0000"):
        publishing.read_metrics(str(path), bundle, digest(bundle))
    copy = shutil.copytree(bundle, tmp_path / "bundle")
    assert publishing.read_metrics(None, copy, digest(copy)) is None
    assert "the card says that the model was not evaluated" in capsys.readouterr().out
    path.unlink()
    assert publishing.read_metrics(None, copy, digest(copy)) is None
    with pytest.raises(ValueError, match="--metrics: no file"):
        publishing.read_metrics(str(path), bundle, digest(bundle))


def test_a_card_without_any_record_is_a_card(tmp_path: Path) -> None:
    text = write_card(
        title="a | b",
        license_name="other",
        info=None,
        metrics=None,
        size=(64, 64),
        digest="0" * 64,
        has_fp16=False,
        grid=None,
    )
    assert ModelCard(text).data.to_dict()["license"] == "other"
    assert "its training is not recorded" in text
    assert "Metrics are not recorded" in text
    assert "No licence was chosen" in text
    assert "samples.png" not in text
    assert "fp16" not in text


@pytest.mark.parametrize(
    ("values", "error"),
    [
        ({"push": True}, "--push: needs --repo"),
        ({"seed": -1}, "--seed: expected"),
        ({"num_steps": 0}, "--num-steps: expected"),
        ({"repo": "a/b/c"}, "--repo: expected USER/NAME, found 'a/b/c'"),
    ],
)
def test_impossible_settings_are_refused(
    bundle: Path, tmp_path: Path, values: dict[str, Any], error: str
) -> None:
    with pytest.raises(ValueError, match=error):
        publishing.export(config(bundle, tmp_path / "out", **values))
    assert not (tmp_path / "out").exists()


class Hub(ThreadingHTTPServer):
    """A stand-in for the Hub: it knows the calls of an upload, and keeps commits."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.calls: list[str] = []
        self.commits: list[dict[str, bytes]] = []
        self.deleted: list[str] = []
        self.refuse = ""
        """The end of the path of a call that is answered with an error."""


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        self.server.calls.append(f"GET {self.path}")
        if "/tree/" in self.path:
            names = ("old.fp16.safetensors", "notes.md")
            return self.answer(
                [{"type": "file", "path": name, "size": 1, "oid": "1"} for name in names]
            )
        return self.answer({"error": "there is none"}, 404)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.calls.append(f"POST {self.path}")
        if self.server.refuse and self.path.endswith(self.server.refuse):
            return self.answer({"error": "no"}, 403)
        if self.path.endswith("/repos/create"):
            assert json.loads(body)["name"] == "scenes"
            return self.answer({"url": f"{self.server.url}/{REPO}", "name": REPO})
        if self.path.endswith("/validate-yaml"):
            return self.answer({"errors": [], "warnings": []})
        if "/preupload/" in self.path:
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            return self.answer({"files": files})
        assert "/commit/" in self.path, self.path
        self.keep(body)
        return self.answer(
            {"commitUrl": f"{self.server.url}/{REPO}/commit/1", "commitOid": "1" * 40}
        )

    def keep(self, body: bytes) -> None:
        lines = [json.loads(line) for line in body.splitlines()]
        values = [(line["key"], line["value"]) for line in lines]
        self.server.commits.append(
            {v["path"]: base64.b64decode(v["content"]) for key, v in values if key == "file"}
        )
        self.server.deleted += [v["path"] for key, v in values if key == "deletedFile"]

    def answer(self, document: Any, status: int = 200) -> None:
        content = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with Hub() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_the_upload_is_one_commit_of_all_files(exported: Path, hub: Hub) -> None:
    api = HfApi(endpoint=hub.url, token="hf_test")
    url = publishing.push(exported, REPO, private=True, api=api)
    assert url == f"{hub.url}/{REPO}/commit/1"
    (commit,) = hub.commits
    files = {path for path in exported.rglob("*") if path.is_file()}
    assert commit == {path.relative_to(exported).as_posix(): path.read_bytes() for path in files}
    assert hub.deleted == ["old.fp16.safetensors"]


@pytest.mark.parametrize("call", ["/repos/create", "/preupload/main", "/commit/main"])
def test_a_refused_upload_commits_nothing_and_says_why(exported: Path, hub: Hub, call: str) -> None:
    hub.refuse = call
    api = HfApi(endpoint=hub.url, token="hf_test")
    with pytest.raises(ValueError, match=rf"^--push: the Hub refused {REPO}: .*403") as caught:
        publishing.push(exported, REPO, private=True, api=api)
    assert "hf auth login" in str(caught.value)
    assert hub.commits == []


def test_a_hub_that_is_not_reached_is_an_error(exported: Path, hub: Hub) -> None:
    hub.shutdown()
    hub.server_close()
    api = HfApi(endpoint=hub.url, token="hf_test")
    with pytest.raises(ValueError, match="--push: the Hub was not reached"):
        publishing.push(exported, REPO, private=True, api=api)


def test_without_push_nothing_leaves_the_machine(
    bundle: Path, tmp_path: Path, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    api = HfApi(endpoint=hub.url, token="hf_test")
    own = config(bundle, tmp_path / "out", repo=REPO, fp16=False)
    publishing.export(own, api)
    assert hub.calls == []
    out = capsys.readouterr().out
    assert f"nothing was uploaded; --repo {REPO} --push uploads these files in one commit" in out
    assert "  unet/diffusion_pytorch_model.safetensors  " in out
    assert "no --prompt: the card has no sample images" in out
    assert not list((tmp_path / "out").rglob("*.fp16.*"))
    assert (bundle / INFO_FILE).read_bytes() == (tmp_path / "out" / INFO_FILE).read_bytes()


def test_push_uploads_what_was_written(bundle: Path, tmp_path: Path, hub: Hub) -> None:
    api = HfApi(endpoint=hub.url, token="hf_test")
    own = config(bundle, tmp_path / "out", repo=REPO, push=True, fp16=False)
    publishing.export(own, api)
    assert len(hub.commits) == 1
    assert "README.md" in hub.commits[0]
