"""Prepares the network for its device: memory format, activation checkpointing, compiled blocks.

The down, middle and up blocks are compiled one by one, not the network as a whole. Gradients are
then reduced while the backward pass of the other blocks runs, the names of the weights stay, and
FSDP can gather a block's weights at a time. The trade-off: nothing is fused across blocks.
"""

import warnings
from contextlib import AbstractContextManager
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

BACKEND = "inductor"
# Recompilations beyond one per block and shape, such as after a change of torch's settings.
SPARE_RECOMPILATIONS = 4


def blocks(unet: UNet2DConditionModel) -> list[nn.Module]:
    """Returns the blocks that are compiled and sharded, each on its own."""
    return [*unet.down_blocks, unet.mid_block, *unet.up_blocks]


def checkpoint_activations(unet: UNet2DConditionModel, *, dropout: float) -> None:
    """Makes the backward pass compute the blocks' activations again instead of storing them.

    Without dropout no random state is kept: reading it is not allowed while a CUDA graph captures.
    """

    def run(module: nn.Module, *inputs: Any) -> Any:
        # __call__ by name, as diffusers' own function does.
        return checkpoint(
            module.__call__, *inputs, use_reentrant=False, preserve_rng_state=dropout > 0
        )

    unet.enable_gradient_checkpointing(run)


def use_channels_last(unet: UNet2DConditionModel, *, sharded: bool) -> None:
    """Makes convolutions use the channels_last memory format.

    FSDP (`sharded`) accepts contiguous parameters only, so there each convolution converts its
    input, and the kernels convert the gathered weights.
    """
    if not sharded:
        unet.to(memory_format=torch.channels_last)
        return
    for module in unet.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_pre_hook(_to_channels_last)


def _to_channels_last(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (inputs[0].contiguous(memory_format=torch.channels_last), *inputs[1:])


def compile_blocks(unet: UNet2DConditionModel, *, num_shapes: int) -> None:
    """Compiles each block for every one of `num_shapes` latent shapes, at its first use.

    Each block is one graph also under DistributedDataParallel. The trade-off: the gradients of a
    block are reduced when its whole backward pass is done, not bucket by bucket within it.
    """
    parts = blocks(unet)
    # Blocks of one class share the limit, and beyond it a block silently runs without compilation.
    limit = len(parts) * num_shapes + SPARE_RECOMPILATIONS
    dynamo: Any = torch._dynamo.config
    dynamo.recompile_limit = max(dynamo.recompile_limit, limit)
    dynamo.accumulated_recompile_limit = max(dynamo.accumulated_recompile_limit, limit)
    # By default torch divides each block into a graph per bucket, for compiling whole networks.
    dynamo.optimize_ddp = False
    # diffusers asks for torch's version through a cache. Its value never changes.
    warnings.filterwarnings("ignore", message="Dynamo detected a call to a `functools.lru_cache`")
    for part in parts:
        part.compile(backend=BACKEND, dynamic=False)


def without_compilation() -> AbstractContextManager[None]:
    """Runs compiled blocks eagerly: another batch size or mode would compile them again."""
    context: AbstractContextManager[None] = torch.compiler.set_stance("force_eager")
    return context
