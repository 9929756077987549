"""Which buffers of a step lie in its arena, where, and why the others do not. No torch.

The arena is there for the whole step, so what it takes at one moment cannot serve others at another: a step in an arena holds
the arena's bytes and, beside them, the most that lies outside at any moment. Where that is above the limit, buffers are left
out one after another, at the arena's own fullest moment first, those that the outside has room for.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..problem import Problem
from ..schedule import Schedule, simulate
from ..units import format_percent
from .intervals import Interval
from .lifetimes import Buffer, buffers_of
from .offsets import OffsetPlan, plan_offsets

OVER_LIMIT = "the arena and all outside of it would be above the limit"
TIME_LIMIT_S = 5.0


@dataclass(frozen=True)
class Place:
    """One buffer of a step.

    name: of the first storage in it. operator: what makes it. [begin, end): the steps in which it is alive. kind: of storage.
    offset: bytes from the arena's start; None for what is outside, and then `reason` says why.
    """

    name: str
    operator: str
    kind: str
    size_bytes: int
    begin: int
    end: int
    offset: int | None
    reason: str


@dataclass(frozen=True)
class ArenaPlan:
    """Where the buffers of one schedule lie: `places[i]` is buffer i of `fxmem.memory.buffers_of`.

    arena_bytes: of the one allocation. lower_bound_bytes: the most of it that is alive at once. peak_bytes: of the step, the
    arena and all else that is alive counted.
    """

    places: tuple[Place, ...]
    arena_bytes: int
    lower_bound_bytes: int
    peak_bytes: int

    @property
    def inside(self) -> tuple[Place, ...]:
        """What lies in the arena."""
        return tuple(p for p in self.places if p.offset is not None)

    @property
    def outside(self) -> tuple[Place, ...]:
        """What the allocator serves."""
        return tuple(p for p in self.places if p.offset is None)

    @property
    def share(self) -> float:
        """The bytes that are made in the arena, as a fraction of all bytes that the step makes."""
        made_bytes = sum(p.size_bytes for p in self.places)
        return sum(p.size_bytes for p in self.inside) / made_bytes if made_bytes else 0.0

    def why_outside(self) -> dict[str, tuple[int, int]]:
        """By reason, how many buffers are outside of the arena and how many bytes they have, the most bytes first."""
        found: dict[str, tuple[int, int]] = {}
        for place in self.outside:
            count, size_bytes = found.get(place.reason, (0, 0))
            found[place.reason] = count + 1, size_bytes + place.size_bytes
        return dict(sorted(found.items(), key=lambda item: -item[1][1]))

    def __str__(self) -> str:
        """A table: sums, then a line for each buffer."""
        lines = [
            f"arena of {self.arena_bytes:,} bytes for {len(self.inside)} of {len(self.places)} buffers, "
            f"{format_percent(self.share, 0)} of the bytes; peak with it {self.peak_bytes:,} bytes",
            *(f"  outside: {n} buffers, {size:,} bytes: {why}" for why, (n, size) in self.why_outside().items()),
            "",
            f"{'buffer':<44}{'bytes':>14}{'steps':>14}  where",
        ]
        for p in self.places:
            where = p.reason if p.offset is None else f"{p.offset:,} to {p.offset + p.size_bytes:,}"
            lines.append(f"{p.name:<44}{p.size_bytes:>14,}{f'{p.begin} to {p.end - 1}':>14}  {where}")
        return "\n".join(lines)


def plan_arena(
    problem: Problem,
    schedule: Schedule,
    reasons: Mapping[int, str],
    limit_bytes: int | None = None,
    alignment: int = 64,
    time_limit_s: float = TIME_LIMIT_S,
) -> ArenaPlan:
    """Place the buffers of a schedule (`buffers_of`) in one arena.

    reasons: why buffers, by index, have to stay outside. What the step hands out, at its end or by its "return", always does.
    limit_bytes: what the peak of the step, arena included, is to stay within; at least the schedule's own peak is allowed.
    alignment: of offsets, bytes; a power of two. Offsets have been verified (`fxmem.memory.verify`).
    """
    buffers, during = buffers_of(problem, schedule), np.array(simulate(problem, schedule).during_bytes, np.int64)
    handed_out = problem.outputs | problem.returned
    why = dict(reasons)
    why |= {i: _handed_out(problem, b) for i, b in enumerate(buffers) if b.outside or handed_out & set(b.storages)}
    candidates = [i for i in range(len(buffers)) if i not in why]
    limit_bytes = max(int(during.max(initial=problem.fixed_bytes)), limit_bytes or 0)
    plan, chosen, peak_bytes = _within(buffers, candidates, during, limit_bytes, alignment, time_limit_s)
    why |= dict.fromkeys(set(candidates) - set(chosen), OVER_LIMIT)
    offset_of = dict(zip(chosen, plan.offsets, strict=True))
    places = []
    for i, buffer in enumerate(buffers):
        operator = problem.operators[schedule.steps[buffer.users[0]]]
        kind, begin, end = problem.storages[buffer.storages[0]].kind, buffer.users[0], _end(buffer, len(during))
        places.append(Place(buffer.name, operator.name, kind, buffer.size_bytes, begin, end, offset_of.get(i), why.get(i, "")))
    return ArenaPlan(tuple(places), plan.arena_bytes, plan.lower_bound_bytes, peak_bytes)


def _handed_out(problem: Problem, buffer: Buffer) -> str:
    gradient = any(problem.storages[s].kind == "gradient" for s in buffer.storages)
    return "a gradient that is handed out" if gradient else "an output of the module"


def _end(buffer: Buffer, steps: int) -> int:
    return steps if buffer.outside else buffer.users[-1] + 1


def _within(
    buffers: Sequence[Buffer], candidates: list[int], during: np.ndarray, limit_bytes: int, alignment: int, time_limit_s: float
) -> tuple[OffsetPlan, list[int], int]:
    """The offsets of as many candidates as the limit allows, which these are, and the step's peak."""
    balance, deadline = _Balance(buffers, candidates, during, alignment), time.monotonic() + time_limit_s
    while True:
        balance.leave_out(limit_bytes)
        chosen = sorted(balance.chosen)
        intervals = [
            Interval(str(i), buffers[i].users[0], buffers[i].users[-1] + 1, balance.sizes[i], alignment) for i in chosen
        ]
        plan = plan_offsets(intervals, time_limit_s=max(0.0, deadline - time.monotonic()))
        peak_bytes = plan.arena_bytes + int(balance.outside.max(initial=0))
        if peak_bytes <= limit_bytes or not chosen:
            return plan, chosen, peak_bytes
        limit_bytes -= max(alignment, plan.arena_bytes - int(balance.inside.max()))  # gaps between the slots take room, too


class _Balance:
    """Bytes inside and outside at each step, as buffers move from the one to the other."""

    def __init__(self, buffers: Sequence[Buffer], candidates: list[int], during: np.ndarray, alignment: int):
        self.spans = {i: slice(buffers[i].users[0], buffers[i].users[-1] + 1) for i in candidates}
        self.bytes = {i: buffers[i].size_bytes for i in candidates}
        self.sizes = {i: -(-size // alignment) * alignment for i, size in self.bytes.items()}
        self.inside, self.outside = np.zeros_like(during), during.copy()
        self.chosen = set(candidates)
        for i in candidates:
            self.inside[self.spans[i]] += self.sizes[i]
            self.outside[self.spans[i]] -= self.bytes[i]

    def leave_out(self, limit_bytes: int) -> None:
        """Move buffers outside until the two greatest sums are within the limit together."""
        while self.chosen and int(self.inside.max()) + int(self.outside.max()) > limit_bytes:
            fullest, most = int(self.inside.argmax()), int(self.outside.max())
            alive = [i for i in self.chosen if self.spans[i].start <= fullest < self.spans[i].stop]
            left = min(
                alive, key=lambda i: (max(0, int(self.outside[self.spans[i]].max()) + self.bytes[i] - most), -self.bytes[i], i)
            )
            self.chosen.remove(left)
            self.inside[self.spans[left]] -= self.sizes[left]
            self.outside[self.spans[left]] += self.bytes[left]
