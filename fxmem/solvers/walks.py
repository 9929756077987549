"""What a stage makes again from what it finds alive: the walks of a state (see `state`), remembered as it changes.

A walk makes what a stage's last operator reads and does not find, in post-order: each storage by the maker that is cheapest
given what is there, just in time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce
from operator import or_
from typing import NamedTuple

from .stages import Compiled, Option, members

MOST_SETS = 200  # of walks, remembered for each stage
MOST_ALIKE = 8  # walks in a set: they find alike what the stage reads
LOOKAHEAD = 60  # recomputes deep into which the cost of a storage with several makers is worked out


class Walk(NamedTuple):
    """recomputes: operators that run again, in order. seconds: of these, and of what a slower option takes more. touched:
    storages (and the wish for thrift) whose presence decided. made: what is made. replay: bits that the stage uses or makes,
    and room to remember what depends on them. end: the option that the stage's last operator runs by."""

    recomputes: tuple[int, ...]
    seconds: float
    touched: int
    made: int
    replay: tuple[int, dict]
    end: int


class Walks:
    """The walks of all stages of one compiled problem, remembered by what they depended on."""

    def __init__(self, compiled: Compiled):
        self.compiled = compiled
        self._needs = [stage.any_needs for stage in compiled.stages]
        optional = members(compiled.optional)
        self._conditions = {
            1 << k: [compiled.late_inputs[p] for p in compiled.makers[k]] for k in optional if compiled.makers[k]
        }
        self._encoding_s = {bit: e.time_s for e in compiled.encoders.values() for bit in (1 << k for k in members(e.outputs))}
        self._known: list[dict[int, list[tuple[int, int, Walk]]]] = [{} for _ in compiled.stages]

    def find(self, t: int, alive: int) -> Walk:
        """The cheapest walk of stage t, which finds `alive`."""
        known = self._known[t]
        for touched, present, walk in known.get(self._needs[t] & alive, ()):
            if alive & touched == present:
                return walk
        walk = self._cheapest(t, alive)
        if len(known) >= MOST_SETS:
            known.clear()
        alike = known.setdefault(self._needs[t] & alive, [])
        if len(alike) >= MOST_ALIKE:
            del alike[0]
        alike.append((walk.touched, alive & walk.touched, walk))
        return walk

    def _cheapest(self, t: int, alive: int) -> Walk:
        """By the stage's cheapest option, the first of equals; what it finds encoded counts with what that took. One that reads
        what nothing makes again now, and nobody wants to carry, comes last: that is carried all the same, if it must be. Where
        thrift is wished for and there is a thrifty option, by that one."""
        stage, looked, best, least = self.compiled.stages[t], 0, None, (True, math.inf)
        unwanted = self._unwanted(alive)
        ends = stage.quickest
        if stage.thrifty is not None:
            looked = self.compiled.thrift
            ends = (stage.thrifty,) if alive & looked else ends
        for end in ends:
            option = stage.options[end]
            walk = self._by(option, end, alive | unwanted)
            looked |= walk.touched
            encoded = members(option.needs & alive) if self._encoding_s and len(ends) > 1 else ()
            paid_s = walk.seconds + sum(self._encoding_s.get(1 << k, 0.0) for k in encoded)
            reluctant = bool(option.needs & unwanted)
            if best is None or (reluctant, paid_s + 1e-12) < least:
                best, least = walk, (reluctant, paid_s)
        for bit, conditions in self._conditions.items():
            if looked & bit:
                looked |= reduce(or_, conditions)
        return best._replace(touched=looked)

    def _unwanted(self, alive: int) -> int:
        """Storages that nobody wants to carry and that nothing can be sure to make again, but for those that something can."""
        found = self.compiled.optional & ~alive
        for bit, conditions in self._conditions.items():
            if found & bit and any(not late & ~alive for late in conditions):
                found ^= bit
        return found

    def _by(self, option: Option, end: int, have: int) -> Walk:
        """Post-order over what the option reads and is missing."""
        needs = touched = relevant = option.needs
        made, order, seconds, recomputes = 0, [], option.slower_s, self.compiled.recomputes
        missing = needs & ~have
        while missing:
            stack = [self._choose(1 << (missing.bit_length() - 1), have)]
            while stack:
                index, looked = stack[-1]
                touched |= looked
                again = recomputes[index]
                inputs, outputs = again.inputs, again.outputs
                touched |= inputs
                lacking = inputs & ~have
                if lacking:
                    stack.append(self._choose(1 << (lacking.bit_length() - 1), have))
                    continue
                stack.pop()
                order.append(index)
                relevant |= inputs | outputs
                seconds += again.time_s
                have |= outputs
                made |= outputs
            missing = needs & ~have
        return Walk(tuple(order), seconds, touched, made, (relevant, {}), end)

    def _choose(self, bit: int, have: int) -> tuple[int, int]:
        """The cheapest maker of a storage, given what is there; and what was looked at to know."""
        makers = self.compiled.makers[bit.bit_length() - 1]
        if len(makers) == 1:
            return makers[0], 0
        at_once = self._undisputed(makers, have)
        if at_once is not None:
            return at_once
        looked = 0
        known: dict[int, tuple[float, int]] = {}

        def cost(bit: int, depth: int) -> tuple[float, int]:
            nonlocal looked
            if bit in known:
                return known[bit]
            best = (float("inf"), -1)
            for index in self.compiled.makers[bit.bit_length() - 1]:
                again, late = self.compiled.recomputes[index], self.compiled.late_inputs[index]
                looked |= late
                if late & ~have:
                    continue
                looked |= again.inputs
                total = again.time_s
                if depth:
                    total += sum(cost(1 << k, depth - 1)[0] for k in members(again.inputs & ~have))
                best = min(best, (total, index))
            known[bit] = best
            return best

        return cost(bit, LOOKAHEAD)[1], looked

    def _undisputed(self, makers: Sequence[int], have: int) -> tuple[int, int] | None:
        """Of several makers, the quickest first, the one that takes least by itself, where it lacks nothing that another does
        not lack too; and what was looked at to know. None where there is no such maker."""
        found, lacking, looked = -1, 0, 0
        for index in makers:
            inputs, late = self.compiled.recomputes[index].inputs, self.compiled.late_inputs[index]
            looked |= late
            if late & ~have:
                continue
            looked |= inputs
            if found < 0:
                found, lacking = index, inputs & ~have
            elif lacking & ~inputs:
                return None
        return (found, looked) if found >= 0 else None
