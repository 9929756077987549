"""All that is known of a module before a budget is: capture, passes, costs, the Problem, and the plain module's peak."""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import fx, nn

from .baseline import EagerTimeline, eager_timeline
from .budget import Budget
from .capture import Capture, capture, device_of, refusing
from .cost import CostModel, cost_model, workspace_of
from .decisions import Origin, Plan
from .errors import CaptureError
from .guards import ValueGuard, is_offered
from .lowering import Lowered, lower
from .measuring import attached_outputs
from .order import Order
from .passes import (
    Costs,
    Liveness,
    MarkInplace,
    MarkRegions,
    MatchEager,
    MergeCasts,
    MergeCopies,
    NameNodes,
    OfferImplementations,
    OwnGradients,
    Pass,
    Reorder,
    RewriteParts,
    ShapeProp,
    SplitConvolutions,
    UpdateBuffers,
    WriteViews,
)
from .passes.base import told
from .passes.merge_casts import keeps_casts
from .passes.reorder import better_order
from .problem import without_recompute
from .progress import detail, phase
from .schedule import Schedule
from .solvers import Solution
from .torch_budget import partitioner_schedules
from .torch_internals import pytree
from .version import VERSION

CUDA_ALIGNMENT_BYTES = 512  # the caching allocator's granularity


@dataclass(frozen=True)
class Prepared:
    """One capture, costed by one model. device: None where all tensors were on meta. seconds: what all of it took.
    origin: what plans made of it hold for. rewritten: the same step with parts of it written otherwise, where implementations
    offer that. order: that of the operators, where it is not the graph's own (see `Reorder`).
    """

    model: str
    captured: Capture
    device: torch.device | None
    lowered: Lowered
    baseline: EagerTimeline
    cost_model: CostModel
    seconds: float
    origin: Origin
    rewritten: Prepared | None = None
    order: Order | None = None

    @cached_property
    def programs(self) -> tuple[Prepared, ...]:
        """The ways to write the step, the plain one first."""
        written = (self, self.rewritten) if self.rewritten else (self,)
        return tuple(program for way in written for program in (way, way.reordered) if program)

    @cached_property
    def reordered(self) -> Prepared | None:
        """The same step with the backward in another order, where one needs less memory."""
        order = better_order(self.lowered)
        return order and replace(self, lowered=_lowered(self.captured, self.origin, order), order=order)

    def reordered_joint(self) -> fx.GraphModule:
        """The joint graph, which other programs may share: from then on it is in the order of this one."""
        if self.order:
            for graph_pass in (Reorder(self.order), Liveness(), MarkRegions()):
                graph_pass(self.captured.joint)
        return self.captured.joint

    @property
    def cost(self) -> str:
        """The cost model's name."""
        return self.cost_model.name

    def plan(self, solution: Solution, budget_bytes: int | None, asked: Budget | None = None) -> Plan:
        """What a solver decided, as users see it. asked: the budget as the user gave it; otherwise it is budget_bytes."""
        return Plan(
            model=self.model,
            budget_bytes=budget_bytes,
            baseline_peak_bytes=self.baseline.peak_bytes,
            baseline_by_kind=self.baseline.peak_by_kind,
            problem=self.lowered.problem,
            solution=solution,
            cost=self.cost,
            capture_time_s=self.seconds,
            asked=asked or Budget(size_bytes=budget_bytes),
            origin=self.origin,
        )

    def under(self, cost: str | CostModel, baseline: EagerTimeline | None = None) -> Prepared:
        """The same capture costed otherwise. baseline: the plain module's memory under that cost model, where it is known."""
        model = _cost_model(cost, self.device)
        detail(f"Costs, {model.name}")
        Costs(model)(self.captured.joint)
        baseline = baseline or _baseline(self.captured, model, self.model)
        rewritten = self.rewritten and self.rewritten.under(model, baseline)
        lowered = _lowered(self.captured, self.origin)
        return replace(self, lowered=lowered, baseline=baseline, cost_model=model, rewritten=rewritten)

    def partitioner_schedules(self) -> tuple[Schedule, ...]:
        """What PyTorch's own partitioner would do with this step (see `torch_budget`)."""
        return partitioner_schedules(self.captured.joint, self.lowered)


def prepare(
    module: nn.Module,
    args: tuple,
    kwargs: Mapping[str, Any],
    cost: str | CostModel,
    output_gradients: Any = None,
    implementations: Sequence[str] | None = None,
    exactness: str = "bitwise",
    inplace: bool = True,
    recompute: bool = True,
    everywhere: bool = False,
    holds: Callable[[ValueGuard], bool] | None = None,
) -> Prepared:
    """Capture a module and run every pass that needs no budget. everywhere, holds: see `OfferImplementations`; guards are asked
    about the module's values where the latter is not given."""
    if not (output_gradients is None or isinstance(output_gradients, Iterable)):
        raise CaptureError(f'output_gradients={output_gradients!r}: allowed are None, "all", or indices, as in (0,)')
    offer = OfferImplementations(implementations, exactness, everywhere, holds or functools.partial(is_offered, module))
    rewrite, rewrite_backward = (RewriteParts(implementations, exactness, forward) for forward in (True, False))
    started = time.perf_counter()
    device = device_of(module, args, kwargs)
    model = _cost_model(cost, device)
    origin = Origin(
        fxmem=VERSION,
        torch=torch.__version__.split("+")[0],
        device=_device_name(device),
        mode="train" if module.training else "eval",
        inputs=_inputs(args, kwargs),
        output_gradients=output_gradients
        if output_gradients is None or isinstance(output_gradients, str)
        else tuple(output_gradients),
        implementations=None if implementations is None else tuple(implementations),
        exactness=exactness,
        inplace=inplace,
        recompute=recompute,
    )
    phase("capturing")
    captured = capture(module, args, kwargs, output_gradients)
    phase("preparing")
    merge = (MergeCasts(),) if keeps_casts(captured.torch_level) else ()
    for graph_pass in (SplitConvolutions(), MergeCopies(), NameNodes(), MatchEager(), *merge, WriteViews(), rewrite_backward):
        graph_pass(captured.joint)
    other = None
    if rewrite.applies(captured.joint):  # a copy of a large graph takes seconds
        other = replace(captured, joint=fx.GraphModule(captured.joint, copy.deepcopy(captured.joint.graph)))
    passes = _annotations(device, model, offer, inplace)

    def finish(captured: Capture, baseline: EagerTimeline | None = None) -> Prepared:
        for graph_pass in passes:
            detail(f"Costs, {model.name}" if isinstance(graph_pass, Costs) else type(graph_pass).__name__)
            graph_pass(captured.joint)
        lowered = _lowered(captured, origin)
        baseline, seconds = baseline or _baseline(captured, model, type(module).__name__), time.perf_counter() - started
        made_for = replace(origin, withheld=captured.joint.meta["fxmem_withheld"])
        return Prepared(type(module).__name__, captured, device, lowered, baseline, model, seconds, made_for)

    plain = finish(captured)
    if other is None:
        return plain
    rewrite(other.joint)
    rewritten = finish(other, plain.baseline)
    return replace(plain, rewritten=rewritten, seconds=rewritten.seconds)


def _lowered(captured: Capture, origin: Origin, order: Order | None = None) -> Lowered:
    lowered = lower(captured.joint, order)
    return lowered if origin.recompute else replace(lowered, problem=without_recompute(lowered.problem))


def _annotations(device: torch.device | None, model: CostModel, offer: Pass, inplace: bool) -> tuple[Pass, ...]:
    """The passes that one way of writing the step goes through, in order."""
    return (
        UpdateBuffers(),
        shape_prop(device),
        OwnGradients(),
        Liveness(),
        MarkRegions(),
        offer,
        *((MarkInplace(),) if inplace else ()),
        Costs(model),
    )


def shape_prop(device: torch.device | None) -> ShapeProp:
    """The pass, with sizes as the device's allocator rounds them."""
    return ShapeProp(alignment_bytes=CUDA_ALIGNMENT_BYTES if device and device.type == "cuda" else 1)


def _device_name(device: torch.device | None) -> str:
    """What a plan's times and workspaces hold for."""
    if device is None:
        return "meta"
    there = device.type == "cuda" and torch.cuda.is_available()
    return torch.cuda.get_device_name(device) if there else device.type


def _inputs(args: tuple, kwargs: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """Where in the call each leaf stands, and what it is."""
    given = (*((f"argument {i}", a) for i, a in enumerate(args)), *kwargs.items())
    return tuple((n + pytree.keystr(path), _told(leaf)) for n, v in given for path, leaf in pytree.tree_leaves_with_path(v))


def _told(leaf: Any) -> str:
    """A leaf of a call: "float32[8, 3, 224, 224]", with strides where it is not contiguous; or the value of what is none."""
    if not isinstance(leaf, torch.Tensor):
        return repr(leaf)
    return told(leaf, strides=not leaf.is_contiguous())


def _cost_model(cost: str | CostModel, device: torch.device | None) -> CostModel:
    return cost_model(cost, device or torch.device("cpu"), anywhere=device is None)


def _baseline(captured: Capture, model: CostModel, name: str) -> EagerTimeline:
    """The plain module's memory, with workspaces as the cost model has them for the planned one."""
    with refusing(name):
        return eager_timeline(captured.torch_level, *captured.call, workspace=workspace_of(model), roots_of=attached_outputs)
