"""Gradients in storages of their own, laid out as autograd wants them, so that autograd takes them as they are."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ..graph_meta import StorageInfo, is_backward, require, rounded
from ..layouts import gradient_layout, lies_as, span
from .base import Pass, made_like

aten = torch.ops.aten


class OwnGradients(Pass):
    """Copies a gradient that shows bytes of an incoming gradient, of an input or of another gradient, or that lies in memory
    otherwise than its parameter (as `torch.autograd`'s gradient layout contract has it). What is handed over becomes `.grad`,
    into which later steps add. Needs ShapeProp and the roles that `fxmem.capture` leaves."""

    def apply(self, graph_module: fx.GraphModule) -> bool:
        require(graph_module, "fxmem_storages", "ShapeProp")
        graph, infos = graph_module.graph, graph_module.meta["fxmem_storages"]
        output = graph.output_node()
        placeholders = {n.meta.get("fxmem_role"): n for n in graph.nodes if n.op == "placeholder"}
        values, given = list(output.args[0]), []
        for i, role in enumerate(output.meta.get("fxmem_roles", ())):
            if role.kind != "gradient":
                continue
            value, layout = values[i], gradient_layout(placeholders[role.key].meta["val"])
            shown = any(infos[s].is_input for s in value.meta["fxmem_storages"]) or any(_overlap(value, g) for g in given)
            if shown or not lies_as(value.meta["val"], layout):
                values[i] = _copy(graph_module, value, layout)
            given.append(values[i])
        modified = values != list(output.args[0])
        output.args = (tuple(values),)
        return modified


def _overlap(value: fx.Node, other: fx.Node) -> bool:
    """Whether two gradients show the same bytes of one storage."""
    if not set(value.meta["fxmem_storages"]) & set(other.meta["fxmem_storages"]):
        return False
    (a, b), (c, d) = span(value.meta["val"]), span(other.meta["val"])
    return a < d and c < b


def _copy(graph_module: fx.GraphModule, value: fx.Node, layout: tuple[int, ...]) -> fx.Node:
    """A copy with the strides `layout` of a dense tensor: contiguous in the order of its dimensions in memory."""
    graph = graph_module.graph
    backward = (n for n in graph.nodes if n.op == "call_function" and is_backward(n))
    before = next(backward, graph.output_node()) if value.op == "placeholder" else value.next
    order = sorted(range(len(layout)), key=lambda d: -layout[d])
    moved = order != sorted(order)
    with graph.inserting_before(before):
        ordered = _call(aten.permute.default, value, order) if moved else value
        copied = _call(aten.clone.default, ordered, memory_format=torch.contiguous_format)
        size_bytes = rounded(copied.meta["val"].untyped_storage().nbytes(), graph_module.meta["fxmem_alignment_bytes"])
        copied.meta["fxmem_storages"] = (len(graph_module.meta["fxmem_storages"]),)
        graph_module.meta["fxmem_storages"] += (StorageInfo(copied, size_bytes),)
        return _call(aten.permute.default, copied, _inverse(order)) if moved else copied


def _call(target: Any, value: fx.Node, *args: Any, **kwargs: Any) -> fx.Node:
    made = made_like(value, target, (value, *args), kwargs)
    made.meta["fxmem_backward"] = True
    made.meta.pop("fxmem_role", None)
    return made


def _inverse(order: list[int]) -> list[int]:
    return sorted(range(len(order)), key=order.__getitem__)
