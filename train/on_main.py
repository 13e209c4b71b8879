"""Work that the main process does for all: files are read and hashed once, not once per process.

Hundreds of processes that read the same gigabytes from a shared disk wait for it and for each
other. The trade-off: these are collective calls, which all processes must make in the same order.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from latent_t2i.train import fsdp

T = TypeVar("T")


def in_group() -> bool:
    """Returns whether this process belongs to a group of several."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def on_main(work: Callable[[], T]) -> T:
    """Runs `work` in the main process and returns its result in all processes.

    A ValueError or OSError of the main process is raised there, and with its text as a ValueError
    in the others.
    """
    if not in_group():
        return work()
    found: list[Any] = [None, None]
    failure: ValueError | OSError | None = None
    if dist.get_rank() == 0:
        try:
            found[0] = work()
        except (ValueError, OSError) as error:
            failure, found[1] = error, str(error)
    dist.broadcast_object_list(found, src=0)
    if failure is not None:
        raise failure
    result, message = found
    if message is not None:
        raise ValueError(message)
    return result


class SharedTensors(Mapping[str, Tensor]):
    """Tensors that the main process has read; each access sends one to all processes.

    So no process holds them all on its device. Under FSDP a process gets its shard of a tensor, as
    that of the same name in `like` is sharded.
    """

    def __init__(
        self, read: Mapping[str, Tensor], like: Mapping[str, Tensor], device: torch.device
    ) -> None:
        self._read = read
        self._like = like
        self._device = device
        self._layout: dict[str, tuple[torch.Size, torch.dtype]] = on_main(
            lambda: {name: (tensor.shape, tensor.dtype) for name, tensor in read.items()}
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self._layout)

    def __len__(self) -> int:
        return len(self._layout)

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._receive(name) if in_group() else self._read[name]
        return fsdp.local_shard(tensor, self._like[name]) if name in self._like else tensor

    def _receive(self, name: str) -> Tensor:
        shape, dtype = self._layout[name]
        if dist.get_rank() == 0:
            tensor = self._read[name].to(self._device)
        else:
            tensor = torch.empty(shape, dtype=dtype, device=self._device)
        dist.broadcast(tensor, src=0)
        return tensor
