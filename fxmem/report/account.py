"""What there is to say about a plan, as titled tables of text, before anything decides how they look."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..schedule import alive_at_peak
from ..units import format_bytes, format_percent, format_seconds
from .replay import PEAK_KINDS, TITLES, chosen_implementations, is_recompute, maker_of, shares_by_module

if TYPE_CHECKING:
    from ..decisions import Frontier, Plan
    from ..problem import Problem

LARGEST = 10
MODULES = 8
TO_TELL = 0.01  # of the peak: outputs of fewer bytes need no word
EQUAL_TIMES = 1e-9  # of a step: what is less is rounding
TEXTS = ("", "storage", "kind", "module", "line", "chosen", "status")


@dataclass(frozen=True)
class Table:
    """columns: titles; the columns called as in TEXTS hold text, the others numbers."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def is_text(self, column: int) -> bool:
        return self.columns[column] in TEXTS


@dataclass(frozen=True)
class Account:
    """A title, lines of facts, and tables; `tables[i]` is a row of tables that may stand side by side."""

    title: str
    facts: tuple[tuple[str, str], ...]
    tables: tuple[tuple[Table, ...], ...]


def account_of_plan(plan: Plan) -> Account:
    """Peaks by kind, extra time and where it goes, the largest storages at the peak, modules, and implementations."""
    tables = [(_peaks(plan), *_implementations(plan)), (_largest(plan),), _modules(plan)]
    return Account(_title(plan), tuple(_facts(plan)), tuple(row for row in tables if row))


def account_of_frontier(frontier: Frontier) -> Account:
    """One row for each plan."""
    rows = (
        (f"{p.predicted_peak_bytes:,}", format_percent(p.predicted_peak_bytes / p.baseline_peak_bytes),
         format_percent(p.predicted_overhead), format_percent(p.lower_bound_overhead), p.status)
        for p in frontier
    )  # fmt: skip
    table = Table("", ("peak (bytes)", "of plain", "extra time", "at least", "status"), tuple(rows))
    return Account(f"{frontier[0].model}: {len(frontier)} plans, {frontier[0].cost} costs", (), ((table,),))


def _title(plan: Plan) -> str:
    budget = "nothing recomputed" if plan.budget_bytes is None else f"budget {format_bytes(plan.budget_bytes)}"
    return f"{plan.model}: {budget}"


def _facts(plan: Plan) -> Iterable[tuple[str, str]]:
    share = plan.predicted_peak_bytes / plan.baseline_peak_bytes
    peaks = f"{format_bytes(plan.baseline_peak_bytes)} -> {format_bytes(plan.predicted_peak_bytes)}"
    yield "peak", f"{peaks} ({format_percent(share, 0)} of the plain module's)"
    if (held_bytes := _dropped_outputs_bytes(plan.problem)) > TO_TELL * plan.predicted_peak_bytes:
        yield "outputs", f"up to {format_bytes(held_bytes)} more where the caller holds those without gradient in the backward"
    yield "time", f"{format_percent(plan.predicted_overhead, sign=True)} predicted ({plan.cost} costs){_parts(plan)}"
    yield "found", f"{plan.status}; none within this budget is below {format_percent(plan.lower_bound_overhead, sign=True)}"
    steps, timeline = plan.solution.schedule.steps, plan.solution.timeline
    again = sum(is_recompute(plan.problem, plan.solution.schedule))
    in_place = sum(pair is not None for pair in timeline.inplace)
    yield "steps", f"{len(steps):,}, of which {again:,} recompute and {in_place:,} run in place"
    if plan.arena is not None:
        arena = plan.arena
        inside = f"{len(arena.inside):,} of {len(arena.places):,} buffers, {format_percent(arena.share, 0)} of their bytes"
        yield "arena", f"{format_bytes(arena.arena_bytes)} for {inside}; print(plan.arena) lists them"
    yield "took", f"{plan.capture_time_s:.1f} s to capture, {plan.solve_time_s:.1f} s to solve"


def _dropped_outputs_bytes(problem: Problem) -> int:
    """Bytes of what the forward hands out, and a training step lets go of before its backward."""
    return sum(problem.storages[s].size_bytes for s in problem.returned - problem.outputs if problem.producers[s])


def _parts(plan: Plan) -> str:
    """Where the extra time goes, where implementations have a part in it."""
    chosen, own_s = _chosen(plan).values(), plan.problem.plain_time_s
    encoders_s, slower_s = sum(c.encoders_s for c in chosen), sum(c.slower_s for c in chosen)
    plain_s = plan.solution.timeline.time_s / (1 + plan.predicted_overhead)  # of the step as the module writes it
    again_s, rewritten_s = plan.solution.timeline.time_s - own_s - encoders_s - slower_s, own_s - plain_s
    is_rewritten = rewritten_s > EQUAL_TIMES * own_s
    if not encoders_s and not slower_s and not is_rewritten:
        return ""
    recompute, encoders, slower, rewriting = (
        format_percent(s / (plain_s or 1.0)) for s in (max(0.0, again_s), encoders_s, slower_s, rewritten_s)
    )
    parts = f": recompute {recompute}, encoders {encoders}, slower implementations {slower}"
    return f"{parts}, parts written otherwise {rewriting}" if is_rewritten else parts


def _peaks(plan: Plan) -> Table:
    rows = (
        (TITLES[kind], format_bytes(plan.baseline_by_kind.get(kind, 0)), format_bytes(plan.peak_by_kind.get(kind, 0)))
        for kind in PEAK_KINDS
    )
    return Table("At the peak", ("", "plain", "planned"), tuple(rows))


def _implementations(plan: Plan) -> list[Table]:
    rows = tuple(
        (name, str(c.places), format_bytes(c.code_bytes), format_seconds(c.encoders_s), format_seconds(c.slower_s))
        for name, c in _chosen(plan).items()
    )
    return [Table("Implementations", ("chosen", "places", "kept", "encoders", "slower by"), rows)] if rows else []


def _chosen(plan: Plan):
    return chosen_implementations(plan.problem, plan.solution.schedule, plan.solution.timeline)


def _largest(plan: Plan) -> Table:
    """The largest of what the step has computed by its peak, and where in the user's code it comes from."""
    problem, timeline = plan.problem, plan.solution.timeline
    at_peak = alive_at_peak(problem, plan.solution.schedule, timeline)
    computed = [s for s in at_peak if problem.producers[s]]
    rows = []
    for index in sorted(computed, key=lambda s: (-problem.storages[s].size_bytes, s))[:LARGEST]:
        storage, maker = problem.storages[index], maker_of(problem, index)
        rows.append((storage.name, storage.kind, format_bytes(storage.size_bytes), maker.module or "(root)", maker.source))
    name = problem.operators[plan.solution.schedule.steps[timeline.peak_step]].name
    return Table(f"Largest at the peak, in {name}", ("storage", "kind", "size", "module", "line"), tuple(rows))


def _modules(plan: Plan) -> tuple[Table, ...]:
    """Modules by bytes kept, and by time recomputed."""
    shares = shares_by_module(plan.problem, plan.solution.schedule, plan.solution.timeline)
    kept = sorted((n for n in shares if shares[n].kept_bytes), key=lambda n: (-shares[n].kept_bytes, n))
    again = sorted((n for n in shares if shares[n].recomputed_bytes), key=lambda n: (-shares[n].recomputed_s, n))
    plain_s = plan.problem.plain_time_s or 1.0
    rows = tuple((n or "(root)", format_bytes(shares[n].kept_bytes)) for n in kept[:MODULES])
    tables = [Table(_ranked("Kept", kept), ("module", "bytes"), rows)] if kept else []
    rows = tuple(
        (n or "(root)", format_bytes(shares[n].recomputed_bytes), format_percent(shares[n].recomputed_s / plain_s, 2))
        for n in again[:MODULES]
    )
    return (*tables, *([Table(_ranked("Recomputed", again), ("module", "bytes", "time"), rows)] if again else []))


def _ranked(title: str, names: list[str]) -> str:
    return f"{title} ({MODULES} of {len(names)} modules)" if len(names) > MODULES else title
