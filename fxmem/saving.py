"""Plans as files: JSON with all that was decided, and what it was decided for.

A plan holds for one module, one kind of call and one version of PyTorch: other shapes or another PyTorch make other
operators. So a file says what it was made for, and one that does not fit is refused with the first thing that differs. The
schedule is replayed when it is read; nothing is solved, and no operator is timed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pathlib
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from .budget import Budget
from .errors import PlanError, ProblemError
from .problem import Operator, Problem, Storage
from .schedule import Schedule, simulate
from .solvers import Solution
from .typed import wrongly_typed

if TYPE_CHECKING:
    from .decisions import Plan

FORMAT = 1
STRUCTURE = (
    "name",
    "inputs",
    "outputs",
    "inplace",
    "recomputable",
    "replaces",
    "implementation",
)  # what of operators has to agree


def save_plan(plan: Plan, path: str | os.PathLike) -> None:
    """Write `plan` to a file, all of it or nothing. Raises PlanError where that cannot be done."""
    write_whole(path, json.dumps(plan_to_data(plan)).encode())


def write_whole(path: str | os.PathLike, content: bytes) -> None:
    """Write a file, all of it or nothing, for all who may read in its folder. Raises PlanError where that cannot be done."""
    if not isinstance(path, str | os.PathLike):
        raise PlanError(f"path={path!r} was given; give the path of a file to write")
    path = pathlib.Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_bytes(content)
        os.replace(beside, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise PlanError(
            f"{path} cannot be written ({error.strerror}): name a file in a folder that can be written to"
        ) from error


def load_plan(path: str | os.PathLike) -> Plan:
    """Read a plan that `save_plan` wrote. Raises PlanError for a file that is none, is not whole, or is another version's."""
    if not isinstance(path, str | os.PathLike):
        raise PlanError(f"path={path!r} was given; it is the path of a file that Plan.save wrote")
    try:
        data = json.loads(pathlib.Path(path).read_text())
    except OSError as error:
        raise PlanError(f"plan {path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise PlanError(f"{path} is no plan, or not a whole one ({error}): plan anew, and save that") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        given = data.get("format") if isinstance(data, dict) else None
        raise PlanError(
            f"{path} has format {given!r}, and this version of fxmem reads format {FORMAT}: plan anew, and save that"
        )
    try:
        plan = plan_from_data(data)
        wrong = next(wrongly_typed(plan, type(plan), ""), None)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, ProblemError) as error:
        raise PlanError(f"{path} is damaged ({type(error).__name__}: {error}): plan anew, and save that") from error
    if wrong:
        raise PlanError(f"{path} is damaged ({wrong}): plan anew, and save that")
    return plan


def plan_to_data(plan: Plan) -> dict[str, Any]:
    """A plan as what JSON holds. Timelines are left out: the simulator makes them again."""
    problem, solution = plan.problem, plan.solution
    return {
        "format": FORMAT,
        "origin": asdict(plan.origin),
        "model": plan.model,
        "asked": asdict(plan.asked),
        "budget_bytes": plan.budget_bytes,
        "baseline_peak_bytes": plan.baseline_peak_bytes,
        "baseline_by_kind": plan.baseline_by_kind,
        "cost": plan.cost,
        "capture_time_s": plan.capture_time_s,
        "solution": {name: value for name, value in vars(solution).items() if name not in ("schedule", "timeline")},
        "schedule": solution.schedule.steps,
        "overhead": solution.timeline.overhead,
        "num_forward": problem.num_forward,
        "num_program": problem.num_program,
        "outputs": sorted(problem.outputs),
        "extra_bytes": problem.extra_bytes,
        "storages": [list(vars(storage).values()) for storage in problem.storages],
        "operators": [_without_defaults(operator) for operator in problem.operators],
    }


def plan_from_data(data: dict[str, Any]) -> Plan:
    """The plan that `plan_to_data` was given, its schedule replayed."""
    from .decisions import Origin, Plan

    problem = Problem(
        storages=tuple(Storage(*row) for row in data["storages"]),
        operators=tuple(Operator(**{name: _frozen(value) for name, value in row.items()}) for row in data["operators"]),
        num_forward=data["num_forward"],
        num_program=data["num_program"],
        outputs=frozenset(data["outputs"]),
        extra_bytes=data["extra_bytes"],
    )
    schedule = Schedule(_frozen(data["schedule"]))
    rest = {name: _frozen(value) for name, value in data["solution"].items()}
    timeline = replace(simulate(problem, schedule), overhead=data["overhead"])  # over the plain step, also of a rewritten one
    solution = Solution(schedule, timeline, **rest)
    origin = Origin(**{name: _frozen(value) for name, value in data["origin"].items()})
    same = ("model", "budget_bytes", "baseline_peak_bytes", "baseline_by_kind", "cost", "capture_time_s")
    return Plan(problem=problem, solution=solution, origin=origin, asked=Budget(**data["asked"]), **{n: data[n] for n in same})


def check_fits(plan: Plan, here: Plan) -> None:
    """Raise PlanError, with the first difference, where a plan is for another module, call or version than `here` is."""
    for what, there, now in _differences(plan, here):
        raise PlanError(
            f"the plan does not fit: {what} is {there} in the plan and {now} here. "
            "Plan anew with a budget, or give the plan of this module, call and version"
        )


def _differences(plan: Plan, here: Plan) -> Iterator[tuple[str, Any, Any]]:
    pairs = [("the model", plan.model, here.model)]
    pairs += [(f"the {name} version", getattr(plan.origin, name), getattr(here.origin, name)) for name in ("fxmem", "torch")]
    pairs += [(f"the {name}", getattr(plan.origin, name), getattr(here.origin, name)) for name in ("device", "mode")]
    there, now = dict(plan.origin.inputs), dict(here.origin.inputs)
    pairs += [(f"input {name}", there.get(name, "absent"), now.get(name, "absent")) for name in dict.fromkeys((*there, *now))]
    for what, a, b in (*pairs, *_structure(plan.problem, here.problem)):
        if a != b:
            yield what, a, b


def _structure(a: Problem, b: Problem) -> Iterator[tuple[str, Any, Any]]:
    """All of two problems that no cost model decides."""
    for i, (s, t) in enumerate(zip_longest(a.storages, b.storages)):
        yield (
            f"storage {i}",
            _told(s and (s.name, f"{s.size_bytes:,} bytes", s.kind)),
            _told(t and (t.name, f"{t.size_bytes:,} bytes", t.kind)),
        )
    for i, (o, p) in enumerate(zip_longest(a.operators, b.operators)):
        yield f"operator {i}", *(_told(x and [getattr(x, name) for name in STRUCTURE]) for x in (o, p))
    for name in ("num_forward", "num_program", "outputs", "extra_bytes"):
        yield name, getattr(a, name), getattr(b, name)


def _told(parts: Iterable[Any] | None) -> str:
    return "absent" if parts is None else ", ".join(map(str, parts))


def cache_path(folder: str | os.PathLike, here: Plan, asked: Iterable[Any]) -> pathlib.Path:
    """The file for plans like `here` (its problem without its costs, what it was made for) when asked for `asked`.

    Raises PlanError where the folder cannot be written to.
    """
    folder = pathlib.Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise PlanError(f"cache_dir={str(folder)!r} cannot be written to ({error.strerror}): name another folder") from error
    told = [f"{what}: {b}" for what, _, b in _structure(here.problem, here.problem)]
    text = json.dumps([FORMAT, here.model, asdict(here.origin), told, [repr(part) for part in asked]])
    return folder / f"{here.model}-{hashlib.sha256(text.encode()).hexdigest()[:20]}.json"


def _without_defaults(operator: Operator) -> dict[str, Any]:
    default = Operator(operator.name, operator.inputs, operator.outputs)
    needed = ("name", "inputs", "outputs")
    return {name: value for name, value in vars(operator).items() if name in needed or value != getattr(default, name)}


def _frozen(value: Any) -> Any:
    """Lists as tuples, all the way down."""
    return tuple(map(_frozen, value)) if isinstance(value, list) else value
