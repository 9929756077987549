"""What plans take for granted of the values of parameters: looked at when a step is planned, and again at each call."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from torch import fx, nn

from .errors import ImplementationError
from .torch_internals import FakeTensor

HOLDS_UP_TO = 1.0
OFFERED_UP_TO = 0.5  # so that a plan lasts: values move from step to step


@dataclass(frozen=True)
class ValueGuard:
    """A `Guard` of an implementation when a module's tensors have names: share_of_limit is given the tensors of these."""

    implementation: str
    share_of_limit: Callable[..., torch.Tensor]
    names: tuple[str, ...]

    @property
    def key(self) -> tuple[str, ...]:
        """What plans know it by."""
        return self.implementation, *self.names

    def __str__(self) -> str:
        return " and ".join(map(repr, self.names))


def guards_of(graph: fx.Graph) -> tuple[ValueGuard, ...]:
    """What has to hold for the operators that run in a graph."""
    return tuple(dict.fromkeys(node.meta["fxmem_guard"] for node in graph.nodes if "fxmem_guard" in node.meta))


@torch.no_grad()
def broken_guards(guards: Collection[ValueGuard], module: nn.Module, limit: float = HOLDS_UP_TO) -> list[ValueGuard]:
    """The guards whose share is above the limit, or NaN, and those of tensors that the module does not have. What fake or meta
    tensors would be is not known: it holds. Raises ImplementationError, naming it, for a guard that fails."""
    tensors = {guard: [_tensor_at(module, name) for name in guard.names] for guard in guards}
    missing = [guard for guard, found in tensors.items() if any(t is None for t in found)]
    shares = {guard: _share(guard, found) for guard, found in tensors.items() if guard not in missing}
    known = {guard: share for guard, share in shares.items() if not (share.is_meta or isinstance(share, FakeTensor))}
    if not known:
        return missing
    values = torch.stack(list(known.values())).tolist()  # a GPU is waited for once
    return [*missing, *(guard for guard, value in zip(known, values, strict=True) if not value <= limit)]


def _share(guard: ValueGuard, tensors: list[torch.Tensor]) -> torch.Tensor:
    try:
        return torch.as_tensor(guard.share_of_limit(*tensors), device=tensors[0].device).float().reshape(())
    except Exception as error:
        raise ImplementationError(
            f"the guard of implementation {guard.implementation!r} fails on {guard}: {error}; it gives one number"
        ) from error


def is_offered(module: nn.Module, guard: ValueGuard) -> bool:
    """Whether a plan may go by what a guard watches, for a while."""
    return not broken_guards((guard,), module, OFFERED_UP_TO)


def _tensor_at(module: nn.Module, name: str) -> torch.Tensor | None:
    found = module
    for part in name.split("."):
        found = getattr(found, part, None)
    return found
