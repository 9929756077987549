"""Copies that stand for nothing: the traced graph writes to no value, so that a copy and its original stay equal."""

from __future__ import annotations

import torch
from torch import fx

from ..graph_meta import makes_view, readers
from .base import Pass, layouts

aten = torch.ops.aten


class MergeCopies(Pass):
    """Replaces a clone, or a concatenation of a single tensor (as dense blocks begin with), by its original where that lies in
    memory alike. What a caller gives or gets stays apart: inputs, and results of the step."""

    def apply(self, graph_module: fx.GraphModule) -> bool:
        graph, before = graph_module.graph, len(graph_module.graph.nodes)
        for node in graph.nodes:  # a copy of a copy sees what has become of that
            original = _original(node)
            if original is not None:
                node.replace_all_uses_with(original)
                graph.erase_node(node)
        return len(graph.nodes) < before


def _original(node: fx.Node) -> fx.Node | None:
    """What a node makes nothing but a copy of."""
    is_copy = node.target is aten.clone.default or (node.target is aten.cat.default and len(node.args[0]) == 1)
    if not is_copy:
        return None
    (original,) = node.all_input_nodes
    alike = layouts(node.meta["val"]) == layouts(original.meta["val"])
    return original if alike and not _is_visible(node) and not _is_visible(original) else None


def _is_visible(node: fx.Node) -> bool:
    """Whether the caller may see the bytes of a value: it is, or shows, an input or a result."""
    while makes_view(node):
        node = node.all_input_nodes[0]
    return node.op != "call_function" or any(reader.op == "output" for reader in readers(node))
