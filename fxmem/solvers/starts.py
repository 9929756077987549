"""States to begin a search from: everything kept, and checkpoints at equal distances (Chen et al. 2016, sqrt(N) memory)."""

from __future__ import annotations

from collections.abc import Sequence

from ..schedule import Schedule
from .stages import Compiled, members
from .state import desires

SEGMENT_COUNTS = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)


def starting_states(compiled: Compiled, starts: Sequence[Schedule] = ()) -> list[tuple[int, ...]]:
    """The given schedules, everything kept, nothing kept, and segments of equal bytes, as wishes for each stage."""
    count = len(compiled.stages)
    everything = (1 << len(compiled.sizes)) - 1
    found = [tuple(desires(compiled, schedule)) for schedule in starts]
    found += [(everything,) * count, (0,) * count]
    total_bytes = sum(compiled.sizes)
    for segments in SEGMENT_COUNTS:
        if segments < len(compiled.sizes):
            found.append(tuple(_segmented(compiled, max(1, total_bytes // segments))))
    return found


def _segmented(compiled: Compiled, segment_bytes: int) -> list[int]:
    """Keep only what a later segment reads until the backward reaches a segment; from then on all of that segment."""
    owner, filled = [], 0
    for size in compiled.sizes:
        owner.append(filled // segment_bytes)
        filled += size
    crossing = 0
    for again in compiled.recomputes.values():
        made_in = max((owner[k] for k in members(again.outputs)), default=0)
        crossing |= sum(1 << k for k in members(again.inputs) if owner[k] < made_in)
    inside = [0] * (owner[-1] + 1 if owner else 1)
    for k, segment in enumerate(owner):
        inside[segment] |= 1 << k
    wishes, reached = [], crossing
    for stage in compiled.stages:
        wishes.append(reached)
        for k in members(stage.needs):
            reached |= inside[owner[k]]
    return wishes
