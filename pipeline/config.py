"""The settings of stage one."""

import math
import re
from dataclasses import dataclass
from typing import Literal

from latent_t2i.scenes.world import SPLITS
from latent_t2i.shards.schema import TextDtype


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """Where the captioned images come from."""

    kind: Literal["coco", "folder", "webdataset", "parquet", "scenes"] = "coco"
    """coco: a folder of images with a COCO captions file; folder: images with metadata.jsonl,
    metadata.csv or a .txt beside each; webdataset: tars of img2dataset; parquet: images and
    captions in columns; scenes: drawn images in COCO's layout."""
    images: str = ""
    """coco, folder: the folder of images, such as data/coco/train2014; webdataset, parquet: a
    folder of files, a file, a pattern, braces or a URL: 's3://bucket/{00000..00099}.tar'."""
    captions: str = ""
    """coco: the captions file, such as data/coco/annotations/captions_train2014.json."""
    instances: str | None = None
    """coco: the instances file; its boxes and categories are added to each record's JSON."""
    caption_column: str | None = None
    """folder (with metadata), webdataset (in the JSON), parquet: field with the caption or a list
    of captions; default: the first of text, caption, captions and prompt."""
    image_column: str | None = None
    """parquet: column with the images; default: image, img, jpg, jpeg, png or webp."""
    caption_per: Literal["line", "paragraph", "file"] = "line"
    """folder: whether each line of a text file is a caption, each paragraph, or the whole file."""
    caption_extension: str = ".txt"
    """folder, webdataset: extension of the text files, such as .caption or .output.txt."""
    tar_members: Literal["adjacent", "anywhere"] = "adjacent"
    """webdataset: whether the files of an image are adjacent in the tar; anywhere keeps the texts
    of one tar in memory."""
    val_fraction: float = 0.0
    """all but scenes: fraction of the images, by a hash of the key, that --split val gets and
    --split train does not."""
    world: Literal["easy", "full"] = "easy"
    """scenes: which shapes, colours, sizes and numbers of objects there are."""
    num_images: int | None = None
    """scenes: number of images to draw; others: use only the first images."""

    def __post_init__(self) -> None:
        if self.num_images is not None and self.num_images < 1:
            raise ValueError(f"--source.num-images: expected at least 1, found {self.num_images}")
        if self.kind == "scenes" and self.num_images is None:
            raise ValueError("--source.num-images: required for a scenes source")
        required = {"coco": ("images", "captions"), "scenes": ()}.get(self.kind, ("images",))
        for name in required:
            if not getattr(self, name):
                raise ValueError(f"--source.{name}: required for a {self.kind} source")
        if not 0 <= self.val_fraction < 1:
            raise ValueError(
                f"--source.val-fraction: expected at least 0 and below 1, found {self.val_fraction}"
            )
        if not re.fullmatch(r"(\.[A-Za-z0-9_-]+)+", self.caption_extension):
            raise ValueError(
                "--source.caption-extension: expected one like .txt or .output.txt, found "
                f"{self.caption_extension!r}"
            )
        for name, kinds in _KINDS_OF.items():
            if self.kind in kinds or getattr(self, name) == getattr(type(self), name):
                continue
            flag = f"--source.{name.replace('_', '-')}"
            *first, last = kinds
            allowed = f"{', '.join(first)} or {last}" if first else last
            raise ValueError(f"{flag}: has no effect on a {self.kind} source, only on {allowed}")


_KINDS_OF = {
    "images": ("coco", "folder", "webdataset", "parquet"),
    "captions": ("coco",),
    "instances": ("coco",),
    "caption_column": ("folder", "webdataset", "parquet"),
    "image_column": ("parquet",),
    "caption_per": ("folder",),
    "caption_extension": ("folder", "webdataset"),
    "tar_members": ("webdataset",),
    "val_fraction": ("coco", "folder", "webdataset", "parquet"),
}


@dataclass(frozen=True, kw_only=True)
class ViewsConfig:
    """Which encodings of an image are stored; training draws one of them at each visit."""

    flip: bool = False
    """Also encode each crop flipped (a flipped latent is not a flipped image's latent)."""
    crops: int = 1
    """Crops per image: the first as --crop says, each further one of 75 to 100 % of its size at a
    random place, derived from the seed, the image's key and the crop's number."""

    def __post_init__(self) -> None:
        if self.crops < 1:
            raise ValueError(f"--views.crops: expected at least 1, found {self.crops}")

    @property
    def num(self) -> int:
        """Views per image: crop 0, crop 0 flipped, crop 1, ..."""
        return self.crops * (2 if self.flip else 1)


@dataclass(frozen=True, kw_only=True)
class PipelineConfig:
    """Encodes captioned images once, into shards that training streams."""

    name: str
    """Name of the data set; shards go to shards/data/NAME/SPLIT."""
    split: str = "train"
    """Name of this part of the data set; for scenes: train, val or held_out."""
    vae: str
    """Folder or Hub name of an autoencoder."""
    text_encoder: str
    """Folder or Hub name of a CLIP text encoder with its tokenizer."""
    vae_revision: str | None = None
    """Branch, tag or commit, for a VAE from the Hub."""
    vae_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the VAE's computations; float16 is not offered because many VAEs overflow in it."""
    text_encoder_revision: str | None = None
    """Branch, tag or commit, for a text encoder from the Hub."""
    text_hidden_state: Literal["last", "penultimate"] = "last"
    """last: after the final norm, as in Stable Diffusion 1; penultimate: as in SDXL."""
    source: SourceConfig
    """Where the captioned images come from."""
    image_size_px: int = 64
    """Images are resized by their shorter side and cropped to a square of this size."""
    crop: Literal["centre", "random"] = "centre"
    """random: one position per image, derived from the seed and the image's key. With
    --views.crops it applies to the first crop."""
    buckets: bool = False
    """Keep aspect ratios: one set for each of several sizes with about the square's area."""
    max_aspect: float = 2.0
    """buckets: the largest ratio of the sides; longer images are cropped to it."""
    bucket_multiple_px: int = 64
    """buckets: sides are multiples of this and of the VAE's downscaling factor."""
    min_image_size_px: int = 1
    """Images whose shorter side is smaller are quarantined."""
    fast_jpeg: bool = True
    """Decode JPEG files at a fraction of their size where the target is much smaller."""
    views: ViewsConfig = ViewsConfig()
    """Which encodings of an image are stored."""
    producers: tuple[str, ...] = ()
    """Further fields, each as NAME=MODEL or NAME=MODEL@REVISION, with a folder or Hub name:
    clip_image, CLIP's embedding of each view; dino, the patch features of a DINOv2."""
    max_tokens: int = 77
    """Tokens kept of a caption, start and end included."""
    out: str | None = None
    """Folder for the shards, instead of shards/data/NAME/SPLIT; or a URL of fsspec, such as
    s3://BUCKET/FOLDER or hf://datasets/USER/NAME/FOLDER."""
    work_dir: str | None = None
    """out is a URL: local folder with room for two shards per process, which are put at the URL and
    deleted; default: in the user's cache folder."""
    records_per_shard: int = 1000
    """Maximum number of images per shard; a killed run repeats at most one shard."""
    max_shard_bytes: int = 1_000_000_000
    """Maximum size of a shard, which holds at least one image; the smaller limit applies."""
    text_dtype: TextDtype = "float16"
    """int8 halves the text, with one scale per channel; the error is measured and recorded."""
    batch_size: int | None = None
    """Images per batch of the VAE; the text encoder's batches have four times as many captions.
    Default: 32 on a CPU; on a GPU up to 256, as its memory and the image size allow."""
    seed: int = 0
    """Seed of the drawn scenes and of random crops."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda, cuda:1 ..."""
    executor: Literal["local", "ray"] = "local"
    """ray: encode on a Ray cluster, with one actor per GPU, or per core if there are no GPUs."""
    ray_address: str | None = None
    """ray: the cluster's address; default: RAY_ADDRESS, a cluster that runs on this machine, or a
    new one of this machine's cores and GPUs."""
    num_threads: int | None = None
    """Threads that decode, and on a CPU encode; default: this process's share of the cores. ray:
    threads of each actor; default: the cores per GPU, or one."""
    tf32: bool = True
    """Faster float32 products with 10 bits of precision, on a GPU that has them; the manifest
    records their use, which must be the same when a run is resumed."""
    compile: bool = False
    """Compile the VAE's encoder: takes minutes at the start, then runs faster."""
    max_quarantined: float = 0.01
    """Largest share of images that may be quarantined before the run counts as failed."""
    append: bool = False
    """Add records that are new in the source to a finished set, as further shards; shards that
    exist stay as they are."""
    retry: bool = False
    """Bring the shards of a finished set up to date: those with quarantined images that can be read
    now, or with images or captions that have changed since, are encoded again."""
    dry_run: bool = False
    """Print the plan (what will be written, and its size) and stop."""
    force: bool = False
    """Start even if the disk seems too small."""

    def __post_init__(self) -> None:
        for flag, text in (("--name", self.name), ("--split", self.split)):
            if not text or text in {".", ".."} or {"/", "\\"} & set(text):
                raise ValueError(f"{flag}: expected the name of a folder, found {text!r}")
        for flag, value, minimum in (
            ("--image-size-px", self.image_size_px, 1),
            ("--max-tokens", self.max_tokens, 3),
            ("--records-per-shard", self.records_per_shard, 1),
            ("--max-shard-bytes", self.max_shard_bytes, 1),
            ("--batch-size", 1 if self.batch_size is None else self.batch_size, 1),
            ("--seed", self.seed, 0),
            ("--num-threads", 1 if self.num_threads is None else self.num_threads, 1),
            ("--min-image-size-px", self.min_image_size_px, 1),
            ("--max-aspect", self.max_aspect, 1),
            ("--bucket-multiple-px", self.bucket_multiple_px, 1),
        ):
            if not minimum <= value < math.inf:  # false for NaN too
                raise ValueError(f"{flag}: expected at least {minimum}, found {value}")
        if not 0 <= self.max_quarantined <= 1:
            raise ValueError(
                f"--max-quarantined: expected a share from 0 to 1, found {self.max_quarantined}"
            )
        if self.ray_address is not None and self.executor != "ray":
            raise ValueError(
                f"--ray-address: {self.ray_address!r} has no effect without --executor ray"
            )
        if self.executor == "ray" and "://" in (self.out or ""):
            raise ValueError(
                f"--executor ray: expected a shared folder for --out, found {self.out!r}"
            )
        if self.work_dir is not None and "://" not in (self.out or ""):
            raise ValueError(f"--work-dir: needs a URL for --out, found {self.out!r}")
        for flag, is_set in (("--append", self.append), ("--retry", self.retry)):
            for other, unfit in (
                ("--buckets", self.buckets),
                ("a URL for --out", "://" in (self.out or "")),
                ("--executor ray", self.executor == "ray"),
            ):
                if is_set and unfit:
                    raise ValueError(
                        f"{flag}: not available with {other}: encode the images as another set, "
                        "with their own --source and --out"
                    )
        if self.source.kind == "scenes" and self.split not in SPLITS:
            raise ValueError(
                f"--split: expected {', '.join(SPLITS)} for scenes, found {self.split!r}"
            )
