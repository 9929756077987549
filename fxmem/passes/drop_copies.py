"""Copies that tracing brings in and the plain module does not make."""

from __future__ import annotations

import torch
from torch import fx

from ..graph_meta import require
from .base import Pass

CLONE = torch.ops.aten.clone.default


class DropCopies(Pass):
    """Takes out each `clone` of a value that the graph computes where original and copy lie in memory alike and nobody outside
    sees the copy: a dropout that is off leaves one. For graphs of a forward alone, in which nothing computed is written to.
    Needs ShapeProp."""

    def apply(self, graph_module: fx.GraphModule) -> bool:
        require(graph_module, "fxmem_storages", "ShapeProp")
        graph, infos = graph_module.graph, graph_module.meta["fxmem_storages"]
        returned = {s for n in graph.output_node().all_input_nodes for s in n.meta["fxmem_storages"]}
        found = []
        for node in graph.find_nodes(op="call_function", target=CLONE):
            value, original = node.meta["val"], node.args[0]
            computed = not any(infos[s].is_input for s in original.meta["fxmem_storages"])
            if computed and not returned & set(node.meta["fxmem_storages"]) and value.stride() == original.meta["val"].stride():
                found.append(node)
        for node in found:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        return bool(found)
