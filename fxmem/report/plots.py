"""A plan's memory over the step, its schedule as a matrix, its arena, and a frontier of plans, drawn by matplotlib."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..memory import buffers_of, plan_arena
from ..schedule import Timeline, forward_length, plain_schedule, simulate
from ..units import BYTES_IN, SECONDS_IN, format_bytes, unit_of
from .axes import AGAIN, IN_PLACE, KEPT, KIND_COLOURS, RUN, WIDTH_INCHES, legend_below, pyplot, title_of
from .replay import PEAK_KINDS, TITLES, bytes_by_kind, is_recompute, step_times_s

if TYPE_CHECKING:
    from ..decisions import Frontier, Plan
    from ..problem import Problem
    from ..schedule import Schedule

MARKERS = "sv^D<>pP"
NO_LIMIT = 1 << 60  # bytes


def plot_timeline(plan: Plan) -> tuple[Any, Any]:
    """Bytes alive over one step, stacked by kind: with nothing recomputed, and as planned. Returns the two Axes."""
    plt = pyplot()
    problem, planned = plan.problem, plan.solution
    plain = plain_schedule(problem)
    runs = ((plain, simulate(problem, plain)), (planned.schedule, planned.timeline))
    _, (above, below) = plt.subplots(
        2, 1, figsize=(WIDTH_INCHES, 7.0), sharex=True, sharey=True, layout="constrained", gridspec_kw={"hspace": 0.03}
    )
    unit, size = unit_of(plan.baseline_peak_bytes, BYTES_IN)
    highest = max(plan.baseline_peak_bytes, plan.predicted_peak_bytes, plan.budget_bytes or 0, *(t.peak_bytes for _, t in runs))
    for axes, (schedule, timeline), title in zip((above, below), runs, ("nothing recomputed", "planned"), strict=True):
        edges, label = _edges(problem, schedule)
        _stack(axes, bytes_by_kind(problem, schedule, timeline), edges, size)
        _peak(axes, timeline, edges, size, 1.07 * highest / size)
        end = edges[forward_length(problem, schedule)]
        axes.axvline(end, color="black", linewidth=0.8, linestyle=":")
        axes.text(end, 0.985, " backward", transform=axes.get_xaxis_transform(), va="top", fontsize=9)
        axes.set(ylabel=f"memory ({unit})", title=title_of(plan.model, title))
        axes.set_ylim(0, 1.3 * highest / size)
    above.axhline(plan.baseline_peak_bytes / size, color="black", linewidth=1.2, linestyle="--", label="plain PyTorch's peak")
    if plan.budget_bytes is not None:
        below.axhline(plan.budget_bytes / size, color="black", linewidth=1.2, label="budget")
    below.set(xlabel=label)
    below.set_xlim(0, edges[-1])
    handles = {text: handle for axes in (above, below) for handle, text in zip(*axes.get_legend_handles_labels(), strict=True)}
    legend_below(below, list(handles.values()))
    return above, below


def _edges(problem: Problem, schedule: Schedule) -> tuple[list[float], str]:
    """Where each step begins on the x axis, and where the last one ends; in steps where they take no time."""
    times = step_times_s(problem, schedule)
    total = sum(times)
    unit, size = unit_of(total, SECONDS_IN)
    widths, label = ([t / size for t in times], f"predicted time ({unit})") if total else ([1.0] * len(times), "steps")
    edges = [0.0]
    for width in widths:
        edges.append(edges[-1] + width)
    return edges, label


def _stack(axes: Any, series: dict[str, list[int]], edges: list[float], size: float) -> None:
    """One area for each kind that there is."""
    shown = [kind for kind in PEAK_KINDS if any(series[kind])]
    heights = [[b / size for b in (*series[kind], series[kind][-1])] for kind in shown]
    axes.stackplot(
        edges, heights, step="post", colors=[KIND_COLOURS[kind] for kind in shown], labels=[TITLES[kind] for kind in shown]
    )


def _peak(axes: Any, timeline: Timeline, edges: list[float], size: float, height: float) -> None:
    """An arrow to the highest point, from a label at `height`, beside the line where the backward begins."""
    x, y = (edges[timeline.peak_step] + edges[timeline.peak_step + 1]) / 2, timeline.peak_bytes / size
    side = "right" if x > 0.6 * edges[-1] else "left"
    axes.annotate(
        f"  peak {format_bytes(timeline.peak_bytes)}  ", (x, y), xytext=(x, height), ha=side, va="bottom", fontsize=10,
        arrowprops={"arrowstyle": "->", "linewidth": 1, "relpos": (side == "right", 0)},
    )  # fmt: skip


def plot_schedule(plan: Plan, axes: Any = None) -> Any:
    """Operators (rows, in program order) over steps (columns): where each runs first, in place or again, and how long what it
    made is kept, as in Checkmate's figures (Jain et al. 2020). Returns the Axes."""
    plt = pyplot()
    if axes is None:
        axes = plt.subplots(figsize=(WIDTH_INCHES, 6.6), layout="constrained")[1]
    problem, schedule, timeline = plan.problem, plan.solution.schedule, plan.solution.timeline
    rows = [_row(problem, index) for index in range(len(problem.operators))]
    lives = _lives(problem, schedule, timeline)
    axes.hlines(
        [rows[problem.producers[s][0]] for s, _, _ in lives], [a for _, a, _ in lives], [b for _, _, b in lives], colors=KEPT,
        linewidth=max(0.6, min(8.0, 300 / problem.num_program)), zorder=1,
    )  # fmt: skip
    again = is_recompute(problem, schedule)
    marks: dict[str, list[int]] = {RUN: [], IN_PLACE: [], AGAIN: []}
    for step in range(len(schedule.steps)):
        marks[AGAIN if again[step] else IN_PLACE if timeline.inplace[step] else RUN].append(step)
    side = max(1.6, min(10.0, 330 / len(schedule.steps)))
    for colour, steps in marks.items():
        at = [s + 0.5 for s in steps], [rows[schedule.steps[s]] for s in steps]
        axes.plot(*at, linestyle="none", marker="s", markersize=side, color=colour, zorder=3 if colour == AGAIN else 2)
    axes.axvline(forward_length(problem, schedule), color="black", linewidth=0.8, linestyle=":")
    axes.axhline(problem.num_forward - 0.5, color="black", linewidth=0.8, linestyle=":")
    axes.set(
        xlim=(0, len(schedule.steps)), ylim=(problem.num_program, -1), xlabel="time (steps of the schedule)",
        ylabel="operator (number in program order)",
        title=title_of(plan.model, f"{len(schedule.steps):,} steps, {sum(again):,} of them recompute"),
    )  # fmt: skip
    names = {KEPT: "kept", RUN: "runs", IN_PLACE: "runs in place", AGAIN: "runs again"}
    handles = [plt.Line2D([], [], linestyle="none", marker="s", markersize=9, color=c, label=n) for c, n in names.items()]
    legend_below(axes, handles, columns=4)
    return axes


def _row(problem: Problem, index: int) -> int:
    """The program operator in whose row another is drawn: what it replaces, whose storage it makes, or what it encodes."""
    if index in problem.encoders:
        return max((problem.producers[s][0] for s in problem.operators[index].inputs if problem.producers[s]), default=0)
    if index in problem.variants:
        return problem.producers[problem.operators[index].outputs[0]][0]
    return problem.program_index(index)


def _lives(problem: Problem, schedule: Schedule, timeline: Timeline) -> list[tuple[int, int, int]]:
    """(storage, step that makes it, step after its last use) of all that lives for more than the step that makes it."""
    lives, born = [], {}
    for step, (index, frees) in enumerate(zip(schedule.steps, timeline.frees, strict=True)):
        for storage in problem.operators[index].outputs:
            born.setdefault(storage, step)
        lives += [(s, born.pop(s), step + 1) for s in frees if s in born]
    return [life for life in (*lives, *((s, b, len(schedule.steps)) for s, b in born.items())) if life[2] > life[1] + 1]


def plot_frontier(frontier: Frontier, axes: Any = None) -> Any:
    """Peak against extra time: each plan, what no schedule goes below, and peers where they were computed. Returns the Axes."""
    first = frontier[0]
    unit, size = unit_of(first.baseline_peak_bytes, BYTES_IN)

    def points(plans: Iterable[Plan]) -> list[tuple[float, float]]:
        return [(p.predicted_peak_bytes / size, p.predicted_overhead) for p in plans]

    bounds = [(p.predicted_peak_bytes / size, p.lower_bound_overhead) for p in frontier]
    peers = {name: points(plans) for name, plans in frontier.peers.items()}
    axes = plot_points(points(frontier), bounds, peers, first.baseline_peak_bytes / size, axes)
    axes.set(
        xlabel=f"peak of the step ({unit})",
        ylabel=f"extra time (%, {first.cost} costs)",
        title=title_of(first.model, "peak against time"),
    )
    return axes


def plot_points(
    ours: Sequence[tuple[float, float]],
    bounds: Sequence[tuple[float, float]],
    peers: Mapping[str, Sequence[tuple[float, float]]],
    plain_peak: float,
    axes: Any = None,
) -> Any:
    """(peak, extra time as a fraction) of fxmem, of lower bounds, and of others by name, in the unit of `plain_peak`."""
    if axes is None:
        axes = pyplot().subplots(figsize=(WIDTH_INCHES, 5.4), layout="constrained")[1]

    def line(points: Sequence[tuple[float, float]], **style) -> None:
        axes.plot([peak for peak, _ in points], [100 * extra for _, extra in points], **style)

    line(bounds, color="black", linestyle=":", label="no schedule below", zorder=1)
    for marker, (name, points) in zip(itertools.cycle(MARKERS), peers.items(), strict=False):
        style = {"color": "#8a8a8a", "markerfacecolor": "none", "markersize": 7, "linestyle": "none"}
        line(points, marker=marker, label=name, zorder=2, **style)
    line(ours, color=AGAIN, marker="o", markersize=7, linewidth=1, label="fxmem", zorder=3)
    axes.axvline(plain_peak, color="black", linewidth=1.0, linestyle="--", label="plain PyTorch's peak")
    axes.grid(alpha=0.3)
    axes.set_ylim(bottom=min(-1.0, axes.get_ylim()[0]))
    legend_below(axes, axes.get_legend_handles_labels()[0])
    return axes


def plot_memory_map(plan: Plan, axes: Any = None) -> Any:
    """The arena as address over time: a block for each buffer from the step that makes it to its last use, coloured by kind,
    those that several storages share in place hatched. Without an arena, one for all that could lie in it. Returns the Axes."""
    plt = pyplot()
    if axes is None:
        axes = plt.subplots(figsize=(WIDTH_INCHES, 5.4), layout="constrained")[1]
    blocks, arena_bytes = _blocks(plan)
    unit, size = unit_of(arena_bytes, BYTES_IN)
    for (kind, shared), found in itertools.groupby(sorted(blocks), key=lambda block: block[:2]):
        bars = [(begin, end - begin, offset / size, size_bytes / size) for _, _, begin, end, offset, size_bytes in found]
        axes.bar(
            [begin for begin, *_ in bars], [height for *_, height in bars], [width for _, width, *_ in bars],
            [bottom for _, _, bottom, _ in bars], align="edge", color=KIND_COLOURS[kind], edgecolor="#333333", linewidth=0.3,
            hatch="////" if shared else None, label=TITLES[kind] + (", shared in place" if shared else ""),
        )  # fmt: skip
    steps = len(plan.solution.schedule.steps)
    axes.axhline(arena_bytes / size, color="black", linewidth=1.0, linestyle="--", label=f"end, {format_bytes(arena_bytes)}")
    end = forward_length(plan.problem, plan.solution.schedule)
    if end < steps:
        axes.axvline(end, color="black", linewidth=0.8, linestyle=":")
        axes.text(end, 1.005, "backward", transform=axes.get_xaxis_transform(), fontsize=9)
    told = f"arena of {len(blocks):,} buffers" if plan.arena is not None else f"{len(blocks):,} buffers, if all lay in an arena"
    axes.set(
        xlim=(0, steps), ylim=(0, 1.04 * arena_bytes / size or 1), xlabel="time (steps of the schedule)",
        ylabel=f"address ({unit})",
    )  # fmt: skip
    axes.set_title(title_of(plan.model, told), pad=16)
    legend_below(axes, axes.get_legend_handles_labels()[0], columns=2)
    return axes


def _blocks(plan: Plan) -> tuple[list[tuple[str, bool, int, int, int, int]], int]:
    """(kind, whether shared in place, begin, end, offset, bytes) of each buffer in the arena, and the arena's bytes."""
    buffers = buffers_of(plan.problem, plan.solution.schedule)
    arena = plan.arena or plan_arena(plan.problem, plan.solution.schedule, {}, NO_LIMIT)
    found = [
        (p.kind, len(b.storages) > 1, p.begin, p.end, p.offset, p.size_bytes)
        for p, b in zip(arena.places, buffers, strict=True)
        if p.offset is not None and p.size_bytes
    ]
    return found, arena.arena_bytes
