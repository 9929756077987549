"""Many moves at once: single moves are priced on a state, and an integer program packs the best set of them that fits.

Annealing finds good patterns for one part of a graph after the other, but seldom the exchange of three of them for five
others that a tight budget asks for. Here each move is evaluated alone, exactly: the seconds it saves or costs, and the bytes
it adds or frees at each stage and forward operator. A knapsack with a row for each moment that could run over, and a clique
for moves that touch the same wish or the same stage's recomputes, chooses among them all (a very large-scale neighbourhood in
the sense of Ahuja et al. 2002). Moves still interact, so the whole set is evaluated exactly, and taken only if it is better;
where it needs more bytes than promised, those moments get less room and the program is solved again. Where no such set is
better, moves of one stage may go together as long as they do not make the same operator run, or no longer run, there: in long
segments, made again at one stage each, most of what is to be had is there. A state that does not fit yet has moments with less
than no room: the set must free what they lack, or, where no set frees it all, as much of it as it can, and the next round goes
on from there.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from itertools import zip_longest
from operator import or_

import numpy as np

from .highs import Program, minimize
from .moves import Moves
from .stages import members
from .state import State

RANDOM_X_STAGES, LEAST_RANDOM, MOST_RANDOM = 200_000, 400, 700  # random moves, by the number of stages
SURE_ROUNDS, MOST_ROUNDS = 8, 40
SAVED = 0.01  # of the extra time: a round after the sure ones that saves less is weak
MOST_STRIPS = 2  # weak rounds, or ones that save nothing, after which wishes are stripped; the next one is the last
FREED = 0.1  # of the bytes too many: a round that frees less, any at all, is the last, for annealing does that better
ATTEMPTS = 3
FIT_SHARE = 4  # of the time that is left, sets that fit are looked for in this part: there may be none, which is hard to prove
MOST_NODES = 200
MOST_CUTS = 20
LACKING = 10.0  # what lacking the most bytes that a move adds or frees at a moment weighs, in times of the most that one costs
BLOCK = 64  # moves written out in full at a time
CUTS = 20
Wishes = dict[int, int]


@dataclass(frozen=True)
class Priced:
    """A move from the state at hand: which wishes it flips, and what follows from that alone.

    flips: bits whose wish changes, for each stage. moments, steps: the bytes added at each stage and then at each forward
    operator, as the moments at which they differ from those added just before, and by how much (a storage kept over a thousand
    stages is two numbers). reruns: see `State.rewalked`.
    """

    flips: Wishes
    time_s: float
    moments: np.ndarray
    steps: np.ndarray
    reruns: tuple[tuple[int, int], ...]


def pack(state: State, moves: Moves, deadline: float = math.inf) -> bool:
    """Improve a state by sets of moves, until none is found: first to fit, then to take less time. Whether the deadline
    (time.monotonic) cut it short."""
    careful, strips, hurried, stripped = True, MOST_STRIPS, False, None
    for number in range(MOST_ROUNDS):
        before, now = _rank(state), time.monotonic()
        halfway = now + (deadline - now) / 2
        priced = list(_priced(state, moves, halfway))
        hurried = time.monotonic() > halfway
        careful = _round(state, priced, careful, deadline)
        rank = _rank(state)
        few_freed = rank[0] > (1 - FREED) * before[0]
        little_saved = not before[0] and rank[1] > (1 - SAVED) * before[1]
        if few_freed or hurried and rank == before:
            break
        if rank == before or (little_saved and number >= SURE_ROUNDS):
            strips -= 1
            if stripped is None or stripped[0] != rank:
                stripped = rank, list(state.desired)
            if strips < 0 or not _strip(state):
                break
    if stripped and _rank(state) == stripped[0]:  # nothing came of it
        state.reset(stripped[1], state.budget_bytes)
    return hurried or time.monotonic() > deadline


def _strip(state: State) -> bool:
    """Wish for nothing but what comes of it: then other moves are of use, such as not to keep what a move makes again. Whether
    there were other wishes."""
    before, rank, thrift = list(state.desired), _rank(state), state.compiled.thrift
    wishes = [bits & (live | thrift) for bits, live in zip(before, state.live, strict=True)]
    state.reset(wishes, state.budget_bytes)
    if _rank(state) > rank:
        state.reset(before, state.budget_bytes)
    return state.desired != before


def _round(state: State, priced: list[Priced], careful: bool, deadline: float) -> bool:
    """Look for a better state, which the state then is: first with as much care as before, then with the other. With how much
    one was found, or as before."""
    knapsack, before = None, _rank(state)
    for care in (careful, not careful):
        if not priced or time.monotonic() > deadline:
            break
        knapsack = knapsack or _Knapsack(priced, state.budget_bytes - _moments(state))
        knapsack.restrict(_cliques(priced, state.everything, care))
        now = time.monotonic()
        if _fit(state, knapsack, before, now + (deadline - now) / FIT_SHARE) or (
            before[0] > 0 and _near(state, knapsack, before, deadline)
        ):
            return care
    return careful


def _fit(state: State, knapsack: _Knapsack, before: tuple[int, float], deadline: float) -> bool:
    """Make a set of moves with which the state fits and is better than before, or what of such a set is of use."""
    room, chosen = knapsack.room, []
    for _ in range(ATTEMPTS):
        chosen = knapsack.solve(deadline) or chosen
        if not chosen:
            break
        for move in chosen:
            _flip(state, move)
        if not state.excess_bytes and _rank(state) < before:
            state.keep()
            return True
        over = np.maximum(0, _moments(state) - state.budget_bytes)
        state.undo()
        if not over.any():
            break
        knapsack.room = knapsack.room - 1.5 * over
    knapsack.room = room
    return bool(chosen) and _one_by_one(state, chosen)


def _near(state: State, knapsack: _Knapsack, before: tuple[int, float], deadline: float) -> bool:
    """Make a set of moves that leaves fewer bytes too many, where none was found that leaves none."""
    for rounded in (True, False):
        for move in knapsack.solve(deadline, within=False, rounded=rounded):
            _flip(state, move)
        if _rank(state) < before:
            state.keep()
            return True
        state.undo()
    return False


def _one_by_one(state: State, chosen: list[Priced]) -> bool:
    """Of a set that does not fit as a whole, first what frees bytes, then what saves most time, as far as each fits."""
    desired, before = list(state.desired), _rank(state)
    for move in sorted(chosen, key=lambda move: (move.time_s <= 0, move.time_s)):
        excess_bytes = state.excess_bytes
        _flip(state, move)
        state.undo() if state.excess_bytes > excess_bytes else state.keep()
    if _rank(state) < before:
        return True
    state.reset(desired, state.budget_bytes)
    return False


def _rank(state: State) -> tuple[int, float]:
    """The smaller the better; rounded so that noise is no progress."""
    return state.excess_bytes, round(state.time_s, 12)


def _flip(state: State, move: Priced) -> None:
    state.change({t: state.desired[t] ^ bits for t, bits in move.flips.items()})


def _moments(state: State) -> np.ndarray:
    """Most bytes during each stage, then during each forward operator."""
    return np.array([*state.peak_bytes, *state.forward_bytes], float)


def _priced(state: State, moves: Moves, deadline: float) -> Iterator[Priced]:
    """All moves of one storage over one gap and some random ones, each that could be of use once; until the deadline."""
    before, before_s, desired = _moments(state), state.time_s, list(state.desired)
    seen, same = set(), {}  # one object for equal bits, of which there are thousands of bytes in a move
    for propose in _proposals(state, moves):
        if time.monotonic() > deadline:
            return
        places: set[int] = set()
        for wishes in propose:
            state.change(wishes)
            places.update(wishes)
        added, time_s = _moments(state) - before, state.time_s - before_s
        steps = np.diff(added, prepend=0.0)
        (moments,) = np.nonzero(steps)
        key = round(time_s, 12), moments.tobytes(), steps[moments].tobytes()
        if (time_s < 0 or added.min() < 0) and key not in seen:
            seen.add(key)
            changed = ((t, state.desired[t] ^ desired[t]) for t in sorted(places))
            flips = {t: same.setdefault(bits, bits) for t, bits in changed if bits}
            yield Priced(flips, time_s, moments, steps[moments], tuple(state.rewalked()))
        state.undo()


def _proposals(state: State, moves: Moves) -> Iterator[Iterator[Wishes]]:
    """Each a sequence of moves to apply in turn; of all kinds from the beginning, as there may not be time for all."""
    single = (moves.all_evictions(state), moves.all_keeps(state), moves.all_switches(state), moves.all_savings(state))
    for several in zip_longest(*single):
        yield from (iter((wishes,)) for wishes in several if wishes)
    for _ in range(min(MOST_RANDOM, max(LEAST_RANDOM, RANDOM_X_STAGES // len(state.live)))):
        yield (moves.draw(state) for _ in range(moves.how_many()))


class _Knapsack:
    """Least time within the room of each moment, one move of each clique.

    Where the state fits, of hundreds of moments only some dozens are ever short of room: their rows are added as the linear
    relaxation runs over them, and the integer program is solved with those alone.
    """

    def __init__(self, priced: list[Priced], room: np.ndarray):
        from scipy.sparse import csr_array  # here, so that importing the package does not wait for it

        self.priced = priced
        self.cost = np.array([move.time_s for move in priced])
        self.cost /= np.abs(self.cost).max() or 1.0
        values, moments = (np.concatenate([getattr(move, name) for move in priced]) for name in ("steps", "moments"))
        columns = np.repeat(np.arange(len(priced)), [len(move.moments) for move in priced])
        self.steps = csr_array((values, (moments, columns)), shape=(len(room), len(priced)))
        self.unit = self._largest()  # of each row
        self.room = room
        self.short = np.flatnonzero(room < 0)
        self._rows: dict[int, tuple[list[int], list[float]]] = {}
        self.restrict([])

    def restrict(self, cliques: list[list[int]]) -> None:
        """Begin anew, with these cliques."""
        self.cliques = cliques
        self.moments: list[int] = []  # that have a row

    def solve(self, deadline: float, within: bool = True, rounded: bool = False) -> list[Priced]:
        """The moves to make, none where nothing is better. within: with bytes too many nowhere; otherwise where the state has
        bytes too many, those that remain count. rounded: by the linear relaxation alone."""
        count, integer = len(self.priced), False
        if not within:
            self.moments += [int(row) for row in self.short if row not in self.moments]
        for _ in range(MOST_CUTS):
            program = self._program(integer, within)
            start = np.concatenate((np.zeros(count), program.upper[count:])) if integer else None
            x = minimize(program, deadline=deadline, most_nodes=MOST_NODES, start=start).x
            if x is None:
                return []
            x = x[:count]
            over = (np.cumsum(self.steps @ (np.round(x) if integer else x)) - self.room) / self.unit
            over[self.moments] = 0
            new = [int(row) for row in np.argsort(-over, kind="stable")[:CUTS] if over[row] > 1e-6]
            if not new and (integer or rounded):
                return [self.priced[j] for j, value in enumerate(x) if value > 0.5]
            self.moments += new
            integer = integer or not new
        return []

    def _largest(self) -> np.ndarray:
        """The most bytes that any move adds or frees at each moment, at least one."""
        most, steps = np.ones(self.steps.shape[0]), self.steps.tocsc()
        for begin in range(0, steps.shape[1], BLOCK):
            added = np.cumsum(steps[:, begin : begin + BLOCK].toarray(), axis=0)
            most = np.maximum(most, np.abs(added).max(axis=1))
        return most

    def _row(self, moment: int) -> tuple[list[int], list[float]]:
        """The moves that add or free bytes at a moment, and how many units."""
        if moment not in self._rows:
            added = self.steps[: moment + 1].sum(axis=0)
            (at,) = np.nonzero(added)
            self._rows[moment] = at.tolist(), (added[at] / self.unit[moment]).tolist()
        return self._rows[moment]

    def _program(self, integer: bool, within: bool) -> Program:
        """Beside a variable for each move, one for each moment that is short of room: what it still lacks."""
        starts, columns, values, upper, count = [0], [], [], [], len(self.priced)
        lacking = {int(row): count + n for n, row in enumerate(self.short)}
        for row in self.moments:
            at, added = self._row(row)
            columns += at
            values += added
            if row in lacking:
                columns.append(lacking[row])
                values.append(-1.0)
            upper.append(self.room[row] / self.unit[row])
            starts.append(len(columns))
        for clique in self.cliques:
            columns += clique
            values += [1.0] * len(clique)
            upper.append(1.0)
            starts.append(len(columns))
        most = np.zeros(len(lacking)) if within else -self.room[self.short] / self.unit[self.short]
        cost = np.concatenate((self.cost, np.full(len(lacking), LACKING)))
        upper_bounds, integral = np.concatenate((np.ones(count), most)), np.arange(len(cost)) < count * integer
        return Program(
            cost, np.array(starts), np.array(columns, int), np.array(values, float), np.full(len(upper), -np.inf),
            np.array(upper), np.zeros(len(cost)), upper_bounds, integral,
        )  # fmt: skip


def _cliques(priced: list[Priced], storages: int, careful: bool) -> list[list[int]]:
    """Sets of moves of which one at most can be taken, without those that lie within another: moves of one storage, and of one
    operator that a stage makes run or not, or if careful of one stage. `storages` are the bits that are storages' (see
    `Compiled.thrift`)."""
    users: dict[tuple, int] = {}
    for j, move in enumerate(priced):
        flipped = reduce(or_, move.flips.values(), 0) & storages
        reruns = {t for t, _ in move.reruns} if careful else move.reruns
        for key in (*(("stage", r) for r in reruns), *(("storage", k) for k in members(flipped))):
            users[key] = users.get(key, 0) | 1 << j
    largest: list[list[int]] = []
    around: dict[int, list[int]] = {}  # of the largest ones, those that each move is in
    for clique in sorted(set(users.values()), key=lambda c: (-c.bit_count(), c)):
        lowest = (clique & -clique).bit_length() - 1
        if clique.bit_count() > 1 and not any(clique & other == clique for other in around.get(lowest, ())):
            largest.append(members(clique))
            for j in largest[-1]:
                around.setdefault(j, []).append(clique)
    return largest
