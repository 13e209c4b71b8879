"""The producers that a set may have besides the VAE and the text encoder, by the name of theirs."""

from collections.abc import Callable, Sequence

from latent_t2i.pipeline.producers import clip_image, dino
from latent_t2i.pipeline.producers.producer import FLAG, Producer

FURTHER: dict[str, Callable[[str, str | None], Producer]] = {
    "clip_image": clip_image.load,
    "dino": dino.load,
}


def load_further(names: Sequence[str]) -> tuple[Producer, ...]:
    """Loads the producers that NAME=MODEL or NAME=MODEL@REVISION describe.

    Raises ValueError for an unknown or repeated name, and for a model that is unavailable.
    """
    models: dict[str, str] = {}
    for text in names:
        name, separator, model = text.partition("=")
        if name not in FURTHER or not separator or not model or name in models:
            raise ValueError(
                f"{FLAG}: expected NAME=MODEL, each NAME once, of {', '.join(FURTHER)}, "
                f"found {text!r}"
            )
        models[name] = model
    return tuple(FURTHER[name](*_split_revision(model)) for name, model in models.items())


def _split_revision(model: str) -> tuple[str, str | None]:
    name, _, revision = model.partition("@")
    return name, revision or None
