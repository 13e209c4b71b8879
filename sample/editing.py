"""`sample.edit`: image to image, inpainting and variations with the stock pipelines.

Image to image: SDEdit, Meng et al. 2021 (2108.01073). Inpainting: the known part is replaced with
the noised original after each step, as in Lugmayr et al. 2022 (2201.09865) without resampling. It
needs no special U-Net.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from latent_t2i.model.bundle import find_bundle
from latent_t2i.model.generate import check_num_steps
from latent_t2i.model.grid import DECODE_ERRORS, labelled_grid, read_settings, save_png
from latent_t2i.model.paths import complete_or_absent, find_path, hash_file, output_root
from latent_t2i.sample.folder import describe_computation, refuse_foreign, save_whole
from latent_t2i.sample.pictures import describe_bundle
from latent_t2i.sample.schedulers import check_partial, choose_scheduler, make_scheduler
from latent_t2i.sample.settings import EditConfig
from latent_t2i.sample.stock import OnStep, as_pipeline, draw_stock, load_stock, output_size

MAX_PIXELS = 89_478_485
"""Larger images count as decompression bombs."""
PLAIN_CHANNELS = 4
"""Input channels by which the stock inpainting pipeline recognises a U-Net without mask inputs."""


def edit(config: EditConfig) -> Path:
    """Writes one PNG per prompt and seed, and a grid; returns the path of the grid."""
    assert config.init_image is not None
    source = find_file(config.init_image, "--init-image")
    original = read_image(source, "--init-image")
    mask = None if config.mask is None else read_mask(config.mask, original.size)
    seeds = range(config.seed, config.seed + config.num_images)
    pairs = [(prompt, seed) for prompt in config.prompts or _own_prompt(source) for seed in seeds]
    out = Path(config.out) if config.out else output_root() / "runs" / "edits"
    path = out / "edits.png"
    earlier = out / "edits"
    refuse_foreign(path, *([earlier] if earlier.is_file() else sorted(earlier.glob("*"))))
    pipeline = load_stock(config)
    images = list(edit_image(pipeline, original, mask, pairs, config=config))
    settings = describe_edit(config) | describe_bundle(find_bundle(config.bundle))
    with complete_or_absent(earlier) as folder:
        for number, (image, (prompt, seed)) in enumerate(zip(images, pairs, strict=True)):
            # The last batch may be smaller.
            size = min(
                config.batch_size, len(pairs) - number // config.batch_size * config.batch_size
            )
            own = {"prompt": prompt, "seed": seed} | settings
            own |= describe_computation(pipeline, batch_size=size)
            save_png(image, folder / f"{number:04d}.png", own)
    fitted = fit(original, images[0].size)
    grid = labelled_grid([fitted, *images], [source.name, *(_label(*pair) for pair in pairs)])
    settings |= describe_computation(pipeline, batch_size=min(config.batch_size, len(pairs)))
    save_whole(grid, path, {"prompts": config.prompts, "seed": config.seed} | settings)
    print(f"{len(images)} images from {source}: {path}")
    return path


def edit_image(
    pipeline: Any,
    original: Image.Image,
    mask: Image.Image | None,
    pairs: Sequence[tuple[str, int]],
    *,
    config: EditConfig,
    on_step: OnStep | None = None,
) -> Iterator[Image.Image]:
    """Yields one changed image per pair of prompt and seed; `mask` (L) has the size of `original`.

    Where the mask is black the pixels are those of the resized original, bit for bit.
    """
    size = output_size(pipeline, config.size)
    scheduler = choose_scheduler(pipeline.scheduler, config.scheduler)
    steps = schedule_steps(config.num_steps, config.strength, scheduler)
    shown = fit(original, size)
    negative = {"negative_prompt": config.negative_prompt} if config.negative_prompt else {}
    inputs = [{"prompt": prompt, "image": shown, **negative} for prompt, _ in pairs]
    seeds = [seed for _, seed in pairs]
    shared: dict[str, Any] = {"settings": config, "num_steps": steps, "strength": config.strength}
    shared |= {"on_step": on_step, "title": "edit"}
    if mask is None:
        img2img = as_pipeline("StableDiffusionImg2ImgPipeline", pipeline, config)
        yield from draw_stock(img2img, inputs, seeds, **shared)
        return
    soft = fit(mask, size)
    covered = cover(soft, pipeline.vae_scale_factor)
    inputs = [single | {"mask_image": covered} for single in inputs]
    inpaint = as_pipeline("StableDiffusionInpaintPipeline", pipeline, config)
    shared |= {"width": size[0], "height": size[1]}
    with _reported_as_plain(pipeline):
        for image in draw_stock(inpaint, inputs, seeds, **shared):
            yield Image.composite(image, shown, soft)


def schedule_steps(num_steps: int, strength: float, scheduler: Any) -> int:
    """Returns the steps of a whole schedule of which the stock pipelines run `num_steps`.

    They run `int(steps * strength)`. It is the shortest schedule that the sampler allows. Raises
    ValueError if there is none.
    """
    limit = int(scheduler.config.num_train_timesteps)
    if int(limit * strength) < num_steps:
        raise ValueError(
            f"--strength: at strength {strength:g} at most {int(limit * strength)} steps can be "
            f"run, because the bundle has {limit} timesteps; found --num-steps {num_steps}: lower "
            "it, or raise the strength"
        )
    if strength < 1:
        check_partial(scheduler)
    whole = [n for n in range(num_steps, limit + 1) if int(n * strength) == num_steps]
    for steps in whole:
        if _is_allowed(scheduler, steps):
            return steps
    allowed = {int(n * strength) for n in range(1, limit + 1) if _is_allowed(scheduler, n)} - {0}
    nearest = sorted(sorted(allowed, key=lambda n: abs(n - num_steps))[:8])
    euler = _is_allowed(make_scheduler(scheduler, "euler"), whole[0])
    raise ValueError(
        f"--num-steps: at strength {strength:g} choose from {', '.join(map(str, nearest))}"
        f"{', or use --scheduler euler' if euler else ''}; found {num_steps}, of a whole schedule "
        f"of {whole[0]}, with which {type(scheduler).__name__} gives wrong images"
    )


def _is_allowed(scheduler: Any, num_steps: int) -> bool:
    """Returns whether a sampler runs a whole schedule of this length correctly."""
    try:
        check_num_steps(scheduler, num_steps)
    except ValueError:
        return False
    return True


def cover(mask: Image.Image, downscale: int) -> Image.Image:
    """Returns the mask (L) in black and white, with each latent's square white if a part of it is.

    The pipeline reads one pixel per latent, so that it would miss thin lines.
    """
    white = np.asarray(mask) > 0  # (H, W)
    height, width = white.shape
    squares = white.reshape(height // downscale, downscale, width // downscale, downscale)
    covered = squares.any(axis=(1, 3)).repeat(downscale, 0).repeat(downscale, 1)
    return Image.fromarray(covered.astype(np.uint8) * 255)


@contextmanager
def _reported_as_plain(pipeline: Any) -> Iterator[None]:
    """Makes the stock inpainting pipeline accept latents of any number of channels.

    It decides by the configured number alone whether the U-Net takes a mask; 4 means that it does
    not.
    """
    unet = pipeline.unet
    channels = unet.config.in_channels
    unet.register_to_config(in_channels=PLAIN_CHANNELS)
    try:
        yield
    finally:
        unet.register_to_config(in_channels=channels)


def fit(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Returns the centre of the image with the aspect ratio of `size` (width, height), resized."""
    return image if image.size == size else ImageOps.fit(image, size, Image.Resampling.LANCZOS)


def find_file(name: str, flag: str) -> Path:
    """Returns an input file; raises ValueError, which names the flag, if there is none."""
    path = find_path(name)
    if path is None or not path.is_file():
        raise ValueError(f"{flag}: no file {name!r} in the current directory or the project")
    return path


def read_image(path: Path, flag: str) -> Image.Image:
    """Returns an image file upright and as RGB, with transparency on white.

    Raises ValueError, which names the flag, for a file that is not an image.
    """
    with _pillow_errors(path, flag), Image.open(path) as opened:
        _check_pixels(opened, path, flag)
        upright = ImageOps.exif_transpose(opened)
        if not upright.has_transparency_data:
            return upright.convert("RGB")
        over = upright.convert("RGBA")
        white = Image.new("RGBA", over.size, "white")
        return Image.alpha_composite(white, over).convert("RGB")


def read_mask(name: str, size: tuple[int, int]) -> Image.Image:
    """Returns a mask as greyscale; raises ValueError if its size is not `size` or it is black."""
    path = find_file(name, "--mask")
    mask = read_image(path, "--mask").convert("L")
    if mask.size != size:
        raise ValueError(
            f"--mask: {path} has {mask.width} x {mask.height} px, but --init-image has {size[0]} x "
            f"{size[1]}; expected the same size: white is repainted, black is kept"
        )
    if mask.getextrema()[1] == 0:
        raise ValueError(
            f"--mask: {path} is black everywhere, so nothing would change; expected white where "
            "the image is to be repainted"
        )
    return mask


@contextmanager
def _pillow_errors(path: Path, flag: str) -> Iterator[None]:
    with warnings.catch_warnings():
        # Pillow warns about damaged metadata; the pixels are checked here.
        warnings.simplefilter("ignore", UserWarning)
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            yield
        except DECODE_ERRORS as error:
            if str(error).startswith(flag):
                raise
            raise ValueError(
                f"{flag}: {path} is not an image that Pillow reads ({error}); expected a PNG, "
                "JPEG, WebP or another image file"
            ) from error


def _check_pixels(image: Image.Image, path: Path, flag: str) -> None:
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(
            f"{flag}: {path} has {image.width} x {image.height} px; expected at most "
            f"{MAX_PIXELS:,} pixels"
        )


def _own_prompt(path: Path) -> tuple[str, ...]:
    """Returns the prompt that an image made here carries, else the empty prompt."""
    try:
        prompt = read_settings(path).get("prompt")
    except ValueError:
        prompt = None
    if not isinstance(prompt, str) or not prompt:
        print("no --prompt: variations with the empty prompt")
        return ("",)
    print(f"no --prompt: variations with the prompt of {path}: {prompt}")
    return (prompt,)


def describe_edit(config: EditConfig) -> dict[str, Any]:
    """Returns the settings of an edit for its PNGs, without prompt, seed and bundle."""
    names = ("strength", "guidance_scale", "num_steps", "scheduler", "negative_prompt", "size")
    settings: dict[str, Any] = {name: getattr(config, name) for name in names}
    for name in ("init_image", "mask"):
        if (given := getattr(config, name)) is not None:
            path = find_file(given, f"--{name.replace('_', '-')}")
            settings |= {name: path.name, f"{name}_sha256": _sha256(path)}
    return settings


def _sha256(path: Path) -> str:
    return hash_file(path)


def _label(prompt: str, seed: int) -> str:
    # A long prompt is cut at its end.
    return f"seed {seed}: {prompt or 'variation'}"
