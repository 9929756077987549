"""What the search moves through, and its exact incremental evaluation.

A state says for every stage which forward storages one would like to carry into it. Its meaning is *recompute just in
time*: each stage makes what its operator reads and does not find, in post-order, and everything is freed at its last use,
as `fxmem.schedule.simulate` does. So any state is a valid schedule, and the wish to keep what is never used costs nothing.
"""

from __future__ import annotations

from functools import reduce
from itertools import accumulate
from operator import add, or_

from ..schedule import Schedule, forward_length
from .stages import Compiled, members
from .walks import Walks


class State:
    """Desired carries for each stage, what follows from them, and an undo log for the last change.

    desired[t], alive[t]: storages wished for and found when stage t begins, and beside them the wish for thrift (see
    `Compiled.thrift`); recomputes[t], seconds[t], touched[t], made[t], ends[t]: the stage's walk (see `Walk`); live[t]: what is
    in truth carried into stage t, of live_bytes[t] bytes; peak_bytes[t]: most bytes in it.
    forward_bytes[m]: bytes at moment m of the forward. time_s: sum over all recomputes, encoders and slower alternatives.
    excess_bytes: sum over the stages and the forward of what they need beyond budget_bytes.
    """

    def __init__(self, compiled: Compiled, budget_bytes: int, desired: list[int] | None = None):
        self.compiled = compiled
        self.everything = compiled.everything
        self._sizes = {1 << k: size for k, size in enumerate(compiled.sizes)} | {0: 0}
        self._table = {p: (r.inputs, r.outputs, r.extra_bytes, r.inplace) for p, r in compiled.recomputes.items()}
        self._thrift = compiled.thrift
        self._encoders_by_bit: dict[int, list[int]] = {}
        for moment, encoder in compiled.encoders.items():
            for k in members(encoder.inputs | encoder.outputs):
                self._encoders_by_bit.setdefault(k, []).append(moment)
        self._walks = Walks(compiled)
        self.reset(desired or [self.everything] * len(compiled.stages), budget_bytes)

    def reset(self, desired: list[int], budget_bytes: int) -> None:
        """Evaluate a state from nothing."""
        count = len(self.compiled.stages)
        self.budget_bytes = budget_bytes
        self.desired = [bits | self.compiled.always for bits in desired]
        self.alive, self.touched, self.made, self.live = ([0] * count for _ in range(4))
        self.recomputes: list[tuple[int, ...]] = [()] * count
        self.ends = [0] * count
        self._replays: list[tuple[int, dict]] = [(0, {})] * count
        self.seconds = [0.0] * count
        self.live_bytes, self.peak_bytes, self._excess = ([0] * count for _ in range(3))
        self.time_s, self.excess_bytes = 0.0, 0
        self._change = [0] * (len(self.compiled.forward_bytes) + 1)
        self._base = [b - self._saved_bytes(i, 0) for i, b in enumerate(self.compiled.forward_bytes)]
        self._carried = 0
        self.forward_bytes = list(self._base)
        self.forward_peak_bytes = max(self._base, default=0)
        self._forward_excess = 0
        self._log: list[tuple] = []
        for t in range(count):
            found = self.alive[t - 1] | self.made[t - 1] if t else self.everything
            self.alive[t] = (found | self._thrift) & self.desired[t]
            self._enter(t)
        self._settle(count - 1, 0, everywhere=True)
        self.time_s += sum(self.seconds)  # beside what encoding takes
        self._log.clear()

    @property
    def worst_bytes(self) -> int:
        """The schedule's peak."""
        return max(self.forward_peak_bytes, *self.peak_bytes)

    def rewalked(self) -> list[tuple[int, int]]:
        """What runs otherwise than at the last `keep` or `undo`: stages, each with an operator that they recompute or no longer
        recompute, or with -1 where their last operator runs by another option."""
        first = {entry[1]: (entry[2], entry[-1]) for entry in reversed(self._log) if entry[0] == "walk"}
        found = []
        for t, (recomputes, end) in first.items():
            if self.recomputes[t] != recomputes:
                found += ((t, p) for p in sorted(set(recomputes) ^ set(self.recomputes[t])))
            if self.ends[t] != end:
                found.append((t, -1))
        return found

    def change(self, wishes: dict[int, int]) -> None:
        """Replace desired[t] by wishes[t]; `undo` takes it back as long as `keep` was not called."""
        if not wishes:
            return
        desired, always, first, last = self.desired, self.compiled.always, min(wishes), max(wishes)
        self._log.append(("desired", first, desired[first : last + 1], self.time_s, self.excess_bytes))
        for t, bits in wishes.items():
            desired[t] = bits | always
        dirty_low, dirty_high = self._spread(first, last)
        if dirty_high >= 0:
            self._settle(dirty_high, dirty_low)

    def keep(self) -> None:
        """Accept all changes since the last `keep` or `undo`."""
        self._log.clear()

    def undo(self) -> None:
        """Take back all changes since the last `keep` or `undo`."""
        log = self._log
        while log:
            entry = log.pop()
            name = entry[0]
            if name == "walk":
                _, t, self.recomputes[t], self.seconds[t], self.touched[t], self.made[t], self._replays[t], self.ends[t] = entry
            elif name == "back":
                _, carried, self.forward_bytes, self.forward_peak_bytes, self._forward_excess, *lists = entry
                live, live_bytes, peaks, excesses = lists
                count = len(live)
                self.live[:count], self.live_bytes[:count] = live, live_bytes
                self.peak_bytes[:count], self._excess[:count] = peaks, excesses
                self._carry(carried)
            elif name == "alive":
                _, t, alive = entry
                self.alive[t : t + len(alive)] = alive
            else:
                _, t, desired, self.time_s, self.excess_bytes = entry
                self.desired[t : t + len(desired)] = desired

    def schedule(self) -> Schedule:
        """The steps that the state stands for."""
        compiled = self.compiled
        unused = {m for m, encoder in compiled.encoders.items() if not encoder.outputs & self._carried}
        steps = [p for m, p in enumerate(compiled.forward) if m not in unused]
        for stage, again, end in zip(compiled.stages, self.recomputes, self.ends, strict=True):
            last = stage.options[end].operator
            steps += (*stage.operators, *again, *((last,) if last >= 0 else ()))
        return Schedule(tuple(steps))

    def _spread(self, first: int, last: int) -> tuple[int, int]:
        """Forward from the first changed wish: the lowest and highest stage that now recomputes otherwise."""
        alive, made, desired, touched, log = self.alive, self.made, self.desired, self.touched, self._log
        low, high, before, thrift = len(alive), -1, alive[first:], self._thrift
        found = alive[first - 1] | made[first - 1] if first else self.everything
        walks = []
        for t in range(first, len(alive)):
            found = (found | thrift) & desired[t]
            old = alive[t]
            if found != old:
                alive[t] = found
                if (found ^ old) & touched[t]:
                    was, end = self.recomputes[t], self.ends[t]
                    walks.append(("walk", t, was, self.seconds[t], touched[t], made[t], self._replays[t], end))
                    self.time_s -= self.seconds[t]
                    self._enter(t)
                    self.time_s += self.seconds[t]
                    if self.recomputes[t] != was or self.ends[t] != end:
                        low, high = min(low, t), t
            elif t > last:
                break
            found |= made[t]
        log.append(("alive", first, before[: t + 1 - first]))
        log += walks
        return low, high

    def _enter(self, t: int) -> None:
        """Find what stage t recomputes from what it finds alive, and how its last operator runs."""
        walk = self._walks.find(t, self.alive[t])
        self.recomputes[t], self.seconds[t], self.touched[t], self.made[t], self._replays[t], self.ends[t] = walk

    def _settle(self, high: int, low: int, everywhere: bool = False) -> None:
        """Backward over the stages from the highest that recomputes otherwise, until what is live agrees again."""
        live, live_bytes, peaks, excesses = self.live, self.live_bytes, self.peak_bytes, self._excess
        replays, budget_bytes = self._replays, self.budget_bytes
        saved = [values[: high + 1] for values in (live, live_bytes, peaks, excesses)]
        self._log.append(("back", self._carried, self.forward_bytes, self.forward_peak_bytes, self._forward_excess, *saved))
        t = high
        while t >= 0:
            after, after_bytes = (live[t + 1], live_bytes[t + 1]) if t + 1 < len(live) else (0, 0)
            relevant, memo = replays[t]
            concerned = after & relevant
            found = memo.get(concerned)
            if found is None:
                found = memo[concerned] = self._replay(t, concerned)
            now_live, now_bytes, peak = (after ^ concerned) | found[0], after_bytes + found[1], after_bytes + found[2]
            excess = peak - budget_bytes if peak > budget_bytes else 0
            self.excess_bytes += excess - excesses[t]
            changed, added = live[t] ^ now_live, now_bytes - live_bytes[t]
            live[t], live_bytes[t], peaks[t], excesses[t] = now_live, now_bytes, peak, excess
            t -= 1
            if t < low and not everywhere:
                if not changed:
                    return
                t = self._shift(t, changed, added)
        self._carry(live[0])
        self.forward_bytes = list(map(add, self._base, accumulate(self._change)))
        self.forward_peak_bytes = max(self.forward_bytes, default=0)
        excess = max(0, self.forward_peak_bytes - self.budget_bytes)
        self.excess_bytes += excess - self._forward_excess
        self._forward_excess = excess

    def _shift(self, high: int, changed: int, added: int) -> int:
        """Below and with stage `high`, stages that neither read nor make what changed carry just that more or less through;
        the first one that does."""
        replays, low = self._replays, high
        while low >= 0 and not replays[low][0] & changed:
            low -= 1
        if low < high:
            part, budget_bytes = slice(low + 1, high + 1), self.budget_bytes
            self.live[part] = [bits ^ changed for bits in self.live[part]]
            self.live_bytes[part] = [bytes_ + added for bytes_ in self.live_bytes[part]]
            peaks = self.peak_bytes[part] = [bytes_ + added for bytes_ in self.peak_bytes[part]]
            excesses = [bytes_ - budget_bytes if bytes_ > budget_bytes else 0 for bytes_ in peaks]
            self.excess_bytes += sum(excesses) - sum(self._excess[part])
            self._excess[part] = excesses
        return low

    def _size(self, bits: int) -> int:
        size = self._sizes.get(bits)
        if size is None:
            size = self._sizes[bits] = self.compiled.bytes_of(bits)
        return size

    def _replay(self, t: int, live: int) -> tuple[int, int, int]:
        """Stage t in reverse, from what is live after it, as far as the stage uses or makes it: what of that is live before it,
        and the change of the live bytes and the stage's peak, both beyond the bytes live after it."""
        stage, size, live_bytes = self.compiled.stages[t], self._size, 0
        option = stage.options[self.ends[t]]
        peak = option.during_bytes
        for bit, saved in option.inplace:
            if not live & bit:
                peak -= saved
                break
        live_bytes += size(option.needs & ~live)
        live |= option.needs
        peak += live_bytes
        between = stage.between_bytes
        for index in reversed(self.recomputes[t]):
            inputs, outputs, extra, inplace = self._table[index]
            during = between + live_bytes + extra + size((inputs | outputs) & ~live)
            for bit, saved in inplace:
                if not live & bit:
                    during -= saved
                    break
            if during > peak:
                peak = during
            live_bytes += size(inputs & ~live) - size(outputs & live)
            live = (live & ~outputs) | inputs
        return live, live_bytes, max(peak, stage.head_bytes + live_bytes)

    def _saved_bytes(self, moment: int, carried: int) -> int:
        """Bytes that the operator at a moment of the forward saves in place, where `carried` goes on into the backward; for an
        encoder that runs, less than nothing: what it takes."""
        compiled = self.compiled
        encoder = compiled.encoders.get(moment)
        if encoder is not None:
            if not encoder.outputs & carried:
                return 0
            behind = [compiled.encoders[m] for m in encoder.group if m >= moment]
            inputs = reduce(or_, (e.inputs for e in behind if e.outputs & carried))
            dead = (k for k in members(inputs & ~carried) if compiled.last_use[k] < encoder.group.start)
            own = compiled.bytes_of(encoder.outputs & ~carried) + encoder.workspace_bytes
            return -own - sum(compiled.sizes[k] for k in dead)
        for bit, saved in compiled.forward_inplace[moment]:
            if compiled.last_use[bit.bit_length() - 1] == moment and not carried & bit:
                return saved
        return 0

    def _carry(self, carried: int) -> None:
        """Change what the forward hands over, and with it the forward's bytes and what encoding takes."""
        compiled, changed, before = self.compiled, carried ^ self._carried, self._carried
        self._carried = carried
        moments, encoders = set(), set()
        for k in members(changed):
            encoders.update(self._encoders_by_bit.get(k, ()))
            size, last = compiled.sizes[k], compiled.last_use[k]
            self._change[last + 1] += size if carried >> k & 1 else -size
            moments.add(last)
        for moment in sorted(encoders):
            encoder = compiled.encoders[moment]
            self.time_s += encoder.time_s * (bool(encoder.outputs & carried) - bool(encoder.outputs & before))
            moments.update(encoder.group)
        for moment in moments:
            if moment >= 0:
                self._base[moment] += self._saved_bytes(moment, before) - self._saved_bytes(moment, carried)


def desires(compiled: Compiled, schedule: Schedule) -> list[int]:
    """The state nearest to a given schedule: what lives in it when each stage begins, and thrift where it was exercised."""
    problem, bit = compiled.problem, {s: 1 << k for k, s in enumerate(compiled.storages)}
    stage_of = {p: t for t, stage in enumerate(compiled.stages) for p in (*stage.operators, stage.options[0].operator)}
    thrifty = {stage.options[stage.thrifty].operator for stage in compiled.stages if stage.thrifty is not None}
    found, live, stage = [0] * len(compiled.stages), 0, len(compiled.stages) - 1
    for index in reversed(schedule.steps[forward_length(problem, schedule) :]):
        now = stage_of.get(problem.program_index(index), stage)
        if now < stage:
            found[stage] |= live
            stage = now
        if index in thrifty:
            found[now] |= compiled.thrift
        operator = problem.operators[index]
        for s in operator.outputs:
            live &= ~bit.get(s, 0)
        for s in operator.inputs:
            live |= bit.get(s, 0)
    found[stage] |= live
    return found


def least_possible_bytes(compiled: Compiled) -> int:
    """Bytes below which no schedule in program order goes: each operator alone, with what lives beside it in every schedule."""
    low = 0
    for stage in compiled.stages:
        low = max(low, stage.head_bytes, min(option.alone_bytes for option in stage.options))
    for moment, bytes_ in enumerate(compiled.forward_bytes):
        saved = max((s for bit, s in compiled.forward_inplace[moment]), default=0)
        low = max(low, bytes_ - saved)
    return low
