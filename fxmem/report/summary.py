"""The printed summary of a plan: one screen of plain text."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from ..budget import format_bytes
from ..schedule import forward_length

if TYPE_CHECKING:
    from ..decisions import Plan

KINDS = ("parameter", "buffer", "input", "activation", "gradient", "workspace")
TITLES = dict(zip(KINDS, ("parameters", "buffers", "inputs", "activations", "gradients", "workspace"), strict=True))
WIDTH = 78
MOST_ROWS = 12


def summarize(plan: Plan) -> str:
    """The summary of `plan` as text: peaks by kind, time, and the modules whose values are kept or recomputed."""
    return "\n".join([*_head(plan), "", *_peaks(plan), "", *_modules(plan)])


def _head(plan: Plan) -> list[str]:
    budget = "nothing recomputed" if plan.budget_bytes is None else f"budget {format_bytes(plan.budget_bytes)}"
    extra, bound = 100 * plan.predicted_overhead, 100 * plan.lower_bound_overhead
    return [
        f"{plan.model}: {budget}",
        f"peak   {format_bytes(plan.baseline_peak_bytes)} -> {format_bytes(plan.predicted_peak_bytes)} "
        f"({plan.predicted_peak_bytes / plan.baseline_peak_bytes:.0%} of the plain module's)",
        f"time   +{extra:.1f} % predicted ({plan.cost} costs), at least +{bound:.1f} % for this peak; {plan.status}",
        f"plan   {plan.capture_time_s:.1f} s to capture, {plan.solve_time_s:.1f} s to solve",
    ]


def _peaks(plan: Plan) -> list[str]:
    rows = [f"{'at the peak':<16}{'plain':>14}{'planned':>14}"]
    for kind in KINDS:
        plain, planned = plan.baseline_by_kind.get(kind, 0), plan.peak_by_kind.get(kind, 0)
        rows.append(f"{TITLES[kind]:<16}{format_bytes(plain):>14}{format_bytes(planned):>14}")
    return rows


def _modules(plan: Plan) -> list[str]:
    """Per module: bytes kept from forward to backward, bytes made again instead, and the extra time of that."""
    kept, again, seconds = kept_and_recomputed(plan)
    names = sorted({*kept, *again}, key=lambda name: (-seconds[name], -kept[name], name))
    rows = [f"{'module':<40}{'kept':>12}{'recomputed':>12}{'time':>9}"]
    for name in names[:MOST_ROWS]:
        share = seconds[name] / plan.problem.plain_time_s if plan.problem.plain_time_s else 0.0
        shown = name if len(name) < 40 else f"...{name[-35:]}"
        rows.append(
            f"{shown or '(root)':<40}{format_bytes(kept[name]):>12}{format_bytes(again[name]):>12}{100 * share:>7.1f} %"
        )
    if len(names) > MOST_ROWS:
        rows.append(f"... and {len(names) - MOST_ROWS} more modules")
    return rows


def kept_and_recomputed(plan: Plan) -> tuple[Counter, Counter, Counter]:
    """By module: bytes that wait for the backward, bytes that are made again in it, and the seconds which that takes."""
    problem, schedule, timeline = plan.problem, plan.solution.schedule, plan.solution.timeline
    kept, again, seconds = Counter(), Counter(), Counter()
    alive: set[int] = set()
    forward_steps = forward_length(problem, schedule)
    for step, index in enumerate(schedule.steps):
        operator = problem.operators[index]
        if step < forward_steps:
            alive |= set(operator.outputs)
            alive -= {*timeline.frees[step]}
        elif problem.program_index(index) not in problem.backward:
            again[operator.module] += sum(problem.storages[s].size_bytes for s in operator.outputs)
            seconds[operator.module] += operator.again_s
    for storage in alive - problem.outputs:
        kept[problem.operators[problem.producers[storage][0]].module] += problem.storages[storage].size_bytes
    return kept, again, seconds
