"""Seconds and workspace of every node, from a cost model."""

from __future__ import annotations

import math

from torch import fx

from ..cost import CostModel
from ..errors import CostError
from .base import Pass, require
from .shape_prop import is_view


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
                    f"the cost model {self.model.name!r} gives node {node.name!r} {time_s!r} s and {workspace_bytes!r} bytes of "
                    "workspace; both must be finite and zero or more"
                )
            node.meta["fxmem_time_s"] = time_s
            node.meta["fxmem_workspace_bytes"] = workspace_bytes
        return False
