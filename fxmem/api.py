"""transform, plan, plans, frontier: the pipeline from top to bottom."""

from __future__ import annotations

import functools
import itertools
import logging
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from .budget import check_time_limit, parse_budget
from .capture import check_inputs, example_inputs_of, tensors_of
from .codegen.assemble import assemble
from .codegen.calls import canonical_call, check_is_tuple
from .codegen.partition import partition
from .codegen.planned import PlannedModule, check_names
from .cost import CostModel
from .decisions import Frontier, Plan
from .errors import BudgetError, CaptureError, CostError, FxmemError, InfeasibleBudgetError
from .guards import guards_of
from .inference import plan_inference
from .passes import PlaceInArena, Rematerialize
from .planning import Question, check_holds, decide, given_plan, none_better, solve_for
from .prepared import Prepared, prepare
from .progress import phase, showing
from .solvers import find_solver, solve_alone
from .solving import check_solver, choose_frontier
from .torch_internals import COLLECTING_HOOKS, FakeTensor

log = logging.getLogger(__name__)


def transform(
    module: nn.Module,
    example_inputs: Sequence[Any] | None = None,
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    budget: float | str | None = None,
    max_overhead: float | None = None,
    cost: str | CostModel | None = None,
    solver: str = "auto",
    time_limit_s: float = 60.0,
    output_gradients: str | Sequence[int] | None = None,
    implementations: Sequence[str] | None = None,
    exactness: str = "bitwise",
    inplace: bool = True,
    recompute: bool = True,
    arena: bool = False,
    plan: Plan | str | os.PathLike | None = None,
    cache_dir: str | os.PathLike | None = None,
    progress: bool | None = None,
) -> PlannedModule:
    """A module that computes what `module` computes, outputs, gradients and buffers alike, with its peak under a budget.

    module: a GraphModule (symbolic_trace, export), or any nn.Module that Dynamo captures as one graph; left as it is, but its
        parameters, buffers and submodules are shared with the result.
    example_inputs, example_kwargs: what the module will be called with: shapes, dtypes and structure count, not values. May be
        left out for a GraphModule whose placeholders carry shapes.
    budget: bytes (int), "900MiB", a fraction of the plain module's peak (float), "min", or None: nothing is recomputed.
    max_overhead: instead of a budget, the least peak at this extra time (0.1: ten percent) at most.
    cost: "measured" (the default for real tensors: times each different operator on the device), "roofline", a device's
        name ("P100", "V100", "A100", "H100", "H200", "cpu"), or a CostModel.
    solver: a name in `fxmem.solvers.SOLVERS`. time_limit_s: seconds for the solver.
    output_gradients: which output leaves get gradients: None (the scalar ones if there are any, else all), "all", or indices.
    implementations: names in `fxmem.implementations.IMPLEMENTATIONS` that the solver may choose from: None (all), or a tuple of
        names; "-name" leaves one out, () leaves all out. exactness: "bitwise", or "accurate" to allow those too whose gradients
        differ in the last bits. inplace: whether results may be written over operands that die. recompute: False for a step in
        which no operator runs twice, so that implementations and operators in place alone save memory.
    arena: whether results go into planned slices of one allocation that is kept from step to step, where operators can write
        there; inference, then, has a plan and an arena of its own.
    plan: instead of a budget, a Plan or the file of one (`Plan.save`) for this module and call: nothing is solved, and
        output_gradients, implementations, exactness, inplace and recompute are the plan's.
    cache_dir: a folder where plans are kept from run to run; what was planned there before is not solved again (of a CostModel,
        the name counts).
    progress: False for silence; otherwise a line in the terminal tells what takes so long, where rich is installed.

    The peak counts parameters, buffers, inputs, all that is computed, gradients of parameters and inputs, and workspaces.
    Raises FxmemError for a solver or switch that is none, and its subclasses BudgetError, InfeasibleBudgetError, CaptureError,
    CostError, ImplementationError and PlanError; `module` is then untouched.
    """
    given = None
    _check_switches(arena=arena)
    graph_options = _graph_options(output_gradients, implementations, exactness, inplace, recompute)
    if plan is not None:
        given = given_plan(plan, budget, max_overhead)
        graph_options = {name: getattr(given.origin, name) for name in graph_options}
    ask = given.asked if given else parse_budget(budget, max_overhead)
    question = Question(ask, cost, solver, time_limit_s, graph_options)
    return _transform(module, example_inputs, example_kwargs, question, given, arena, cache_dir, progress)


def _transform(
    module: nn.Module,
    example_inputs: Sequence[Any] | None,
    example_kwargs: Mapping[str, Any] | None,
    question: Question,
    given: Plan | None,
    arena: bool,
    cache_dir: str | os.PathLike | None,
    progress: bool | None,
    withheld: frozenset[tuple[str, ...]] = frozenset(),
) -> PlannedModule:
    """As `transform`, of what that was asked. withheld: see `Question`."""
    module, args, kwargs = _example_call(module, example_inputs, example_kwargs)
    check_names(module)
    _warn_of_hooks(module)
    with showing(progress):
        cost = question.cost or _default_cost(module, args, kwargs)
        prepared, plan_ = decide(module, args, kwargs, replace(question, cost=cost, withheld=withheld), given, cache_dir)
        ask = question.budget
        others = replace(question, budget=ask if ask.fraction is None else replace(ask, at_least_bytes=plan_.budget_bytes))
        options = dict(question=others, given=None, arena=arena, cache_dir=cache_dir, progress=progress)
        again = functools.partial(_transform, **options)
        joint = Rematerialize(solution=plan_.solution)(prepared.reordered_joint()).graph_module
        guards = guards_of(joint.graph)
        if given:
            check_holds(guards, module)
        infer = None
        if arena:
            infer = functools.partial(plan_inference, inplace=question.graph_options["inplace"])
            limit_bytes = plan_.budget_bytes or plan_.baseline_peak_bytes
            PlaceInArena(prepared.lowered, plan_.solution.schedule, limit_bytes)(joint)
            plan_ = replace(plan_, arena=joint.meta["fxmem_arena"])
        parts = partition(joint.graph, joint.meta["fxmem_regions"])
        layout = joint.meta.get("fxmem_layout")
        return assemble(module, prepared.captured, parts, args, kwargs, plan_, again, layout, infer, guards)


def plan(
    module: nn.Module,
    example_inputs: Sequence[Any] | None = None,
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    budget: float | str | None = None,
    max_overhead: float | None = None,
    cost: str | CostModel = "roofline",
    solver: str = "auto",
    time_limit_s: float = 60.0,
    output_gradients: str | Sequence[int] | None = None,
    implementations: Sequence[str] | None = None,
    exactness: str = "bitwise",
    inplace: bool = True,
    recompute: bool = True,
    cache_dir: str | os.PathLike | None = None,
    progress: bool | None = None,
) -> Plan:
    """What `transform` would decide, without making the module: nothing is executed, nothing of the model's size allocated.

    Parameters and inputs may be fake or meta tensors, so that what no machine at hand can hold is planned on a laptop.
    `cost="measured"`, which is `transform`'s default, times operators one by one. Otherwise as for `transform`.
    """
    graph_options = _graph_options(output_gradients, implementations, exactness, inplace, recompute)
    question = Question(parse_budget(budget, max_overhead), cost, solver, time_limit_s, graph_options)
    module, args, kwargs = _example_call(module, example_inputs, example_kwargs)
    with showing(progress):
        return decide(module, args, kwargs, question, None, cache_dir)[1]


def frontier(
    module: nn.Module,
    example_inputs: Sequence[Any] | None = None,
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    points: int = 8,
    cost: str | CostModel = "roofline",
    time_limit_s: float = 60.0,
    output_gradients: str | Sequence[int] | None = None,
    implementations: Sequence[str] | None = None,
    exactness: str = "bitwise",
    inplace: bool = True,
    recompute: bool = True,
    peers: Sequence[str] = (),
    progress: bool | None = None,
) -> Frontier:
    """Up to `points` Plans from no recompute to the least reachable peak, from one capture.

    peers: names of other solvers whose plans within the same budgets are to stand beside them; one that is better, where time
        was short, takes the place of a Plan. Otherwise as for `plan`.
    """
    if isinstance(points, bool) or not isinstance(points, int) or points < 1:
        raise BudgetError(f"points={points!r} was given; a frontier has one point or more")
    check_time_limit(time_limit_s)
    if isinstance(peers, str):
        raise FxmemError(f"peers={peers!r} was given; give a tuple of solvers' names, as in peers=({peers!r},)")
    for name in peers:
        find_solver(name)
    graph_options = _graph_options(output_gradients, implementations, exactness, inplace, recompute)
    module, args, kwargs = _example_call(module, example_inputs, example_kwargs)
    with showing(progress):
        prepared = prepare(module, args, kwargs, cost, **graph_options)
        phase("solving")
        chosen = choose_frontier([program.lowered.problem for program in prepared.programs], points, time_limit_s)
        found = tuple(prepared.programs[n].plan(solution, solution.timeline.peak_bytes) for n, solution in chosen)
        others = {name: _peer(prepared, name, found) for name in peers}
        return Frontier(none_better(found, [p for plans_ in others.values() for p in plans_]), others)


def _peer(prepared: Prepared, solver: str, plans_: Sequence[Plan]) -> tuple[Plan, ...]:
    """What another solver finds by itself within the budgets of some plans."""
    problem = prepared.lowered.problem
    starts = prepared.partitioner_schedules() if solver == "torch_budget" else ()
    budgets = (plan_.predicted_peak_bytes for plan_ in plans_ if plan_.predicted_overhead)
    found = ((budget_bytes, solve_alone(problem, budget_bytes, solver, starts)) for budget_bytes in budgets)
    return tuple(prepared.plan(solution, budget_bytes) for budget_bytes, solution in found if solution)


def plans(
    module: nn.Module,
    example_inputs: Sequence[Any] | None = None,
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    budgets: Sequence[float | str],
    costs: Sequence[str | CostModel] = ("roofline",),
    solver: str = "auto",
    time_limit_s: float = 60.0,
    output_gradients: str | Sequence[int] | None = None,
    implementations: Sequence[str] | None = None,
    exactness: str = "bitwise",
    inplace: bool = True,
    recompute: bool = True,
    progress: bool | None = None,
) -> dict[tuple[str, float | str], Plan | InfeasibleBudgetError]:
    """Plans for several budgets and devices, from one capture: {(name of the cost model, budget): Plan}.

    Smaller budgets are solved first and start the larger ones, so that a larger budget never costs more extra time. A budget
    that cannot be met has its InfeasibleBudgetError in place of a Plan. time_limit_s: for each; an interrupt leaves none for
    the budgets that are still to be solved, where a plan that fits is known. Otherwise as for `plan`.
    """
    if isinstance(budgets, str) or not isinstance(budgets, Iterable) or not (budgets := tuple(budgets)):
        raise BudgetError(f"budgets={budgets!r} was given; give several, as in budgets=(0.7, 0.5)")
    if isinstance(costs, str) or not isinstance(costs, Iterable):
        raise CostError(f'costs={costs!r} was given; give several, as in costs=("P100", "H100")')
    check_time_limit(time_limit_s)
    wanted = {budget: parse_budget(budget) for budget in budgets}
    check_solver(solver, *wanted.values())
    graph_options = _graph_options(output_gradients, implementations, exactness, inplace, recompute)
    module, args, kwargs = _example_call(module, example_inputs, example_kwargs)
    asked = Counter(getattr(cost, "name", cost) for cost in costs)
    if not asked or asked.most_common(1)[0][1] > 1:
        raise CostError(f"costs={costs!r} was given; name one cost model or more, each by another name")
    with showing(progress):
        found: dict[tuple[str, float | str], Plan | InfeasibleBudgetError] = {}
        prepared = prepare(module, args, kwargs, costs[0], **graph_options)
        for number, cost in enumerate(costs):
            prepared = prepared.under(cost) if number else prepared
            known: list[Plan] = []
            for budget in sorted(wanted, key=lambda b: wanted[b].tightness(prepared.baseline.peak_bytes)):
                try:
                    _, plan_ = solve_for(prepared, wanted[budget], solver, time_limit_s, known)
                    found[prepared.cost, budget] = plan_
                    known.append(plan_)
                    time_limit_s = 0.0 if plan_.solution.interrupted else time_limit_s
                except InfeasibleBudgetError as error:
                    found[prepared.cost, budget] = error
    names = dict.fromkeys(name for name, _ in found)
    return {(name, budget): found[name, budget] for name in names for budget in wanted}


def _example_call(
    module: nn.Module, args: Sequence[Any] | None, kwargs: Mapping[str, Any] | None
) -> tuple[nn.Module, tuple, dict]:
    """The module to plan (of a planned one, what it was made from), and the example call in its canonical form."""
    if isinstance(module, PlannedModule):
        module = module.source
    if not isinstance(module, nn.Module):
        raise CaptureError(f"fxmem transforms torch.nn.Module objects; a {type(module).__name__} was given")
    if isinstance(module, torch.jit.ScriptModule):
        raise CaptureError("TorchScript modules hold no Python to trace: transform the module that this one was made from")
    inner = next((name for name, m in module.named_modules() if isinstance(m, PlannedModule)), None)
    if inner is not None:
        raise CaptureError(
            f"submodule {inner!r} is a planned module already: transform the whole with its plain module (its `source`)"
        )
    if not (kwargs is None or isinstance(kwargs, Mapping)):
        raise CaptureError(f"example_kwargs is a {type(kwargs).__name__}; give a dict of the module's keyword arguments")
    if args is None and not kwargs:
        args = example_inputs_of(module)
    check_is_tuple(args, CaptureError)
    try:
        check_inputs(tuple(args or ()), kwargs or {})
        return module, *canonical_call(module, tuple(args or ()), kwargs or {})
    except TypeError as error:
        raise CaptureError(f"the example inputs do not fit {type(module).__name__}.forward: {error}") from error


def _graph_options(
    output_gradients: Any, implementations: Sequence[str] | None, exactness: str, inplace: bool, recompute: bool
) -> dict[str, Any]:
    """What decides which operators there are, as `prepare` takes it, and as `Origin` holds it."""
    _check_switches(inplace=inplace, recompute=recompute)
    return dict(
        output_gradients=output_gradients,
        implementations=implementations,
        exactness=exactness,
        inplace=inplace,
        recompute=recompute,
    )


def _check_switches(**given: Any) -> None:
    """Raise FxmemError where what is on or off is given as something else."""
    for name, value in given.items():
        if not isinstance(value, bool):
            raise FxmemError(f"{name}={value!r} was given; it is True or False")


def _default_cost(module: nn.Module, args: tuple, kwargs: dict) -> str:
    """Measured, where there are real tensors on a real device."""
    unreal = any(t.is_meta or isinstance(t, FakeTensor) for t in tensors_of(module, args, kwargs))
    return "roofline" if unreal else "measured"


def _warn_of_hooks(module: nn.Module) -> None:
    """Hooks on submodules are traced, but do not fire inside a region: no matter for those that only note what they see."""

    def hooks_of(m: nn.Module) -> list[Any]:
        found = itertools.chain.from_iterable(
            hooks.values() for hooks in (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks, m._backward_pre_hooks)
        )
        return [hook for hook in found if getattr(hook, "__module__", "") != COLLECTING_HOOKS]

    hooked = [name for name, m in module.named_modules() if name and hooks_of(m)]
    if hooked:
        log.warning(
            "hooks on submodules do not run in a planned step, which only repeats what they compute: %s has some "
            "(%d modules in all)",
            hooked[0],
            len(hooked),
        )
