"""Inference in an arena: a graph of the forward alone, captured without gradients, in which nothing waits for a backward."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .baseline import EagerTimeline, Workspace, eager_timeline
from .capture import Capture, capture, device_of
from .codegen.assemble import assemble
from .codegen.partition import partition
from .codegen.planned import PlannedModule
from .cost import cost_model, workspace_of
from .decisions import Plan
from .lowering import lower
from .passes import (
    Costs,
    Liveness,
    MarkInplace,
    MarkRegions,
    MatchEager,
    NameNodes,
    PlaceInArena,
    Rematerialize,
    SingleResults,
    UpdateBuffers,
    WriteViews,
)
from .prepared import shape_prop
from .progress import phase
from .solving import unsolved


def plan_inference(module: nn.Module, args: tuple, kwargs: Mapping[str, Any], inplace: bool = True) -> PlannedModule:
    """A module that computes what `module(*args, **kwargs)` computes without gradients, its results in an arena.

    Its peak, the arena included, is not above that of the plain module, or of the graph alone where that is higher. Arguments
    in their canonical form; calls of another kind need another plan. Raises CaptureError.
    """
    with torch.inference_mode(False), torch.no_grad():
        return _plan(module, args, kwargs, inplace)


def _plan(module: nn.Module, args: tuple, kwargs: Mapping[str, Any], inplace: bool) -> PlannedModule:
    started = time.perf_counter()
    device = device_of(module, args, kwargs)
    model = cost_model("roofline", device, anywhere=False)
    phase("planning inference")
    captured = capture(module, args, kwargs, inference=True)
    joint = captured.joint
    for graph_pass in (NameNodes(), MatchEager(), WriteViews(), SingleResults(), UpdateBuffers(), shape_prop(device)):
        graph_pass(joint)
    for graph_pass in (Liveness(), MarkRegions(), *([MarkInplace()] if inplace else []), Costs(model)):
        graph_pass(joint)
    lowered = lower(joint)
    solution = unsolved(lowered.problem)
    baseline = _baseline(module, args, dict(kwargs), captured, workspace_of(model))
    Rematerialize(solution=solution)(joint)
    # Workspaces are formulas, mostly of more than is taken: they count for the arena, not for what it is held against.
    PlaceInArena(lowered, solution.schedule, baseline.storages_peak_bytes)(joint)
    plan = Plan(
        model=type(module).__name__,
        budget_bytes=None,
        baseline_peak_bytes=baseline.peak_bytes,
        baseline_by_kind=baseline.peak_by_kind,
        problem=lowered.problem,
        solution=solution,
        cost=model.name,
        capture_time_s=time.perf_counter() - started,
        arena=joint.meta["fxmem_arena"],
    )
    parts = partition(joint.graph, joint.meta["fxmem_regions"])
    return assemble(module, captured, parts, args, kwargs, plan, None, joint.meta["fxmem_layout"])


def _baseline(module: nn.Module, args: tuple, kwargs: dict, captured: Capture, workspace: Workspace) -> EagerTimeline:
    """The plain module's memory, with all that its Python code still refers to; where that does not run on fake tensors, its
    captured graph's, which is never more."""
    try:  # a copy, so that what the code notes on the module is not noted twice, and nobody's hooks see fake tensors
        apart = copy.deepcopy(module, {id(t): t for t in (*module.parameters(), *module.buffers())})
        for part in apart.modules():
            part._forward_hooks.clear()
            part._forward_pre_hooks.clear()
        return eager_timeline(apart, args, kwargs, workspace, inference=True)
    except Exception:
        return eager_timeline(captured.torch_level, *captured.call, workspace, inference=True)
