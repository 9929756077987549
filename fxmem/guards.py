"""What plans take for granted of the values of parameters: looked at when a step is planned, and again at each call."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from torch import fx, nn

from .torch_internals import FakeTensor, attribute_at

OFFERED = 0.5  # so that a plan lasts: values move from step to step


@dataclass(frozen=True)
class ValueGuard:
    """nearness: of the tensors that a module holds by these names (see `implementations.Guard`)."""

    nearness: Callable[..., torch.Tensor]
    names: tuple[str, ...]

    def __str__(self) -> str:
        return " and ".join(map(repr, self.names))


def guards_of(graph: fx.Graph) -> tuple[ValueGuard, ...]:
    """What has to hold for the operators that run in a graph."""
    return tuple(dict.fromkeys(node.meta["fxmem_guard"] for node in graph.nodes if "fxmem_guard" in node.meta))


@torch.no_grad()
def broken(guards: Collection[ValueGuard], module: nn.Module, limit: float = 1.0) -> list[ValueGuard]:
    """Those guards whose nearness is above the limit, or no number. Of tensors without values (fake, meta) all hold, of
    none at all none does."""
    found = [(guard, [attribute_at(module, f".{name}") for name in guard.names]) for guard in guards]
    missing = [guard for guard, tensors in found if any(t is None for t in tensors)]
    real = [(guard, tensors) for guard, tensors in found if not any(map(_has_no_values, tensors))]
    if not real:
        return missing
    values = torch.stack([guard.nearness(*tensors).double() for guard, tensors in real]).tolist()  # a GPU is waited for once
    return [*missing, *(guard for (guard, _), value in zip(real, values, strict=True) if not value <= limit)]


def _has_no_values(tensor: torch.Tensor | None) -> bool:
    return tensor is None or tensor.is_meta or isinstance(tensor, FakeTensor)
