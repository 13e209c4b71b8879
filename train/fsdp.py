"""FSDP: one network sharded over the processes, for networks that exceed one GPU's memory.

Each process keeps its shard of every weight, gradient, moment and average, and gathers a block's
weights while the block computes (ZeRO stage 3: Rajbhandari et al. 2020, 1910.02054; FSDP: Zhao et
al. 2023, 2304.11277). The trade-off: weights are sent in every forward and backward pass, not only
gradients. Checkpoints and bundles hold full tensors, so a run can resume on any number of
processes, with or without FSDP.
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

from latent_t2i.train.prepare import blocks


def apply_fsdp(unet: UNet2DConditionModel, accelerator: Accelerator) -> None:
    """Shards a network in place. All processes must hold the same weights.

    Weights are gathered in the training precision; gradients are reduced in float32.
    """
    in_bf16 = accelerator.mixed_precision == "bf16"
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if in_bf16 else None, reduce_dtype=torch.float32
    )
    # PyTorch's own call: accelerate (1.15) shards nothing on CPUs, so tests there would prove
    # nothing about GPUs.
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    # The root is resharded after a pass too, so that between passes every parameter is a DTensor.
    for block in (*blocks(unet), unet):
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=True)


def is_fsdp(unet: nn.Module) -> bool:
    """Returns whether a network is sharded, so that all processes must join each forward pass."""
    return isinstance(unet, FSDPModule)


@contextmanager
def no_gradient_sync(
    accelerator: Accelerator, unet: UNet2DConditionModel, model: nn.Module
) -> Iterator[None]:
    """Accumulates gradients locally; the next backward pass outside the context reduces them."""
    if isinstance(unet, FSDPModule):
        unet.set_requires_gradient_sync(False)
        yield
        unet.set_requires_gradient_sync(True)
    else:
        with accelerator.no_sync(model):
            yield


def full_tensors(tensors: Mapping[str, Tensor], *, keep: bool) -> dict[str, Tensor]:
    """Returns full tensors, gathered ones on the CPU; an empty dict in processes without `keep`.

    A collective call: all processes must make it with the same names.
    """
    found = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, DTensor):
            gathered = tensor.full_tensor()  # also where it is discarded: a collective
            tensor = gathered.cpu() if keep else gathered
        if keep:
            found[name] = tensor
    return found


def local_shard(tensor: Tensor, like: Tensor) -> Tensor:
    """Returns this process's shard of a full tensor, sharded as `like` is."""
    if not isinstance(like, DTensor):
        return tensor
    # Every process has the full tensor, so no data has to be sent.
    return distribute_tensor(
        tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None
    )
