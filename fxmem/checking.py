"""Holds an implementation against the plain operator: gradients, bytes and all."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .codegen.assemble import assemble
from .codegen.calls import canonical_call, check_is_tuple
from .codegen.partition import partition
from .codegen.planned import PlannedModule
from .decisions import Plan
from .errors import ImplementationError
from .implementations import IMPLEMENTATIONS, choose_implementations
from .lowering import Lowered
from .measuring import backward_roots, measure
from .passes import Rematerialize
from .prepared import prepare
from .schedule import Schedule, simulate
from .solvers import Solution
from .solvers.stages import compile_problem
from .torch_internals import pytree, tensors_in

MOST_ERRORS = 4.0  # times the plain operator's own error that an accurate implementation may have
NO_DIGIT = 0.5  # the plain operator's own error from which on a tensor says nothing: a gradient that is zero but for rounding
LEAST_ERROR = 16 * torch.finfo(torch.float64).eps  # that counts as the plain operator's: in float64 it is the measure itself


@dataclass(frozen=True)
class ImplementationCheck:
    """What `check_implementation` found.

    places: operators that the implementation ran for. is_bitwise: outputs and gradients equal the plain module's, bit
    for bit. error, plain_error: largest difference from float64, relative to the tensor's largest value, with and without it,
    of the tensors of which the plain operator gets a digit right.
    predicted_peak_bytes, measured_peak_bytes: of the step.
    """

    name: str
    places: int
    is_bitwise: bool
    error: float
    plain_error: float
    predicted_peak_bytes: int
    measured_peak_bytes: int


def check_implementation(
    name: str, module: nn.Module, example_inputs: Sequence[Any], example_kwargs: Mapping[str, Any] | None = None
) -> ImplementationCheck:
    """Run one training step of `module` with the implementation `name` wherever it applies, whatever that costs, beside the
    plain step.

    module: uses the operators that the implementation serves; left as it is. example_inputs: real tensors.
    Raises ImplementationError where it applies nowhere, where gradients are not what its exactness promises ("bitwise": equal;
    "accurate": within 4 times the error that the plain operator itself has against float64), or where the step needs more
    memory than was promised.
    """
    choose_implementations((name,), "accurate")
    check_is_tuple(example_inputs, ImplementationError)
    args, kwargs = canonical_call(module, tuple(example_inputs), example_kwargs or {})
    plain = copy.deepcopy(module)
    expected = _values(plain, args, kwargs)
    planned, places = force(name, copy.deepcopy(module), args, kwargs)
    if not places:
        raise ImplementationError(_why_nowhere(name, module, args, kwargs))
    try:
        measured_bytes = measure(planned, args, kwargs).peak_bytes
        values = _values(planned, args, kwargs)
    except Exception as error:
        raise ImplementationError(f"implementation {name!r} fails when it runs: {error}") from error
    exact = _values(*_as_float64((copy.deepcopy(module), args, kwargs)))
    bitwise = len(values) == len(expected) and all(map(_same, values, expected))
    errors, plain_errors = _errors(values, exact), _errors(expected, exact)
    telling = [n for n, error in enumerate(plain_errors) if error < NO_DIGIT]
    error, plain_error = (max((found[n] for n in telling), default=0.0) for found in (errors, plain_errors))
    found = ImplementationCheck(name, places, bitwise, error, plain_error, planned.plan.predicted_peak_bytes, measured_bytes)
    _judge(found)
    return found


def force(name: str, module: nn.Module, args: tuple, kwargs: dict) -> tuple[PlannedModule, int]:
    """The module planned so that nothing is recomputed but by the implementation, and in how many places that is used."""
    prepared = prepare(module, args, kwargs, "measured", "all", (name,), "accurate", everywhere=True)
    prepared = prepared.rewritten or prepared
    problem = prepared.lowered.problem
    schedule, places = _everywhere(prepared.lowered)
    places += prepared.captured.joint.meta.get("fxmem_rewrites", 0)
    solution = Solution(schedule, simulate(problem, schedule), 0.0, "forced", "check", 0.0)
    plan: Plan = prepared.plan(solution, None)
    joint = Rematerialize(solution=solution)(prepared.captured.joint).graph_module
    parts = partition(joint.graph, joint.meta["fxmem_regions"])
    return assemble(module, prepared.captured, parts, args, kwargs, plan, _no_other_shapes), places


def _why_nowhere(name: str, module: nn.Module, args: tuple, kwargs: dict) -> str:
    joint = prepare(module, args, kwargs, "roofline", "all", (name,), "accurate", everywhere=True).captured.joint
    model, serves = type(module).__name__, IMPLEMENTATIONS[name].serves
    found = f"implementation {name!r} applies nowhere in {model}: it serves {', '.join(map(str, serves))}, "
    if not any(node.target in serves for node in joint.graph.nodes):
        return f"{found}which the step does not run: give a module that uses one of them, where it needs a gradient"
    refused = joint.meta["fxmem_not_offered"].get(name)
    return found + (f"and what it gave is not offered: {refused}" if refused else "and gave no Choice for any of them")


def _no_other_shapes(*_: Any, **__: Any) -> PlannedModule:
    raise ImplementationError("a module that was planned for a check runs on the checked inputs alone")


def _everywhere(lowered: Lowered) -> tuple[Schedule, int]:
    """All encoders in the forward, each operand that can be made otherwise so made before its first use in the backward, all
    alternatives."""
    problem = lowered.problem
    offered = (p for p in problem.variants if lowered.nodes[p].meta.get("fxmem_offers") == "variant")
    makers = {problem.operators[p].outputs[0]: p for p in offered}
    steps, places = list(compile_problem(problem).forward), 0
    for index in problem.backward:
        run = problem.alternatives.get(index, (index,))[0]
        again = [makers.pop(s) for s in problem.operators[index].inputs if s in makers]
        places += len(again) + (run != index)
        steps += [*again, run]
    return Schedule(tuple(steps)), places


def _values(module: nn.Module, args: tuple, kwargs: dict) -> list[torch.Tensor]:
    """Outputs, and gradients of parameters and inputs, of one step from one seed."""
    args, kwargs = pytree.tree_map_only(
        torch.Tensor, lambda t: t.detach().clone().requires_grad_(t.requires_grad), (args, kwargs)
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        roots = backward_roots(module(*args, **kwargs))
        torch.autograd.backward(roots, [torch.linspace(0.5, 1.5, r.numel()).view(r.shape).to(r) for r in roots])
    leaves = *module.parameters(), *tensors_in((args, kwargs))
    return [*(r.detach() for r in roots), *(t.grad for t in leaves if t.grad is not None)]


def _as_float64(tree: Any) -> Any:
    """Module and tensors in float64; integers as they are."""

    def convert(leaf: Any) -> Any:
        if isinstance(leaf, nn.Module):
            return leaf.double()
        wide = isinstance(leaf, torch.Tensor) and leaf.is_floating_point()
        return leaf.detach().double().requires_grad_(leaf.requires_grad) if wide else leaf

    return pytree.tree_map(convert, tree)


def _same(value: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool(((value == expected) | (value.isnan() & expected.isnan())).all())


def _errors(values: list[torch.Tensor], exact: list[torch.Tensor]) -> list[float]:
    """Of each tensor, the largest difference relative to its largest finite value; what is not finite has to be so in both."""
    return [_error(value, right) for value, right in zip(values, exact, strict=True)]


def _error(value: torch.Tensor, right: torch.Tensor) -> float:
    if (right.isfinite() & value.isnan()).any():
        return math.inf
    finite = right.isfinite() & value.isfinite()
    if not finite.any():
        return 0.0
    return (value[finite].double() - right[finite].double()).abs().max().item() / (right[finite].abs().max().item() or 1.0)


def _judge(found: ImplementationCheck) -> None:
    exactness = IMPLEMENTATIONS[found.name].exactness
    if exactness == "bitwise" and not found.is_bitwise:
        raise ImplementationError(
            f"implementation {found.name!r} says that it is bitwise, but outputs or gradients differ from the plain module's: "
            f"its error against float64 is {found.error:.3g}, the plain one's {found.plain_error:.3g}"
        )
    if found.error > MOST_ERRORS * max(found.plain_error, LEAST_ERROR) and not found.is_bitwise:
        raise ImplementationError(
            f"implementation {found.name!r} is wrong: its error against float64 is {found.error:.3g}, the plain operator's own "
            f"{found.plain_error:.3g}; at most {MOST_ERRORS:g} times that is allowed"
        )
    if found.measured_peak_bytes > found.predicted_peak_bytes:
        raise ImplementationError(
            f"implementation {found.name!r} keeps or takes more than it promises: a step of {found.predicted_peak_bytes:,} "
            f"bytes was predicted, {found.measured_peak_bytes:,} were measured"
        )
