"""Running a step in an arena: one allocation, a tensor over its slice for each planned result, kept from step to step.

Each slice is a storage of its own that cannot grow, so that an operator whose result is larger fails before it writes; and a
tensor with a version counter of its own, since autograd would take a write to one slice for a write to all.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import ArenaError
from ..torch_internals import OpOverload

log = logging.getLogger(__name__)

MISFITS = {  # what operators say of the memory that they are given
    "not resizable": "it takes more bytes",
    "scalar type": "it has another dtype",
    "can't be cast": "it has another dtype",
    "dtype": "it has another dtype",
}


@dataclass(frozen=True)
class Slot:
    """Where one result of an operator lies.

    keyword: by which the operator is told. offset: bytes from the arena's start; None where the allocator serves it.
    begin, end: the steps of the schedule in which what lies there is alive, half-open.
    """

    keyword: str
    offset: int | None
    size_bytes: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    begin: int
    end: int


@dataclass(frozen=True)
class Layout:
    """arena_bytes: of the one allocation, on a device of this type. slots: for each node that writes into it, one for each of
    its results."""

    arena_bytes: int
    device_type: str
    slots: Mapping[str, tuple[Slot, ...]]


class Unplanned:
    """Stands in for an arena where there is none: each result has memory of its own from the allocator, until it dies."""

    def __init__(self, layout: Layout, device: torch.device):
        self.layout, self.device = layout, device

    def write(self, node: str, operator: OpOverload, *args: Any, **kwargs: Any) -> Any:
        """Run an operator into the memory planned for `node`; its result, or a tuple of them. Raises ArenaError."""
        slots, tensors = self.layout.slots[node], self._tensors(node)
        addresses = [t.data_ptr() for t in tensors]
        try:
            operator(*args, **kwargs, **{s.keyword: t for s, t in zip(slots, tensors, strict=True)})
        except RuntimeError as error:
            told = next((what for text, what in MISFITS.items() if text in str(error)), None)
            if told is None:
                raise
            raise ArenaError(_misfit(node, operator, told)) from error
        for tensor, slot, address in zip(tensors, slots, addresses, strict=True):
            if tensor.shape != slot.shape or tensor.stride() != slot.stride or tensor.data_ptr() != address:
                lies = f"it has shape {tuple(tensor.shape)} and strides {tensor.stride()}"
                raise ArenaError(_misfit(node, operator, f"{lies}, planned were {slot.shape} and {slot.stride}"))
        return tensors[0] if len(tensors) == 1 else tensors

    def _tensors(self, node: str) -> tuple[torch.Tensor, ...]:
        return tuple(self._fresh(slot) for slot in self.layout.slots[node])

    def _fresh(self, slot: Slot) -> torch.Tensor:
        return torch.empty_strided(slot.shape, slot.stride, dtype=slot.dtype, device=self.device)


class Arena(Unplanned):
    """One allocation and the tensors over its slices. Raises ArenaError where it cannot be allocated."""

    def __init__(self, layout: Layout, device: torch.device):
        super().__init__(layout, device)
        self.stream = _stream(device)
        try:
            with torch.inference_mode(False):
                self._memory = torch.empty(layout.arena_bytes, dtype=torch.uint8, device=device)
                self._over = {node: tuple(map(self._slice, slots)) for node, slots in layout.slots.items()}
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise ArenaError(
                f"an arena of {layout.arena_bytes:,} bytes cannot be allocated on {device} ({reason}): lower the budget or the "
                "batch, or transform without the arena"
            ) from error

    def _tensors(self, node: str) -> tuple[torch.Tensor, ...]:
        over = self._over[node]
        if None not in over:
            return over
        return tuple(self._fresh(s) if t is None else t for t, s in zip(over, self.layout.slots[node], strict=True))

    def _slice(self, slot: Slot) -> torch.Tensor | None:
        if slot.offset is None:
            return None
        storage = self._memory.untyped_storage()[slot.offset : slot.offset + slot.size_bytes]
        return torch.empty(0, dtype=slot.dtype, device=self.device).set_(storage, 0, slot.shape, slot.stride)


class ArenaPool:
    """The arenas of one layout: one is kept for the next step, a forward that begins while it is in use gets another."""

    def __init__(self, layout: Layout):
        self.layout = layout
        self._kept: list[Arena] = []
        self._in_use: weakref.WeakSet[Arena] = weakref.WeakSet()

    def __reduce__(self):
        return ArenaPool, (self.layout,)

    def __deepcopy__(self, memo: dict) -> ArenaPool:
        return ArenaPool(self.layout)

    def lend(self, device: torch.device) -> Lease:
        """An arena for one step; where none can be allocated, the step runs without."""
        stream = _stream(device)
        arena = next((a for a in self._kept if (a.device, a.stream) == (device, stream)), None)
        if arena is not None:
            self._kept.remove(arena)
        else:
            self.keep_none()  # of another device
            try:
                arena = Arena(self.layout, device)
            except ArenaError as error:
                log.warning("%s. This step runs without an arena", error)
                return Lease(Unplanned(self.layout, device), None)
        self._in_use.add(arena)
        return Lease(arena, self)

    def take_back(self, arena: Arena) -> None:
        """What was lent is free again; no more than one is kept."""
        if arena in self._in_use:
            self._in_use.discard(arena)
            if not self._kept:
                self._kept.append(arena)

    def keep_none(self) -> None:
        """Let go of what is kept, not of what is in use."""
        self._kept.clear()

    def release(self) -> None:
        """Let go of the memory: now of what is kept, and of what is in use when its step is over."""
        self.keep_none()
        self._in_use = weakref.WeakSet()

    @property
    def allocated_bytes(self) -> int:
        """Of all arenas that are kept or in use."""
        return self.layout.arena_bytes * (len(self._kept) + len(self._in_use))


class Lease:
    """An arena for as long as one forward call's values live: until the end of its backward, or until nobody holds them."""

    _pool: ArenaPool | None = None

    def __init__(self, arena: Unplanned, pool: ArenaPool | None):
        self.arena, self._pool = arena, pool

    def end(self) -> None:
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.take_back(self.arena)

    def __del__(self):
        self.end()


def lend(pool: ArenaPool | None, tensors: Iterable[torch.Tensor]) -> Lease | None:
    """A lease from the pool, if there is one, for the device of the given tensors."""
    if pool is None:
        return None
    device = next(t.device for t in tensors if t.device.type == pool.layout.device_type)
    return pool.lend(device)


def _stream(device: torch.device) -> Any:
    """On CUDA, memory is free for another step once that is on the same stream."""
    return torch.cuda.current_stream(device) if device.type == "cuda" else None


def _misfit(node: str, operator: OpOverload, what: str) -> str:
    return f"the result of node {node!r} ({operator}) does not fit its slice of the arena: {what}; transform without the arena"
