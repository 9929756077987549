"""Autocast's cache, which tracing has to do without."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import fx

from ..torch_internals import ENTER_AUTOCAST, EXIT_AUTOCAST
from .base import Pass, made_like

aten = torch.ops.aten
CAST, ADD = aten._to_copy.default, aten.add.Tensor
LOW_PRECISION = (torch.bfloat16, torch.float16)
CASTING = ("to", "type", "bfloat16", "half")


class MergeCasts(Pass):
    """Under autocast the plain module casts a parameter once for all its uses, and sums up their gradients in the lower
    precision before it casts the sum back; tracing casts for each use, and sums up after it has cast back. Here the casts of
    each parameter become one, and so do those of its gradients, in the order in which autograd adds.
    """

    def apply(self, graph_module: fx.GraphModule) -> bool:
        graph, output = graph_module.graph, graph_module.graph.output_node()
        parameters = {n.meta["fxmem_role"]: n for n in graph.find_nodes(op="placeholder") if "fxmem_role" in n.meta}
        modified = False
        for place, role in enumerate(output.meta.get("fxmem_roles", ())):
            if role.kind == "gradient" and role.key.kind == "parameter":
                for casts in _casts_of(parameters[role.key]):
                    modified |= self._merge(graph, casts, output.args[0][place])
        return modified

    def _merge(self, graph: fx.Graph, casts: list[fx.Node], gradient: fx.Node) -> bool:
        terms, numbers = _terms(gradient), {cast.meta.get("seq_nr") for cast in casts}  # autograd's, of forward and backward
        cast_back = [t for t in terms if t.target is CAST and t.meta.get("seq_nr") in numbers]
        if len(cast_back) != len(casts) or any(len(t.users) > 1 for t in cast_back):
            return False
        for cast in casts[1:]:
            cast.replace_all_uses_with(casts[0])
            graph.erase_node(cast)
        last = cast_back[-1]
        with graph.inserting_before(last):
            last.replace_input_with(last.args[0], _sum([t.args[0] for t in cast_back], gradient))
        with graph.inserting_before(gradient):
            total = _sum([t for t in terms if t is last or t not in cast_back], gradient)
        gradient.replace_all_uses_with(total)
        for node in _additions(gradient):
            graph.erase_node(node)
        for node in cast_back[:-1]:
            graph.erase_node(node)
        return True


def keeps_casts(torch_level: fx.GraphModule) -> bool:
    """Whether one cache of casts lives through a module's forward: autocast is in force around it, or once inside. A module
    that casts parameters by itself, which no cache knows of, is left as it is traced."""
    depth = entered = 0
    for node in torch_level.graph.nodes:
        if node.op == "call_method" and node.target in CASTING and node.args[0].op == "get_attr":
            return False
        if node.target is ENTER_AUTOCAST:
            entered += depth == 0 and node.args[2] is not False
            depth += 1
        depth -= node.target is EXIT_AUTOCAST
    around = any(map(torch.is_autocast_enabled, ("cpu", "cuda")))
    return torch.is_autocast_cache_enabled() and (around or entered == 1)


def _casts_of(parameter: fx.Node) -> Iterable[list[fx.Node]]:
    """The casts of a parameter to each lower precision, in their order, where there are several."""
    for dtype in LOW_PRECISION:
        casts = sorted(n for n in parameter.users if n.target is CAST and n.meta["val"].dtype == dtype)
        if parameter.meta["val"].dtype is torch.float32 and len(casts) > 1:
            yield casts


def _additions(gradient: fx.Node) -> list[fx.Node]:
    """The additions by which autograd summed up a gradient, the last one first."""
    found, node = [], gradient
    while node.target is ADD and not node.kwargs and all(isinstance(a, fx.Node) for a in node.args):
        if found and len(node.users) > 1:
            break
        found.append(node)
        node = node.args[0]
    return found


def _terms(gradient: fx.Node) -> list[fx.Node]:
    """What autograd summed up, in the order in which it came."""
    additions = _additions(gradient)
    return [additions[-1].args[0], *(node.args[1] for node in reversed(additions))] if additions else [gradient]


def _sum(terms: list[fx.Node], like: fx.Node) -> fx.Node:
    total = terms[0]
    for term in terms[1:]:
        total = made_like(like, ADD, (total, term))
    return total
