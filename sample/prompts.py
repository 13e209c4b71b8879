"""Prompts from the command line and from files, as the list of pictures to draw."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from latent_t2i.model.checks import check_number
from latent_t2i.model.paths import find_path
from latent_t2i.sample.config import SEED_LIMIT, SampleConfig, check_text, settings_from
from latent_t2i.sample.folder import Picture

MAX_TEXT_BYTES = 2**30
"""Larger text files are refused, so that a wrong file does not fill the memory."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A prompt, and what its line of a file says about its pictures."""

    text: str
    seed: int | None = None
    settings: dict[str, Any] = field(default_factory=dict)


def list_pictures(config: SampleConfig) -> list[Picture]:
    """Returns `num_images` pictures per prompt, in order.

    Picture number n has seed + n; a prompt with a seed of its own starts there.
    """
    prompts = read_prompts(config)
    chosen = config.draw_settings()
    pictures: list[Picture] = []
    for prompt in prompts:
        settings = chosen
        if prompt.settings:
            settings = settings_from(
                asdict(chosen) | prompt.settings, f"prompt {prompt.text!r:.80}"
            )
        for number in range(config.num_images):
            seed = config.seed + len(pictures) if prompt.seed is None else prompt.seed + number
            pictures.append(Picture(prompt=prompt.text, seed=seed, settings=settings))
    return pictures


def read_prompts(config: SampleConfig) -> list[Prompt]:
    """Returns the prompts of `prompts` and then those of `prompt_file`."""
    prompts = [Prompt(text=text) for text in config.prompts]
    if config.prompt_file is not None:
        path = find_path(config.prompt_file)
        if path is None:
            raise ValueError(
                f"--prompt-file: no file {config.prompt_file!r} in the current directory or the "
                "project"
            )
        try:
            prompts += _read_file(path, config)
        except ValueError as error:
            raise ValueError(f"--prompt-file: {error}") from error
    if not prompts:
        raise ValueError("--prompt: no prompts; give --prompt, --prompt-file or a preset with some")
    return prompts


def _read_file(path: Path, config: SampleConfig) -> Iterable[Prompt]:
    """Returns the prompts of a file, whose kind its ending tells."""
    text = read_text(path)
    if path.suffix.lower() == ".json":
        return choose_captions(text, path, num=config.num_prompts, seed=config.prompt_seed)
    lines = [(number, line.strip()) for number, line in enumerate(text.split("\n"), 1)]
    lines = [(number, line) for number, line in lines if line]
    if path.suffix.lower() == ".jsonl":
        return [_read_line(line, f"{path}: line {number}") for number, line in lines]
    return [Prompt(text=line) for _, line in lines]


def _read_line(line: str, where: str) -> Prompt:
    """Returns the prompt of a line of JSON; raises ValueError if it is not one."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not valid JSON: {error}") from error
    if not isinstance(record, dict) or not isinstance(record.get("prompt"), str):
        raise ValueError(f'{where}: expected an object with a text "prompt", found {line:.80}')
    text, seed = record.pop("prompt"), record.pop("seed", None)
    check_text(f"{where}: prompt", text)
    if seed is not None:
        check_number(f"{where}: seed", seed, least=0, below=SEED_LIMIT, whole=True)
    if "guide" in record:
        raise ValueError(f"{where}: guide: one bundle guides all pictures; expected --guide")
    settings_from(record, where)
    return Prompt(text=text, seed=seed, settings=record)


def choose_captions(text: str, path: Path, *, num: int | None, seed: int) -> list[Prompt]:
    """Returns one caption each of `num` images of a COCO captions file, or of all images.

    The order of the images, and the caption of each, is that of a hash of the seed and the ids. So
    it depends on no library, and fewer prompts are the first ones of more. Raises ValueError for
    another file, or for more prompts than images.
    """
    captions: dict[int, dict[int, str]] = {}
    for image_id, caption_id, caption in _annotations(text, path):
        captions.setdefault(image_id, {})[caption_id] = caption
    if num is not None and num > len(captions):
        raise ValueError(
            f"{path}: {len(captions)} images with captions, found --num-prompts {num}; expected at "
            "most that many"
        )
    images = sorted(captions, key=lambda image: _hash(seed, image))[:num]
    return [
        Prompt(text=min(captions[image].items(), key=lambda item: _hash(seed, image, item[0]))[1])
        for image in images
    ]


def _hash(*numbers: int) -> bytes:
    return hashlib.sha256(" ".join(map(str, numbers)).encode()).digest()


def _annotations(text: str, path: Path) -> Iterator[tuple[int, int, str]]:
    """Yields image id, caption id and caption of each annotation that is not blank."""
    try:
        document = json.loads(text)
        annotations = document["annotations"]
        rows = [(row["image_id"], row["id"], row["caption"]) for row in annotations]
    except (ValueError, RecursionError, TypeError, LookupError) as error:
        raise ValueError(
            f"{path}: expected COCO captions with annotations of image_id, id and caption, found "
            f"something else ({type(error).__name__}: {error})"
        ) from error
    for image_id, caption_id, caption in rows:
        valid = isinstance(image_id, int) and isinstance(caption_id, int)
        if not valid or not isinstance(caption, str):
            raise ValueError(
                f"{path}: annotation {caption_id!r:.40}: expected whole numbers as ids and a text "
                f"as caption, found {caption!r:.80}"
            )
        check_text(f"{path}: annotation {caption_id}", caption)
        if caption := " ".join(caption.split()):
            yield image_id, caption_id, caption


def read_text(path: Path) -> str:
    """Returns the content of a UTF-8 file; raises ValueError if it is not one, or is too large."""
    # A FIFO would block, and a device would never end.
    if not path.is_file():
        raise ValueError(f"{path} is not a regular file")
    num_bytes = path.stat().st_size
    if num_bytes > MAX_TEXT_BYTES:
        raise ValueError(f"{path} has {num_bytes:,} bytes, expected at most {MAX_TEXT_BYTES:,}")
    try:
        return path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}") from error
