"""Whether two modules' training steps leave the same behind: outputs, gradients and buffers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.utils._pytree as pytree
from torch import nn

from fxmem.measuring import backward_roots

from .models import Example


@dataclass(frozen=True)
class StepResult:
    """All that one step leaves, in the modules' own order; on the CPU."""

    outputs: list[torch.Tensor]
    gradients: list[torch.Tensor | None]
    buffers: list[torch.Tensor]


@dataclass(frozen=True)
class Difference:
    """gradient: the largest, over the parameters, of |a - b| / |a| in the largest norm; the flags are about equal bits."""

    gradient: float
    equal_outputs: bool
    equal_gradients: bool
    equal_buffers: bool


def step_result(module: nn.Module, example: Example, seed: int = 1) -> StepResult:
    """Run one step of `module` on the example's inputs; its gradients and buffers are afterwards what they were."""
    buffers = [(b, b.detach().clone()) for name, b in module.named_buffers() if not name.startswith("fxmem_regions.")]
    torch.manual_seed(seed)
    outputs = module(*example.args, **example.kwargs)
    roots = backward_roots(outputs)
    torch.autograd.backward(roots, [torch.ones_like(root) for root in roots])
    result = StepResult(
        [t.detach().cpu() for t in pytree.tree_leaves(outputs) if isinstance(t, torch.Tensor)],
        [None if p.grad is None else p.grad.cpu() for p in module.parameters()],
        [b.detach().to("cpu", copy=True) for b, _ in buffers],
    )
    module.zero_grad(set_to_none=True)
    with torch.no_grad():
        for buffer, value in buffers:
            buffer.copy_(value)
    return result


def difference(a: StepResult, b: StepResult) -> Difference:
    """How far b is from a."""
    relative = [_relative(x, y) for x, y in zip(a.gradients, b.gradients, strict=True)]
    return Difference(
        max(relative, default=0.0), _equal(a.outputs, b.outputs), _equal(a.gradients, b.gradients), _equal(a.buffers, b.buffers)
    )


def _relative(a: torch.Tensor | None, b: torch.Tensor | None) -> float:
    if a is None or b is None:
        return 0.0 if a is b else float("inf")
    largest, apart = a.abs().max().item(), (a - b).abs().max().item()
    return 0.0 if apart == 0 else apart / largest if largest else float("inf")


def _equal(a: list, b: list) -> bool:
    return len(a) == len(b) and all(x is y if x is None or y is None else torch.equal(x, y) for x, y in zip(a, b, strict=True))
