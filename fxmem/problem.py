"""The rematerialization problem as plain data: no torch, nothing that moves.

A training step is a list of *operators* in program order, the forward ones first. Operators read and make *storages*: the
bytes behind one or more tensors (views cost nothing and are not operators). Any forward operator may run again during the
backward, and then makes its storages anew. Beside the program stand other ways to run parts of it, for schedules to choose:

- a *variant* makes a forward storage, and only ever runs as a recompute (a dropout applied with its kept mask, for one);
- an *encoder* makes a storage that the program does not know, from forward storages, in the forward or as a recompute (the
  signs of a ReLU's output in bits);
- an *alternative* runs in the place of one backward operator and makes what it makes, from other storages (the ReLU's
  gradient from the signs).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property

from .errors import ProblemError

KINDS = ("parameter", "buffer", "input", "activation", "gradient")


@dataclass(frozen=True)
class Storage:
    """Bytes behind one or more tensors.

    kind: one of KINDS. What no operator makes (parameters, buffers, inputs) is there during the whole step.
    """

    name: str
    size_bytes: int
    kind: str = "activation"


@dataclass(frozen=True)
class Operator:
    """One operator of the step.

    inputs, outputs: indices into `Problem.storages`.
    time_s: seconds of one run, the first or another.
    workspace_bytes: what the operator takes and gives back while it runs.
    inplace: pairs (input, output): the output may take over the input's bytes when the input dies in this operator.
        The first pair whose input dies is the one that is used.
    recomputable: False for what must run exactly once.
    replaces: of an alternative, the backward operator in whose place it runs. Where it is faster, that does not count: extra
        time is never below zero.
    module, source, implementation: for reports: the user's module path; "file.py:12", where the user calls it; the operator
        implementation that it belongs to, "" for the program's own.
    """

    name: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    time_s: float = 0.0
    workspace_bytes: int = 0
    inplace: tuple[tuple[int, int], ...] = ()
    recomputable: bool = True
    module: str = ""
    source: str = ""
    implementation: str = ""
    replaces: int | None = None


@dataclass(frozen=True)
class Problem:
    """A training step: operators `[0, num_forward)` are the forward, `[num_forward, num_program)` the backward, both in
    program order; from `num_program` on stand variants, encoders and alternatives, what they read before them.

    outputs: storages that live to the end of the step (the model's outputs, gradients of parameters and inputs).
    extra_bytes: bytes alive during the whole step that belong to no storage (saved generator states, say).
    """

    storages: tuple[Storage, ...]
    operators: tuple[Operator, ...]
    num_forward: int
    num_program: int
    outputs: frozenset[int] = field(default_factory=frozenset)
    extra_bytes: int = 0

    def __post_init__(self):
        _check(self)

    @property
    def returned(self) -> frozenset[int]:
        """The storages that a forward hands out: what its last operator, the "return" of a captured module, reads."""
        return frozenset(self.operators[self.num_forward - 1].inputs)

    @cached_property
    def producers(self) -> tuple[tuple[int, ...], ...]:
        """For each storage the operators that make it: the program's own first, then variants; empty if fixed."""
        makers: list[list[int]] = [[] for _ in self.storages]
        for index, operator in enumerate(self.operators):
            for storage in operator.outputs:
                makers[storage].append(index)
        return tuple(tuple(m) for m in makers)

    @cached_property
    def fixed_bytes(self) -> int:
        """Bytes that are there before the step begins and stay: parameters, buffers, inputs, extra_bytes."""
        made = (s.size_bytes for s, m in zip(self.storages, self.producers, strict=True) if not m)
        return sum(made) + self.extra_bytes

    @cached_property
    def plain_time_s(self) -> float:
        """Seconds of every operator once, the same in every order: the unit of extra time."""
        return math.fsum(o.time_s for o in self.operators[: self.num_program])

    @property
    def forward(self) -> range:
        return range(self.num_forward)

    @property
    def backward(self) -> range:
        return range(self.num_forward, self.num_program)

    @cached_property
    def variants(self) -> tuple[int, ...]:
        """Other makers of forward storages."""
        return tuple(p for p in self._beside if self.operators[p].replaces is None and p not in self.encoders)

    @cached_property
    def encoders(self) -> tuple[int, ...]:
        """Makers of storages that the program does not know."""
        known = {s for o in self.operators[: self.num_program] for s in o.outputs}
        found = (p for p in self._beside if self.operators[p].replaces is None)
        return tuple(p for p in found if not known.intersection(self.operators[p].outputs))

    @cached_property
    def alternatives(self) -> dict[int, tuple[int, ...]]:
        """For each backward operator that has any, the operators that may run in its place."""
        found: dict[int, tuple[int, ...]] = {}
        for p in self._beside:
            replaced = self.operators[p].replaces
            if replaced is not None:
                found[replaced] = (*found.get(replaced, ()), p)
        return found

    @cached_property
    def useful_alternatives(self) -> dict[int, tuple[int, ...]]:
        """Those alternatives that solvers look at: a search with fewer choices finds more."""
        useful = {index: tuple(p for p in found if not self._is_useless(p)) for index, found in self.alternatives.items()}
        return {index: found for index, found in useful.items() if found}

    def _is_useless(self, index: int) -> bool:
        """Whether an alternative reads all that the operator reads, and takes no less time, memory or room for its result (a
        convolution's slices on a GPU, say). Or whether it takes more time than to make what it reads again from what the
        operator reads, which is no larger to keep (a layer norm from its output, where it takes long to divide by weights)."""
        other, plain = self.operators[index], self.operators[self.program_index(index)]
        slower_s, inplace = other.time_s - plain.time_s, set(other.inplace) <= set(plain.inplace)
        instead = set(other.inputs) - set(plain.inputs)
        spared = set(plain.inputs) - set(other.inputs)
        if not spared:
            return inplace and slower_s >= 0 and other.workspace_bytes >= plain.workspace_bytes
        if max(map(self._size_bytes, spared)) > max(map(self._size_bytes, instead), default=0):
            return False
        return math.fsum(self._again_s(s, set(plain.inputs)) for s in instead if self.producers[s]) < slower_s

    def _size_bytes(self, storage: int) -> int:
        return self.storages[storage].size_bytes

    def _again_s(self, storage: int, kept: set[int]) -> float:
        """Seconds to make a forward storage again from some that are kept, and from what is always there."""
        makers = [self.operators[p] for p in self.producers[storage]]
        fit = (o for o in makers if o.recomputable and all(s in kept or not self.producers[s] for s in o.inputs))
        return min((o.time_s for o in fit), default=math.inf)

    @property
    def _beside(self) -> range:
        return range(self.num_program, len(self.operators))

    def program_index(self, index: int) -> int:
        """The operator in whose place `index` runs: itself, but for alternatives."""
        replaced = self.operators[index].replaces
        return index if replaced is None else replaced

    def slower_s(self, index: int) -> float:
        """Seconds that an alternative takes more than what it replaces."""
        return max(0.0, self.operators[index].time_s - self.operators[self.program_index(index)].time_s)


def without_implementations(problem: Problem) -> tuple[Problem, tuple[int, ...]]:
    """The same step with no encoders, nothing that reads what they make, no alternatives, and of the variants only those that
    read what their operator itself has made beside; and which of the old operators each of the new ones is."""
    codes = {s for p in problem.encoders for s in problem.operators[p].outputs}
    kept = [s for s in range(len(problem.storages)) if s not in codes]
    number = {s: i for i, s in enumerate(kept)}
    elsewhere = {p for p in problem.variants if not _reads_its_own(problem, p)}
    left = [
        p
        for p, o in enumerate(problem.operators)
        if o.replaces is None and p not in elsewhere and not codes.intersection((*o.inputs, *o.outputs))
    ]
    operators = (
        replace(
            problem.operators[p],
            inputs=tuple(number[s] for s in problem.operators[p].inputs),
            outputs=tuple(number[s] for s in problem.operators[p].outputs),
            inplace=tuple((number[a], number[b]) for a, b in problem.operators[p].inplace),
        )
        for p in left
    )
    outputs = frozenset(number[s] for s in problem.outputs)
    storages = tuple(problem.storages[s] for s in kept)
    return replace(problem, storages=storages, operators=tuple(operators), outputs=outputs), tuple(left)


def without_recompute(problem: Problem) -> Problem:
    """The same step where no forward operator runs twice: variants may run that read nothing but what was made of their result,
    what encoders have kept or what later operators have joined."""
    first = [makers[:1] for makers in problem.producers]

    def takes_apart(variant: int) -> bool:
        operator = problem.operators[variant]
        made = max(first[s] for s in operator.outputs)
        return all(made < first[s] for s in operator.inputs if first[s])

    once = {*problem.forward, *(p for p in problem.variants if not takes_apart(p))}
    operators = (replace(o, recomputable=False) if p in once else o for p, o in enumerate(problem.operators))
    return replace(problem, operators=tuple(operators))


def _reads_its_own(problem: Problem, variant: int) -> bool:
    """Whether a variant begins from another result of the operator that it stands for, as dropout does from its mask."""
    operator = problem.operators[variant]
    makers = {problem.producers[s][0] for s in operator.outputs}
    return any(not {*problem.operators[p].outputs}.isdisjoint(operator.inputs) for p in makers)


def _check(problem: Problem) -> None:
    """Refuse what no step can be: costs that are no costs, a storage read before it is made, two first producers."""
    if not 0 <= problem.num_forward <= problem.num_program <= len(problem.operators):
        raise ProblemError(
            f"num_forward={problem.num_forward} and num_program={problem.num_program} do not split "
            f"{len(problem.operators)} operators: need 0 <= num_forward <= num_program <= number of operators"
        )
    for storage in problem.storages:
        _check_cost(f"storage {storage.name!r}", "size_bytes", storage.size_bytes)
        if storage.kind not in KINDS:
            raise ProblemError(f"storage {storage.name!r} has kind {storage.kind!r}; allowed: {', '.join(KINDS)}")
    made = {s for operator in problem.operators for s in operator.outputs}
    _check_indices("outputs of the problem", problem.outputs, len(problem.storages))
    available = set(range(len(problem.storages))) - made
    for index, operator in enumerate(problem.operators):
        _check_operator(problem, operator)
        missing = [s for s in operator.inputs if s not in available]
        if missing:
            raise ProblemError(
                f"operator {operator.name!r} reads storage {problem.storages[missing[0]].name!r} before anything makes it: "
                "the operators are cyclic or out of order"
            )
        _check_producer(problem, index, operator, available)
        available.update(operator.outputs)


def _check_producer(problem: Problem, index: int, operator: Operator, available: set[int]) -> None:
    again = [s for s in operator.outputs if s in available]
    if index < problem.num_program and again:
        raise ProblemError(
            f"operator {operator.name!r} makes storage {problem.storages[again[0]].name!r}, which exists already"
        )
    if operator.replaces is not None:
        _check_alternative(problem, index, operator)
    elif index >= problem.num_program:
        _check_beside(problem, index, operator, again)


def _check_alternative(problem: Problem, index: int, operator: Operator) -> None:
    if index < problem.num_program or operator.replaces not in problem.backward:
        raise ProblemError(
            f"operator {operator.name!r} replaces operator {operator.replaces}, but only what stands beside the program can "
            f"replace, and only a backward operator, {problem.num_forward} to {problem.num_program - 1}"
        )
    replaced = problem.operators[operator.replaces]
    backward = {s for p in problem.backward for s in problem.operators[p].outputs}
    if backward & set(operator.inputs) != backward & set(replaced.inputs):
        raise ProblemError(f"alternative {operator.name!r} does not read the same gradients as {replaced.name!r}")
    if set(operator.outputs) != set(replaced.outputs):
        raise ProblemError(f"alternative {operator.name!r} does not make what {replaced.name!r} makes, in whose place it runs")


def _check_beside(problem: Problem, index: int, operator: Operator, again: list[int]) -> None:
    """A variant makes forward storages alone; an encoder none of the program's, from what one forward operator makes."""
    made_by = {s: p for p in range(problem.num_program) for s in problem.operators[p].outputs}
    foreign = [s for s in operator.outputs if s not in made_by or made_by[s] >= problem.num_forward]
    if again and foreign:
        raise ProblemError(
            f"variant {operator.name!r} makes storage {problem.storages[foreign[0]].name!r}, which no forward operator makes"
        )
    sources = {made_by.get(s, index) for s in operator.inputs if s in made_by or problem.producers[s]}
    if not again and (len(sources) > 1 or any(p >= problem.num_forward for p in sources) or not operator.recomputable):
        raise ProblemError(
            f"encoder {operator.name!r} must be recomputable and read what one forward operator makes, and fixed storages"
        )


def _check_operator(problem: Problem, operator: Operator) -> None:
    who = f"operator {operator.name!r}"
    _check_indices(f"inputs of {who}", operator.inputs, len(problem.storages))
    _check_indices(f"outputs of {who}", operator.outputs, len(problem.storages))
    _check_cost(who, "time_s", operator.time_s)
    _check_cost(who, "workspace_bytes", operator.workspace_bytes)
    for source, target in operator.inplace:
        if source not in operator.inputs or target not in operator.outputs:
            raise ProblemError(
                f"{who} has the in-place pair {(source, target)}, which is not (one of its inputs, one of its outputs)"
            )


def _check_indices(what: str, indices: Iterable[int], count: int) -> None:
    for index in indices:
        if not 0 <= index < count:
            raise ProblemError(f"{what} name storage {index}, but there are {count} storages")


def _check_cost(who: str, field_name: str, value: float) -> None:
    if not math.isfinite(value) or value < 0:
        raise ProblemError(f"{who} has {field_name}={value!r}; it must be a finite number, zero or more")
