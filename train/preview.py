"""Pictures while training: the same prompts and seeds each time, with the averaged weights.

The stock pipeline is put together from the run's own parts, as the bundle will be, so a preview is
what sampling would show of a bundle of that step, with the sampler that the bundle names. It draws
in the denoiser's own memory; the VAE and the text encoder visit the device for as long as it takes.
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


def path_of(folder: Path, step: int) -> Path:
    """Returns where a run's preview of a step is."""
    return folder / "previews" / f"step-{step:08d}.png"


def make_preview(run: Run) -> None:
    """Draws the preview of this step, on the main process; the others wait.

    Of a network shared out, all processes draw the same pictures, since each has but a part of it.
    """
    main = run.accelerator.is_main_process
    if main or is_fsdp(run.state.unet):
        images = draw_images(run)
        if main:
            write(path_of(run.plan.folder, run.state.step), images, run)
    run.accelerator.wait_for_everyone()


def draw_images(run: Run) -> list[Image.Image]:
    """Draws the pictures with the averaged weights."""
    config, plan, state = run.plan.config.preview, run.plan, run.state
    seeds = [config.seed + number for number in range(len(config.prompts))]
    pipeline = make_pipeline(
        unet=state.unet,
        vae=plan.vae,
        tokenizer=plan.tokenizer,
        text_encoder=plan.text_encoder,
        scheduler=make_scheduler(run.plan.config.objective),
        max_tokens=plan.shards.manifest.max_tokens,
    )
    pipeline.set_progress_bar_config(disable=True)
    visitors = (pipeline.vae, pipeline.text_encoder)
    with state.ema.swapped_into(state.unet):
        try:
            for network in visitors:
                network.to(run.accelerator.device)
            return generate_images(
                pipeline,
                config.prompts,
                seeds,
                guidance_scale=config.guidance_scale,
                num_steps=config.num_steps,
                title="preview",
            )
        finally:
            for network in visitors:
                network.to("cpu")


def write(path: Path, images: list[Image.Image], run: Run) -> None:
    """Writes the labelled grid into a file and gives it to the trackers."""
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
    trackers.log_image(run.accelerator, "previews", grid, state.step)
