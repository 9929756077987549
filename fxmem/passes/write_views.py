"""Writes into views as the plain module does them: without a copy of all that lies in the same storage."""

from __future__ import annotations

import torch
from torch import fx

from ..codegen.operators import SCATTERS, as_strided_scatter, laid_out
from .base import Pass, made_like

aten = torch.ops.aten
COPY = aten.copy.default


class WriteViews(Pass):
    """`view.copy_(value)` is traced as `copy(view, value)`, and that scattered into the base. Both operators of aten's clone
    the whole storage of their first operand, whatever part of it that is: of a view, all that it is a view of, and in an arena
    all of the arena.

    `copy` reads nothing of the view but its layout: what is scattered is `value` itself, in the view's shape and type, and who
    else reads the copy gets one that lies like the view (see `laid_out`). Scatters are fxmem's own, which clone their operand.
    """

    def apply(self, graph_module: fx.GraphModule) -> bool:
        graph = graph_module.graph
        copies = graph.find_nodes(op="call_function", target=COPY)
        for node in copies:
            self._inline(graph, node)
        scatters = [node for node in graph.nodes if node.target in SCATTERS]
        for node in scatters:
            node.target = SCATTERS[node.target]
            if node.target is as_strided_scatter and node.args[4:] not in ((), (None,)):
                # counted from the start of the operand's storage, which is another one when it runs
                node.args = (*node.args[:4], node.args[4] - node.args[0].meta["val"].storage_offset())
            elif node.target is as_strided_scatter:
                node.args = node.args[:4]
        return bool(copies or scatters)

    def _inline(self, graph: fx.Graph, node: fx.Node) -> None:
        made, value = node.meta["val"], node.args[1]
        read_as_it_lies = [user for user in node.users if user.target not in SCATTERS or user.args[0] is node]
        with graph.inserting_before(node):
            if read_as_it_lies:
                args = value, list(made.shape), list(made.stride())
                copied = made_like(node, laid_out, args, {"dtype": made.dtype})
                for user in read_as_it_lies:
                    user.replace_input_with(node, copied)
            if node.users and value.meta["val"].dtype != made.dtype:
                value = made_like(node, aten._to_copy.default, (value,), {"dtype": made.dtype})
            if node.users and value.meta["val"].shape != made.shape:
                value = made_like(node, aten.expand.default, (value, list(made.shape)))
        node.replace_all_uses_with(value)
        graph.erase_node(node)
