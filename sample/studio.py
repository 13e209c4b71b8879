"""What the page does, without the page: finds bundles, keeps one loaded, draws with previews.

Images are drawn one by one, so that each appears as soon as it is finished. The drawing runs in a
thread, and its progress arrives as an iterator; closing the iterator stops the drawing at its next
step. One image is drawn at a time, whatever the number of visitors.
"""

import queue
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from time import monotonic
from typing import Any

from PIL import Image
from torch import Tensor

from latent_t2i.model.bundle import find_bundle
from latent_t2i.model.paths import output_root
from latent_t2i.sample import sampler
from latent_t2i.sample.config import DrawSettings, DtypeName, check_text
from latent_t2i.sample.editing import describe_edit, edit_image, read_image, read_mask
from latent_t2i.sample.folder import describe_computation, save_whole
from latent_t2i.sample.latent_preview import fit_latent_to_rgb, preview
from latent_t2i.sample.pictures import SHIPPED_BUNDLE, describe_bundle
from latent_t2i.sample.settings import AppConfig, EditConfig
from latent_t2i.sample.stock import OnStep, output_size

HEARTBEAT_S = 0.5
"""Longest time without an event."""
MIN_PREVIEW_S = 0.1
"""Shortest time between two previews: each is a message to the browser."""


@dataclass(frozen=True, kw_only=True)
class Waiting:
    """Nothing to see yet."""

    reason: str = ""
    """Empty if it has not changed."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """A step of an unfinished image."""

    number: int
    """Index of the image in its request."""
    step: int
    """Steps done so far."""
    num_steps: int
    picture: Image.Image
    """What the latents show, approximately."""


@dataclass(frozen=True, kw_only=True)
class Finished:
    """A finished image."""

    number: int
    picture: Image.Image
    path: Path
    """Its PNG, with its settings."""


Event = Waiting | Progress | Finished
Emit = Callable[[Event], None]


class Stopped(Exception):
    """Raised in the drawing thread when nobody waits for its images any more."""


@dataclass(eq=False, kw_only=True)
class _Loaded:
    key: tuple[object, ...]
    pipeline: Any
    matrix: Tensor  # (C + 1, 3)
    identity: dict[str, Any]


class Studio:
    """One loaded bundle and the folder of the finished images."""

    def __init__(self, config: AppConfig) -> None:
        self.config = config
        self.out = (Path(config.out) if config.out else output_root() / "runs/page").absolute()
        self._lock = threading.Lock()
        self._loaded: _Loaded | None = None

    def bundles(self) -> dict[str, Path]:
        """Returns the bundles of this machine by name: --bundle, then runs, then the shipped one.

        Runs come newest first. The page offers these only, so that no visitor opens another folder.
        """
        runs = output_root() / "runs"
        found = [path.parent for path in runs.glob("*/bundle*/model_index.json")]
        found.sort(key=lambda folder: (folder / "model_index.json").stat().st_mtime, reverse=True)
        own = [] if self.config.bundle is None else [find_bundle(self.config.bundle)]
        return {
            short_name(folder): folder for folder in [*own, *found, find_bundle(SHIPPED_BUNDLE)]
        }

    def find(self, bundle: str) -> Path:
        """Returns the folder of a bundle's name; raises ValueError if it is not on this machine."""
        folders = self.bundles()
        if bundle not in folders:
            raise ValueError(
                f"bundle: found {bundle!r:.200}, which is not in runs/ any more; reload the page "
                "and choose another"
            )
        return folders[bundle]

    def draw(
        self,
        bundle: str,
        prompt: str,
        images: Sequence[tuple[int, DrawSettings]],
        stop: threading.Event | None = None,
    ) -> Generator[Event]:
        """Yields previews and images of a prompt, one image per pair of seed and settings.

        It ends early when `stop` is set.
        """
        check_text("prompt", prompt)
        folder = self.find(bundle)
        return _in_thread(lambda emit: self._draw(folder, prompt, images, emit), stop)

    def edit(
        self, prompt: str, config: EditConfig, stop: threading.Event | None = None
    ) -> Generator[Event]:
        """Yields previews and changed images of the settings' image; the bundle is a name."""
        assert config.init_image is not None
        check_text("prompt", prompt)
        folder = self.find(config.bundle)
        original = read_image(Path(config.init_image), "image")
        mask = None if config.mask is None else read_mask(config.mask, original.size)
        return _in_thread(
            lambda emit: self._edit(folder, prompt, original, mask, config, emit), stop
        )

    def _draw(
        self,
        folder: Path,
        prompt: str,
        images: Sequence[tuple[int, DrawSettings]],
        emit: Emit,
    ) -> None:
        with self._turn(emit):
            loaded = self._load(folder, self.config.dtype)
            for number, (seed, settings) in enumerate(images):
                size = output_size(loaded.pipeline, settings.size)
                on_step = _emitter(loaded, number, settings.num_steps, size, emit)
                values = asdict(settings)
                (picture,) = sampler.draw(
                    loaded.pipeline, [prompt], [seed], on_step=on_step, **values
                )
                own = {"prompt": prompt, "seed": seed} | values | loaded.identity
                emit(self._save(number, picture, own))

    def _edit(
        self,
        folder: Path,
        prompt: str,
        original: Image.Image,
        mask: Image.Image | None,
        config: EditConfig,
        emit: Emit,
    ) -> None:
        with self._turn(emit):
            # A stock pipeline runs the VAE in the same data type, in which it must not overflow.
            dtype = "float32" if self.config.dtype in ("auto", "float16") else self.config.dtype
            loaded = self._load(folder, dtype)
            size = output_size(loaded.pipeline, config.size)
            settings = describe_edit(config) | loaded.identity
            for number in range(config.num_images):
                pair = (prompt, config.seed + number)
                on_step = _emitter(loaded, number, config.num_steps, size, emit)
                (picture,) = edit_image(
                    loaded.pipeline, original, mask, [pair], config=config, on_step=on_step
                )
                own = dict(zip(("prompt", "seed"), pair, strict=True)) | settings
                emit(self._save(number, picture, own))

    @contextmanager
    def _turn(self, emit: Emit) -> Iterator[None]:
        """Waits until no other request is drawn."""
        if self._lock.locked():
            emit(Waiting(reason="Waiting for another picture ..."))
        with self._lock:
            emit(Waiting(reason="Loading ..."))
            yield

    def _load(self, folder: Path, dtype: DtypeName) -> _Loaded:
        device = sampler.choose_device(self.config.device)
        if dtype == "auto" and device == "cpu":
            dtype = "float32"
        key = (folder, dtype, _stamp(folder))
        if self._loaded is None or self._loaded.key != key:
            self._loaded = None  # frees the memory before the next bundle needs it
            pipeline = sampler.load(folder, device=device, dtype=dtype)
            self._loaded = _Loaded(
                key=key,
                pipeline=pipeline,
                matrix=fit_latent_to_rgb(pipeline.vae),
                # Pictures are drawn one by one.
                identity=describe_bundle(folder) | describe_computation(pipeline, batch_size=1),
            )
        return self._loaded

    def _save(self, number: int, picture: Image.Image, settings: dict[str, Any]) -> Finished:
        self.out.mkdir(parents=True, exist_ok=True)
        taken = [int(path.stem) for path in self.out.glob("[0-9]*.png") if path.stem.isdigit()]
        path = self.out / f"{max(taken, default=-1) + 1:06d}.png"
        save_whole(picture, path, settings)
        return Finished(number=number, picture=picture, path=path)


def _stamp(folder: Path) -> tuple[object, ...]:
    """Returns what changes when a bundle is replaced by that of a later training."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    states = [(path, path.stat()) for path in files]
    return tuple((path, state.st_size, state.st_mtime_ns, state.st_ino) for path, state in states)


def parse_scales(text: str) -> list[float]:
    """Returns the guidance scales of a text such as "1, 2, 4, 7"; raises ValueError otherwise."""
    try:
        scales = [float(part) for part in text.replace(",", " ").split()]
    except ValueError:
        scales = []
    if not 1 <= len(scales) <= 16:
        raise ValueError(
            f"guidance scales: expected 1 to 16 numbers, such as 1, 2, 4, 7, found {text!r:.80}"
        )
    return scales


def _emitter(
    loaded: _Loaded,
    number: int,
    num_steps: int,
    size: tuple[int, int],
    emit: Emit,
) -> OnStep:
    """Returns a step callback that sends previews, not too many of them."""
    last = 0.0

    def on_step(step: int, latents: Tensor) -> None:
        nonlocal last
        if step > 1 and monotonic() - last < MIN_PREVIEW_S:
            return
        picture = preview(latents[0], loaded.matrix, size)
        # Samplers of second order call this twice per step.
        total = max(step, num_steps)
        emit(Progress(number=number, step=step, num_steps=total, picture=picture))
        last = monotonic()

    return on_step


def short_name(folder: Path) -> str:
    """Returns a folder's path, relative to the project if it is inside."""
    path, root = folder.resolve(), output_root().resolve()
    return str(path.relative_to(root)) if path.is_relative_to(root) else str(path)


def _in_thread(work: Callable[[Emit], None], stop: threading.Event | None) -> Generator[Event]:
    """Runs `work` in a thread and yields what it emits; raises what it raises.

    If nothing is emitted, it yields Waiting from time to time, so that it notices `stop` and can be
    closed. It then ends, and the next `emit` raises Stopped in the thread. Closing does not wait
    for that, because the page's server closes it in its event loop.
    """
    items: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
    ended = threading.Event() if stop is None else stop

    def emit(item: Event) -> None:
        if ended.is_set():
            raise Stopped
        items.put(item)

    pool = ThreadPoolExecutor(max_workers=1)
    future = pool.submit(work, emit)
    pool.shutdown(wait=False)  # the thread ends with its work
    future.add_done_callback(lambda _: items.put(None))
    try:
        while not ended.is_set() and (item := _next(items)) is not None:
            yield item
    except GeneratorExit:
        ended.set()
        raise
    if not ended.is_set():
        future.result()


def _next(items: "queue.SimpleQueue[Event | None]") -> Event | None:
    try:
        return items.get(timeout=HEARTBEAT_S)
    except queue.Empty:
        return Waiting()
