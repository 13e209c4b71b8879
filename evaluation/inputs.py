"""Everything that an evaluation reads before its long part, so that a mistake shows at once."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from latent_t2i.evaluation import contamination
from latent_t2i.evaluation.captions import Names, read_items
from latent_t2i.evaluation.compare import read_results
from latent_t2i.evaluation.config import EvaluationConfig
from latent_t2i.evaluation.curves import read_history
from latent_t2i.evaluation.data_card import locations_of
from latent_t2i.evaluation.images import Size, image_size, list_images
from latent_t2i.evaluation.metrics.metric import Item, Need
from latent_t2i.evaluation.objects import add_objects
from latent_t2i.evaluation.protocols import PROMPTS_FILE, chooses_prompts, protocol_items
from latent_t2i.evaluation.reals import FolderReals, Reals, SceneReals, open_folder
from latent_t2i.model.bundle import INFO_FILE, read_info
from latent_t2i.model.checks import read_json_object
from latent_t2i.model.paths import find_path, output_root
from latent_t2i.sample.pictures import choose_bundle
from latent_t2i.scenes.prompts import KINDS, make_prompts
from latent_t2i.scenes.world import CANVAS_PX
from latent_t2i.shards.buckets import holds_buckets, open_buckets
from latent_t2i.shards.reader import open_shards
from latent_t2i.shards.schema import FormatError


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """The inputs of an evaluation, read and checked."""

    out: Path
    items: Sequence[Item]
    """What is to be drawn, or what the finished images show."""
    size: Size
    """Size of the judged images, and of the reference where that is cropped."""
    fit: Size | None = None
    """Size to which the judged images are cropped and resized; None if they are judged as is."""
    bundle: Path | None = None
    info: Mapping[str, Any] | None = None
    history: Sequence[Mapping[str, Any]] | None = None
    images: Sequence[Path] | None = None
    """Finished images, one per item; None if a bundle draws them."""
    captions_by: str | None = None
    """How finished images and captions were paired: by file name, or by position."""
    reals: Reals | None = None
    statistics: Path | None = None
    """Statistics of the reference without its images."""
    train_shards: tuple[Path, ...] = ()
    """Folders of the training sets."""
    contamination: Mapping[str, Any] = field(default_factory=dict)
    """What contamination.check found, or why nothing was compared."""
    others: Sequence[tuple[str, Mapping[str, Any]]] = ()
    """Name and results of the evaluations to show beside this one."""

    @property
    def available(self) -> frozenset[Need]:
        """The inputs that metrics may need."""
        found: dict[Need, bool] = {
            "reference": self.reals is not None or self.statistics is not None,
            "captions": all(item.captions for item in self.items),
            "scenes": all(item.prompt and item.prompt.scene for item in self.items),
            "bundle": self.bundle is not None,
            "shards": bool(self.train_shards),
            "objects": any(item.objects for item in self.items),
        }
        return frozenset(need for need, present in found.items() if present)


def open_inputs(config: EvaluationConfig) -> Inputs:
    """Reads and checks the inputs; raises ValueError that names the faulty one."""
    out = Path(config.out) if config.out else output_root() / "runs" / config.name
    inputs = _finished_images(config, out) if config.images else _of_bundle(config, out)
    train_shards, unknown = train_shards_of(config, inputs.info)
    inputs = replace(inputs, train_shards=train_shards)
    reals, statistics = _open_reference(config, inputs)
    others = [read_results(name) for name in config.compare]
    inputs = replace(inputs, reals=reals, statistics=statistics, others=others)
    return replace(inputs, contamination=_check_contamination(config, inputs, unknown))


def _of_bundle(config: EvaluationConfig, out: Path) -> Inputs:
    folder = choose_bundle(config.bundle, config.name)
    info, history = _read_info(folder), _read_history(config.run, folder)
    drawn = _bundle_size(folder)
    size = (config.size, config.size) if config.size else drawn
    if config.oracle and size[0] != size[1]:
        raise ValueError(
            f"--oracle: the bundle generates images of {size[0]} x {size[1]} pixels, but the "
            "oracle needs square ones; expected --no-oracle and --captions"
        )
    items = add_objects(_make_items(config, out), config.objects)
    return Inputs(
        out=out, items=items, size=size, fit=None if size == drawn else size, bundle=folder,
        info=info, history=history,
    )  # fmt: skip


def _bundle_size(folder: Path) -> Size:
    """Returns width and height of a bundle's images."""
    unet = read_json_object(folder / "unet" / "config.json", {"sample_size": object})
    vae = read_json_object(folder / "vae" / "config.json")
    num_blocks = len(vae.get("block_out_channels") or vae.get("decoder_block_out_channels") or [0])
    side = unet["sample_size"]
    height, width = side if isinstance(side, list) else (side, side)
    factor = 2 ** (num_blocks - 1)
    return width * factor, height * factor


def _finished_images(config: EvaluationConfig, out: Path) -> Inputs:
    folder = Path(str(config.images))
    paths = list_images(folder, "--images")
    fit = (config.size, config.size) if config.size else None
    size = fit or image_size(paths[0])
    if config.captions is None:
        if config.objects is not None:
            raise ValueError(
                f"--objects: found {config.objects!r} with --images, but no --captions; expected "
                "captions, whose images' objects these are"
            )
        keys = [p.relative_to(folder).as_posix() for p in paths]
        items = [Item(position=number, key=key) for number, key in enumerate(keys)]
        return Inputs(out=out, items=items, size=size, fit=fit, images=paths)
    texts = _all_prompts(config, out, len(paths))
    items, captions_by = pair_captions(paths, folder, texts, config.captions)
    if captions_by == "position" and chooses_prompts(config.protocol):
        raise ValueError(
            f"--images: no image of {folder} has the name of a prompt, and --protocol "
            f"{config.protocol} has no public order; expected the names in {out / PROMPTS_FILE}, "
            f"such as {texts[0].key}"
        )
    items = add_objects(items, config.objects)
    return Inputs(out=out, items=items, size=size, fit=fit, images=paths, captions_by=captions_by)


def _all_prompts(config: EvaluationConfig, out: Path, num_images: int) -> list[Item]:
    """Returns the prompts that finished images may show; raises ValueError for a wrong number."""
    assert config.captions is not None
    if config.protocol == "own":
        return read_items(config.captions)
    if num_images != config.num_prompts:
        raise ValueError(
            f"--images: found {num_images} images with --protocol {config.protocol}, expected its "
            f"{config.num_prompts}; give all of them, or use --protocol own"
        )
    return protocol_items(config, out)


def pair_captions(
    paths: Sequence[Path], folder: Path, texts: Sequence[Item], name: str
) -> tuple[list[Item], str]:
    """Returns the captions of each image of a folder, and how they were paired.

    `texts` are all captions of the file `name`. They are paired by file name, or by position if no
    image has the name of a caption and there are as many images as captions. Raises ValueError that
    names the image if only some have the name of a caption. The items keep the captions' own keys,
    by which annotated objects and training images are found.
    """
    names = Names(texts)
    found = {path: names.find(path, folder) for path in paths}
    strays = [path for path, item in found.items() if item is None]
    if len(strays) == len(paths):
        return _by_position(paths, texts, name), "position"
    if strays:
        raise ValueError(
            f"--captions: {name} has captions of {len(paths) - len(strays)} of the {len(paths)} "
            f"images of --images by their file names, but none of {strays[0].relative_to(folder)}; "
            "expected captions of all, or of none by name and as many captions as images"
        )
    chosen = [item for item in found.values() if item is not None]
    repeated = Counter(item.key for item in texts)
    for item in chosen:
        if repeated[item.key] > 1:
            raise ValueError(
                f"--captions: {name} has {repeated[item.key]} prompts named {item.key}, as is an "
                "image of --images; expected one prompt of each name"
            )
    return [replace(item, position=n) for n, item in enumerate(chosen)], "file name"


def _by_position(paths: Sequence[Path], texts: Sequence[Item], name: str) -> list[Item]:
    if len(texts) != len(paths):
        raise ValueError(
            f"--captions: {name} has captions of {len(texts)} images, such as {texts[0].key}, but "
            f"none of the {len(paths)} images of --images by its file name, such as "
            f"{paths[0].name}; expected equal names, or as many captions as images"
        )
    print(
        "--captions: no image has the file name of a caption, so they are paired by position: "
        f"{paths[0].name} with {texts[0].key}, ..., {paths[-1].name} with {texts[-1].key}"
    )
    return list(texts)


def _make_items(config: EvaluationConfig, out: Path) -> list[Item]:
    """Returns the prompts as items, numbered over all kinds."""
    if config.protocol != "own":
        return protocol_items(config, out)
    if config.captions is not None:
        return read_items(config.captions, config.num_prompts)
    prompts = [
        (kind, prompt)
        for kind in KINDS
        for prompt in make_prompts(config.world, kind, config.num_prompts, config.seed)
    ]
    return [
        Item(position=n, key=f"{kind}-{n}", captions=(prompt.text,), prompt=prompt, group=kind)
        for n, (kind, prompt) in enumerate(prompts)
    ]


def _open_reference(config: EvaluationConfig, inputs: Inputs) -> tuple[Reals | None, Path | None]:
    if config.reference is None:
        scenes = inputs.bundle is not None and config.oracle
        return (SceneReals(items=inputs.items, size_px=CANVAS_PX) if scenes else None), None
    path = find_path(config.reference)
    if path is None:
        raise ValueError(
            f"--reference: no folder or file {config.reference!r} in the current directory or the "
            "project"
        )
    if path.is_file():
        return None, path
    known = Names(item for item in inputs.items if item.captions)
    same = inputs.images is not None and config.size is None
    return open_folder(path, known, None if same else inputs.size), None


def train_shards_of(
    config: EvaluationConfig, info: Mapping[str, Any] | None
) -> tuple[tuple[Path, ...], str]:
    """Returns the training sets: those given, else those that the bundle names, if present.

    If there is none, the text says why.
    """
    if config.train_shards is not None:
        return tuple(_given_shards(name) for name in config.train_shards), "--train-shards is empty"
    if info is None:
        return (), "the training set of the images is unknown; give it with --train-shards"
    names = locations_of(info["config"]) or (f"shards/data/{info['name']}/train",)
    hashes = info.get("shards_sha256")
    hashes = hashes if isinstance(hashes, list) else [hashes] * len(names)  # one set: one hash
    folders = []
    for named, sha256 in zip(names, hashes, strict=True):
        found = find_path(named) if "://" not in named else None
        if found is None or _shards_sha256(found) != sha256:
            fault = "is not a folder here" if found is None else "is another set by now"
            reason = f"the training set {named} {fault}; give a copy of it with --train-shards"
            print(f"memorisation: not checked: {reason}")
            return (), reason
        folders.append(found)
    return tuple(folders), ""


def _given_shards(name: str) -> Path:
    found = find_path(name)
    if found is None:
        raise ValueError(f"--train-shards: no folder {name!r}")
    return found


def _shards_sha256(folder: Path) -> str | None:
    """Returns the hash of a set of shards; None if the folder holds no finished one."""
    try:
        if holds_buckets(folder):
            return open_buckets(folder, verify="none").sha256
        return open_shards(folder, verify="none").sha256
    except FormatError:
        return None


def _check_contamination(
    config: EvaluationConfig, inputs: Inputs, unknown: str
) -> Mapping[str, Any]:
    """Returns what contamination.check found; raises ValueError unless it is allowed.

    `unknown` is why there are no training shards. Prints what could not be compared.
    """
    reals = inputs.reals if isinstance(inputs.reals, FolderReals) else None
    items = [item for item in inputs.items if not (item.prompt and item.prompt.scene)]
    items += reals.items if reals else ()
    if not items and inputs.statistics is None:
        return contamination.unchecked(
            contamination.NOT_NEEDED, "scenes are drawn for this evaluation from their own seeds"
        )
    if inputs.train_shards:
        found = contamination.check(items, inputs.train_shards, reals.paths if reals else ())
    else:
        found = contamination.unchecked(contamination.NOT_CHECKED, unknown)
    if inputs.train_shards and inputs.statistics is not None:
        found = _without_reference(found, inputs.statistics)
    if found["reason"]:
        print(f"contamination: {found['status']}: {found['reason']}")
    if found["count"] and not config.allow_contamination:
        examples = ", ".join(found["examples"][:3])
        folders = ", ".join(map(str, inputs.train_shards))
        raise ValueError(
            f"--captions or --reference: {found['count']} of the images are in the training set "
            f"{folders}, such as {examples}; expected images that the model has not seen: choose "
            "another split, or add --allow-contamination to continue with a mark in "
            "every result"
        )
    return found


def _without_reference(found: Mapping[str, Any], statistics: Path) -> dict[str, Any]:
    """Returns the check's record with the reason that a reference's images are unknown."""
    status = contamination.PARTLY if found["num_images_compared"] else contamination.NOT_CHECKED
    reason = f"{statistics.name} holds statistics of the reference without its images"
    return {**found, "status": status, "reason": "; ".join(filter(None, [found["reason"], reason]))}


def _read_info(folder: Path) -> dict[str, Any]:
    """Returns a bundle's info; raises ValueError if a field that the report shows is unusable."""
    info = read_info(folder)
    numbers = dict.fromkeys(("step", "num_parameters", "train_seconds"), int | float)
    for name, kind in (numbers | {"config": dict}).items():
        if not isinstance(info.get(name), kind):
            expected = "an object" if kind is dict else "a number"
            raise ValueError(
                f"{folder / INFO_FILE}: {name} is {info.get(name)!r}, expected {expected}"
            )
    return info


def _read_history(run: str | None, folder: Path) -> list[dict[str, Any]] | None:
    """Returns the training's metrics.jsonl; None if it is missing and `run` is not given."""
    path = (folder.parent if run is None else Path(run)) / "metrics.jsonl"
    if run is not None and not path.is_file():
        raise ValueError(f"--run: {path} does not exist; give the folder of the training run")
    return read_history(path) if path.is_file() else None
