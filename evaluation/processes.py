"""The processes of one evaluation, as `accelerate launch -m evaluation.run` starts them.

The metrics exchange sums and numbers per image at the end of a row only, through gloo on the CPU,
so that a GPU's backend and its time-outs play no part.
"""

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")
TIMEOUT = timedelta(hours=24)  # the ranks finish their shares of the images at different times


@dataclass(frozen=True, kw_only=True)
class Group:
    """This process's number among all of them."""

    rank: int = 0
    world_size: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """Returns the values of all processes, by rank; every process must call it."""
        if self.world_size == 1:
            return [value]
        found: list[T] = [value] * self.world_size
        dist.all_gather_object(found, value)
        return found


def start_group() -> Group:
    """Returns the group that the launcher's environment describes; one process without it."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1:
        return Group()
    if not dist.is_initialized():
        dist.init_process_group("gloo", timeout=TIMEOUT)
    return Group(rank=dist.get_rank(), world_size=world_size)
