"""Preview images during training: fixed prompts and seeds, drawn with the EMA weights.

A preview equals the images of a bundle of that step: the same pipeline is assembled from the run's
networks. The VAE and the text encoder are on the device only during a preview.
"""

from pathlib import Path

from PIL import Image

from latent_t2i.model.bundle import make_pipeline
from latent_t2i.model.diffusion import make_scheduler
from latent_t2i.model.generate import generate_images
from latent_t2i.model.grid import labelled_grid, save_png
from latent_t2i.train import trackers
from latent_t2i.train.fsdp import is_fsdp
from latent_t2i.train.setup import Run

BATCH_SIZE = 4
"""Images drawn at once: the memory estimate does not count previews, which decode in float32."""


def preview_path(folder: Path, step: int) -> Path:
    """Returns the file of a step's preview in a run's folder."""
    return folder / "previews" / f"step-{step:08d}.png"


def make_preview(run: Run) -> None:
    """Draws and writes the preview of the current step."""
    main = run.accelerator.is_main_process
    # Under FSDP every process holds a part of the network, so all of them have to draw.
    if main or is_fsdp(run.state.unet):
        images = draw_images(run)
        if main:
            write(preview_path(run.plan.folder, run.state.step), images, run)
    run.accelerator.wait_for_everyone()


def draw_images(run: Run) -> list[Image.Image]:
    """Draws one image per prompt with the EMA weights."""
    config, plan, state = run.plan.config.preview, run.plan, run.state
    pipeline = make_pipeline(
        unet=state.unet,
        vae=plan.vae,
        tokenizer=plan.tokenizer,
        text_encoder=plan.text_encoder,
        scheduler=make_scheduler(run.plan.config.objective),
        max_tokens=plan.shards.manifest.max_tokens,
    )
    pipeline.set_progress_bar_config(disable=True)
    frozen = (pipeline.vae, pipeline.text_encoder)
    with state.ema.swapped_into(state.unet):
        try:
            for network in frozen:
                network.to(run.accelerator.device)
            return generate_images(
                pipeline,
                config.prompts,
                range(config.seed, config.seed + len(config.prompts)),
                guidance_scale=config.guidance_scale,
                num_steps=config.num_steps,
                batch_size=BATCH_SIZE,
                title="preview",
                require_finite=False,  # `write` reports black images
            )
        finally:
            for network in frozen:
                network.to("cpu")


def write(path: Path, images: list[Image.Image], run: Run) -> None:
    """Writes the images as a labelled grid and sends it to the trackers."""
    config, state = run.plan.config.preview, run.state
    grid = labelled_grid(images, config.prompts)
    settings = {
        "prompt": " | ".join(config.prompts),
        "step": state.step,
        "weights": "ema",
        "seed": config.seed,
        "num_steps": config.num_steps,
        "guidance_scale": config.guidance_scale,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}")
    save_png(grid, partial, settings)
    partial.replace(path)
    num_black = sum(image.getbbox() is None for image in images)
    if num_black:
        run.progress.say(
            f"warning: preview of step {state.step}: {num_black} of {len(images)} images are "
            "entirely black, which usually means that the network's output is not finite"
        )
    trackers.log_image(run.accelerator, "previews", grid, state.step)
