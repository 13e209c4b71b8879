"""`sample.grid`: a table of images, prompts x values of one setting."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from latent_t2i.model.bundle import INFO_FILE, find_bundle, read_info
from latent_t2i.model.grid import comparison_grid
from latent_t2i.sample import sampler
from latent_t2i.sample.folder import describe_computation, refuse_foreign, save_whole
from latent_t2i.sample.pictures import describe_bundle
from latent_t2i.sample.settings import GridConfig

HEADERS = {"guidance-scale": "guidance", "seed": "seed", "num-steps": "steps"}


def draw_grid(config: GridConfig) -> Path:
    """Writes the table and returns its path."""
    out = Path(config.out)
    refuse_foreign(out)
    folders = [find_bundle(name) for name in config.bundle]
    drawn = [_draw_bundle(folder, config) for folder in folders]
    columns = [column for found, _ in drawn for column in found]
    rows = list(zip(*columns, strict=True))
    out.parent.mkdir(parents=True, exist_ok=True)
    table = comparison_grid(rows, rows=config.prompts, columns=headers(config, folders))
    names = (
        "prompts",
        "guidance_scale",
        "seed",
        "num_steps",
        "scheduler",
        "negative_prompt",
        "size",
    )
    settings: dict[str, Any] = {name: getattr(config, name) for name in names}
    save_whole(table, out, settings | {"bundles": [record for _, record in drawn]})
    print(f"{len(rows)} x {len(columns)} images: {out}")
    return out


def headers(config: GridConfig, folders: Sequence[Path]) -> list[str]:
    """Returns the columns' headers: the setting that varies, else the guidance scale."""
    axis, values = next(
        ((name, found) for name, found in config.axes().items() if len(found) > 1),
        ("guidance-scale", config.guidance_scale),
    )
    if axis == "bundle":
        return [describe(folder) for folder in folders]
    texts = [f"{value:g}" if isinstance(value, float) else str(value) for value in values]
    return [f"{HEADERS[axis]} {text}" for text in texts]


def describe(folder: Path) -> str:
    """Returns a bundle's run and training step, as the header of its column."""
    if not (folder / INFO_FILE).is_file():  # a stock pipeline
        return folder.name
    info = read_info(folder)
    ema = info.get("ema", {}).get("sigma_rel")
    return f"{info['name']}, step {info['step']:,}" + ("" if ema is None else f", EMA {ema:g}")


def _draw_bundle(
    folder: Path, config: GridConfig
) -> tuple[list[list[Image.Image]], dict[str, Any]]:
    """Returns the columns of one bundle, each with one image per prompt, and how they were drawn.

    Only one bundle is in memory at a time.
    """
    pipeline = sampler.load(folder, device=config.device, dtype=config.dtype)
    batch_size = min(config.batch_size, len(config.prompts))
    columns = [
        sampler.draw(
            pipeline,
            config.prompts,
            [seed] * len(config.prompts),
            batch_size=batch_size,
            guidance_scale=scale,
            num_steps=steps,
            scheduler=config.scheduler,
            negative_prompt=config.negative_prompt if scale > 1 else "",
            size=config.size,
        )
        for scale in config.guidance_scale
        for seed in config.seed
        for steps in config.num_steps
    ]
    computed = describe_computation(pipeline, batch_size=batch_size)
    return columns, describe_bundle(folder) | computed
