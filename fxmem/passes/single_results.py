"""Batch norms that move no statistics as operators with one result, which can run in place."""

from __future__ import annotations

import torch
from torch import fx

from ..outforms import normalize
from .base import Pass

NORM = torch.ops.aten._native_batch_norm_legit_no_training.default


class SingleResults(Pass):
    """Replaces each batch norm of inference, whose other results are empty, by `fxmem::normalize`; on the CPU, where that may
    write over its operand."""

    def apply(self, graph_module: fx.GraphModule) -> bool:
        graph = graph_module.graph
        found = [n for n in graph.find_nodes(op="call_function", target=NORM) if n.args[0].meta["val"].device.type == "cpu"]
        found = [n for n in found if all(item.args[1] == 0 for item in n.users)]
        for node in found:
            x, weight, bias, mean, variance, _, eps = node.args
            with graph.inserting_before(node):
                made = graph.create_node("call_function", normalize, (x, weight, bias, mean, variance, eps), {}, node.name)
            made.meta = node.meta | {"val": node.meta["val"][0]}
            for item in list(node.users):
                item.replace_all_uses_with(made)
                graph.erase_node(item)
            graph.erase_node(node)
        return bool(found)
