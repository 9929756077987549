"""Hardtanh and ReLU6: their backward asks whether an element lay inside of the interval."""

from __future__ import annotations

import torch
from torch import fx

from .base import CODE, Call, Choice, register_implementation
from .bits import empty_bits, keep_where, pack, pack_workspace
from .operators import alike, define, is_exact

aten = torch.ops.aten


@register_implementation("hardtanh_bits", aten.hardtanh_backward.default)
def hardtanh_bits(node: fx.Node) -> Choice | None:
    """A bit for each element, inside or not."""
    gradient, x, low, high = node.args
    value = x.meta["val"]
    if not alike(gradient.meta["val"], value) or not is_exact(value.dtype, low, high):
        return None
    stride = list(x.meta["val"].stride())
    return Choice(encode=Call(pack_inside, (x, stride, low, high)), backward=Call(keep_where, (gradient, CODE, stride)))


@register_implementation("hardtanh_output", aten.hardtanh_backward.default)
def hardtanh_output(node: fx.Node) -> Choice | None:
    """The output, where something else keeps it: it lies inside where the input does."""
    gradient, x, low, high = node.args
    original = x.args[0] if x.target is aten.clone.default else x  # the in-place form keeps a copy
    result = next((u for u in original.users if u.target is aten.hardtanh.default and u.args[1:] == (low, high)), None)
    if result is None or not is_exact(x.meta["val"].dtype, low, high) or result.meta["val"].stride() != x.meta["val"].stride():
        return None
    return Choice(backward=Call(node.target, (gradient, result, low, high)))


def _pack_inside(x: torch.Tensor, stride: list[int], low: float, high: float) -> torch.Tensor:
    """1 where low < x < high. NaN: as in `hardtanh_backward`, whose vectors on the CPU count it as outside (the few elements
    beyond the last vector do not), whereas CUDA counts it as inside."""
    if x.device.type == "cpu":
        return pack(x, stride, lambda piece: torch.gt(piece, low).logical_and_(torch.lt(piece, high)))
    return pack(x, stride, lambda piece: torch.le(piece, low).logical_or_(torch.ge(piece, high)), inverted=True)


pack_inside = define(
    "pack_inside(Tensor x, int[] stride, Scalar low, Scalar high) -> Tensor",
    _pack_inside,
    empty_bits,
    pack_workspace,
)
