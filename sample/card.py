"""The model card of an exported bundle: README.md as the Hugging Face Hub shows it.

It says what `bundle.json` and evaluation's metrics.json say, and what they do not: a missing entry
appears as "not recorded" and is never guessed.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from huggingface_hub import ModelCardData

from latent_t2i import __version__

MISSING = "not recorded"
MARK = f"<!-- written by sample.export of latent-t2i {__version__} -->"
SECONDS_PER_HOUR = 3600
NOT_METRICS = ("train_seconds", "total_seconds", "num_prompts", "bundle", "bundle_sha256")
RECIPE = {
    "Prediction": ("objective", "prediction"),
    "Noise schedule": ("objective", "beta_schedule"),
    "Timestep sampling": ("objective", "timestep_sampling"),
    "Caption dropout": ("objective", "caption_dropout"),
    "Batch size": ("batch_size",),
    "Learning rate": ("optim", "learning_rate"),
    "Learning rate schedule": ("optim", "schedule"),
    "Weight decay": ("optim", "weight_decay"),
    "Average of the weights": ("ema",),
    "Channels": ("model", "channels"),
    "Seed": ("seed",),
}
"""Rows of the recipe, and where the bundle's settings have them."""


def write_card(
    *,
    title: str,
    license_name: str,
    info: Mapping[str, Any] | None,
    metrics: Mapping[str, Any] | None,
    size: tuple[int, int],
    digest: str,
    has_fp16: bool,
    grid: Mapping[str, Any] | None,
) -> str:
    """Returns the text of README.md.

    Args:
        title: The card's heading.
        license_name: Licence of the weights, as the Hub spells it; "other" if none was chosen.
        info: Content of bundle.json; None for a stock pipeline.
        metrics: Content of metrics.json; None if the bundle was not evaluated.
        size: Width and height of the images in pixels.
        digest: sha256 of the bundle.
        has_fp16: Whether the folder has float16 variants.
        grid: The settings of samples.png; None if there is no such image.
    """
    sections = [
        f"# {title}\n\n{MARK}\n\n{_summary(info, size)}",
        "" if grid is None else _samples(grid),
        _usage(has_fp16),
        _intended_use(info),
        _data(info),
        _recipe(info),
        _evaluation(metrics),
        _licence(license_name),
        f"## Files\n\nsha256 of the bundle that was exported: `{digest}`.",
    ]
    return f"---\n{_metadata(license_name)}\n---\n\n" + "\n\n".join(filter(None, sections)) + "\n"


def _metadata(license_name: str) -> str:
    tags = ["text-to-image", "stable-diffusion", "latent-t2i"]
    data = ModelCardData(
        license=license_name,
        license_name="not-chosen" if license_name == "other" else None,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=tags,
    )
    text: str = data.to_yaml()
    return text


def _summary(info: Mapping[str, Any] | None, size: tuple[int, int]) -> str:
    shape = f"Images have {size[0]} x {size[1]} pixels."
    if info is None:
        return f"A Stable Diffusion pipeline; its training is {MISSING}. {shape}"
    return (
        "A text-to-image latent diffusion model: a U-Net with "
        f"{info['num_parameters'] / 1e6:,.1f} M parameters, trained for {info['step']:,} steps on "
        f"precomputed latents and text states. {shape}"
    )


def _samples(grid: Mapping[str, Any]) -> str:
    return (
        "![Samples with their prompts](samples.png)\n\n"
        f"First seeds from {grid['seed']} on, not selected; guidance scale "
        f"{grid['guidance_scale']:g}, {grid['num_steps']} steps of {grid['scheduler']}."
    )


def _usage(has_fp16: bool) -> str:
    half = (
        '\n\n`variant="fp16", dtype=torch.float16` loads the float16 files only.'
        if has_fp16
        else ""
    )
    return f"""\
## Use

```python
from diffusers import StableDiffusionPipeline

pipeline = StableDiffusionPipeline.from_pretrained("path or repository of this model")
pipeline("a prompt", guidance_scale=4).images[0].save("picture.png")
```{half}"""


def _intended_use(info: Mapping[str, Any] | None) -> str:
    known = "" if info is None else " It makes what its training images show, and nothing else."
    return (
        f"## Intended use\n\nResearch and teaching.{known} There is no safety checker. Text in "
        "images, counts and faces are usually wrong in small models. The images carry the biases "
        "of the training images and captions; do not present them as photographs of real events."
    )


def _data(info: Mapping[str, Any] | None) -> str:
    found = info or {}
    rows = {
        "Training set": _get(found, ("config", "shards")) or found.get("name"),
        "sha256 of its manifest": found.get("shards_sha256"),
        "VAE": _get(found, ("config", "vae")),
        "Text encoder": _get(found, ("config", "text_encoder")),
    }
    return "## Training data\n\n" + _table(("", ""), rows.items())


def _recipe(info: Mapping[str, Any] | None) -> str:
    found = info or {}
    seconds = found.get("train_seconds")
    rows = {name: _get(found, ("config", *path)) for name, path in RECIPE.items()}
    rows |= {
        "Precision": found.get("precision"),
        "Training time": None if seconds is None else f"{seconds / SECONDS_PER_HOUR:.1f} hours",
        "Final training loss": _get(found, ("metrics", "loss")),
    }
    return "## Recipe\n\n" + _table(("setting", "value"), rows.items())


def _evaluation(metrics: Mapping[str, Any] | None) -> str:
    if metrics is None:
        return f"## Evaluation\n\nMetrics are {MISSING}: the model was not evaluated."
    protocol = metrics.get("protocol_id")
    rows = {
        name: value
        for name, value in metrics.items()
        if isinstance(value, int | float)
        and not isinstance(value, bool)
        and name not in NOT_METRICS
    }
    named = f"`{protocol}`" if protocol else MISSING
    text = (
        f"## Evaluation\n\nProtocol: {named}. Figures of different protocols are not comparable. A "
        "name that ends in `@gN` has guidance scale N.\n\n"
    )
    return text + _table(("metric", "value"), sorted(rows.items()))


def _licence(name: str) -> str:
    if name == "other":
        return (
            "## Licence\n\nNo licence was chosen for these weights. The licences of the training "
            "images, of the VAE and of the text encoder apply to them too."
        )
    return (
        f"## Licence\n\n{name}, chosen by the publisher for these weights. The licences of the "
        "training images, of the VAE and of the text encoder may limit it."
    )


def _get(found: Mapping[str, Any], path: Iterable[str]) -> Any:
    """Returns a nested value, None if there is none."""
    value: Any = found
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _table(header: tuple[str, str], rows: Iterable[tuple[str, Any]]) -> str:
    lines = [f"| {header[0]} | {header[1]} |", "|---|---|"]
    return "\n".join([*lines, *(f"| {_cell(name)} | {_cell(value)} |" for name, value in rows)])


def _cell(value: Any) -> str:
    """Returns a value as the text of a table's cell."""
    return " ".join(_words(value)).replace("|", "\\|").replace("<", "&lt;")


def _words(value: Any) -> Iterator[str]:
    if value is None:
        yield MISSING
    elif isinstance(value, Mapping):
        yield ", ".join(f"{key} {_cell(inner)}" for key, inner in value.items())
    elif isinstance(value, list | tuple):
        yield ", ".join(map(str, value))
    elif isinstance(value, float):
        yield f"{value:.4g}"
    else:
        yield from str(value).split()
