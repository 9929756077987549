"""Plans of arenas, on plain data: what lies inside, within which limit, and why the rest does not. And its picture."""

import matplotlib
import pytest
import torch
from helpers.models import UNet
from helpers.steps import transform
from hypothesis import given
from hypothesis import strategies as st
from matplotlib import pyplot

from fxmem.memory import Interval, buffers_of, plan_arena, verify
from fxmem.memory.arena import OVER_LIMIT
from fxmem.problem import Operator, Problem, Storage
from fxmem.schedule import plain_schedule, simulate

matplotlib.use("Agg")


def chain(sizes, inplace=()):
    """x -> a -> b -> ... -> return; each reads the one before it, and the last is returned."""
    storages = (Storage("x", 10, "input"), *(Storage(f"s{i}", size, "activation") for i, size in enumerate(sizes)))
    operators = [Operator(f"o{i}", (i,), (i + 1,), inplace=((i, i + 1),) if i in inplace else ()) for i in range(len(sizes))]
    operators.append(Operator("return", (len(sizes),), (), recomputable=False))
    return Problem(storages, tuple(operators), len(operators), len(operators), frozenset())


def test_outputs_are_outside_and_all_else_is_inside():
    problem = chain([64, 128, 64, 64], inplace=(2,))
    plan = plan_arena(problem, plain_schedule(problem), {}, 1000)
    assert [(p.name, p.offset is not None, p.begin, p.end) for p in plan.places] == [
        ("s0", True, 0, 2), ("s1", True, 1, 4), ("s3", False, 3, 5),
    ]  # fmt: skip
    assert plan.arena_bytes == plan.lower_bound_bytes == 192 and plan.places[2].reason == "an output of the module"
    assert plan.peak_bytes == 10 + 192 + 64 and plan.share == 192 / 256


def test_a_reason_keeps_a_buffer_outside():
    problem = chain([64, 128, 64, 64])
    plan = plan_arena(problem, plain_schedule(problem), {1: "no kernel"}, 1000)
    assert [p.reason for p in plan.places] == ["", "no kernel", "", "an output of the module"]
    assert plan.why_outside() == {"no kernel": (1, 128), "an output of the module": (1, 64)}
    assert "outside: 1 buffers, 128 bytes: no kernel" in str(plan) and "s1" in str(plan)


@pytest.mark.parametrize(("limit", "inside", "peak"), [(1000, 2, 566), (565, 1, 394), (393, 0, 374), (0, 0, 374)])
def test_the_arena_and_what_is_beside_it_stay_within_the_limit(limit, inside, peak):
    """s1 (256 bytes) fills the arena where little is outside, and takes room from the output (300 bytes) at the end."""
    problem = chain([64, 256, 64, 64, 300])
    plan = plan_arena(problem, plain_schedule(problem), {0: "no kernel", 2: "no kernel"}, limit)
    assert simulate(problem, plain_schedule(problem)).peak_bytes == 374
    assert (len(plan.inside), plan.peak_bytes) == (inside, peak)
    assert (OVER_LIMIT in plan.why_outside()) == (inside < 2)


@given(
    st.lists(st.integers(0, 300), min_size=2, max_size=12), st.sets(st.integers(0, 11)), st.sets(st.integers(1, 11)),
    st.integers(0, 3000), st.sampled_from([1, 8, 64]),
)  # fmt: skip
def test_plans_of_random_chains(sizes, barred, inplace, limit, alignment):
    sizes = [sizes[i - 1] if i in inplace else size for i, size in enumerate(sizes)]
    problem = chain(sizes, inplace)
    schedule = plain_schedule(problem)
    buffers = buffers_of(problem, schedule)
    plan = plan_arena(problem, schedule, {i: "barred" for i in barred if i < len(buffers)}, limit, alignment)
    assert plan.peak_bytes <= max(limit, simulate(problem, schedule).peak_bytes)
    assert not any(p.offset is not None and i in barred for i, p in enumerate(plan.places))
    inside = [(Interval(str(i), p.begin, p.end, p.size_bytes, alignment), p.offset) for i, p in enumerate(plan.inside)]
    verify([interval for interval, _ in inside], [offset for _, offset in inside], plan.arena_bytes)
    outside = [0] * len(schedule.steps)
    for place in plan.inside:
        for step in range(place.begin, place.end):
            outside[step] += place.size_bytes
    during = simulate(problem, schedule).during_bytes
    beside = max(d - o for d, o in zip(during, outside, strict=True))
    assert plan.peak_bytes == plan.arena_bytes + beside


@pytest.mark.parametrize("arena", [True, False])
def test_memory_map(arena, tmp_path):
    torch.manual_seed(0)
    plan = transform(UNet(16), (torch.randn(4, 3, 32, 32),), budget=None, arena=arena).plan
    axes = plan.plot_memory_map()
    blocks = [patch for container in axes.containers for patch in container]
    unit = axes.get_ylabel().removeprefix("address ")
    if arena:
        top = max(b.get_y() + b.get_height() for b in blocks) * {"(KB)": 1e3, "(MB)": 1e6}[unit]
        assert (len(blocks), top) == (len(plan.arena.inside), pytest.approx(plan.arena.arena_bytes, rel=1e-3))
    assert {"activations", "gradients"} <= {c.get_label().partition(",")[0] for c in axes.containers}
    assert axes.get_xlabel() == "time (steps of the schedule)" and unit in ("(KB)", "(MB)")
    axes.figure.savefig(tmp_path / "map.png")
    assert (tmp_path / "map.png").stat().st_size > 10_000
    other = pyplot.subplots()[1]
    assert plan.plot_memory_map(other) is other
    pyplot.close("all")
