"""Small rewrites that make the joint graph compute bit for bit what the plain module computes."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ..codegen.operators import bernoulli, dropout_apply, in_format_of, in_kernel_format, laid_out
from ..kernel_strides import LAID_ANEW
from .base import Pass, fake_result, layouts, made_like

aten = torch.ops.aten
NATIVE_DROPOUT = aten.native_dropout.default
GRU_CELLS = (torch.nn.GRUCell, torch.gru_cell)
GROUP_NORMS = (aten.native_group_norm.default, aten.native_group_norm_backward.default)


class MatchEager(Pass):
    """On the CPU the plain module's dropout multiplies by noise forward and backward alike, whereas the traced
    `native_dropout_backward` rounds differently in half precision (and copies the mask into the gradient's type).

    A dropout of everything draws nothing in the plain module, where the traced one draws its mask.

    Batch norm's backward in training is handed the new running statistics, which it never reads: it is not handed them.
    Group norm reads the memory format off the strides, also off those of dimensions of size one, which fake operators choose
    differently: it checks again when it runs.

    `bernoulli_` (in `Dropout(inplace=True)` and `AlphaDropout`, say) draws in the order in which its tensor lies in memory; the
    traced `bernoulli` draws for a contiguous one.

    What is computed in place stays as it lies, where the same operator's kernel would lay out a new tensor otherwise.

    A GRU's cell computes its gates in place, where all of them lie side by side. What of a row is left over when vectors are
    full is rounded otherwise, so they are laid out as far apart here, too.
    """

    def apply(self, graph_module: fx.GraphModule) -> bool:
        norms = [
            n for n in graph_module.graph.nodes if n.target is aten.native_batch_norm_backward.default and n.args[7] is True
        ]
        for node in norms:
            node.args = (*node.args[:3], None, None, *node.args[5:])
        modified = self._same_dropout(graph_module) or bool(norms)
        modified = self._no_draws(graph_module) or modified
        modified = self._same_gates(graph_module) or modified
        modified = self._same_order_of_draws(graph_module) or modified
        modified = self._same_layout_in_place(graph_module) or modified
        return self._same_formats(graph_module) or modified

    def _same_gates(self, graph_module: fx.GraphModule) -> bool:
        graph = graph_module.graph
        modified = False
        for node in filter(_is_of_gru_cell, graph.find_nodes(op="call_function", target=aten.sigmoid.default)):
            gate = node.args[0]
            value, among = gate.meta["val"], gate.args[0].meta["val"]
            if value.device.type != "cpu" or value.stride() == among.stride():
                continue
            with graph.inserting_before(node):
                apart = made_like(node, laid_out, (gate, list(value.shape), list(among.stride())), {"dtype": value.dtype})
            node.replace_input_with(gate, apart)
            modified = True
        return modified

    def _same_order_of_draws(self, graph_module: fx.GraphModule) -> bool:
        found = [
            node
            for node in graph_module.graph.find_nodes(op="call_function", target=aten.bernoulli.p)
            if not node.args[0].meta["val"].is_contiguous()
        ]
        for node in found:
            if _caller(node) is torch.bernoulli:  # which does draw for a contiguous one
                self._lay_out(node)
            else:
                node.target, node.args, node.kwargs = bernoulli, node.args[:2] if node.args[1:] else (node.args[0], 0.5), {}
        return bool(found)

    def _same_layout_in_place(self, graph_module: fx.GraphModule) -> bool:
        found = [n for n in graph_module.graph.nodes if getattr(n.target, "overloadpacket", None) in LAID_ANEW]
        found = [n for n in found if layouts(fake_result(n.target, n.args, n.kwargs)) != layouts(n.meta["val"])]
        for node in found:
            self._lay_out(node)
        return bool(found)

    def _lay_out(self, node: fx.Node) -> None:
        """Hand on what a node makes as it was traced, whatever strides its kernel gives it."""
        value = node.meta["val"]
        with node.graph.inserting_after(node):
            how = list(value.shape), list(value.stride())
            made = made_like(node, laid_out, (node, *how), {"dtype": value.dtype})
        node.replace_all_uses_with(made, delete_user_cb=lambda user: user is not made)

    def _same_formats(self, graph_module: fx.GraphModule) -> bool:
        found = [
            (node, value)
            for node in graph_module.graph.nodes
            if node.target in GROUP_NORMS
            for value in node.all_input_nodes
            if value.meta["val"].dim() > 2 and 1 in value.meta["val"].shape
        ]
        for node, value in found:
            is_gradient = node.target is GROUP_NORMS[1] and value is node.args[0]
            with graph_module.graph.inserting_before(node):
                target, read = (in_format_of, (value, node.args[1])) if is_gradient else (in_kernel_format, (value,))
                formatted = graph_module.graph.call_function(target, read)
            formatted.meta = node.meta | {"val": value.meta["val"]}
            node.replace_input_with(value, formatted)
        return bool(found)

    def _no_draws(self, graph_module: fx.GraphModule) -> bool:
        """A dropout that drops everything multiplies by zero and draws nothing, whereas `native_dropout` draws its mask."""
        graph = graph_module.graph
        found = [
            n for n in graph.find_nodes(op="call_function", target=NATIVE_DROPOUT) if n.args[1] == 1 and n.args[2] is not False
        ]
        for node in found:
            with graph.inserting_before(node):
                nothing = graph.call_function(aten.mul.Scalar, (node.args[0], 0))
                mask = graph.call_function(aten.zeros_like.default, (node.args[0],), {"dtype": torch.bool})
            for made, value in zip((nothing, mask), node.meta["val"], strict=True):
                made.meta = node.meta | {"val": value}
            for item in list(node.users):
                item.replace_all_uses_with((nothing, mask)[item.args[1]])
                graph.erase_node(item)
            graph.erase_node(node)
        return bool(found)

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


def _is_of_gru_cell(node: fx.Node) -> bool:
    """Whether a sum of gates is its operand, in a layer of PyTorch's or in what that calls."""
    return _caller(node) in GRU_CELLS and node.args[0].target is aten.add.Tensor


def _caller(node: fx.Node) -> Any:
    """The layer or function of PyTorch's that a node is a part of."""
    callers = [caller for _, caller in node.meta.get("source_fn_stack") or ()]
    return callers[-1] if callers else None
