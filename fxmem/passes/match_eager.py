"""Small rewrites that make the joint graph compute bit for bit what the plain module computes."""

from __future__ import annotations

import torch
from torch import fx

from ..codegen.operators import dropout_apply
from .base import Pass

aten = torch.ops.aten


class MatchEager(Pass):
    """On the CPU the plain module's dropout multiplies by noise forward and backward alike, whereas the traced
    `native_dropout_backward` rounds differently in half precision (and copies the mask into the gradient's type).

    Batch norm's backward in training is handed the new running statistics, which it never reads: it is not handed them.
    """

    def apply(self, graph_module: fx.GraphModule) -> bool:
        norms = [n for n in graph_module.graph.nodes if n.target is aten.native_batch_norm_backward.default and n.args[7] is True]
        for node in norms:
            node.args = (*node.args[:3], None, None, *node.args[5:])
        return self._same_dropout(graph_module) or bool(norms)

    def _same_dropout(self, graph_module: fx.GraphModule) -> bool:
        found = [
            n
            for n in graph_module.graph.nodes
            if n.target is aten.native_dropout_backward.default and n.args[0].meta["val"].device.type == "cpu"
        ]
        for node in found:
            with graph_module.graph.inserting_before(node):
                grad, mask, scale = node.args
                replacement = graph_module.graph.call_function(dropout_apply, (grad, mask, scale))
            replacement.meta = dict(node.meta)
            node.replace_all_uses_with(replacement)
            graph_module.graph.erase_node(node)
        return bool(found)
