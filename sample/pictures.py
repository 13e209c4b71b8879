"""`sample.run`: writes one PNG per prompt and seed, and one labelled grid."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from latent_t2i.model.bundle import digest, find_bundle
from latent_t2i.model.grid import labelled_grid, read_settings, save_png
from latent_t2i.model.paths import find_path, output_root
from latent_t2i.sample import sampler
from latent_t2i.sample.config import SampleConfig

SHIPPED_BUNDLE = "scenes/bundle"
MAX_TEXT_BYTES = 2**30
"""Larger text files are refused, so that a wrong file does not fill the memory."""


def sample(config: SampleConfig) -> Path:
    """Generates an image for every prompt; returns the path of the grid.

    Raises ValueError if there is no bundle or no prompt.
    """
    folder = choose_bundle(config.bundle, config.name)
    prompts = [p for p in read_prompts(config) for _ in range(config.images_per_prompt)]
    seeds = [config.seed + number for number in range(len(prompts))]
    settings: dict[str, Any] = {
        "guidance_scale": config.guidance_scale,
        "num_steps": config.num_steps,
        "scheduler": config.scheduler,
    }
    pipeline = sampler.load(folder, device=config.device, dtype=config.dtype)
    identity = describe_bundle(folder)
    images = sampler.draw(pipeline, prompts, seeds, batch_size=config.batch_size, **settings)
    out = Path(config.out) if config.out else output_root() / "runs" / (config.name or "samples")
    (out / "samples").mkdir(parents=True, exist_ok=True)
    paths = [out / "samples" / f"{number:04d}.png" for number in range(len(images))]
    for path, image, prompt, seed in zip(paths, images, prompts, seeds, strict=True):
        save_png(image, path, {"prompt": prompt, "seed": seed} | settings | identity)
    _remove_older(out / "samples", set(paths))
    grid = out / "samples.png"
    save_png(labelled_grid(images, prompts), grid, {"prompts": prompts} | settings | identity)
    print(f"{len(images)} images from {folder}: {grid}")
    return grid


def choose_bundle(bundle: str | None, name: str | None) -> Path:
    """Returns the given bundle, else that of the named run; the shipped one if both are None."""
    if bundle is not None:
        return find_bundle(bundle)
    if name is None:
        print(f"no --bundle and no run name: using the shipped {SHIPPED_BUNDLE}")
        return find_bundle(SHIPPED_BUNDLE)
    own = output_root() / "runs" / name / "bundle"
    if not own.exists():
        raise ValueError(
            f"--bundle: {own} does not exist; train it with train/run.py, or give the folder of "
            f"another bundle, such as {SHIPPED_BUNDLE}"
        )
    return find_bundle(own)


def describe_bundle(folder: Path) -> dict[str, str]:
    """Returns the bundle's path, relative to the project if it is inside, and its sha256."""
    path, root = folder.resolve(), output_root().resolve()
    name = path.relative_to(root) if path.is_relative_to(root) else path
    return {"bundle": str(name), "bundle_sha256": digest(folder)}


def _remove_older(folder: Path, keep: Collection[Path]) -> None:
    """Removes the numbered images of an earlier call, which would look like results of this one."""
    older = [path for path in sorted(folder.glob("[0-9]*.png")) if path not in keep]
    removed = [path for path in older if _has_settings(path)]
    for path in removed:
        path.unlink()
    if removed:
        print(f"removed {len(removed)} images of an earlier call from {folder}")


def _has_settings(path: Path) -> bool:
    try:
        read_settings(path)
    except (ValueError, OSError):
        return False
    return True


def read_prompts(config: SampleConfig) -> list[str]:
    """Returns the prompts of `prompts` and then those of `prompt_file`."""
    prompts = list(config.prompts)
    if config.prompt_file is not None:
        path = find_path(config.prompt_file)
        if path is None:
            raise ValueError(
                f"--prompt-file: no file {config.prompt_file!r} in the current directory or the "
                "project"
            )
        try:
            lines = read_text(path).split("\n")
        except ValueError as error:
            raise ValueError(f"--prompt-file: {error}") from error
        prompts += [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError("--prompt: no prompts; give --prompt, --prompt-file or a preset with some")
    return prompts


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
