"""Writes a set to a repository on the Hugging Face Hub: hf://datasets/USER/NAME/FOLDER.

On the Hub each put of fsspec would be a commit, and commits are limited. So a shard's bytes are
uploaded at once, and one commit makes many shards with their reports visible together. The cost:
a process that is killed encodes the shards again that were not committed yet.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

from latent_t2i.shards.remote.transport import (
    RemoteError,
    Retry,
    error_status,
    find_filesystem,
    join,
)
from latent_t2i.shards.remote.upload import RemoteFolder, ShortWriteError

T = TypeVar("T")
Change = CommitOperationAdd | CommitOperationDelete

MAX_FILES_PER_FOLDER = 10_000
MAX_FILES_PER_COMMIT = 100
"""The Hub recommends 50 to 100."""
MAX_COMMITS_PER_HOUR = 100
"""Of all processes together; the Hub allows 128 per repository."""
COMMIT_INTERVAL_S = 300.0
"""After it, fewer files are committed too, because a killed process loses what is not."""
CONFLICTS = (409, 412, 423)
"""Statuses of a commit that another one has overtaken: it can be repeated."""


def in_repository(url: str) -> bool:
    """Returns whether a URL is a folder of a repository, which is changed by commits.

    hf://buckets/... is not: it is an object store.
    """
    return url.startswith("hf://") and not url.startswith("hf://buckets/")


class HubFolder(RemoteFolder):
    """A folder of a repository. Files are visible after a commit, several in one."""

    max_files = MAX_FILES_PER_FOLDER

    def __init__(self, url: str, retry: Retry | None = None, *, num_processes: int = 1) -> None:
        """Raises ValueError for a URL without a repository, RemoteError if it does not exist."""
        super().__init__(url, retry)
        system, path = find_filesystem(url)
        try:
            resolved = self._try("", lambda: system.resolve_path(path))
        except ValueError as error:
            raise ValueError(f"{url}: {error}") from error
        except (FileNotFoundError, NotImplementedError) as error:
            raise RemoteError(
                f"{url}: there is no such repository or branch, or the token may not see it: "
                "create it (hf repos create USER/NAME --repo-type dataset), or correct --out"
            ) from error
        self._repository = {
            "repo_id": resolved.repo_id,
            "repo_type": resolved.repo_type,
            "revision": resolved.revision,
        }
        self._folder = resolved.path_in_repo
        self._api = HfApi(endpoint=system.endpoint, token=system.token)
        self._shortest_s = 3600 * num_processes / MAX_COMMITS_PER_HOUR
        self._added: dict[str, CommitOperationAdd] = {}
        self._sizes: dict[str, int] = {}
        self._deleted: dict[str, CommitOperationDelete] = {}
        self._ends: set[str] = set()
        """Names of added files that complete a shard, so that a commit may end with them."""
        self._committed_s = time.monotonic()
        self._num_sent = 1
        """Number of commits that the last changes took; the next ones wait as often as long."""

    def put(self, name: str, path: Path) -> None:
        """Uploads a file, which may be deleted afterwards; `commit` makes it visible."""
        addition = CommitOperationAdd(self._in_repository(name), str(path))

        def upload() -> None:
            self._api.preupload_lfs_files(additions=[addition], **self._repository)

        self._change(name, upload)
        if addition.path_or_fileobj:  # small enough for git itself: sent with the commit
            addition = CommitOperationAdd(self._in_repository(name), path.read_bytes())
        self._add(name, addition, path.stat().st_size)

    def put_bytes(self, name: str, content: bytes) -> None:
        """Adds a small file to the next commit."""
        self._add(name, CommitOperationAdd(self._in_repository(name), content), len(content))

    def delete(self, name: str) -> None:
        """Deletes a file with the next commit, if it is there."""
        self._added.pop(name, None)
        if self.find(name) is not None:
            self._deleted[name] = CommitOperationDelete(self._in_repository(name))

    def delete_folder(self, name: str) -> None:
        """Deletes a folder with the next commit, if it is there."""
        if self.list(name):
            path = f"{self._in_repository(name)}/"
            self._deleted[name] = CommitOperationDelete(path, is_folder=True)

    def commit(self, *, now: bool = True) -> None:
        """Commits all changes; with `now` false, if they are many or the last commit is old.

        Files that were added between two calls are in one commit, and the deletions are in the
        last. Raises RemoteError if a file has another size afterwards.
        """
        self._ends.update([*self._added][-1:])
        num_changes = len(self._added) + len(self._deleted)
        age_s = time.monotonic() - self._committed_s
        shortest_s = self._num_sent * self._shortest_s
        are_many = num_changes >= MAX_FILES_PER_COMMIT
        wait_s = shortest_s if are_many else max(shortest_s, COMMIT_INTERVAL_S)
        if not num_changes or (not now and age_s < wait_s):
            return
        chunks = self._divide()
        for names in chunks:
            self._send_commit(names)
        self._ends.clear()
        self._committed_s, self._num_sent = time.monotonic(), len(chunks)

    def _divide(self) -> list[list[str]]:
        """Returns the changed names by commit, at most MAX_FILES_PER_COMMIT each."""
        groups: list[list[str]] = [[]]
        for name in self._added:
            groups[-1].append(name)
            if name in self._ends:
                groups.append([])
        if self._added:
            groups.pop()
        groups[-1] += self._deleted  # after the manifest: without it, reports are still needed
        chunks: list[list[str]] = [[]]
        for group in groups:
            if len(chunks[-1]) + len(group) > MAX_FILES_PER_COMMIT:
                chunks.append([])
            chunks[-1] += group
        return [
            chunk[start : start + MAX_FILES_PER_COMMIT]
            for chunk in chunks
            for start in range(0, len(chunk), MAX_FILES_PER_COMMIT)
        ]

    def _send_commit(self, names: list[str]) -> None:
        """Makes one commit, which contains the changes with these names."""
        added = [self._added[name] for name in names if name in self._added]
        message = f"Stage one: {names[0]}" + (f" and {len(names) - 1} more" if names[1:] else "")

        def send() -> None:
            # The Hub refuses to delete what another process has deleted meanwhile.
            deleted = [
                self._deleted[name]
                for name in names
                if name in self._deleted and self._is_there(name)
            ]
            operations: list[Change] = [*deleted, *added]
            if not operations:
                return
            try:
                self._api.create_commit(
                    operations=operations, commit_message=message, **self._repository
                )
            except (EntryNotFoundError, HfHubHTTPError) as error:
                is_gone = isinstance(error, EntryNotFoundError)
                if not is_gone and error_status(error) not in CONFLICTS:
                    raise
                raise OSError(f"another commit was first: {error}") from error

        self._change("", send)
        self._check_sizes(added)
        for name in names:
            if name in self._added:
                del self._sizes[self._added.pop(name).path_in_repo]
            self._deleted.pop(name, None)

    def _is_there(self, name: str) -> bool:
        if self._deleted[name].is_folder:
            return bool(self.list(name))
        return self.find(name) is not None

    def _in_repository(self, name: str) -> str:
        return f"{self._folder}/{name}" if self._folder else name

    def _add(self, name: str, addition: CommitOperationAdd, size: int) -> None:
        self._deleted.pop(name, None)
        self._added[name] = addition
        self._sizes[addition.path_in_repo] = size

    def _check_sizes(self, added: list[CommitOperationAdd]) -> None:
        paths = [addition.path_in_repo for addition in added]
        if not paths:
            return
        infos = self._try("", lambda: self._api.get_paths_info(paths=paths, **self._repository))
        found = {info.path: getattr(info, "size", None) for info in infos}
        for path in paths:
            if found.get(path) != self._sizes[path]:
                raise ShortWriteError(
                    f"{self.url}: {path} in the repository: expected {self._sizes[path]} bytes, "
                    f"found {found.get(path, 'no file')}: look for it in .gitignore"
                )

    def _change(self, name: str, action: Callable[[], T]) -> T:
        try:
            return self._try(name, action)
        except FileNotFoundError as error:
            raise RemoteError(
                f"{join(self.url, name) if name else self.url}: there is no such repository or "
                "branch: create it, or correct --out"
            ) from error
