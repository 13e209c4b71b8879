"""One network shared out over the processes, for networks that do not fit into one GPU's memory.

Each process keeps its share of every weight, gradient, moment and average; a block's weights are
brought together for as long as it computes (ZeRO stage 3: Rajbhandari et al. 2020, 1910.02054;
FSDP: Zhao et al. 2023, 2304.11277). The price is that weights travel in each forward and backward
pass, not only gradients. Checkpoints and bundles hold whole tensors, so a run goes on with any
number of processes, shared out or not.

It is PyTorch's `fully_shard`, called here and not by accelerate (1.15), which shares nothing out
between processes on a CPU: what is tested on CPUs is then what runs on GPUs.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


def apply_fsdp(unet: UNet2DConditionModel, accelerator: Accelerator) -> None:
    """Leaves this process its share of each weight, in place; all processes must hold the same.

    Weights travel in the precision of training, gradients are added up in float32.
    """
    in_bf16 = accelerator.mixed_precision == "bf16"
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if in_bf16 else None, reduce_dtype=torch.float32
    )
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    # The root too goes back to shares after a pass: outside passes all there is are shares.
    for block in (*unet.down_blocks, unet.mid_block, *unet.up_blocks, unet):
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=True)


def is_shared(unet: nn.Module) -> bool:
    """Whether a network is shared out, so that all processes must take part in each pass of it."""
    return isinstance(unet, FSDPModule)


@contextmanager
def without_exchange(
    accelerator: Accelerator, unet: UNet2DConditionModel, model: nn.Module
) -> Iterator[None]:
    """Within it gradients add up in each process; the next backward pass outside exchanges them."""
    if isinstance(unet, FSDPModule):
        unet.set_requires_gradient_sync(False)
        yield
        unet.set_requires_gradient_sync(True)
    else:
        with accelerator.no_sync(model):
            yield


def full_tensors(tensors: Mapping[str, Tensor], *, keep: bool) -> dict[str, Tensor]:
    """Returns whole tensors, of shared ones on the CPU; nothing in processes that do not `keep`.

    All processes must call it alike.
    """
    found = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, DTensor):
            together = tensor.full_tensor()  # also for those that let it go at once
            tensor = together.cpu() if keep else together
        if keep:
            found[name] = tensor
    return found


def part_of(tensor: Tensor, like: Tensor) -> Tensor:
    """Returns what this process keeps of a whole tensor, shared out as `like` is."""
    if not isinstance(like, DTensor):
        return tensor
    # Every process has read the same file, so nothing has to be sent.
    return distribute_tensor(
        tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None
    )


def parts_of(tensors: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns what this process keeps of whole tensors; those without a namesake stay whole."""
    return {name: part_of(t, like[name]) if name in like else t for name, t in tensors.items()}
