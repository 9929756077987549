"""A Problem compiled for the search: backward stages, and sets of forward storages as Python integers.

Only storages that the forward makes, and that do not live to the end, are a matter of choice; each has one bit. Everything
else (gradients, outputs, what is fixed) lives at the same times in every schedule, so it is a constant of each moment.
A *stage* is one backward operator that reads such storages, or can run in several ways, together with the operators before it
that do neither: what is recomputed for it runs just before it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, reduce
from operator import and_, or_

from ..problem import Operator, Problem

ALWAYS_KEPT_FRACTION = 1e-3  # storages this small in sum are not worth a decision: kept until their last use


@dataclass(frozen=True)
class Option:
    """One way to run a stage's last operator: the program's own, or an alternative.

    needs: bits that it reads (0 in one that reads nothing), of needs_bytes. during_bytes: while it runs, without the
    forward storages that the bits stand for. inplace: (bit of the input, or 0 where it surely dies, bytes saved). slower_s:
    seconds more than the program's own.
    """

    operator: int
    needs: int
    needs_bytes: int
    during_bytes: int
    inplace: tuple[tuple[int, int], ...]
    slower_s: float = 0.0

    @property
    def least_bytes(self) -> int:
        """While it runs in place."""
        return self.during_bytes - max((saved for _, saved in self.inplace), default=0)

    @property
    def alone_bytes(self) -> int:
        """While it runs in place, with what it reads and nothing else that the bits stand for."""
        return self.least_bytes + self.needs_bytes


@dataclass(frozen=True)
class Stage:
    """Constants of one backward stage; bytes without the forward storages that the bits stand for.

    operators: the stage's backward operators but the last; they read no forward storage. options: the ways to run the last.
    head_bytes: most bytes during the operators before the recomputes; between_bytes: while the recomputes run.
    """

    operators: tuple[int, ...]
    options: tuple[Option, ...]
    head_bytes: int
    between_bytes: int

    @cached_property
    def needs(self) -> int:
        """Bits that the program's own last operator reads."""
        return self.options[0].needs

    @cached_property
    def common_needs(self) -> int:
        """Bits that every option reads."""
        return reduce(and_, (option.needs for option in self.options))

    @cached_property
    def any_needs(self) -> int:
        """Bits that some option reads."""
        return reduce(or_, (option.needs for option in self.options))

    @cached_property
    def quickest(self) -> tuple[int, ...]:
        """Of the options that read the same, the one that takes least time; for each such set, in order."""
        best: dict[int, int] = {}
        for end, option in enumerate(self.options):
            other = self.options[best.setdefault(option.needs, end)]
            if (option.slower_s, option.alone_bytes) < (other.slower_s, other.alone_bytes):
                best[option.needs] = end
        return tuple(best.values())

    @cached_property
    def thrifty(self) -> int | None:
        """The option that takes fewest bytes, where it is none of the quickest."""
        end = min(range(len(self.options)), key=lambda end: (self.options[end].alone_bytes, self.options[end].slower_s))
        return None if end in self.quickest else end


@dataclass(frozen=True)
class Encoder:
    """An encoder in the forward. group: its place and those of the others that encode what the same operator makes."""

    outputs: int
    inputs: int
    workspace_bytes: int
    time_s: float
    group: range


@dataclass(frozen=True)
class Recompute:
    """What running one forward operator or variant again takes. extra_bytes: workspace, and outputs made a second time."""

    time_s: float
    inputs: int
    outputs: int
    extra_bytes: int
    inplace: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Compiled:
    """A Problem in stages.

    storages[k]: the storage that bit k stands for, in the order in which the forward makes them; sizes[k]: its bytes.
    always: bits that are kept until their last use: too small to matter, or impossible to make again. optional: impossible to
    make again, but every stage has an option that does not read them, or only where something else is alive: a wish not to
    carry them is one for these options, or for that.
    makers[k]: operators that can make bit k again, the quickest first. late_inputs[p]: inputs of variant p that the forward
    makes later than its outputs: it is used only where they are alive.
    forward[m]: the operator at moment m of the forward; encoders follow what they encode, and only run where it is carried.
    forward_bytes[m]: bytes then if nothing were carried into the backward and nothing ran in place; last_use[k]: the last
    moment at which the program uses bit k, or the one before it is encoded; forward_inplace[m]: as in Option.
    encoders: those of the forward by their moments.
    """

    problem: Problem
    storages: tuple[int, ...]
    sizes: tuple[int, ...]
    always: int
    optional: int
    stages: tuple[Stage, ...]
    recomputes: dict[int, Recompute]
    makers: tuple[tuple[int, ...], ...]
    late_inputs: dict[int, int]
    forward: tuple[int, ...]
    forward_bytes: tuple[int, ...]
    last_use: tuple[int, ...]
    forward_inplace: tuple[tuple[tuple[int, int], ...], ...]
    encoders: dict[int, Encoder]

    @property
    def everything(self) -> int:
        """All bits."""
        return (1 << len(self.sizes)) - 1

    @property
    def thrift(self) -> int:
        """A bit that is no storage's: the wish that a stage's last operator runs by its thrifty option."""
        return 1 << len(self.sizes)

    def bytes_of(self, bits: int) -> int:
        """Bytes of a set of storages."""
        return sum(self.sizes[k] for k in members(bits))


def members(bits: int) -> list[int]:
    """The bit numbers in a set, in increasing order."""
    found = []
    while bits:
        low = bits & -bits
        found.append(low.bit_length() - 1)
        bits ^= low
    return found


def compile_problem(problem: Problem, *, merged: bool = True) -> Compiled:
    """Split the backward into stages and every operator's storages into bits and constants.

    merged: operators that read no forward storage and run in one way only join the next stage; otherwise each backward operator
        is a stage.
    """
    forward = _forward_order(problem)
    made = [s for index in forward for s in problem.operators[index].outputs]
    storages = tuple(s for s in made if s not in problem.outputs)
    bit = {s: 1 << k for k, s in enumerate(storages)}
    sizes = tuple(problem.storages[s].size_bytes for s in storages)
    last_use = _last_forward_use(problem, forward, storages)
    again = [p for p in (*problem.forward, *problem.variants, *problem.encoders) if problem.operators[p].recomputable]
    recomputes = {p: _recompute(problem, problem.operators[p], bit) for p in again}
    late = {p: _late_inputs(problem, p, bit) for p in again}
    by_time = (sorted((recomputes[p].time_s, p) for p in problem.producers[s] if p in recomputes) for s in storages)
    makers = tuple(tuple(p for _, p in timed) for timed in by_time)
    stages, small, unsure = _stages(problem, bit, merged), _small(sizes), _unsure(makers, late)
    optional = _optional(makers, stages, unsure) & ~small
    return Compiled(
        problem=problem,
        storages=storages,
        sizes=sizes,
        always=(unsure | small) & ~optional,
        optional=optional,
        stages=stages,
        recomputes=recomputes,
        makers=makers,
        late_inputs=late,
        forward=forward,
        forward_bytes=_forward_bytes(problem, forward, storages, last_use),
        last_use=last_use,
        forward_inplace=tuple(_pairs(problem, problem.operators[i], bit, lambda s: False) for i in forward),
        encoders=_encoders(problem, forward, bit),
    )


def _forward_order(problem: Problem) -> tuple[int, ...]:
    """The forward with every encoder right after what makes the first of its inputs last."""
    behind: dict[int, list[int]] = {}
    for p in problem.encoders:
        makers = (problem.producers[s][0] for s in problem.operators[p].inputs if problem.producers[s])
        behind.setdefault(max(makers, default=0), []).append(p)
    return tuple(p for index in problem.forward for p in (index, *behind.get(index, ())))


def _encoders(problem: Problem, forward: tuple[int, ...], bit: dict[int, int]) -> dict[int, Encoder]:
    found, first = {}, 0
    for moment, index in enumerate(forward):
        if index < problem.num_forward:
            first = moment + 1
            continue
        last = next((m for m in range(moment, len(forward)) if forward[m] < problem.num_forward), len(forward))
        o = problem.operators[index]
        inputs, outputs = _bits(o.inputs, bit), _bits(o.outputs, bit)
        found[moment] = Encoder(outputs, inputs, o.workspace_bytes, o.time_s, range(first, last))
    return found


def _bits(storages: tuple[int, ...], bit: dict[int, int]) -> int:
    found = 0
    for storage in storages:
        found |= bit.get(storage, 0)
    return found


def _pairs(problem: Problem, operator: Operator, bit: dict[int, int], dies) -> tuple[tuple[int, int], ...]:
    """In-place pairs in order, as far as any can be used; `dies` tells of inputs without a bit whether they die."""
    sizes = problem.storages
    found, seen = [], set()
    for source, target in operator.inplace:
        if source in seen:
            continue  # the input's first pair is the one that is used
        seen.add(source)
        if source in bit:
            found.append((bit[source], min(sizes[source].size_bytes, sizes[target].size_bytes)))
        elif dies(source):
            found.append((0, min(sizes[source].size_bytes, sizes[target].size_bytes)))
            break
    return tuple(found)


def _recompute(problem: Problem, operator: Operator, bit: dict[int, int]) -> Recompute:
    again = [s for s in operator.outputs if s not in bit]
    extra_bytes = operator.workspace_bytes + sum(problem.storages[s].size_bytes for s in again)
    usable = replace(operator, inplace=tuple(pair for pair in operator.inplace if pair[1] not in again))
    pairs = _pairs(problem, usable, bit, lambda s: False)
    return Recompute(operator.time_s, _bits(operator.inputs, bit), _bits(operator.outputs, bit), extra_bytes, pairs)


def _late_inputs(problem: Problem, index: int, bit: dict[int, int]) -> int:
    """Inputs of a variant that the forward makes only after the variant's outputs; none for a forward operator."""
    if index < problem.num_forward:
        return 0
    operator = problem.operators[index]
    first = min(problem.producers[s][0] for s in operator.outputs)
    return _bits(tuple(s for s in operator.inputs if s in bit and problem.producers[s][0] > first), bit)


def _unsure(makers: tuple[tuple[int, ...], ...], late: dict[int, int]) -> int:
    """Storages that no operator can be sure to make again."""
    return sum(1 << k for k, options in enumerate(makers) if all(late[p] for p in options))


def _optional(makers: tuple[tuple[int, ...], ...], stages: tuple[Stage, ...], unsure: int) -> int:
    """Of these, those that something may make again, or that no stage has to read."""
    some_time = sum(1 << k for k, options in enumerate(makers) if options)
    avoidable = ~reduce(or_, (stage.common_needs for stage in stages)) & reduce(or_, (stage.any_needs for stage in stages))
    return unsure & (some_time | avoidable)


def _small(sizes: tuple[int, ...]) -> int:
    allowance = ALWAYS_KEPT_FRACTION * sum(sizes)
    bits = 0
    for k in sorted(range(len(sizes)), key=sizes.__getitem__):
        allowance -= sizes[k]
        if allowance < 0:
            break
        bits |= 1 << k
    return bits


def _last_forward_use(problem: Problem, forward: tuple[int, ...], storages: tuple[int, ...]) -> tuple[int, ...]:
    last = {}
    for moment, index in enumerate(forward):
        operator = problem.operators[index]
        if index < problem.num_forward:
            last.update(dict.fromkeys((*operator.inputs, *operator.outputs), moment))
        else:
            last.update(dict.fromkeys(operator.outputs, moment - 1))
    return tuple(last[s] for s in storages)


def _forward_bytes(
    problem: Problem, forward: tuple[int, ...], storages: tuple[int, ...], last_use: tuple[int, ...]
) -> tuple[int, ...]:
    last = dict(zip(storages, last_use, strict=True))
    change = [0] * (len(forward) + 1)
    for moment, index in enumerate(forward):
        for s in problem.operators[index].outputs if index < problem.num_forward else ():
            change[moment] += problem.storages[s].size_bytes
            change[last.get(s, len(forward) - 1) + 1] -= problem.storages[s].size_bytes
    now, found = problem.fixed_bytes, []
    for moment, index in enumerate(forward):
        now += change[moment]
        found.append(now + (problem.operators[index].workspace_bytes if index < problem.num_forward else 0))
    return tuple(found)


def _stages(problem: Problem, bit: dict[int, int], merged: bool) -> tuple[Stage, ...]:
    """Walk the backward once, with what lives there in every schedule."""
    last = {}
    for index in problem.backward:
        operator = problem.operators[index]
        last.update(dict.fromkeys((*operator.inputs, *operator.outputs), index))
    forward_made = {s for i in problem.forward for s in problem.operators[i].outputs}
    size = [s.size_bytes for s in problem.storages]
    now = problem.fixed_bytes + sum(size[s] for s in forward_made if s not in bit)
    stages, head, operators = [], 0, []
    for index in problem.backward:
        operator = problem.operators[index]
        made_here = set(operator.outputs)
        dying = {
            s
            for s in (*operator.inputs, *operator.outputs)
            if last[s] == index and s not in bit and s not in problem.outputs and problem.producers[s]
        }
        between, now = now, now + sum(size[s] for s in made_here)
        options = tuple(_option(problem, p, bit, now, dying) for p in (index, *problem.useful_alternatives.get(index, ())))
        now -= sum(size[s] for s in dying)
        if options[0].needs or len(options) > 1 or not merged:
            stages.append(Stage(tuple(operators), options, head, between))
            head, operators = 0, []
        else:
            operators.append(index)
            head = max(head, options[0].least_bytes)
    if operators or not stages:
        stages.append(Stage(tuple(operators), (Option(-1, 0, 0, now, ()),), head, now))
    return tuple(stages)


def _option(problem: Problem, index: int, bit: dict[int, int], now: int, dying: set[int]) -> Option:
    operator = problem.operators[index]
    pairs, slower_s = _pairs(problem, operator, bit, dying.__contains__), problem.slower_s(index)
    needs_bytes = sum(problem.storages[s].size_bytes for s in set(operator.inputs) if s in bit)
    return Option(index, _bits(operator.inputs, bit), needs_bytes, now + operator.workspace_bytes, pairs, slower_s)
