"""Packing: the priced moves of one state, and the set of them that is taken."""

import math
from random import Random

import numpy as np
import pytest
from helpers.instances import load_instance

from fxmem.schedule import plain_schedule, simulate
from fxmem.solvers import highs, packing
from fxmem.solvers.annealing import Run, anneal
from fxmem.solvers.bound import hint
from fxmem.solvers.moves import Moves
from fxmem.solvers.packing import pack
from fxmem.solvers.segments import equal_segments
from fxmem.solvers.stages import compile_problem, members
from fxmem.solvers.state import State


def budget_of(problem, fraction):
    plain = simulate(problem, plain_schedule(problem)).peak_bytes
    return problem.fixed_bytes + int(fraction * (plain - problem.fixed_bytes))


@pytest.fixture(scope="module")
def rough():
    """A U-Net at half of its peak, after a short walk: fits, and leaves much to be found."""
    problem = load_instance("unet_8")
    compiled, budget_bytes = compile_problem(problem), budget_of(problem, 0.5)
    found = anneal(Run(problem, budget_bytes, hint(compiled, budget_bytes, math.inf), 1_500, 0))
    return State(compiled, budget_bytes, list(found.desired))


def test_a_rough_schedule_becomes_much_cheaper_and_still_fits(rough):
    state = State(rough.compiled, rough.budget_bytes, list(rough.desired))
    assert not pack(state, Moves(state.compiled, Random(0)))
    assert state.time_s < 0.9 * rough.time_s
    timeline = simulate(state.compiled.problem, state.schedule())
    assert timeline.peak_bytes == state.worst_bytes <= state.budget_bytes


def test_the_same_seed_packs_the_same(rough):
    ends = []
    for _ in range(2):
        state = State(rough.compiled, rough.budget_bytes, list(rough.desired))
        pack(state, Moves(state.compiled, Random(1)))
        ends.append(tuple(state.desired))
    assert ends[0] == ends[1]


def test_a_move_costs_what_it_was_priced_at(rough):
    state = State(rough.compiled, rough.budget_bytes, list(rough.desired))
    before, before_s = np.array([*state.peak_bytes, *state.forward_bytes]), state.time_s
    priced = list(packing._priced(state, Moves(state.compiled, Random(2)), math.inf))
    assert len(priced) > 100 and state.time_s == pytest.approx(before_s, abs=1e-12)
    for move in Random(0).sample(priced, 40):
        fresh = State(state.compiled, state.budget_bytes, list(state.desired))
        fresh.reset([bits ^ move.flips.get(t, 0) for t, bits in enumerate(state.desired)], state.budget_bytes)
        assert fresh.time_s - before_s == pytest.approx(move.time_s, abs=1e-9)
        steps = np.zeros(len(before))
        steps[move.moments] = move.steps
        assert ([*fresh.peak_bytes, *fresh.forward_bytes] - before == np.cumsum(steps)).all()


def test_no_moves_are_priced_behind_the_deadline(rough):
    state = State(rough.compiled, rough.budget_bytes, list(rough.desired))
    assert not list(packing._priced(state, Moves(state.compiled, Random(0)), -math.inf))


def test_where_the_program_fails_the_state_stays(rough, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("no licence")

    monkeypatch.setattr(highs, "_run", fail)
    state = State(rough.compiled, rough.budget_bytes, list(rough.desired))
    pack(state, Moves(state.compiled, Random(0)))
    assert state.desired == rough.desired and state.time_s == pytest.approx(rough.time_s)


def test_what_nothing_comes_of_is_no_longer_wished_for(rough):
    state = State(rough.compiled, rough.budget_bytes, list(rough.desired))
    assert packing._strip(state)
    assert state.desired == [live | rough.compiled.always for live in rough.live]
    assert state.live == rough.live and state.recomputes == rough.recomputes and packing._rank(state) == packing._rank(rough)
    assert not packing._strip(state)


def test_fractions_of_moves_are_none(rough, monkeypatch):
    monkeypatch.setattr(packing, "minimize", lambda program, **_: highs.Outcome("limit", np.full(len(program.cost), 0.5), 0.0))
    state = State(rough.compiled, rough.budget_bytes, list(rough.desired))
    pack(state, Moves(state.compiled, Random(0)))
    assert not state.excess_bytes and state.time_s <= rough.time_s + 1e-12


def test_long_walks_stay_exact():
    """Stages that only carry a change through are shifted without being replayed: on a real graph, against a fresh replay."""
    problem = load_instance("unet_8")
    compiled, rng = compile_problem(problem), Random(3)
    state = State(compiled, budget_of(problem, 0.5))
    fresh, moves = State(compiled, state.budget_bytes), Moves(compiled, rng)
    for count in range(400):
        state.change(moves.draw(state))
        state.change(moves.draw(state))
        state.keep() if rng.random() < 0.5 else state.undo()
        if count % 20 == 0:
            fresh.reset(list(state.desired), state.budget_bytes)
            assert (fresh.live, fresh.live_bytes, fresh.peak_bytes) == (state.live, state.live_bytes, state.peak_bytes)
            assert (fresh.forward_bytes, fresh.excess_bytes) == (state.forward_bytes, state.excess_bytes)
            assert fresh.time_s == pytest.approx(state.time_s)


def test_what_does_not_fit_is_packed_until_it_does():
    problem = load_instance("unet_8")
    compiled, budget_bytes = compile_problem(problem), budget_of(problem, 0.4)
    state = State(compiled, budget_bytes, list(hint(compiled, budget_bytes, math.inf)))
    assert state.excess_bytes
    assert not pack(state, Moves(compiled, Random(0)))
    assert simulate(problem, state.schedule()).peak_bytes == state.worst_bytes <= budget_bytes


def test_where_no_set_frees_all_that_is_lacking_several_do(monkeypatch):
    solved = []
    monkeypatch.setattr(packing, "minimize", lambda *a, **k: solved.append(highs.minimize(*a, **k)) or solved[-1])
    problem = load_instance("unet_8")
    compiled, budget_bytes = compile_problem(problem), budget_of(problem, 0.236)
    state = State(compiled, budget_bytes, list(hint(compiled, budget_bytes, math.inf)))
    moves, lacking = Moves(compiled, Random(0)), state.excess_bytes
    priced = list(packing._priced(state, moves, math.inf))
    knapsack = packing._Knapsack(priced, budget_bytes - packing._moments(state))
    knapsack.restrict(packing._cliques(priced, state.everything, careful=True))
    assert not knapsack.solve(math.inf) and knapsack.solve(math.inf, within=False, rounded=True)
    added = np.cumsum(knapsack.steps @ solved[-1].x[: len(priced)])
    assert set(np.flatnonzero(added > knapsack.room + 1e-6 * knapsack.unit)) <= set(knapsack.moments)
    assert not pack(state, moves)
    assert state.excess_bytes < 0.1 * lacking
    assert simulate(problem, state.schedule()).peak_bytes == state.worst_bytes


def test_what_one_stage_makes_again_is_kept_at_once():
    """Segments are made again at one stage each, where one move at a time would be one storage of each segment."""
    compiled = compile_problem(load_instance("unet_8"))
    state = State(compiled, 0, list(next(equal_segments(compiled))))
    state.reset(list(state.desired), int(1.2 * state.worst_bytes))
    priced = list(packing._priced(state, Moves(compiled, Random(0)), math.inf))
    careful, other = (packing._cliques(priced, state.everything, careful) for careful in (True, False))
    assert all(any(set(clique) <= set(larger) for larger in careful) for clique in other)
    knapsack, costs = packing._Knapsack(priced, state.budget_bytes - packing._moments(state)), {}
    for name, cliques in {"careful": careful, "other": other}.items():
        knapsack.restrict(cliques)
        costs[name] = sum(move.time_s for move in knapsack.solve(math.inf))
    assert costs["other"] < 1.1 * costs["careful"] < 0


def test_the_systematic_evictions_are_each_gap_of_each_carried_storage_once(rough):
    moves, gaps = Moves(rough.compiled, Random(0)), []
    for wishes in moves.all_evictions(rough):
        (bit,) = {rough.desired[t] & ~bits for t, bits in wishes.items()} - {0}
        gaps += [(t, bit) for t in wishes if rough.live[t] & ~rough.touched[t] & bit]
    idle = [(t, 1 << k) for t in range(moves.stage_count) for k in members(rough.live[t] & ~rough.touched[t] & moves.free)]
    assert sorted(gaps) == sorted(idle) and len(idle) > 100
