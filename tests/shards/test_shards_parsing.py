"""Parsing: damaged, malicious and mutated documents give a FormatError and never another error."""

import copy
import gzip
import http.server
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from latent_t2i.shards import parsing
from latent_t2i.shards.access import Access, open_set
from latent_t2i.shards.parsing import FormatError, from_json, load_json
from latent_t2i.shards.schema import Manifest, hash_json
from latent_t2i.shards.summary import summarise
from latent_t2i.shards.verify import verify
from latent_t2i.shards.writer import (
    ShardWriter,
    begin_set,
    finish_set,
    keep_text_scale,
    read_report,
    read_text_scale,
)
from tests.servers import QUICK, serve
from tests.shard_sets import (
    edit_json,
    layout_of,
    make_examples,
    make_fields,
    make_provenance,
    make_scale,
    update_hash,
    write_buckets,
    write_set,
)

NUM_MUTATIONS = {"manifest.json": 700, "buckets.json": 700}  # and 200 of each other document
VALUES: list[Any] = [
    None,
    True,
    -1,
    0,
    1.5,
    2**70,
    float("nan"),
    float("inf"),
    "",
    "\x1b[31mred",
    "\ud800",
    "../up",
    [],
    [[1]],
    {},
    {"a": {"b": [None]}},
]


@dataclass(frozen=True, kw_only=True)
class Inner:
    ratio: float
    sizes: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Outer:
    name: str
    kind: Literal["a", "b"]
    inner: Inner | None
    settings: dict[str, str | int | list[int]]


GOOD: dict[str, Any] = {
    "name": "x",
    "kind": "a",
    "inner": {"ratio": 1, "sizes": [1, 2]},
    "settings": {"s": "t", "n": 1, "l": [3]},
}


def test_from_json_round_trips() -> None:
    found = from_json(Outer, GOOD, "f")
    assert found.inner == Inner(ratio=1.0, sizes=(1, 2))
    assert json.loads(json.dumps(asdict(found))) == GOOD
    assert from_json(Outer, GOOD | {"inner": None}, "f").inner is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": 1}, "f: name: expected text, found 1"),
        ({"name": "\ud800"}, "f: name: expected text, found '"),
        ({"kind": "c"}, "f: kind: expected 'a' or 'b', found 'c'"),
        ({"kind": []}, "f: kind: expected 'a' or 'b', found []"),
        ({"inner": 3}, "f: inner: expected a JSON object, found 3"),
        (
            {"inner": {"ratio": True, "sizes": []}},
            "f: inner.ratio: expected a finite number, found",
        ),
        ({"inner": {"ratio": float("nan"), "sizes": []}}, "f: inner.ratio: expected a finite"),
        ({"inner": {"ratio": 1.0, "sizes": [1, "2"]}}, "f: inner.sizes[1]: expected an integer"),
        ({"inner": {"ratio": 1.0, "sizes": 2}}, "f: inner.sizes: expected a list, found 2"),
        ({"inner": {"ratio": 1.0}}, "f: inner: missing key 'sizes'"),
        ({"more": 1}, "f: unknown key 'more'"),
        ({"settings": {"n": None}}, "f: settings.n: expected text, found None"),
        ({"settings": {"n": 2**64}}, "f: settings.n: expected an integer, found 1844674407370955"),
    ],
)
def test_from_json_names_the_place(change: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatError) as raised:
        from_json(Outer, GOOD | change, "f")
    assert str(raised.value).startswith(message)


def test_json_nested_too_deeply_is_rejected() -> None:
    with pytest.raises(FormatError, match=r"^f: JSON nested too deeply"):
        load_json(b"[" * 10**6, "f")


def test_values_nested_near_the_recursion_limit_are_rejected(tmp_path: Path) -> None:
    write_set(tmp_path / "set", [make_examples(1)])
    path = tmp_path / "set" / "manifest.json"
    path.chmod(0o644)
    for depth in range(850, 1000, 3):
        nested = "[" * depth + "]" * depth
        path.write_text(f'{{"schema_version": 3, "vae": {nested}}}')
        with pytest.raises(FormatError):
            open_set(str(path.parent), Access(kind="map"))


def test_control_characters_are_escaped_in_messages(tmp_path: Path) -> None:
    write_set(tmp_path / "set", [make_examples(1)])
    path = tmp_path / "set" / "manifest.json"
    edit_json(path, lambda d: d["vae"].update(name="\x1b]0;owned\x07\nnext"))
    with pytest.raises(FormatError) as raised:
        open_set(str(path.parent), Access(kind="map"), vae_sha256="0" * 64)
    assert str(raised.value).isprintable()
    assert all(line.isprintable() for line in summarise(path.parent, num_sample=1, num_captions=1))


@pytest.mark.parametrize("name", ["x;touch y", "$(id).npy", ".hidden", "a/b", "", "manifest.json"])
@pytest.mark.parametrize("entry", ["shard_table", "empty_text"])
def test_bad_file_names_are_rejected_before_any_download(
    tmp_path: Path, name: str, entry: str
) -> None:
    write_set(tmp_path / "set", [make_examples(1)])

    def change(document: dict[str, Any]) -> None:
        document[entry]["name"] = name

    edit_json(tmp_path / "set" / "manifest.json", change)
    with serve(tmp_path / "set") as server, pytest.raises(FormatError, match="unique file names"):
        access = Access(kind="cache", cache_dir=tmp_path / "cache")
        open_set(server.url, access, retry=QUICK)
    assert server.asked == ["manifest.json"]


def test_large_documents_are_rejected_unparsed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_set(tmp_path / "set", [make_examples(1)])
    monkeypatch.setattr(parsing, "MAX_DOCUMENT_BYTES", 1000)
    monkeypatch.setattr(json, "loads", lambda content: 1 / 0)
    with pytest.raises(FormatError, match=r"manifest\.json: expected at most 1000 bytes"):
        open_set(str(tmp_path / "set"), Access(kind="map"))


class EndlessHandler(http.server.BaseHTTPRequestHandler):
    """Responds with a gzip-compressed document that never ends."""

    def log_message(self, *args: Any) -> None:
        """Suppresses the log."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Encoding", "gzip")
        self.end_headers()
        chunk = gzip.compress(b" " * 10**6)
        try:
            while True:
                self.wfile.write(chunk)
        except OSError:
            pass  # the client has closed the connection


def test_endless_compressed_response_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parsing, "MAX_DOCUMENT_BYTES", 10**7)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), EndlessHandler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}"
        with pytest.raises(FormatError, match="expected at most 10000000 bytes"):
            open_set(url, Access(kind="stream"), retry=QUICK)
        server.shutdown()


def containers(document: Any) -> Iterator[Any]:
    """Yields all objects and lists of a document."""
    if isinstance(document, dict | list):
        yield document
        for item in document.values() if isinstance(document, dict) else document:
            yield from containers(item)


def mutate(document: Any, rng: np.random.Generator) -> None:
    """Changes, removes, adds or swaps one value anywhere in a document."""
    found = [part for part in containers(document) if part]
    part = found[rng.integers(len(found))]
    keys = list(part) if isinstance(part, dict) else list(range(len(part)))
    key, other = (keys[rng.integers(len(keys))] for _ in range(2))
    value = copy.deepcopy(VALUES[rng.integers(len(VALUES))])
    match rng.integers(6):
        case 0 | 1:
            part[key] = value
        case 2:
            del part[key]
        case 3 if isinstance(part, dict):
            part["\x1bnew"] = value
        case 3:
            part.append(copy.deepcopy(part[key]))
        case 4:
            part[key], part[other] = part[other], part[key]
        case _ if type(part[key]) is int:
            part[key] += int(rng.integers(-2, 3))
        case _:
            part[key] = str(part[key])[::-1]


def spoil(content: bytes, rng: np.random.Generator) -> bytes:
    """Overwrites, removes or repeats some bytes."""
    start, end = sorted(rng.integers(0, len(content), 2).tolist())
    match rng.integers(4):
        case 0:
            return content[:end]
        case 1:
            return content[:start] + content[end:]
        case 2:
            return content[:end] + content[start:]
        case _:
            return content[:start] + rng.bytes(1) + content[start + 1 :]


def mutations(content: bytes, num: int, *, is_hashed: bool) -> Iterator[bytes]:
    """Yields changed documents; most have a matching hash, some are changed byte by byte."""
    for seed in range(num):
        rng = np.random.default_rng(seed)
        if seed % 5 == 0:
            yield spoil(content, rng)
            continue
        document = json.loads(content)
        for _ in range(rng.integers(1, 3)):
            mutate(document, rng)
        if is_hashed:
            document.pop("sha256", None)
            document["sha256"] = hashlib_or_none(document)
        yield json.dumps(document).encode()


def hashlib_or_none(document: dict[str, Any]) -> str | None:
    try:
        return hash_json(document)
    except ValueError:
        return None  # NaN


def use(folder: Path) -> None:
    """Opens, reads, verifies and describes a set."""
    num_faults = len(list(verify(folder)))
    try:
        shards = open_set(str(folder), Access(kind="map"))
        if isinstance(shards.manifest, Manifest):
            shards.keys(np.array([0]))
        list(summarise(folder, num_sample=2, num_captions=1))
    except FormatError as error:
        assert num_faults
        assert str(error).isprintable()


def assert_format_errors_only(
    root: Path, name: str, action: Callable[[], object], *, is_hashed: bool = True
) -> None:
    path = root / name
    content = path.read_bytes()
    path.chmod(0o644)
    num = NUM_MUTATIONS.get(path.name, 200)
    for number, changed in enumerate(mutations(content, num, is_hashed=is_hashed)):
        path.write_bytes(changed)
        try:
            action()
        except ValueError as error:
            assert type(error) in (FormatError, ValueError), f"mutation {number}: {error!r}"
            assert str(root) in str(error) and str(error).isprintable()
        except Exception as error:  # noqa: BLE001 - reports the number of the mutation
            pytest.fail(f"mutation {number}: {error!r}: {changed[:3000]!r}")
    path.write_bytes(content)


def test_mutated_manifests(tmp_path: Path) -> None:
    fields = make_fields()
    write_set(
        tmp_path / "set",
        [make_examples(n, text_dtype="int8", seed=n, fields=fields) for n in (2, 1)],
        make_provenance(text_dtype="int8", fields=fields),
        quarantined={"bad": "not an image"},
        field_scales={"clip": np.ones(6, np.float32)},
    )
    assert_format_errors_only(tmp_path, "set/manifest.json", lambda: use(tmp_path / "set"))
    use(tmp_path / "set")


def test_mutated_lists_of_buckets(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    write_buckets(folder, {"64x64": (2,), "128x32": (1,)}, quarantined={"bad": "not an image"})
    assert_format_errors_only(tmp_path, "set/buckets.json", lambda: use(folder))


def test_mutated_progress(tmp_path: Path) -> None:
    examples = make_examples(2, text_dtype="int8")
    provenance = make_provenance(text_dtype="int8")
    folder = tmp_path / "set"
    begin_set(folder, provenance)
    keep_text_scale(folder, make_scale())
    with ShardWriter(folder, 0, layout_of(examples), "moments") as shard:
        for example in examples:
            shard.write(example)

    def finish() -> None:
        copied = shutil.copytree(folder, tmp_path / "copy", dirs_exist_ok=True)
        try:
            begin_set(copied, provenance)
            read_report(copied, 0)
            finish_set(
                copied,
                provenance,
                num_shards=1,
                quarantined={},
                empty_text=examples[0].text[0].astype(np.float16),
                empty_tokens=examples[0].tokens[0],
                text_scale=read_text_scale(copied),
            )
        finally:
            shutil.rmtree(copied)

    for name in ("shard-000000.json", "provenance.json", "text_scale.json"):
        assert_format_errors_only(tmp_path, f"set/progress/{name}", finish, is_hashed=False)
    finish()


@pytest.mark.parametrize("name", ["shards.npy", "shard_sums.npy", "quarantine.jsonl"])
def test_mutated_files_that_the_manifest_hashes(tmp_path: Path, name: str) -> None:
    """Both random bytes and extreme values; the hashes match."""
    folder = tmp_path / "set"
    shards = [make_examples(2), make_examples(1, seed=1)]
    write_set(folder, shards, quarantined={"a": "not an image", "b": "truncated file"})
    content = (folder / name).read_bytes()
    for seed in range(60):
        rng = np.random.default_rng(seed)
        changed = bytearray(spoil(content, rng))
        if seed % 2:
            changed = bytearray(content)
            place = int(rng.integers(len(content) - 8))
            changed[place : place + 8] = rng.choice([b"\xff", b"\0", b"\x80"]) * 8
        (folder / name).write_bytes(changed)
        update_hash(folder, name)
        use(folder)
