"""Cost models: seconds and workspace of every operator, measured on the device at hand or from a roofline."""

from __future__ import annotations

import logging

import torch

from ..errors import CostError
from .base import CostModel, OpCall, OpCost, call_of
from .devices import DEVICE_NAMES, DEVICES
from .measured import MeasuredCost
from .roofline import RooflineCost
from .workspace import workspace_bytes

__all__ = ["CostModel", "MeasuredCost", "OpCall", "OpCost", "RooflineCost", "call_of", "cost_model", "workspace_bytes"]

log = logging.getLogger(__name__)


def cost_model(cost: str | CostModel, device: torch.device) -> CostModel:
    """The cost model that `cost` names, for operators that will run on `device`.

    cost: "measured" (times each different operator on `device`), "roofline" (the device table's row for `device`), a row of
        the table ("P100", "V100", "A100", "H100", "H200", "cpu"), or a CostModel, which is returned as it is.

    Raises CostError, listing what is allowed, for anything else.
    """
    if isinstance(cost, str):
        if cost == "measured":
            return MeasuredCost(device)
        if cost == "roofline":
            return RooflineCost(_row_for(device))
        if cost in DEVICE_NAMES:
            return RooflineCost(cost)
    elif isinstance(cost, CostModel):
        return cost
    raise CostError(f"unknown cost {cost!r}; allowed: 'measured', 'roofline', {', '.join(map(repr, DEVICE_NAMES))}, or a CostModel")


def _row_for(device: torch.device) -> str:
    """The table row of the device at hand; H100, with a warning, for a GPU that the table does not have."""
    if device.type != "cuda":
        return "cpu"
    name = torch.cuda.get_device_name(device) if torch.cuda.is_available() else "no GPU at hand"
    row = next((known for known in DEVICES if known in name), None)
    if row is None:
        log.warning("the device table has no row for %r; planning with H100's", name)
    return row or "H100"
