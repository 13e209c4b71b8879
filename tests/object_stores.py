"""Stores on the local disk behind URLs, with faults: `store:///FOLDER`, and the Hub."""

import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem
from huggingface_hub import CommitOperationAdd, CommitOperationDelete
from huggingface_hub.errors import HfHubHTTPError

HUB_MAX_FILES = 100
"""Files per commit; the Hub recommends 50 to 100."""
HUB_LFS_BYTES = 5000
"""Larger files are uploaded before their commit; smaller ones with it."""


class Store(LocalFileSystem):  # type: ignore[misc]
    """Puts are not atomic: one that fails leaves the first half of the file."""

    protocol = "store"
    faults: ClassVar[list[str]] = []
    """Faults of the next puts of files: "half" fails after one half, "short" does not fail, "" is
    none; one that ends in "..." is kept."""

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(super()._strip_protocol(str(path).removeprefix("store://")))

    def put_file(self, lpath: str, rpath: str, **kwargs: Any) -> None:
        fault = next(iter(self.faults), "")
        if not fault.endswith("..."):
            del self.faults[:1]
        content = Path(lpath).read_bytes()
        if fault:
            content = content[: len(content) // 2]
        Path(rpath).write_bytes(content)
        if fault.startswith("half"):
            raise ConnectionResetError("connection reset by the store")


fsspec.register_implementation("store", Store, clobber=True)


class Hub(LocalFileSystem):  # type: ignore[misc]
    """Reads repositories, which are folders; only commits change them."""

    protocol = "hf"
    cachable = False
    root: ClassVar[Path]
    endpoint = token = None

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(path).replace("hf://datasets", str(cls.root))

    def resolve_path(self, path: str) -> Any:
        user, name, *rest = Path(path).relative_to(self.root).parts
        if not (self.root / user / name).is_dir():
            raise FileNotFoundError(path)
        return SimpleNamespace(
            repo_id=f"{user}/{name}",
            repo_type="dataset",
            revision="main",
            path_in_repo="/".join(rest),
        )

    def put_file(self, *args: Any, **kwargs: Any) -> None:
        raise AssertionError("on the Hub each put is a commit")

    pipe_file = rm_file = rm = put_file


class HubApi:
    """The part of `HfApi` that changes repositories."""

    commits: ClassVar[list[list[str]]] = []
    """The paths of each commit."""
    statuses: ClassVar[list[int]] = []
    """HTTP statuses of the next commits, which fail unless it is 200."""
    uploads: ClassVar[dict[str, bytes]] = {}
    num_uploads: ClassVar[int] = 10**9
    """Number of uploads that succeed; the next one fails like a killed process."""

    def __init__(self, endpoint: None, token: None) -> None:
        pass

    def preupload_lfs_files(self, additions: list[CommitOperationAdd], **repository: str) -> None:
        for addition in additions:
            content = Path(str(addition.path_or_fileobj)).read_bytes()
            if len(content) > HUB_LFS_BYTES:
                if len(self.uploads) == HubApi.num_uploads:
                    raise KeyboardInterrupt
                self.uploads[addition.path_in_repo] = content
                addition.path_or_fileobj = b""

    def create_commit(
        self, *, operations: Iterable[Any], commit_message: str, repo_id: str, **repository: str
    ) -> None:
        if (status := self.statuses.pop(0) if self.statuses else 200) != 200:
            # The client behind the package, and so its class of responses, depends on the version.
            response: Any = SimpleNamespace(status_code=status, headers={}, request=None)
            raise HfHubHTTPError("a commit has happened since", response=response)
        operations = list(operations)
        assert 1 <= len(operations) <= HUB_MAX_FILES
        self.commits.append([operation.path_in_repo for operation in operations])
        for operation in operations:
            path = Hub.root / repo_id / operation.path_in_repo
            if isinstance(operation, CommitOperationDelete):
                shutil.rmtree(path) if operation.is_folder else path.unlink()
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            content = self.uploads.get(operation.path_in_repo, operation.path_or_fileobj)
            assert isinstance(content, bytes)  # a local path may be gone
            path.write_bytes(content)

    def get_paths_info(self, *, paths: list[str], repo_id: str, **repository: str) -> list[Any]:
        there = {path: Hub.root / repo_id / path for path in paths}
        return [
            SimpleNamespace(path=path, size=file.stat().st_size)
            for path, file in there.items()
            if file.is_file()
        ]


def install_hub(root: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Replaces the Hub by folders below `root`; returns the URL of a folder of a repository."""
    (root / "me/set").mkdir(parents=True)
    (root / "me/set/README.md").write_text("a dataset\n")
    monkeypatch.setattr(Hub, "root", root, raising=False)
    for name in ("commits", "statuses"):
        monkeypatch.setattr(HubApi, name, [])
    monkeypatch.setattr(HubApi, "uploads", {})
    monkeypatch.setitem(sys.modules["fsspec.registry"]._registry, "hf", Hub)
    monkeypatch.setattr("latent_t2i.pipeline.hub.HfApi", HubApi)
    return "hf://datasets/me/set/train"
