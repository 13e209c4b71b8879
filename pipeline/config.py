"""The settings of stage one."""

from dataclasses import dataclass
from typing import Literal

from scenes.world import SPLITS
from shards.schema import TextDtype


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """Where the captioned images come from."""

    kind: Literal["coco", "scenes"] = "coco"
    """coco: a folder of images with a COCO captions file; scenes: drawn here, laid out as COCO."""
    images: str = ""
    """coco: the folder of images, such as data/coco/train2014."""
    captions: str = ""
    """coco: the captions file, such as data/coco/annotations/captions_train2014.json."""
    instances: str | None = None
    """coco: the instances file; boxes and categories then go into each record's JSON."""
    world: Literal["easy", "full"] = "easy"
    """scenes: how much can be in a picture."""
    num_images: int | None = None
    """scenes: how many to draw; coco: only the first so many."""

    def __post_init__(self) -> None:
        if self.num_images is not None and self.num_images < 1:
            raise ValueError(f"--source.num-images: expected at least 1, found {self.num_images}")
        files = {"images": self.images, "captions": self.captions}
        if self.kind == "coco":
            for name, value in files.items():
                if not value:
                    raise ValueError(f"--source.{name}: a coco source needs it")
            return
        if self.num_images is None:
            raise ValueError("--source.num-images: a scenes source needs it: how many to draw")
        for name, path in (files | {"instances": self.instances}).items():
            if path:
                raise ValueError(f"--source.{name}: has no effect on scenes, which are drawn")


@dataclass(frozen=True, kw_only=True)
class PipelineConfig:
    """Encodes captioned images once, into shards that training streams."""

    name: str
    """Names the data set; shards go to shards/data/NAME/SPLIT."""
    split: str = "train"
    """Which part of the data set this is; for scenes: train, val or held_out."""
    vae: str
    """Folder or hub name of an AutoencoderKL."""
    text_encoder: str
    """Folder or hub name of a CLIP text encoder with its tokenizer."""
    vae_revision: str | None = None
    """Branch, tag or commit, for a VAE from the hub."""
    text_encoder_revision: str | None = None
    """Branch, tag or commit, for a text encoder from the hub."""
    source: SourceConfig
    """Where the captioned images come from."""
    image_size_px: int = 64
    """Images are resized by their shorter side and cropped to a square of this size."""
    views: Literal[1, 2] = 1
    """2: the flipped image is encoded too (flipping a latent is not the same)."""
    max_tokens: int = 77
    """Tokens kept of a caption, start and end included."""
    out: str | None = None
    """Folder for the shards, in place of shards/data/NAME/SPLIT."""
    records_per_shard: int = 1000
    """Most images per shard: what a killed run may have to do again."""
    max_shard_bytes: int = 1_000_000_000
    """Most bytes per shard, though at least one image; the lesser of the two limits holds."""
    text_dtype: TextDtype = "float16"
    """int8 halves the text, with one scale per channel; the error is measured and noted."""
    batch_size: int = 32
    """Images per run of the VAE; the text encoder takes four times as many captions."""
    seed: int = 0
    """Of the drawn scenes."""
    device: str = "auto"
    """auto (the GPU if there is one), cpu, cuda, cuda:1 ..."""
    max_quarantined: float = 0.01
    """Share of images that may be left out, with reasons, before the run counts as failed."""

    def __post_init__(self) -> None:
        for flag, text in (("--name", self.name), ("--split", self.split)):
            if not text or text in {".", ".."} or {"/", "\\"} & set(text):
                raise ValueError(f"{flag}: expected the name of a folder, found {text!r}")
        for flag, value, least in (
            ("--image-size-px", self.image_size_px, 1),
            ("--max-tokens", self.max_tokens, 3),
            ("--records-per-shard", self.records_per_shard, 1),
            ("--max-shard-bytes", self.max_shard_bytes, 1),
            ("--batch-size", self.batch_size, 1),
            ("--seed", self.seed, 0),
        ):
            if value < least:
                raise ValueError(f"{flag}: expected at least {least}, found {value}")
        if not 0 <= self.max_quarantined <= 1:
            raise ValueError(
                f"--max-quarantined: expected a share from 0 to 1, found {self.max_quarantined}"
            )
        if self.source.kind == "scenes" and self.split not in SPLITS:
            raise ValueError(
                f"--split: expected {', '.join(SPLITS)} for scenes, found {self.split!r}"
            )
