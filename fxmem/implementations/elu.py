"""ELU, SELU and CELU: their derivative can be had from the output as well, in other roundings."""

from __future__ import annotations

import torch
from torch import fx

from .base import Call, Choice, register_implementation

aten = torch.ops.aten
FORWARDS = (aten.elu.default, aten.celu.default)


@register_implementation("elu_output", aten.elu_backward.default, exactness="accurate")
def elu_output(node: fx.Node) -> Choice | None:
    """The output, where something else keeps it: where it is negative, the derivative is it plus a constant."""
    gradient, alpha, scale, input_scale, is_result, x = node.args
    result = next((u for u in x.users if u.target in FORWARDS and _numbers(u) == (alpha, scale, input_scale)), None)
    if (
        is_result
        or result is None
        or min(alpha, scale, input_scale) < 0
        or result.meta["val"].stride() != x.meta["val"].stride()
    ):
        return None
    return Choice(backward=Call(node.target, (gradient, alpha, scale, input_scale, True, result)))


def _numbers(node: fx.Node) -> tuple[float, float, float]:
    """alpha, scale and input_scale of a forward node."""
    alpha, scale, input_scale = (*node.args[1:], *(1, 1, 1)[len(node.args) - 1 :])
    return (alpha, 1, 1 / alpha) if node.target is aten.celu.default else (alpha, scale, input_scale)
