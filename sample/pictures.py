"""What `python -m sample.run` does: prompts to PNG files and one labelled grid."""

from pathlib import Path

from latent_t2i.model.bundle import digest, find_bundle
from latent_t2i.model.grid import labelled_grid, save_png
from latent_t2i.model.paths import find_path, output_root
from latent_t2i.sample import sampler
from latent_t2i.sample.config import SampleConfig

SHIPPED_BUNDLE = "scenes/bundle"


def sample(config: SampleConfig) -> Path:
    """Draws every prompt and returns the grid's path.

    Raises ValueError where there is no bundle or nothing to draw.
    """
    folder = choose_bundle(config.bundle, config.name)
    prompts = [p for p in read_prompts(config) for _ in range(config.images_per_prompt)]
    seeds = [config.seed + number for number in range(len(prompts))]
    images = sampler.draw(
        sampler.load(folder, device=config.device, dtype=config.dtype),
        prompts,
        seeds,
        guidance_scale=config.guidance_scale,
        num_steps=config.num_steps,
        scheduler=config.scheduler,
        batch_size=config.batch_size,
    )
    out = Path(config.out) if config.out else output_root() / "runs" / config.name
    shared = {
        "guidance_scale": config.guidance_scale,
        "num_steps": config.num_steps,
        "scheduler": config.scheduler,
        "bundle": digest(folder),
    }
    (out / "samples").mkdir(parents=True, exist_ok=True)
    for number, (image, prompt, seed) in enumerate(zip(images, prompts, seeds, strict=True)):
        settings = {"prompt": prompt, "seed": seed} | shared
        save_png(image, out / "samples" / f"{number:04d}.png", settings)
    grid = out / "samples.png"
    labelled_grid(images, prompts).save(grid)
    print(f"{len(images)} pictures from {folder}: {grid}")
    return grid


def choose_bundle(bundle: str | None, name: str) -> Path:
    """Returns the bundle that was asked for, else the run's own, else the one that is shipped."""
    if bundle is not None:
        return find_bundle(bundle)
    own = output_root() / "runs" / name / "bundle"
    if own.exists():
        return find_bundle(own)
    if find_path(SHIPPED_BUNDLE) is not None:
        print(f"{own}: not there yet, drawing from the shipped {SHIPPED_BUNDLE}")
        return find_bundle(SHIPPED_BUNDLE)
    raise ValueError(f"--bundle: no {own}: train one with train/run.py or name another")


def read_prompts(config: SampleConfig) -> list[str]:
    """Returns the prompts of the flag and of the file, in that order."""
    prompts = list(config.prompts)
    if config.prompt_file is not None:
        path = find_path(config.prompt_file)
        if path is None:
            raise ValueError(
                f"--prompt-file: no file {config.prompt_file!r} here or in the project"
            )
        prompts += [line.strip() for line in path.read_text("utf-8").splitlines() if line.strip()]
    if not prompts:
        raise ValueError(
            "--prompt: nothing to draw: give a prompt, a file or a preset with prompts"
        )
    return prompts
