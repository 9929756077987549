"""Names that say what is computed and where: `layer1_0_bn1_batch_norm_mean`, not `getitem_16`."""

from __future__ import annotations

import operator
import re

import torch
from torch import fx

from ..graph_meta import module_of
from ..torch_internals import rename_node
from .base import Pass

aten = torch.ops.aten
NORM, GRADIENTS = ("out", "mean", "rstd", "running_mean", "running_var"), ("grad_input", "grad_weight", "grad_bias")
RESULTS = {
    aten._native_batch_norm_legit_functional: NORM,
    aten.native_layer_norm: NORM,
    aten.native_group_norm: NORM,
    aten.native_batch_norm_backward: GRADIENTS,
    aten.native_layer_norm_backward: GRADIENTS,
    aten.native_group_norm_backward: GRADIENTS,
    aten.convolution_backward: GRADIENTS,
    aten.native_dropout: ("out", "mask"),
    aten.max_pool2d_with_indices: ("out", "indices"),
    aten.nll_loss_forward: ("loss", "total_weight"),
}


class NameNodes(Pass):
    """Renames parameters and inputs of a captured joint graph after their roles, operators after their module and what they
    compute, and results of a tuple after what they are."""

    def apply(self, graph_module: fx.GraphModule) -> bool:
        for node in graph_module.graph.nodes:
            name = _role_name(node) if node.op == "placeholder" else _operator_name(node)
            if name:
                rename_node(node, re.sub(r"\W", "_", name))
        return True


def _role_name(node: fx.Node) -> str:
    role = node.meta.get("fxmem_role")
    if role is None:
        return ""
    return {"input": "input_{}", "tangent": "grad_output_{}"}.get(role.kind, "{}").format(role.key)


def _operator_name(node: fx.Node) -> str:
    if node.op != "call_function":
        return ""
    if node.target is operator.getitem:
        source, index = node.args
        names = RESULTS.get(getattr(source.target, "overloadpacket", None), ())
        return f"{source.name}_{names[index] if isinstance(index, int) and index < len(names) else index}"
    operation = getattr(node.target, "_opname", None) or node.target.__name__
    operation = operation.strip("_").removeprefix("native_").removesuffix("_legit_functional").removesuffix("_default")
    return "_".join(part for part in (module_of(node).replace(".", "_"), operation) if part)
