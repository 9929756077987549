"""Cost models: seconds and workspace of every operator, measured on the device at hand or from a roofline."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from ..errors import CostError
from .base import CostModel, OpCall, OpCost, call_of
from .devices import DEVICE_NAMES, row_for
from .measured import MeasuredCost
from .roofline import RooflineCost
from .workspace import workspace_bytes

__all__ = [
    "CostModel", "MeasuredCost", "OpCall", "OpCost", "RooflineCost", "call_of", "checked_cost", "cost_model", "workspace_bytes",
    "workspace_of",
]  # fmt: skip


def cost_model(cost: str | CostModel, device: torch.device, anywhere: bool = False) -> CostModel:
    """The cost model that `cost` names, for operators that will run on `device`.

    cost: "measured" (times each different operator on `device`), "roofline" (the device table's row for `device`), a row of
        the table ("P100", "V100", "A100", "H100", "H200", "cpu"), or a CostModel, which is returned as it is.
    anywhere: nothing is on a real device yet, so that workspaces too are those of the named row.

    Raises CostError, listing what is allowed, for anything else.
    """
    if isinstance(cost, str):
        if cost == "measured":
            return MeasuredCost(device)
        if cost == "roofline":
            return RooflineCost(row_for(device))
        if cost in DEVICE_NAMES:
            return RooflineCost(cost, on_gpu=cost != "cpu" if anywhere else None)
    elif isinstance(cost, CostModel):
        return cost
    raise CostError(
        f"unknown cost {cost!r}; allowed: 'measured', 'roofline', {', '.join(map(repr, DEVICE_NAMES))}, or a CostModel"
    )


def checked_cost(model: CostModel, node: fx.Node) -> OpCost:
    """`model.cost(node)`; CostError, naming the node, where that is no finite cost of zero or more."""
    cost = model.cost(node)
    if not all(math.isfinite(value) and value >= 0 for value in (cost.time_s, cost.workspace_bytes)):
        raise CostError(
            f"cost model {model.name!r} says that node {node.name!r} ({node.target}) costs {cost}; "
            "seconds and bytes must be finite and zero or more"
        )
    return cost


def workspace_of(model: CostModel) -> Callable[[Any, tuple, dict, Any], int]:
    """`model`'s workspace as a function of (operator, args, kwargs, result), for what is no node; the formulas' where the
    model can cost nodes only."""
    cost_of_call = getattr(model, "cost_of_call", None)

    def workspace(target: Any, args: tuple, kwargs: dict, out: Any) -> int:
        call = OpCall(target, args, kwargs, out)
        return cost_of_call(call).workspace_bytes if cost_of_call else workspace_bytes(call)

    return workspace
