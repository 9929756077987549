"""Seconds and workspace of every node, from a cost model."""

from __future__ import annotations

import math

import torch
from torch import fx

from ..codegen.operators import dropout_apply
from ..cost import CostModel, OpCost
from ..errors import CostError
from ..graph_meta import is_backward, is_view, require
from .base import Pass

NATIVE_DROPOUT = torch.ops.aten.native_dropout.default


class Costs(Pass):
    """Annotates every call_function node with `meta["fxmem_time_s"]` and `meta["fxmem_workspace_bytes"]`; views cost nothing.

    Raises CostError, naming the node, where the model gives what is no cost. Needs ShapeProp.
    """

    def __init__(self, model: CostModel):
        super().__init__()
        self.model = model

    def apply(self, graph_module: fx.GraphModule) -> bool:
        require(graph_module, "fxmem_storages", "ShapeProp")
        infos = graph_module.meta["fxmem_storages"]
        for node in graph_module.graph.nodes:
            if node.op != "call_function":
                continue
            time_s, workspace_bytes = 0.0, 0
            if not is_view(node, infos):
                cost = self.model.cost(node)
                time_s, workspace_bytes = cost.time_s, cost.workspace_bytes
            if not math.isfinite(time_s) or time_s < 0 or workspace_bytes < 0:
                raise CostError(
                    f"the cost model {self.model.name!r} gives node {node.name!r} {time_s!r} s and "
                    f"{workspace_bytes!r} bytes of "
                    "workspace; both must be finite and zero or more"
                )
            if _has_kept_mask(node):
                node.meta["fxmem_variant_cost"] = self._dropout_from_mask(node)
            node.meta["fxmem_time_s"] = time_s
            node.meta["fxmem_workspace_bytes"] = workspace_bytes
        return False

    def _dropout_from_mask(self, node: fx.Node) -> OpCost:
        """Cost of running a dropout again from its mask: that of a node that is in no graph yet."""
        graph = fx.Graph()
        value, mask = graph.placeholder("value"), graph.placeholder("mask")
        value.meta["val"], (result, mask.meta["val"]) = node.args[0].meta["val"], node.meta["val"]
        again = graph.call_function(dropout_apply, (value, mask, 1 / (1 - node.args[1])))
        again.meta["val"] = result
        return self.model.cost(again)


def _has_kept_mask(node: fx.Node) -> bool:
    """Whether the node is a forward dropout that draws a mask."""
    return node.target is NATIVE_DROPOUT and not is_backward(node) and node.args[2] is not False and 0 < node.args[1] < 1
