"""Seconds and workspace of every node, from a cost model."""

from __future__ import annotations

import torch
from torch import fx

from ..codegen.operators import dropout_apply
from ..cost import CostModel, OpCost, checked_cost
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
            cost = OpCost(0.0, 0) if is_view(node, infos) else checked_cost(self.model, node)
            if _has_kept_mask(node):
                node.meta["fxmem_variant_cost"] = self._dropout_from_mask(node)
            node.meta["fxmem_time_s"] = cost.time_s
            node.meta["fxmem_workspace_bytes"] = cost.workspace_bytes
        return False

    def _dropout_from_mask(self, node: fx.Node) -> OpCost:
        """Cost of running a dropout again from its mask: that of a node that is in no graph yet."""
        graph = fx.Graph()
        value, mask = graph.placeholder("value"), graph.placeholder("mask")
        value.meta["val"], (result, mask.meta["val"]) = node.args[0].meta["val"], node.meta["val"]
        again = graph.call_function(dropout_apply, (value, mask, 1 / (1 - node.args[1])))
        again.meta["val"] = result
        return checked_cost(self.model, again)


def _has_kept_mask(node: fx.Node) -> bool:
    """Whether the node is a forward dropout that draws a mask, which somebody reads: the backward, but for an input that needs
    no gradient."""
    if node.target is not NATIVE_DROPOUT or is_backward(node):
        return False
    return node.args[2] is not False and 0 < node.args[1] < 1 and any(u.args[1] == 1 for u in node.users)
