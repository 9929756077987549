"""Other ways to place the same intervals, to hold plans against: bytes that each needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fxmem.memory import Interval
from fxmem.memory.greedy import orders, place
from fxmem.memory.intervals import Sections

KIB, MIB = 1 << 10, 1 << 20


def other_allocators(intervals: Sequence[Interval]) -> dict[str, int]:
    """By name the bytes of: greedy by size and by breadth (TensorFlow Lite's two), best fit as requests come, and PyTorch's
    caching allocator."""
    sections = Sections(intervals)
    if not sections.count:
        return dict.fromkeys(("by size", "by breadth", "best fit", "caching allocator"), 0)
    order = orders(sections)
    placed = {name: place(sections, order[name]) for name in ("by size", "by breadth")}
    as_they_come = np.argsort([intervals[i].begin for i in sections.index], kind="stable")
    placed["best fit"] = place(sections, as_they_come, best_fit=True)
    needed = {name: int((offsets + sections.sizes).max()) for name, offsets in placed.items()}
    return needed | {"caching allocator": caching_allocator_bytes(intervals)}


@dataclass(eq=False)
class _Block:
    """Bytes of a segment, taken or free, between two others of it."""

    size_bytes: int
    before: _Block | None = None
    after: _Block | None = None
    taken: bool = True


def caching_allocator_bytes(intervals: Sequence[Interval]) -> int:
    """What PyTorch's CUDA caching allocator has reserved in the end (c10/cuda/CUDACachingAllocator.cpp, default settings).

    Sizes are rounded up to 512 bytes. Up to 1 MiB they come from segments of 2 MiB, below 10 MiB from segments of 20 MiB, and
    else from a segment of their own, rounded up to 2 MiB; of the free blocks the smallest that holds them, split where enough
    is left; what is freed is merged with its neighbours.
    """
    free: dict[bool, list[_Block]] = {True: [], False: []}  # small ones, and the others
    reserved, taken = 0, {}
    events = [(v.begin, 1, i) for i, v in enumerate(intervals)] + [(v.end, 0, i) for i, v in enumerate(intervals)]
    for _, begins, i in sorted(events):
        size_bytes = -(-intervals[i].size_bytes // 512) * 512
        if not size_bytes or intervals[i].begin == intervals[i].end:
            continue
        small = size_bytes <= MIB
        if not begins:
            _give_back(taken.pop(i), free[small])
            continue
        fitting = [b for b in free[small] if b.size_bytes >= size_bytes]
        if fitting:
            block = min(fitting, key=lambda b: b.size_bytes)
            free[small].remove(block)
        else:
            own = -(-size_bytes // (2 * MIB)) * 2 * MIB
            block = _Block(2 * MIB if small else 20 * MIB if size_bytes < 10 * MIB else own)
            reserved += block.size_bytes
        _split(block, size_bytes, free[small], least=512 if small else MIB + 1)
        block.taken, taken[i] = True, block
    return reserved


def _split(block: _Block, size_bytes: int, free: list[_Block], least: int) -> None:
    rest = block.size_bytes - size_bytes
    if rest < least:
        return
    block.size_bytes = size_bytes
    block.after = other = _Block(rest, block, block.after, taken=False)
    if other.after:
        other.after.before = other
    free.append(other)


def _give_back(block: _Block, free: list[_Block]) -> None:
    block.taken = False
    for other in (block.before, block.after):
        if other and not other.taken:
            free.remove(other)
            block.size_bytes += other.size_bytes
            if other is block.before:
                block.before = other.before
                if block.before:
                    block.before.after = block
            else:
                block.after = other.after
                if block.after:
                    block.after.before = block
    free.append(block)
