"""Where each buffer lies in one block of memory: `plan_offsets`. No torch.

First greedy orders (`greedy`), until one meets the *lower bound*, the most bytes alive at once. Where none does, the complete
search (`search`), restarted many times: its effort is heavy-tailed (Gomes, Selman and Kautz 1998), so each try has other
preferences and few nodes, now and then more (Luby, Sinclair and Zuckerman 1993). What has failed in one try is known
to the next; one that is long enough is a proof.

Without a capacity, the smallest arena is bracketed: the search is asked for the least that is not ruled out, then for halves
of what is between that and the best arena known.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..errors import CapacityError, OffsetError
from .greedy import portfolio
from .intervals import Interval, MaxLive, Sections, check_intervals, max_live
from .search import Preference, Search
from .verify import verify

SHORTEST_TRY = 2  # nodes, by the number of intervals
PULLS, NOISE = (0.3, 0.01, 0.1, 0.3, 0.03), 0.3  # of the tries' preferences
FIRST_TRIES = 8
MOST_CELLS = 1 << 24  # intervals times sections that the search has memory for


@dataclass(frozen=True)
class OffsetPlan:
    """A verified placement: intervals[i] takes the bytes [offsets[i], offsets[i] + size_bytes) of the arena.

    lower_bound_bytes: no arena is smaller; the most bytes alive (`max_live`), or more where the search has proven it.
    status: "optimal", "fits" (the capacity), "not found in time" (the arena is larger than the capacity, which is not ruled
        out), or "not proven" (no capacity was given, and a smaller arena is not ruled out).
    method: what placed them; nodes: of the complete search; time_s: of planning.
    """

    intervals: tuple[Interval, ...]
    offsets: tuple[int, ...]
    arena_bytes: int
    lower_bound_bytes: int
    max_live: MaxLive
    capacity: int | None
    status: str
    method: str
    nodes: int
    time_s: float

    @property
    def offset_of(self) -> dict[str, int]:
        """Offsets by the intervals' ids."""
        return {v.id: offset for v, offset in zip(self.intervals, self.offsets, strict=True)}

    def __str__(self) -> str:
        held = "" if self.capacity is None else f", capacity {self.capacity}"
        return (
            f"{self.status}: {len(self.intervals)} intervals in {self.arena_bytes} bytes{held}, "
            f"{self.arena_bytes / max(1, self.lower_bound_bytes):.3f} of the lower bound, {self.method}, {self.nodes} nodes"
        )


def plan_offsets(intervals: Sequence[Interval], capacity: int | None = None, time_limit_s: float = 60.0) -> OffsetPlan:
    """Place intervals in one block of memory, within `capacity` bytes or, where it is None, as few as can be found.

    Raises OffsetError where the input is no placement problem, CapacityError where the capacity is proven to be too small. A
    time limit that cuts in gives the best placement so far, and the status says so. The same input gives the same offsets
    unless it does.
    """
    started = time.monotonic()
    _check(intervals, capacity, time_limit_s)
    live = max_live(intervals)
    if capacity is not None and capacity < live.size_bytes:
        raise CapacityError(_too_much_alive(live, capacity), capacity, live.size_bytes)
    planner = _Planner(Sections(intervals), live.size_bytes, started + time_limit_s)
    planner.greedy()
    if capacity is None:
        planner.minimize()
    elif planner.arena_bytes > capacity and not planner.reach(capacity) and planner.bound_bytes > capacity:
        raise CapacityError(_too_tight(planner, live, capacity), capacity, planner.bound_bytes)
    offsets = [0] * len(intervals)
    for i, offset in zip(planner.sections.index, planner.offsets, strict=True):
        offsets[i] = int(offset)
    verify(intervals, offsets, planner.arena_bytes)
    return OffsetPlan(
        tuple(intervals), tuple(offsets), planner.arena_bytes, planner.bound_bytes, live, capacity, _status(planner, capacity),
        planner.method, planner.nodes, time.monotonic() - started,
    )  # fmt: skip


@dataclass
class _Planner:
    """The best placement so far and what is proven; `reach` and `minimize` go on from where they were."""

    sections: Sections
    bound_bytes: int
    deadline: float
    offsets: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    arena_bytes: int = 0
    method: str = "nothing to place"
    nodes: int = 0
    searches: dict[int, tuple[Search, Iterator[Preference], Iterator[int]]] = field(default_factory=dict)

    @property
    def over(self) -> bool:
        """Whether the search is to end: it is out of time, or would not fit in memory."""
        too_large = self.sections.count * len(self.sections.sizes) > MOST_CELLS
        return too_large or time.monotonic() >= self.deadline

    def greedy(self) -> None:
        """The best of the portfolio, up to the first that meets the bound."""
        for method, offsets in portfolio(self.sections) if self.sections.count else ():
            self._take(method, offsets)
            if self.arena_bytes == self.bound_bytes or time.monotonic() > self.deadline:
                return

    def reach(self, capacity: int, tries: float = math.inf) -> bool:
        """Whether the search found a placement within capacity; that there is none raises the bound."""
        if self.over:
            return False
        capacity -= capacity % self.sections.unit
        search, preferences, limits = self._search(capacity)
        while tries > 0 and not self.over:
            outcome = search.run(next(preferences), next(limits), self.deadline)
            self.nodes += outcome.nodes
            tries -= 1
            if outcome.offsets is not None:
                self._take("complete search", outcome.offsets)
                return True
            if outcome.proven:
                self.bound_bytes = max(self.bound_bytes, capacity + self.sections.unit)
                return False
        return False

    def minimize(self) -> None:
        """Close the bracket between bound and arena, with more tries each time that some are in vain."""
        tries = FIRST_TRIES
        while self.bound_bytes < self.arena_bytes and not self.over:
            low = goal = self.bound_bytes
            while low < self.arena_bytes and not self.over:
                if not self.reach(goal, tries):
                    low = max(goal + self.sections.unit, self.bound_bytes)
                goal = low + (self.arena_bytes - low) // 2
                goal -= goal % self.sections.unit
            tries *= 2

    def _take(self, method: str, offsets: np.ndarray) -> None:
        arena_bytes = int((offsets + self.sections.sizes).max())
        if not len(self.offsets) or arena_bytes < self.arena_bytes:
            self.method, self.offsets, self.arena_bytes = method, offsets, arena_bytes

    def _search(self, capacity: int) -> tuple[Search, Iterator[Preference], Iterator[int]]:
        if capacity not in self.searches:
            self.searches[capacity] = Search(self.sections, capacity), _preferences(self.sections), _limits(self.sections)
        return self.searches[capacity]


def _preferences(sections: Sections) -> Iterator[Preference]:
    """Without end: by size, by life, by area, then mixtures of these with noise, from a fixed seed."""
    sizes, lives = sections.sizes.astype(float), sections.last - sections.first + 1.0
    for key in (sizes, lives, sizes * lives):
        yield Preference(np.argsort(np.lexsort((-sizes * lives, -key))))
    random = np.random.default_rng(0)
    for pull in itertools.cycle(PULLS):
        by_size, by_life = random.random(2)
        noise = random.normal(0.0, NOISE, len(sizes))
        rank = np.argsort(np.argsort(-by_size * np.log(sizes) - by_life * np.log(lives) - noise, kind="stable"))
        yield Preference(rank, pull)


def _limits(sections: Sections) -> Iterator[int]:
    """Nodes of each try, by Luby's sequence: 1, 1, 2, 1, 1, 2, 4, 1, ... times the shortest."""
    for tries in itertools.count(1):
        while tries & (tries + 1):  # the sequence up to 2^k - 1 repeats itself, and then comes 2^(k - 1)
            tries -= (1 << tries.bit_length() - 1) - 1
        yield SHORTEST_TRY * len(sections.sizes) * (tries + 1 >> 1)


def _status(planner: _Planner, capacity: int | None) -> str:
    if planner.arena_bytes == planner.bound_bytes:
        return "optimal"
    if capacity is None:
        return "not proven"
    return "fits" if planner.arena_bytes <= capacity else "not found in time"


def _too_much_alive(live: MaxLive, capacity: int) -> str:
    names = ", ".join(live.ids[:5]) + (", ..." if len(live.ids) > 5 else "")
    return (
        f"a capacity of {capacity} bytes cannot hold the intervals: at moment {live.moment}, {live.size_bytes} bytes are "
        f"alive, of {len(live.ids)} intervals ({names}); give at least that"
    )


def _too_tight(planner: _Planner, live: MaxLive, capacity: int) -> str:
    return (
        f"a capacity of {capacity} bytes cannot hold the intervals, though at most {live.size_bytes} are alive at once: the "
        f"complete search ended after {planner.nodes} nodes; give {planner.bound_bytes} or more"
    )


def _check(intervals: Sequence[Interval], capacity: int | None, time_limit_s: float) -> None:
    check_intervals(intervals)
    if capacity is not None and (not isinstance(capacity, int | np.integer) or isinstance(capacity, bool) or capacity < 0):
        raise OffsetError(f"capacity={capacity!r}; it must be an integer of bytes, zero or more, or None for the least")
    if isinstance(time_limit_s, bool) or not isinstance(time_limit_s, int | float) or not time_limit_s >= 0:
        raise OffsetError(f"time_limit_s={time_limit_s!r}; it must be a number of seconds, zero or more")
