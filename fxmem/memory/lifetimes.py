"""What a schedule makes and when each of it is alive: from Problem and Schedule to buffers and intervals. No torch.

A storage that is recomputed is another *buffer* each time. A buffer is alive from the step that makes it to its last use,
that step included: half-open, [step, last use + 1). Where an operator runs in place, its output goes on in its input's
buffer, as the simulator decides. What exists before the step, and what lives to its end (outputs and gradients), lies
outside of the arena: others hold it, and see it.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from ..problem import Problem
from ..schedule import Schedule, simulate
from .intervals import Interval


@dataclass(frozen=True)
class Buffer:
    """Bytes that one or more storages of a schedule take, one after the other.

    name: of the first storage, with a number where it is made again. storages: in the order in which they take the bytes;
    makers[i]: the step that makes storages[i]. users: steps that make or read any of them, in order; the first makes it.
    outside: whether it lives on after the last step.
    """

    name: str
    storages: tuple[int, ...]
    makers: tuple[int, ...]
    users: tuple[int, ...]
    size_bytes: int
    outside: bool


@dataclass
class _Open:
    """A buffer that may still be used."""

    name: str
    storages: list[int]
    makers: list[int]
    users: list[int]
    outside: bool = False


def buffers_of(problem: Problem, schedule: Schedule, inplace: bool = True) -> tuple[Buffer, ...]:
    """The buffers of a schedule, in the order in which they are made; fixed storages have none.

    inplace: whether pairs that the simulator runs in place share a buffer. Raises ProblemError as `simulate` does.
    """
    timeline = simulate(problem, schedule)
    holder: dict[int, _Open] = {}
    made: list[_Open] = []
    times: Counter[int] = Counter()
    for step, index in enumerate(schedule.steps):
        operator = problem.operators[index]
        pair = timeline.inplace[step] if inplace else None
        read = {id(holder[s]): holder[s] for s in operator.inputs if s in holder}
        for buffer in read.values():
            buffer.users.append(step)
        for storage in operator.outputs:
            times[storage] += 1
            if pair and storage == pair[1]:
                buffer = holder[pair[0]]
                buffer.storages.append(storage)
                buffer.makers.append(step)
            else:
                again = f"#{times[storage]}" if times[storage] > 1 else ""
                buffer = _Open(problem.storages[storage].name + again, [storage], [step], [step])
                made.append(buffer)
            if storage not in problem.outputs:
                holder[storage] = buffer
            elif times[storage] == 1:  # made again, it is dropped at once
                holder[storage], buffer.outside = buffer, True
    return tuple(_closed(problem, buffer) for buffer in made)


def _closed(problem: Problem, buffer: _Open) -> Buffer:
    size_bytes = max(problem.storages[s].size_bytes for s in buffer.storages)
    return Buffer(
        buffer.name, tuple(buffer.storages), tuple(buffer.makers), tuple(buffer.users), size_bytes, buffer.outside
    )  # fmt: skip


def intervals_of(problem: Problem, schedule: Schedule, alignment: int = 1) -> tuple[Interval, ...]:
    """What of a schedule goes into an arena, to be given to `plan_offsets`: moments are steps.

    Ids are `Buffer.name`, with the step where two are equal. alignment: of every buffer, in bytes.
    """
    inside = [b for b in buffers_of(problem, schedule) if not b.outside]
    names = Counter(b.name for b in inside)
    ids = [b.name if names[b.name] == 1 else f"{b.name}@{b.users[0]}.{k}" for k, b in enumerate(inside)]
    return tuple(Interval(id, b.users[0], b.users[-1] + 1, b.size_bytes, alignment) for id, b in zip(ids, inside, strict=True))
