"""Lower bounds on the extra time of *every* schedule within a budget, whatever it recomputes, when, and in which order.

`knapsack`: at the moment of one backward operator, what is read from there on and is not alive must be made again at least
once; the cheapest choice of what to keep is a fractional knapsack (Dantzig 1957). The best such moment counts.

`Relaxation`: Checkmate's program (Jain et al. 2020) with the backward cut into few *windows* of stages; an operator that
runs several times in a window is paid for once. MONeT's rows for the moments inside of a recompute hold for its own order of
recomputes only; here memory is counted only at moments that every schedule passes, the forward's operators and the
backward's: what the window reads later, or hands on, and never makes again, lies there. Storages too small to matter count
as always present, for nothing; of an operator with alternatives, only what all of them read counts, and encoding costs
nothing. All of this can only lower the bound.

Few windows make the better bound, not only the smaller program: in many stages, the linear relaxation recomputes half an
operator twice from half of an input, where one window asks for the whole input. One window takes hundredths of a second, and
its integer program a second; on residual networks it lies within a few percent of the best schedules known.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence

import numpy as np

from .highs import Outcome, Program, minimize
from .stages import Compiled, Stage, members

WINDOWS = (1, 12)
MOST_VARIABLES = 20_000  # of a program that takes a small part of a minute
MOST_ENTRIES = 250_000
MOST_NODES, NODES_X_VARIABLES = 300, 100_000  # the first node gains nearly all that there is to gain
INTEGER_LIMIT_S = 15.0  # never reached but on a slow machine: nodes are counted
IGNORED_FRACTION = 2e-3  # of all bytes, in the smallest storages


def lower_bound(compiled: Compiled, budget_bytes: int, deadline: float, log: list[str]) -> float:
    """A lower bound on the seconds recomputed; infinity where no schedule can fit. A solver that fails costs only its part."""
    best_s = knapsack(compiled, budget_bytes)
    log.append(f"bound: knapsack {best_s:.6g} s")
    for windows in WINDOWS:
        begin = time.monotonic()
        relaxation = Relaxation(compiled, budget_bytes, even_edges(compiled, windows))
        if relaxation.takes_long:
            break
        limit = min(deadline, begin + INTEGER_LIMIT_S)
        outcome = relaxation.solve(limit)
        if windows == 1 and outcome.status == "optimal":
            best_s = max(best_s, outcome.bound)
            outcome = relaxation.solve(limit, integer=True)
        best_s = max(best_s, outcome.bound)
        log.append(f"bound: {windows} windows {outcome.bound:.6g} s, {outcome.status}, {time.monotonic() - begin:.1f} s")
    return best_s * (1 - 1e-6)  # the solver's tolerance


def even_edges(compiled: Compiled, windows: int) -> tuple[int, ...]:
    """The stages at which windows of equal length begin, but for the first."""
    count = len(compiled.stages)
    windows = max(1, min(count, windows))
    return tuple(count * i // windows for i in range(1, windows))


def hint(compiled: Compiled, budget_bytes: int, deadline: float) -> tuple[int, ...]:
    """The relaxation's advice as wishes for each stage: what it makes again is dropped until the backward first reads it.
    Everything kept where it fails."""
    relaxation = Relaxation(compiled, budget_bytes)
    x = relaxation.solve(deadline).x
    dropped = 0
    if x is not None:
        for i, p in enumerate(relaxation.operators):
            if x[relaxation.r(0, i)] > 0.5:
                dropped |= compiled.recomputes[p].outputs
        dropped |= _evaded(compiled, relaxation, x)
    wishes, reached = [], 0
    for stage in compiled.stages:
        wishes.append(compiled.everything & ~(dropped & ~reached))
        reached |= stage.common_needs
    return tuple(wishes)


def _evaded(compiled: Compiled, relaxation: Relaxation, x: np.ndarray) -> int:
    """What only some options of a stage read, and the relaxation does not keep for anybody else."""
    bits = 0
    for stage in compiled.stages:
        for k in members(stage.needs & ~stage.common_needs):
            if k in relaxation.column and x[relaxation.s(0, k)] < 0.5:
                bits |= 1 << k
    return bits


def knapsack(compiled: Compiled, budget_bytes: int) -> float:
    """The best bound of a single moment, in time stages x storages."""
    price = _prices(compiled)
    sizes = np.array(compiled.sizes, float)
    order = np.argsort(-price / np.maximum(sizes, 1e-9), kind="stable")
    wanted = np.zeros(len(sizes), bool)
    best_s = 0.0
    for stage in reversed(compiled.stages):
        if stage.common_needs:
            needs = np.zeros(len(sizes), bool)
            needs[members(stage.common_needs)] = True
            wanted &= ~needs
            room = budget_bytes - fixed_during(compiled, stage)
            chosen = order[wanted[order]]
            fill = np.cumsum(sizes[chosen])
            kept = np.clip((room - (fill - sizes[chosen])) / np.maximum(sizes[chosen], 1e-9), 0, 1)
            best_s = max(best_s, float(((1 - kept) * price[chosen]).sum()))
            wanted |= needs
    return best_s


def _prices(compiled: Compiled) -> np.ndarray:
    """Seconds that making each storage again takes at least; an operator's time is shared among what it makes, by size."""
    price = np.full(len(compiled.sizes), np.inf)
    for again in compiled.recomputes.values():
        outputs = members(again.outputs)
        total = sum(compiled.sizes[k] for k in outputs)
        for k in outputs:
            share = compiled.sizes[k] / total if total else 0.0
            price[k] = min(price[k], again.time_s * share)
    return np.where(np.isfinite(price), price, 0.0)  # what cannot be made again stays, and takes room that is not counted


def fixed_during(compiled: Compiled, stage: Stage) -> int:
    """Bytes during a stage's operator that no schedule avoids."""
    return min(option.least_bytes for option in stage.options) + compiled.bytes_of(stage.common_needs)


class Relaxation:
    """The program's rows, with windows that begin at stage 0 and at each of `edges`.

    Variables: S[window, storage], storage is carried into the window; R[window, operator], it runs again in the window, once
    or more.
    """

    def __init__(self, compiled: Compiled, budget_bytes: int, edges: Sequence[int] = ()):
        self.compiled, self.budget_bytes = compiled, budget_bytes
        self.bits = _large(compiled)
        self.column = {k: i for i, k in enumerate(self.bits)}
        wanted = set(self.bits)
        self.operators = [p for p, r in compiled.recomputes.items() if wanted & set(members(r.outputs))]
        place = {p: i for i, p in enumerate(self.operators)}
        self.makers = {k: sorted(place[p] for p in compiled.makers[k] if p in place) for k in self.bits}
        self.windows = [range(a, b) for a, b in itertools.pairwise((0, *edges, len(compiled.stages)))]
        self.width = len(self.bits) + len(self.operators)
        self.variables = len(self.windows) * self.width
        self.starts, self.columns, self.values, self.upper = [0], [], [], []

    def solve(self, deadline: float, *, integer: bool = False, most_nodes: int | None = None) -> Outcome:
        """Solve it, or the integer program that it relaxes."""
        if not self.upper:
            self.carried_or_made()
            self.needs_met()
            self.inputs_present()
            self.forward_fits()
            self.backward_fits()
        most_nodes = most_nodes or min(MOST_NODES, 1 + NODES_X_VARIABLES // max(1, self.variables))
        return minimize(self.program(integer), deadline=deadline, most_nodes=most_nodes)

    @property
    def takes_long(self) -> bool:
        """Whether solving it takes more than a small part of a minute."""
        return self.variables > MOST_VARIABLES

    def s(self, window: int, k: int) -> int:
        return window * self.width + self.column[k]

    def r(self, window: int, operator: int) -> int:
        return window * self.width + len(self.bits) + operator

    def add(self, entries: list[tuple[int, float]], upper: float) -> None:
        """entries . x <= upper"""
        row: dict[int, float] = {}
        for column, value in entries:
            row[column] = row.get(column, 0.0) + value
        self.columns += row
        self.values += row.values()
        self.starts.append(len(self.columns))
        self.upper.append(upper)

    def _made(self, window: int, k: int, value: float) -> list[tuple[int, float]]:
        return [(self.r(window, i), value) for i in self.makers[k]]

    def carried_or_made(self) -> None:
        """Checkmate (1c): S[w+1, k] <= S[w, k] + sum of R[w, makers of k]."""
        for w in range(len(self.windows) - 1):
            for k in self.bits:
                self.add([(self.s(w + 1, k), 1), (self.s(w, k), -1), *self._made(w, k, -1)], 0)

    def needs_met(self) -> None:
        """What a window's operators read was carried into the window or is made in it."""
        for w, stages in enumerate(self.windows):
            for k in self._read(stages):
                self.add([(self.s(w, k), -1), *self._made(w, k, -1)], -1)

    def inputs_present(self) -> None:
        """Checkmate (1b): R[w, p] <= S[w, k] + sum of R[w, makers of k] for each input k of p."""
        for w in range(len(self.windows)):
            for i, p in enumerate(self.operators):
                for k in members(self.compiled.recomputes[p].inputs):
                    if k in self.column and i not in self.makers[k]:
                        self.add([(self.r(w, i), 1), (self.s(w, k), -1), *self._made(w, k, -1)], 0)

    def forward_fits(self) -> None:
        """What is carried into the backward lies there since the forward made it."""
        compiled, worst = self.compiled, 0
        for index in range(len(compiled.forward_bytes) - 1, -1, -1):
            base = compiled.forward_bytes[index] - max((s for _, s in compiled.forward_inplace[index]), default=0)
            if base > worst:  # an earlier operator with less of its own asks for less than a later one
                worst = base
                entries = [(self.s(0, k), float(compiled.sizes[k])) for k in self.bits if compiled.last_use[k] < index]
                self.add(entries, self.budget_bytes - base)

    def backward_fits(self) -> None:
        """During a stage's operator lie its inputs, what the window hands on without making it again, and what the window
        reads later on without making it again."""
        every = max(1, len(self.compiled.stages) * len(self.bits) * 2 // MOST_ENTRIES)
        for w, stages in enumerate(self.windows):
            for place, t in enumerate(stages):
                if place % every and place + 1 < len(stages):
                    continue
                stage = self.compiled.stages[t]
                later = self._read(stages[place + 1 :])
                self._moment(w, stage, later, last=place + 1 == len(stages))

    def _moment(self, w: int, stage, later: set[int], last: bool) -> None:
        entries, room = [], self.budget_bytes - fixed_during(self.compiled, stage)
        for k in self.bits:
            size = float(self.compiled.sizes[k])
            if stage.common_needs >> k & 1:
                continue
            if k in later:
                room -= size
                entries += self._made(w, k, -size)
            elif w + 1 < len(self.windows):
                entries.append((self.s(w + 1, k), size))
                if not last:
                    entries += self._made(w, k, -size)
        self.add(entries, room)

    def _read(self, stages: range) -> set[int]:
        bits = 0
        for t in stages:
            bits |= self.compiled.stages[t].common_needs
        return {k for k in members(bits) if k in self.column}

    def program(self, integer: bool) -> Program:
        count = self.variables
        cost, kinds = np.zeros(count), np.zeros(count, bool)
        for w in range(len(self.windows)):
            for i, p in enumerate(self.operators):
                cost[self.r(w, i)] = self.compiled.recomputes[p].time_s
                kinds[self.r(w, i)] = integer
        values, upper, starts = np.array(self.values, float), np.array(self.upper, float), np.array(self.starts)
        scale = np.ones(len(upper))
        for row in range(len(upper)):  # bytes in units of the row's largest storage
            if starts[row] < starts[row + 1]:
                scale[row] = max(1.0, np.abs(values[starts[row] : starts[row + 1]]).max())
        values /= np.repeat(scale, np.diff(starts))
        return Program(
            cost, starts, np.array(self.columns), values, np.full(len(upper), -np.inf), upper / scale,
            np.zeros(count), np.ones(count), kinds,
        )  # fmt: skip


def _large(compiled: Compiled) -> list[int]:
    """The storages that the linear program knows of."""
    allowance = IGNORED_FRACTION * sum(compiled.sizes)
    large = []
    for k in sorted(range(len(compiled.sizes)), key=compiled.sizes.__getitem__):
        allowance -= compiled.sizes[k]
        if allowance < 0:
            large.append(k)
    return sorted(large)
