"""The moves of the local search: each proposes other wishes for some stages of a State.

Wishes are returned as {stage: bits} and are not applied. A move that finds nothing to do returns {}.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from random import Random

from .stages import Compiled, members
from .state import State

LONGEST_SEGMENT = 80


class Moves:
    """Draws moves for one compiled problem. State lives in `State`; this holds the tables that the draws use."""

    def __init__(self, compiled: Compiled, rng: Random):
        self.compiled, self.rng = compiled, rng
        self.stage_count = len(compiled.stages)
        self.free = compiled.everything & ~compiled.always
        self.runs = [outputs & self.free for outputs in _forward_outputs(compiled)]
        self.first_need = _first_needs(compiled)
        self._outputs = [members(outputs) for outputs in _forward_outputs(compiled)]
        self.twins = _twins(compiled)
        self.neighbours = _neighbours(compiled)
        self.kinds = (
            self.evict,
            self.evict,
            self.keep_recomputed,
            self.keep_recomputed,
            self.segment,
            self.swap,
            self.copy,
            self.range,
        )
        self.choosing = [t for t, stage in enumerate(compiled.stages) if len(stage.quickest) > 1]
        if self.choosing:
            self.kinds += (self.switch, self.switch)
        self.thrifty = [t for t, stage in enumerate(compiled.stages) if stage.thrifty is not None]
        if self.thrifty:
            self.kinds += (self.save, self.save)

    def draw(self, state: State) -> dict[int, int]:
        """One random move."""
        return self.kinds[int(self.rng.random() * len(self.kinds))](state)

    def how_many(self) -> int:
        """How many moves to make before judging: one to three, mostly one."""
        return 1 + int(self.rng.random() ** 2 * 3)

    def all_evictions(self, state: State) -> Iterator[dict[int, int]]:
        """Each carried storage dropped over each gap between two of its uses, in random order."""
        found, before = [], 0
        for t, (live, touched) in enumerate(zip(state.live, state.touched, strict=True)):
            idle = live & ~touched & self.free
            found += ((k, t) for k in members(idle & ~before))
            before = idle
        self.rng.shuffle(found)
        for k, t in found:
            yield self._clear_gap(state, t, 1 << k)

    def all_keeps(self, state: State) -> Iterator[dict[int, int]]:
        """Each output and input of each recompute carried from when it was last alive, in random order."""
        found = []
        for t, again in enumerate(state.recomputes):
            bits = 0
            for p in again:
                bits |= self.compiled.recomputes[p].inputs | self.compiled.recomputes[p].outputs
            found += ((k, t) for k in members(bits & self.free))
        self.rng.shuffle(found)
        for k, t in found:
            wishes = self._keep_until(state, t, 1 << k)
            if wishes:
                yield wishes

    def all_switches(self, state: State) -> Iterator[dict[int, int]]:
        """Each stage's last operator run by each other of the quickest options."""
        for t in self.choosing:
            for end in self.compiled.stages[t].quickest:
                wishes = self._run_by(state, t, end) if end != state.ends[t] else {}
                if wishes:
                    yield wishes

    def all_savings(self, state: State) -> Iterator[dict[int, int]]:
        """Each stage's last operator run by its thrifty option, or no longer so."""
        for t in self.thrifty:
            yield self._turn(state, t)

    def evict(self, state: State) -> dict[int, int]:
        """Drop a carried storage over the gap between two of its uses; where memory is short, by preference."""
        picked = self._pick_carried(state)
        return self._clear_gap(state, *picked) if picked else {}

    def keep_recomputed(self, state: State) -> dict[int, int]:
        """Carry what a recompute makes, or one of its inputs, from when it was last alive."""
        t = self._pick_recomputing(state)
        if t is None:
            return {}
        again = self.compiled.recomputes[self._pick(state.recomputes[t])]
        bits = again.inputs if self.rng.random() < 0.25 else again.outputs
        choices = members(bits & self.free)
        return self._keep_until(state, t, 1 << self._pick(choices)) if choices else {}

    def swap(self, state: State) -> dict[int, int]:
        """Carry a neighbour in the graph instead of a storage."""
        picked = self._pick_carried(state)
        if not picked:
            return {}
        t, bit = picked
        wishes = self._clear_gap(state, t, bit)
        others = members(self.neighbours[bit.bit_length() - 1] & self.free)
        if others:
            other = 1 << self._pick(others)
            low, high = (min(wishes), max(wishes)) if self.rng.random() < 0.7 else (0, max(wishes))
            for u in range(low, high + 1):
                wishes[u] = wishes.get(u, state.desired[u]) | other
        return wishes

    def segment(self, state: State) -> dict[int, int]:
        """Drop a run of forward operators until the backward first needs any of them; keep all of it from then on."""
        rng, count = self.rng, len(self.runs)
        length = int(math.exp(rng.random() * math.log(min(LONGEST_SEGMENT, count) + 1)))
        start = int(rng.random() * (count - length + 1))
        bits = 0
        for outputs in self.runs[start : start + length]:
            bits |= outputs
        if not bits:
            return {}
        first = min(self.first_need[k] for k in members(bits))
        wishes = {t: state.desired[t] & ~bits for t in range(min(first + 1, self.stage_count))}
        wishes |= {t: state.desired[t] | bits for t in range(first + 1, self.stage_count)}
        return {t: w for t, w in wishes.items() if w != state.desired[t]}

    def range(self, state: State) -> dict[int, int]:
        """Wish for a storage, or not, over a random range of stages."""
        rng, count = self.rng, self.stage_count
        bit = 1 << int(rng.random() * len(self.compiled.sizes))
        if not bit & self.free:
            return {}
        first = int(rng.random() * count)
        last = min(count, first + 1 + int(math.exp(rng.random() * math.log(count))))
        if rng.random() < 0.5:
            return {t: state.desired[t] | bit for t in range(first, last) if not state.desired[t] & bit}
        return {t: state.desired[t] & ~bit for t in range(first, last) if state.desired[t] & bit}

    def copy(self, state: State) -> dict[int, int]:
        """Treat a run of operators as an equal run elsewhere is treated, shifted to its place in the backward."""
        if not self.twins:
            return {}
        rng = self.rng
        source, target, length = self._pick(self.twins)
        offset = int(rng.random() * length)
        length = min(length - offset, int(math.exp(rng.random() * math.log(LONGEST_SEGMENT))) + 1)
        alike: dict[tuple[int, int], int] = {}  # (stages later, bits higher) -> bits of the source
        for i in range(offset, offset + length):
            for s, d in zip(self._outputs[source + i], self._outputs[target + i], strict=True):
                if self.free >> d & 1:
                    key = self.first_need[d] - self.first_need[s], d - s
                    alike[key] = alike.get(key, 0) | 1 << s
        wishes: dict[int, int] = {}
        for (later, higher), bits in alike.items():
            self._copy_bits(state, wishes, bits, later, higher)
        return wishes

    def _copy_bits(self, state: State, wishes: dict[int, int], bits: int, later: int, higher: int) -> None:
        desired = state.desired
        first, last = desired[:1], desired[-1:]
        shifted = first * later + desired[: len(desired) - later] if later > 0 else desired[-later:] + last * -later
        target = bits << higher if higher > 0 else bits >> -higher
        for t, (old, seen) in enumerate(zip(desired, shifted, strict=True)):
            new = (seen & bits) << higher if higher > 0 else (seen & bits) >> -higher
            if new != old & target:
                wishes[t] = wishes.get(t, old) & ~target | new

    def switch(self, state: State) -> dict[int, int]:
        """Run a stage's last operator by another of its quickest options."""
        t = self._pick(self.choosing)
        return self._run_by(state, t, self._pick(self.compiled.stages[t].quickest))

    def save(self, state: State) -> dict[int, int]:
        """Run a stage's last operator by its thrifty option, or no longer so; by preference where memory asks for that."""
        for _ in range(8):
            t = self._pick(self.thrifty)
            short, saving = state.peak_bytes[t] > state.budget_bytes, bool(state.desired[t] & self.compiled.thrift)
            if short != saving:
                break
        return self._turn(state, t)

    def _turn(self, state: State, t: int) -> dict[int, int]:
        """The other wish for thrift in stage t, and to carry into it what the thrifty option reads beyond the one at work."""
        stage, thrift = self.compiled.stages[t], self.compiled.thrift
        wishes: dict[int, int] = {}
        if not state.desired[t] & thrift:
            self._carry(state, t, stage.options[stage.thrifty].needs & ~stage.options[state.ends[t]].needs, wishes)
        return wishes | {t: wishes.get(t, state.desired[t]) ^ thrift}

    def _run_by(self, state: State, t: int, end: int) -> dict[int, int]:
        """To carry into stage t what one option reads, and from its last use on nothing that only others do; without thrift."""
        stage = self.compiled.stages[t]
        needs = stage.options[end].needs & self.free
        wishes = {t: state.desired[t] & ~self.compiled.thrift}
        for k in members(stage.any_needs & self.free & ~needs):
            low = t
            while low > 0 and not (state.touched[low - 1] | state.made[low - 1]) >> k & 1:
                low -= 1
            for u in range(low, t + 1):
                wishes[u] = wishes.get(u, state.desired[u]) & ~(1 << k)
        self._carry(state, t, needs, wishes)
        return {u: bits for u, bits in wishes.items() if bits != state.desired[u]}

    def _carry(self, state: State, t: int, bits: int, wishes: dict[int, int]) -> None:
        """Add to `wishes` that what of `bits` stage t does not find is carried into it, each from where it was last alive."""
        for k in members(bits & self.free & ~state.alive[t]):
            for u in self._keep_until(state, t, 1 << k):
                wishes[u] = wishes.get(u, state.desired[u]) | 1 << k

    def _pick(self, items):
        return items[int(self.rng.random() * len(items))]

    def _pick_carried(self, state: State) -> tuple[int, int] | None:
        """A stage and a storage that is carried through it without being used there."""
        rng, over = self.rng, state.excess_bytes > 0
        for _ in range(8):
            t = int(rng.random() * self.stage_count)
            if over and state.peak_bytes[t] <= state.budget_bytes and rng.random() < 0.8:
                continue
            bits = state.live[t] & self.free & ~state.touched[t]
            count = bits.bit_count()
            if count:
                for _ in range(int(rng.random() * count)):
                    bits &= bits - 1
                return t, bits & -bits
        return None

    def _pick_recomputing(self, state: State) -> int | None:
        for _ in range(12):
            t = int(self.rng.random() * self.stage_count)
            if state.recomputes[t]:
                return t
        return None

    def _clear_gap(self, state: State, t: int, bit: int) -> dict[int, int]:
        """Not to carry `bit` from its last use before stage t to its next use."""
        low = t
        while low > 0 and not (state.touched[low - 1] | state.made[low - 1]) & bit:
            low -= 1
        high = t
        while high + 1 < self.stage_count and not state.touched[high] & bit:
            high += 1
        return {u: state.desired[u] & ~bit for u in range(low, high + 1)}

    def _keep_until(self, state: State, t: int, bit: int) -> dict[int, int]:
        """To carry `bit` into stage t from where it was last alive, or from the forward."""
        low = t
        while low > 0 and not (state.alive[low - 1] | state.made[low - 1]) & bit:
            low -= 1
        return {u: state.desired[u] | bit for u in range(low, t + 1) if not state.desired[u] & bit}


def _first_needs(compiled: Compiled) -> list[int]:
    """For each storage the first stage that reads it; where none does, that of the nearest storage made before it."""
    first = [-1] * len(compiled.sizes)
    for t in range(len(compiled.stages) - 1, -1, -1):
        for k in members(compiled.stages[t].any_needs):
            first[k] = t
    known = len(compiled.stages) - 1
    for k, t in enumerate(first):
        known = first[k] = t if t >= 0 else known
    return first


def _neighbours(compiled: Compiled) -> list[int]:
    """For each storage the inputs of what makes it and the outputs of what reads it."""
    found = [0] * len(compiled.sizes)
    for again in compiled.recomputes.values():
        for k in members(again.outputs):
            found[k] |= again.inputs
        for k in members(again.inputs):
            found[k] |= again.outputs
    return found


def _forward_outputs(compiled: Compiled) -> list[int]:
    bit = {s: 1 << k for k, s in enumerate(compiled.storages)}
    problem = compiled.problem
    return [sum(bit.get(s, 0) for s in problem.operators[p].outputs) for p in problem.forward]


def _twins(compiled: Compiled) -> list[tuple[int, int, int]]:
    """Runs of forward operators that repeat: (start of one, start of the other, length), both ways, longest possible."""
    problem, window = compiled.problem, 4
    sizes = [s.size_bytes for s in problem.storages]
    marks, numbers = [], {}
    for p in problem.forward:
        o = problem.operators[p]
        made = tuple((sizes[s], s in problem.outputs) for s in o.outputs)
        mark = tuple(sizes[s] for s in o.inputs), made, o.time_s
        marks.append(numbers.setdefault(mark, len(numbers)))
    places: dict[tuple, list[int]] = {}
    for start in range(len(marks) - window + 1):
        places.setdefault(tuple(marks[start : start + window]), []).append(start)
    found, seen = [], set()
    for starts in places.values():
        for a, b in zip(starts, starts[1:], strict=False):
            if (a, b) in seen:  # within a run that was found before
                continue
            while a > 0 and marks[a - 1] == marks[b - 1]:
                a, b = a - 1, b - 1
            length = 0
            while b + length < len(marks) and marks[a + length] == marks[b + length]:
                seen.add((a + length, b + length))
                length += 1
            found += [(a, b, length), (b, a, length)]
    return found
