"""The backward of a convolution as two operators: gradients of weight and bias first, then that of the input.

Its kernels are two anyway. Apart, the input dies before its gradient is made, which is what a deep convolutional network's
least peak consists of (MONeT, Shah et al. 2021, has them apart too).
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from ..implementations.convolution import INPUT_ALONE
from .base import Pass

CONVOLUTION_BACKWARD = torch.ops.aten.convolution_backward.default


class SplitConvolutions(Pass):
    """Splits every `convolution_backward` that makes the input's and the weight's gradient."""

    def apply(self, graph_module: fx.GraphModule) -> bool:
        nodes = graph_module.graph.find_nodes(op="call_function", target=CONVOLUTION_BACKWARD)
        both = [n for n in nodes if n.args[10][0] and n.args[10][1]]
        for node in both:
            _split(graph_module.graph, node)
        return bool(both)


def _split(graph: fx.Graph, node: fx.Node) -> None:
    with graph.inserting_before(node):
        parameters = graph.call_function(CONVOLUTION_BACKWARD, (*node.args[:10], [False, *node.args[10][1:]]))
    parameters.meta = dict(node.meta)
    node.args = (*node.args[:10], INPUT_ALONE)
    if "val" in node.meta:
        made = node.meta["val"]
        parameters.meta["val"], node.meta["val"] = (None, *made[1:]), (made[0], None, None)
    for item in [u for u in node.users if u.target is operator.getitem and u.args[1] > 0]:
        item.args = (parameters, item.args[1])
        parameters.append(item)
