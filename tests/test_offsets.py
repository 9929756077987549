"""Offsets: against brute force on small cases, on instances that are hard by design, and what is refused."""

import itertools
import pathlib
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fxmem.errors import CapacityError, OffsetError, PlacementError
from fxmem.memory import Interval, max_live, plan_offsets, read_csv, read_offsets, verify, write_csv
from fxmem.memory import offsets as offsets_module
from fxmem.memory.greedy import orders, place
from fxmem.memory.intervals import Sections
from fxmem.memory.search import Preference, Search

FOLDER = pathlib.Path(__file__).parent / "data" / "minimalloc"
NO_LIMIT = float("inf")


def intervals_of(*rows):
    return tuple(Interval(str(k), *row) for k, row in enumerate(rows))


@st.composite
def random_intervals(draw, most=14, alignments=(1, 1, 1, 2, 4)):
    rows = draw(st.lists(st.tuples(*[st.integers(0, 8)] * 3, st.sampled_from(alignments)), min_size=0, max_size=most))
    return intervals_of(*((begin, begin + life, size, alignment) for begin, life, size, alignment in rows))


def least_arena(intervals):
    """Over all orders, each interval on top of those before it that it meets: the best of these is the best of all."""
    least = sum(v.size_bytes + v.alignment for v in intervals)
    for order in itertools.permutations(v for v in intervals if v.size_bytes and v.end > v.begin):
        tops, arena = [], 0
        for v in order:
            under = max((top for u, top in tops if u.begin < v.end and v.begin < u.end), default=0)
            tops.append((v, -(-under // v.alignment) * v.alignment + v.size_bytes))
            arena = max(arena, tops[-1][1])
        least = min(least, arena)
    return least


@settings(max_examples=60, deadline=None)
@given(random_intervals(most=6))
def test_small_cases_are_those_of_brute_force(intervals):
    plan, least = plan_offsets(intervals), least_arena(intervals)
    assert (plan.arena_bytes, plan.lower_bound_bytes, plan.status) == (least, least, "optimal")
    assert plan_offsets(intervals, capacity=least).arena_bytes == least
    if least:
        with pytest.raises(CapacityError) as caught:
            plan_offsets(intervals, capacity=least - 1)
        assert max_live(intervals).size_bytes <= caught.value.lower_bound_bytes <= least


@settings(max_examples=60, deadline=None)
@given(random_intervals(most=6), st.integers(0, 3), st.sampled_from((0.0, 0.1)))
def test_the_search_alone_is_complete(intervals, more, pull):
    """With no greedy start, at every capacity around the least."""
    sections = Sections(intervals)
    if not sections.count:
        return
    least = least_arena(intervals)
    for capacity in range(max(sections.loads), least + more + 1):
        outcome = Search(sections, capacity).run(Preference(sections.index, pull), NO_LIMIT, NO_LIMIT)
        assert outcome.proven == (outcome.offsets is None)
        assert (outcome.offsets is not None) == (capacity - capacity % sections.unit >= least)


@settings(max_examples=60, deadline=None)
@given(random_intervals())
def test_plans_are_valid_and_between_their_bounds(intervals):
    plan = plan_offsets(intervals, time_limit_s=1.0)
    verify(plan.intervals, plan.offsets, plan.arena_bytes)
    assert max_live(intervals).size_bytes <= plan.lower_bound_bytes <= plan.arena_bytes
    assert plan.arena_bytes <= sum(-(-v.size_bytes // v.alignment) * v.alignment + v.alignment for v in intervals)
    sections = Sections(intervals)
    for order in orders(sections).values() if sections.count else ():
        offsets = place(sections, order, best_fit=True)
        counted = [intervals[i] for i in sections.index]
        verify(counted, [int(offset) for offset in offsets], int((offsets + sections.sizes).max()))


@settings(max_examples=40, deadline=None)
@given(random_intervals(alignments=(1,)))
def test_without_alignment_no_arena_is_larger_than_the_sum(intervals):
    assert plan_offsets(intervals, time_limit_s=1.0).arena_bytes <= sum(v.size_bytes for v in intervals if v.end > v.begin)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_what_was_cut_from_a_full_block_fits_it_again(data):
    """A block is cut in two again and again, by time or by offset: each section is full to the last byte."""
    pieces = [(0, 8, 12)]
    for _ in range(data.draw(st.integers(0, 14))):
        begin, end, size = pieces.pop(data.draw(st.integers(0, len(pieces) - 1)))
        if data.draw(st.booleans()) and end - begin > 1:
            at = data.draw(st.integers(begin + 1, end - 1))
            pieces += [(begin, at, size), (at, end, size)]
        elif size > 1:
            at = data.draw(st.integers(1, size - 1))
            pieces += [(begin, end, at), (begin, end, size - at)]
        else:
            pieces.append((begin, end, size))
    plan = plan_offsets(intervals_of(*pieces))
    assert (plan.arena_bytes, plan.lower_bound_bytes) == (12, 12)


@pytest.mark.parametrize(
    ("name", "most_live", "arena"), [("A", 1048576, 1048576), ("C", 1039360, 1039360), ("D", 986112, None)]
)
def test_hard_instances_are_solved_to_their_capacity(name, most_live, arena):
    intervals = read_csv(FOLDER / f"{name}.1048576.csv")
    plan = plan_offsets(intervals, capacity=1048576)
    verify(intervals, plan.offsets, 1048576)
    assert plan.max_live.size_bytes == most_live
    assert arena in (None, plan.arena_bytes)
    assert plan.method == "complete search" and plan.nodes >= len(intervals)
    assert plan.offsets == plan_offsets(intervals, capacity=1048576).offsets


def test_a_bound_above_the_bytes_alive_is_proven():
    intervals = intervals_of(
        (0, 2, 3, 4), (1, 3, 3, 4), (2, 4, 5, 4)
    )  # aligned, the second begins at 4 or under the third at 0
    plan = plan_offsets(intervals)
    assert (plan.max_live.size_bytes, plan.lower_bound_bytes, plan.arena_bytes, plan.status) == (8, 9, 9, "optimal")
    with pytest.raises(CapacityError, match="complete search ended after [0-9]+ nodes; give 9 or more") as caught:
        plan_offsets(intervals, capacity=8)
    assert caught.value.lower_bound_bytes == 9


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ((3, 2, 5), "ends at 2, before it begins at 3"),
        ((0, 2, -5), "size_bytes=-5"),
        ((0, 2, 5, 3), "alignment=3; it must be a power of two"),
        ((0, 2, 5, 0), "alignment=0"),
        ((0, 2.5, 5), "end=2.5; it must be an integer"),
        ((0, 2, 1 << 61), "size_bytes=2305843009213693952"),
        ((0, 2, True), "size_bytes=True"),
    ],
)
def test_what_is_no_interval_is_refused(row, message):
    with pytest.raises(OffsetError, match=message):
        plan_offsets([Interval("x", *row)])


def test_ids_are_their_own():
    with pytest.raises(OffsetError, match="two intervals have the id 'x'"):
        plan_offsets([Interval("x", 0, 1, 1), Interval("x", 1, 2, 1)])


@pytest.mark.parametrize("capacity", [-1, 1.5, True, "8"])
def test_what_is_no_capacity_is_refused(capacity):
    with pytest.raises(OffsetError, match="capacity="):
        plan_offsets([], capacity=capacity)


@pytest.mark.parametrize("limit", [-1, float("nan"), "1", True])
def test_what_is_no_time_limit_is_refused(limit):
    with pytest.raises(OffsetError, match="time_limit_s="):
        plan_offsets([], time_limit_s=limit)


def test_more_alive_than_the_capacity_says_where():
    with pytest.raises(CapacityError, match="at moment 2, 7 bytes are alive, of 2 intervals \\(0, 1\\)") as caught:
        plan_offsets(intervals_of((0, 3, 4), (2, 5, 3), (4, 6, 2)), capacity=6)
    assert (caught.value.capacity, caught.value.lower_bound_bytes) == (6, 7)


def test_no_time_is_no_error():
    intervals = read_csv(FOLDER / "A.1048576.csv")
    held, free = (plan_offsets(intervals, capacity, time_limit_s=0) for capacity in (1048576, None))
    assert (held.status, free.status, held.nodes) == ("not found in time", "not proven", 0)
    assert held.arena_bytes == free.arena_bytes > 1048576


def test_what_is_too_large_for_the_search_is_placed_all_the_same(monkeypatch):
    monkeypatch.setattr(offsets_module, "MOST_CELLS", 100)
    intervals = read_csv(FOLDER / "A.1048576.csv")
    held, free = (plan_offsets(intervals, capacity) for capacity in (1048576, None))
    assert (held.status, free.status, free.nodes) == ("not found in time", "not proven", 0)


def test_memory_takes_numpy_alone():
    code = "import sys, fxmem.memory; sys.exit(bool({'torch', 'networkx', 'cvxpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=pathlib.Path(__file__).parents[1]).returncode == 0


def test_nothing_to_place():
    assert plan_offsets([]).arena_bytes == 0
    plan = plan_offsets(intervals_of((0, 3, 0), (2, 2, 9)), capacity=0)
    assert (plan.arena_bytes, plan.offsets, plan.status, plan.offset_of) == (0, (0, 0), "optimal", {"0": 0, "1": 0})


@pytest.mark.parametrize(
    ("offsets", "arena", "message"),
    [
        ((0, 3, 4), 16, "'1' at 3 .4 bytes. overlaps '0' at 0 .4 bytes.: both are alive at moment 2"),
        ((0, 4, 2), 16, "'2' is at offset 2, which is not a multiple of 4"),
        ((0, 4, 8), 15, "'2' takes bytes 8 to 16, outside of the arena's 15"),
        ((-4, 4, 8), 16, "outside"),
        ((0, 4), 16, "2 offsets were given for 3 intervals"),
    ],
)
def test_the_verifier_sees_what_is_wrong(offsets, arena, message):
    intervals = intervals_of((0, 3, 4), (2, 5, 4), (2, 5, 8, 4))
    verify(intervals, (0, 4, 8), 16)
    with pytest.raises(PlacementError, match=message):
        verify(intervals, offsets, arena)


def test_half_open_lives_share_bytes():
    assert plan_offsets(intervals_of((0, 2, 8), (2, 4, 8), (4, 6, 8))).arena_bytes == 8


def test_csv_is_written_as_it_is_read(tmp_path):
    for intervals in (intervals_of((0, 3, 4), (1, 2, 5)), intervals_of((0, 3, 4, 2), (1, 2, 5))):
        plan = plan_offsets(intervals)
        write_csv(tmp_path / "plan.csv", plan.intervals, plan.offsets)
        assert read_csv(tmp_path / "plan.csv") == intervals
        assert read_offsets(tmp_path / "plan.csv") == plan.offsets
    write_csv(tmp_path / "a.csv", read_csv(FOLDER / "A.1048576.csv"))
    assert (tmp_path / "a.csv").read_text() == (FOLDER / "A.1048576.csv").read_text()


def test_csv_that_cannot_be_written(tmp_path):
    for path, offsets, message in (("a.csv", [0], "1 offsets were given for 2"), ("no/a.csv", None, "cannot be written")):
        with pytest.raises(OffsetError, match=message):
            write_csv(tmp_path / path, intervals_of((0, 3, 4), (1, 2, 5)), offsets)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("id,lower,upper,size\na,0,3,4\nb,x,3,4\n", "line 3: lower is 'x', which is no integer"),
        ("id,lower,upper,size\na,0,3\n", "line 2: 3 fields, 'a,0,3', for the 4 columns"),
        ("id,lower,upper,size\na,3,0,1\n", "line 2: interval 'a' ends at 0, before it begins at 3"),
        ("id,lower,upper,size\na,0,3,1\na,0,3,1\n", "two intervals have the id 'a'"),
        ("id,lower,size\na,0,3\n", "columns id, lower, size; needed, once each: id, lower, upper, size"),
        ("id,lower,upper,size,gaps\na,0,3,1,1-2\n", "columns id, lower, upper, size, gaps"),
        ("id,lower,lower,upper,size\n", "needed, once each"),
        ("buffer,start,end,size\na,0,3,1\n", "columns buffer, start, end, size; needed, once each: id, lower, upper, size"),
        ("", "columns none"),
    ],
)
def test_a_file_that_does_not_parse_names_its_line(tmp_path, text, message):
    (tmp_path / "bad.csv").write_text(text)
    with pytest.raises(OffsetError, match=message):
        read_csv(tmp_path / "bad.csv")


def test_a_file_without_a_solution_has_no_offsets():
    with pytest.raises(OffsetError, match="has no column 'offset'"):
        read_offsets(FOLDER / "A.1048576.csv")


def test_files_that_are_no_csv(tmp_path):
    with pytest.raises(OffsetError, match="none.csv cannot be read: No such file"):
        read_csv(tmp_path / "none.csv")
    for content in (b"\x89PNG\xff\xfe", b"id,lower,upper,size\n\x00\xff"):
        (tmp_path / "binary.csv").write_bytes(content)
        with pytest.raises(OffsetError, match="binary.csv is no CSV"):
            read_csv(tmp_path / "binary.csv")


@pytest.mark.parametrize("use", [max_live, plan_offsets, lambda given: verify(given, [0], 8)])
def test_what_are_no_intervals(use):
    with pytest.raises(OffsetError, match=r"\(0, 3, 4\) was given; intervals are needed: Interval\(id, begin"):
        use([(0, 3, 4)])
