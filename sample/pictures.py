"""`sample.run`: writes one PNG per prompt and seed, and one labelled grid."""

from pathlib import Path
from typing import Any

from latent_t2i.model.bundle import digest, find_bundle
from latent_t2i.model.grid import labelled_grid, save_png
from latent_t2i.model.paths import find_path, output_root
from latent_t2i.sample import sampler
from latent_t2i.sample.config import SampleConfig

SHIPPED_BUNDLE = "scenes/bundle"


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
    images = sampler.draw(pipeline, prompts, seeds, batch_size=config.batch_size, **settings)
    out = Path(config.out) if config.out else output_root() / "runs" / config.name
    (out / "samples").mkdir(parents=True, exist_ok=True)
    settings["bundle"] = digest(folder)
    for number, (image, prompt, seed) in enumerate(zip(images, prompts, seeds, strict=True)):
        path = out / "samples" / f"{number:04d}.png"
        save_png(image, path, {"prompt": prompt, "seed": seed} | settings)
    grid = out / "samples.png"
    labelled_grid(images, prompts).save(grid)
    print(f"{len(images)} images from {folder}: {grid}")
    return grid


def choose_bundle(bundle: str | None, name: str) -> Path:
    """Returns the given bundle, else that of the run, else the shipped one."""
    if bundle is not None:
        return find_bundle(bundle)
    own = output_root() / "runs" / name / "bundle"
    if own.exists():
        return find_bundle(own)
    if find_path(SHIPPED_BUNDLE) is not None:
        print(f"{own} does not exist yet; using the shipped {SHIPPED_BUNDLE}")
        return find_bundle(SHIPPED_BUNDLE)
    raise ValueError(
        f"--bundle: {own} does not exist; train a bundle with train/run.py or give another folder"
    )


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
        prompts += [line.strip() for line in path.read_text("utf-8").splitlines() if line.strip()]
    if not prompts:
        raise ValueError("--prompt: no prompts; give --prompt, --prompt-file or a preset with some")
    return prompts
