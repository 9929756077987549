"""The rows of the exact program (see `milp`): its variables, and one function for each family of constraints.

Notation as in Checkmate (Jain et al. 2020): S[t, k] storage k is carried into stage t; R[t, p] operator p runs again in it;
and MONeT (Shah et al. 2021): M[t, i] the stage's own operator runs by option i. Ours: E[m], an encoder runs at moment m of the
forward; A, the presence of a storage after each operator of the stage that makes or reads it; I[pair], an operator runs in
place. Bytes are in units of the budget.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from ..schedule import Schedule
from .stages import Compiled, members

Row = tuple[dict[int, float], float]  # sum of coefficient x variable <= bound


def slots(compiled: Compiled) -> list[int]:
    """The order in which a stage recomputes: program order, a variant right after the last maker of its inputs and outputs, but
    for inputs that the forward makes later than these: they have to be carried."""
    problem = compiled.problem
    first = {s: makers[0] for s, makers in enumerate(problem.producers) if makers and makers[0] < problem.num_program}

    def place(p: int) -> tuple[int, int]:
        if p < problem.num_forward:
            return p, 0
        operator = problem.operators[p]
        late = {compiled.storages[k] for k in members(compiled.late_inputs[p])}
        read = {*operator.inputs, *operator.outputs} - late
        return max((first[s] for s in read if s in first), default=0), p

    return sorted(compiled.recomputes, key=place)


@dataclass
class Variables:
    """Numbers of the variables; the first `choices` of them are binary, the rest lie between 0 and 1.

    chain[t][k]: the presence variables of storage k in stage t, from S[t, k] on, each with the slot after which it holds (-1:
    when the stage begins). end[t, i]: option i of stage t, where there are several. encode[m]: the encoder at moment m.
    inplace[t, j, i]: pair i of slot j, of the backward operator's options one after the other (j = len(slots)), or of forward
    moment j (t = -1). lingering[m, k]: storage k, which nothing else uses any more, waits for an encoder at m or behind it.
    """

    compiled: Compiled
    slots: list[int]
    carried: dict[tuple[int, int], int] = field(default_factory=dict)
    run: dict[tuple[int, int], int] = field(default_factory=dict)
    end: dict[tuple[int, int], int] = field(default_factory=dict)
    encode: dict[int, int] = field(default_factory=dict)
    choices: int = 0
    count: int = 0
    chain: list[dict[int, list[tuple[int, int]]]] = field(default_factory=list)
    inplace: dict[tuple[int, int, int], int] = field(default_factory=dict)
    lingering: dict[tuple[int, int], int] = field(default_factory=dict)

    def new(self) -> int:
        self.count += 1
        return self.count - 1

    def before(self, t: int, j: int, k: int) -> int:
        """The presence variable of storage k in force just before slot j of stage t."""
        return next(v for slot, v in reversed(self.chain[t][k]) if slot < j)

    def after(self, t: int, j: int, k: int) -> int:
        """The presence variable of storage k in force after slot j of stage t."""
        return self.before(t, j + 1, k)


def make_variables(compiled: Compiled) -> Variables:
    """All variables of the program, binaries first."""
    v = Variables(compiled, slots(compiled))
    stages, bits = range(len(compiled.stages)), range(len(compiled.sizes))
    v.carried = {(t, k): v.new() for t in stages for k in bits}
    v.run = {(t, j): v.new() for t in stages for j in range(len(v.slots))}
    v.end = {(t, i): v.new() for t, s in enumerate(compiled.stages) if len(s.options) > 1 for i in range(len(s.options))}
    v.encode = {moment: v.new() for moment in compiled.encoders}
    v.choices = v.count
    for t in stages:
        v.chain.append({k: [(-1, v.carried[t, k])] for k in bits})
        for j, p in enumerate(v.slots):
            again = compiled.recomputes[p]
            for k in members(again.inputs | again.outputs):
                v.chain[t][k].append((j, v.new()))
            for i in range(len(again.inplace)):
                v.inplace[t, j, i] = v.new()
        for i in range(len(_stage_pairs(compiled, t))):
            v.inplace[t, len(v.slots), i] = v.new()
    for index, pairs in enumerate(compiled.forward_inplace):
        for i, (bit, _) in enumerate(pairs):
            if compiled.last_use[bit.bit_length() - 1] == index:
                v.inplace[-1, index, i] = v.new()
    for moment, encoder in compiled.encoders.items():
        behind = [compiled.encoders[m] for m in encoder.group if m >= moment]
        inputs = {k for e in behind for k in members(e.inputs) if compiled.last_use[k] < encoder.group.start}
        v.lingering |= {(moment, k): v.new() for k in sorted(inputs)}
    return v


def _stage_pairs(compiled: Compiled, t: int) -> list[tuple[int, int, int]]:
    """The in-place pairs of a stage's own operator: (option, bit of the input, bytes saved)."""
    return [(i, *pair) for i, option in enumerate(compiled.stages[t].options) for pair in option.inplace]


def carried_or_made(v: Variables) -> Iterator[Row]:
    """Checkmate (1c), (7): S[t+1, k] and each A only where the storage was present, or its maker ran; present once at most."""
    last = len(v.compiled.stages) - 1
    for t, chains in enumerate(v.chain):
        for k, chain in chains.items():
            for (_, before), (j, after) in zip(chain, chain[1:], strict=False):
                if v.compiled.recomputes[v.slots[j]].outputs >> k & 1:
                    yield {after: 1, before: -1, v.run[t, j]: -1}, 0
                    yield {before: 1, v.run[t, j]: 1}, 1
                else:
                    yield {after: 1, before: -1}, 0
            if t < last:
                yield {v.carried[t + 1, k]: 1, chain[-1][1]: -1}, 0


def inputs_present(v: Variables) -> Iterator[Row]:
    """Checkmate (1b): R[t, p] only where each input is present; MONeT's choice: what the option in use reads is, too."""
    for t, stage in enumerate(v.compiled.stages):
        for j, p in enumerate(v.slots):
            for k in members(v.compiled.recomputes[p].inputs):
                yield {v.run[t, j]: 1, v.before(t, j, k): -1}, 0
        for k in members(stage.common_needs):
            yield {v.chain[t][k][-1][1]: -1}, -1
        for i, option in enumerate(stage.options):
            for k in members(option.needs & ~stage.common_needs):
                yield {v.end[t, i]: 1, v.chain[t][k][-1][1]: -1}, 0


def one_option(v: Variables) -> Iterator[Row]:
    """MONeT: the M[t, i] of a stage are one in sum."""
    for t, stage in enumerate(v.compiled.stages):
        if len(stage.options) > 1:
            every = {v.end[t, i]: 1 for i in range(len(stage.options))}
            yield every, 1
            yield {variable: -1 for variable in every}, -1


def encoded_or_not_carried(v: Variables) -> Iterator[Row]:
    """S[0, k] of what only an encoder makes, only where that runs; what nothing else uses waits for it."""
    for moment, encoder in v.compiled.encoders.items():
        for k in members(encoder.outputs):
            yield {v.carried[0, k]: 1, v.encode[moment]: -1}, 0
        for k in members(encoder.inputs):
            if (moment, k) in v.lingering:
                yield {v.encode[moment]: 1, v.carried[0, k]: -1, v.lingering[moment, k]: -1}, 0
    for (moment, k), variable in v.lingering.items():
        if (moment + 1, k) in v.lingering and moment + 1 in v.compiled.encoders[moment].group:
            yield {v.lingering[moment + 1, k]: 1, variable: -1}, 0


def inplace_where_the_input_dies(v: Variables) -> Iterator[Row]:
    """I[pair] only where the operator runs and the input is gone after it, and no earlier pair's input is."""
    for (t, j, i), variable in v.inplace.items():
        if t < 0:
            pairs = [q for q in v.compiled.forward_inplace[j] if v.compiled.last_use[q[0].bit_length() - 1] == j]
            pair = v.compiled.forward_inplace[j][i]
            kept = [v.carried[0, q[0].bit_length() - 1] for q in pairs[: pairs.index(pair) + 1]]
        elif j < len(v.slots):
            pairs = v.compiled.recomputes[v.slots[j]].inplace
            kept = [_kept(v, t, j, bit) for bit, _ in pairs[: i + 1]]
            yield {variable: 1, v.run[t, j]: -1}, 0
        else:
            pairs = _stage_pairs(v.compiled, t)
            kept = [_kept(v, t, j, bit) for option, bit, _ in pairs[: i + 1] if option == pairs[i][0]]
            if (t, pairs[i][0]) in v.end:
                yield {variable: 1, v.end[t, pairs[i][0]]: -1}, 0
        if kept[-1] is not None:
            yield {variable: 1, kept[-1]: 1}, 1
        for earlier in kept[:-1]:
            yield {variable: 1} | ({earlier: -1} if earlier is not None else {}), 0


def kept_for_a_use(v: Variables) -> Iterator[Row]:
    """A storage whose death decides which of several pairs runs in place is present only where it is used later on."""
    c = v.compiled
    ways = [*c.recomputes.values(), *(option for s in c.stages for option in s.options)]
    families = [*(way.inplace for way in ways), *c.forward_inplace]
    deciding = {bit.bit_length() - 1 for pairs in families for bit, _ in pairs[:-1]}
    for t, chains in enumerate(v.chain):
        for k in sorted(deciding - {-1}):
            chain = chains[k]
            for (_, before), (j, after) in zip(chain, chain[1:], strict=False):
                reads = c.recomputes[v.slots[j]].inputs >> k & 1
                yield {before: 1, after: -1} | ({v.run[t, j]: -1} if reads else {}), 0
            if not c.stages[t].common_needs >> k & 1:
                later = {v.carried[t + 1, k]: -1} if t + 1 < len(c.stages) else {}
                later |= {v.end[t, i]: -1 for i, option in enumerate(c.stages[t].options) if option.needs >> k & 1}
                yield {chain[-1][1]: 1} | later, 0


def _kept(v: Variables, t: int, j: int, bit: int) -> int | None:
    """The variable that says that a storage outlives an operator; None where it surely does not."""
    k = bit.bit_length() - 1
    if j < len(v.slots):
        return v.after(t, j, k)
    return v.carried[t + 1, k] if bit and t + 1 < len(v.compiled.stages) else None


def forward_fits(v: Variables, budget_bytes: int) -> Iterator[Row]:
    """MONeT (9), for the forward: what it holds anyway, what is carried beyond its last use, and what encoding takes."""
    c = v.compiled
    for index, base_bytes in enumerate(c.forward_bytes):
        row = {v.carried[0, k]: size / budget_bytes for k, size in enumerate(c.sizes) if c.last_use[k] < index and size}
        for i, (_, saved) in enumerate(c.forward_inplace[index]):
            if (-1, index, i) in v.inplace:
                row[v.inplace[-1, index, i]] = -saved / budget_bytes
        if index in c.encoders:
            encoder = c.encoders[index]
            row |= {v.lingering[m, k]: c.sizes[k] / budget_bytes for m, k in v.lingering if m == index}
            for k in members(encoder.outputs):
                row.pop(v.carried[0, k], None)
            row[v.encode[index]] = (encoder.workspace_bytes + c.bytes_of(encoder.outputs)) / budget_bytes
        yield row, 1 - base_bytes / budget_bytes


def stages_fit(v: Variables, budget_bytes: int) -> Iterator[Row]:
    """Checkmate (3), (4) with presence in the place of FREE: the bytes during each operator of each stage."""
    c, end = v.compiled, len(v.slots)
    for t, stage in enumerate(c.stages):
        used: dict[int, float] = {v.carried[t, k]: size / budget_bytes for k, size in enumerate(c.sizes)}
        for j, p in enumerate(v.slots):
            again = c.recomputes[p]
            made_bytes = sum(c.sizes[k] for k in members(again.outputs)) + again.extra_bytes
            row = used | {v.run[t, j]: made_bytes / budget_bytes}
            row |= {v.inplace[t, j, i]: -saved / budget_bytes for i, (_, saved) in enumerate(again.inplace)}
            yield row, 1 - stage.between_bytes / budget_bytes
            for k in members(again.inputs | again.outputs):
                used[v.after(t, j, k)] = used.pop(v.before(t, j, k))
        row = used | {v.inplace[t, end, i]: -saved / budget_bytes for i, (_, _, saved) in enumerate(_stage_pairs(c, t))}
        first = stage.options[0].during_bytes
        for i, option in enumerate(stage.options):
            if i:
                row[v.end[t, i]] = (option.during_bytes - first) / budget_bytes
        yield row, 1 - first / budget_bytes


def read_schedule(v: Variables, values) -> Schedule:
    """The steps that a point stands for."""
    steps = [p for m, p in enumerate(v.compiled.forward) if m not in v.encode or values[v.encode[m]] > 0.5]
    for t, stage in enumerate(v.compiled.stages):
        steps += [p for j, p in enumerate(v.slots) if values[v.run[t, j]] > 0.5]
        end = next((i for i in range(len(stage.options)) if (t, i) in v.end and values[v.end[t, i]] > 0.5), 0)
        steps += stage.operators
        steps += [stage.options[end].operator] if stage.options[end].operator >= 0 else []
    return Schedule(tuple(steps))
