"""What PyTorch itself offers for less memory, applied as its users apply it."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Iterator

import torch
from torch import nn
from torch._functorch import config as functorch_config
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from .models import Example

SEGMENTS = 4  # of a model that is one long Sequential
ACTIVATION_BUDGETS = (1.0, 0.75, 0.5, 0.25, 0.0)


def checkpointed(example: Example) -> nn.Module:
    """A copy of the module, each block under torch.utils.checkpoint: by the model's own switch where it has one."""
    module = copy.deepcopy(example.module)
    if getattr(module, "supports_gradient_checkpointing", False):  # transformers
        module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    elif hasattr(module, "enable_gradient_checkpointing"):  # diffusers
        module.enable_gradient_checkpointing()
    elif layers := [m for m in module.modules() if hasattr(m, "memory_efficient")]:  # torchvision's DenseNet
        for layer in layers:
            layer.memory_efficient = True
    elif example.blocks == ("Sequential",):
        whole = max((m for m in module.children() if isinstance(m, nn.Sequential)), key=len)
        whole.forward = functools.partial(checkpoint_sequential, nn.Sequential(*whole), SEGMENTS, use_reentrant=False)
    else:
        for block in [m for m in module.modules() if type(m).__name__ in example.blocks]:
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    return module


@contextlib.contextmanager
def activation_memory_budget(example: Example, fraction: float) -> Iterator[nn.Module]:
    """The module compiled by aot_eager, its partitioner told to save that fraction; compiled when it is first called."""
    torch._dynamo.reset()
    with functorch_config.patch(activation_memory_budget=fraction):
        yield torch.compile(example.module, backend="aot_eager")
    torch._dynamo.reset()
