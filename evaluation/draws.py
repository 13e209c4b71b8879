"""Which images an evaluation draws, and their folders.

A folder's name ends in a hash of the bundle, prompts, seeds and settings. The same command
therefore finds its finished images again, and changed settings never mix with older images.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from latent_t2i.evaluation.config import EvaluationConfig
from latent_t2i.evaluation.metrics.metric import Item
from latent_t2i.evaluation.processes import Group
from latent_t2i.sample.config import DrawSettings
from latent_t2i.sample.folder import Picture, draw_folder, picture_path

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

FOLDER = "pictures"
NUM_DIVERSE = 4
"""Images per prompt for diversity."""


@dataclass(frozen=True, kw_only=True)
class Draw:
    """Images of some prompts with one bundle and one set of settings."""

    name: str
    items: Sequence[Item]
    seeds: Sequence[int]
    settings: DrawSettings
    identity: Mapping[str, str]
    """The bundle's path and sha256, and the data type."""

    @property
    def pictures(self) -> list[Picture]:
        return [
            Picture(prompt=item.captions[0], seed=seed, settings=self.settings)
            for item, seed in zip(self.items, self.seeds, strict=True)
        ]

    @property
    def folder(self) -> Path:
        """The folder of the images, relative to the output."""
        content = [
            [item.captions[0] for item in self.items], list(self.seeds), asdict(self.settings),
            {name: value for name, value in self.identity.items() if name != "bundle"},
        ]  # fmt: skip
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        return Path(FOLDER) / f"{self.name}-{digest[:10]}"

    def paths(self, out: Path) -> list[Path]:
        """Returns the file of each item."""
        return [picture_path(out / self.folder, number) for number in range(len(self.items))]

    def draw(
        self,
        pipeline: "StableDiffusionPipeline",
        out: Path,
        group: Group,
        *,
        batch_size: int,
        guide: Any = None,
    ) -> None:
        """Draws the images that are missing; returns when those of all processes exist."""
        draw_folder(
            pipeline,
            self.pictures,
            out / self.folder,
            batch_size=batch_size,
            identity=self.identity,
            rank=group.rank,
            world_size=group.world_size,
            title=self.name,
            guide=guide,
        )
        if group.world_size > 1:
            dist.barrier()


def main_settings(config: EvaluationConfig) -> DrawSettings:
    """Returns the settings of the main images."""
    return DrawSettings(
        guidance_scale=config.guidance_scale,
        guidance_interval=config.guidance_interval,
        num_steps=config.num_steps,
        scheduler=config.scheduler,
    )


def seeds_of(items: Sequence[Item], seed: int) -> list[int]:
    """Returns the seed of each item: `seed` plus its number within its group.

    A prompt has the same seed at all settings, and whatever the other groups.
    """
    counts: dict[str, int] = {}
    seeds = []
    for item in items:
        number = counts.get(item.group, 0)
        seeds.append(seed + number)
        counts[item.group] = number + 1
    return seeds


def part_of(items: Sequence[Item], num: int) -> list[int]:
    """Returns the indices of the first `num` items of each group."""
    counts: dict[str, int] = {}
    chosen = []
    for index, item in enumerate(items):
        number = counts.get(item.group, 0)
        counts[item.group] = number + 1
        if number < num:
            chosen.append(index)
    return chosen


def diverse_items(items: Sequence[Item], num_prompts: int) -> list[Item]:
    """Returns NUM_DIVERSE items for each of the first prompts."""
    repeated = [item for item in items[:num_prompts] for _ in range(NUM_DIVERSE)]
    return [replace(item, position=number, group="diverse") for number, item in enumerate(repeated)]
