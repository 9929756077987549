"""ReLU and its kin: their backward asks on which side of the threshold an element lay, and one bit can say that.

Before a max pool not even that is needed. What the pool chose is what it gives out, and elements that it did not choose get no
gradient anyway; so the threshold can act on the gradient of the pool's output, and the pool hands on what is left. That is only
better where the backward reads the pool's output anyway, as a convolution does.
"""

from __future__ import annotations

import functools
import operator

import torch
from torch import fx

from ..graph_meta import is_backward, readers
from .base import CODE, Call, Choice, Rewrite, register_implementation
from .bits import empty_bits, empty_values, keep_where, merge, pack, pack_above, pack_workspace, unpack_workspace
from .operators import alike, define, define_inplace, is_exact

aten = torch.ops.aten
POOLS = {
    aten.max_pool2d_with_indices_backward.default, aten.adaptive_max_pool2d_backward.default,
    aten.max_pool3d_with_indices_backward.default, aten.adaptive_max_pool3d_backward.default,
}  # fmt: skip


@register_implementation("relu_bits", aten.threshold_backward.default)
def relu_bits(node: fx.Node) -> Choice | None:
    """A bit for each element of the output."""
    gradient, result, threshold = node.args
    value = result.meta["val"]
    if not alike(gradient.meta["val"], value) or not is_exact(value.dtype, threshold):
        return None
    stride = list(result.meta["val"].stride())
    return Choice(encode=Call(pack_above, (result, stride, threshold)), backward=Call(keep_where, (gradient, CODE, stride)))


@register_implementation("relu_input", aten.threshold_backward.default)
def relu_input(node: fx.Node) -> Choice | None:
    """The input, where something else keeps it: it is above zero where the output is."""
    gradient, result, threshold = node.args
    if result.target is not aten.relu.default or threshold != 0:
        return None
    return Choice(backward=Call(node.target, (gradient, result.args[0], threshold)))


@register_implementation("relu_pooled", aten.threshold_backward.default)
def relu_pooled(node: fx.Node) -> Rewrite | None:
    """The output of the max pool behind it, where something else keeps it: the gradient is cut before it passes the pool."""
    pool, result, threshold = node.args
    if not isinstance(pool, fx.Node) or pool.target not in POOLS or pool.args[1] is not result or len(pool.users) > 1:
        return None
    gradient, indices = pool.args[0], pool.args[-1]
    forward = indices.args[0] if indices.target is operator.getitem else None
    pooled = next((u for u in forward.users if u.args[1] == 0), None) if forward else None
    if pooled is None or not any(map(is_backward, readers(pooled))):
        return None
    if not alike(gradient.meta["val"], pooled.meta["val"]) or not alike(pool.meta["val"], node.meta["val"]):
        return None
    cut = Call(node.target, (gradient, pooled, threshold))
    return Rewrite({pool: cut, node: Call(pool.target, (pool, *pool.args[1:]), dict(pool.kwargs))})


@register_implementation("leaky_relu_bits", aten.leaky_relu_backward.default)
def leaky_relu_bits(node: fx.Node) -> Choice | None:
    """A bit for each element, positive or not."""
    gradient, x, slope = node.args[:3]
    if not alike(gradient.meta["val"], x.meta["val"]):
        return None
    stride = list(x.meta["val"].stride())
    return Choice(encode=Call(pack_positive, (x, stride)), backward=Call(scale_elsewhere, (gradient, CODE, stride, slope)))


@register_implementation("leaky_relu_output", aten.leaky_relu_backward.default)
def leaky_relu_output(node: fx.Node) -> Choice | None:
    """The output, where something else keeps it: with a slope above zero it has the input's sign."""
    gradient, x, slope, is_result = node.args
    result = next((u for u in x.users if u.target is aten.leaky_relu.default and (u.args[1:] or (0.01,)) == (slope,)), None)
    if result is None or is_result or slope <= 0:
        return None
    return Choice(backward=Call(node.target, (gradient, result, slope, True)))


def _pack_positive(x: torch.Tensor, stride: list[int]) -> torch.Tensor:
    return pack(x, stride, lambda piece: torch.gt(piece, 0))


def _scale_elsewhere(
    values: torch.Tensor, bits: torch.Tensor, stride: list[int], scale: float, inplace: bool = False
) -> torch.Tensor:
    """Values where the bit is set, else values times scale."""
    combine = aten.leaky_relu_backward.grad_input
    return merge(values, bits, stride, lambda mask, piece, out: combine(piece, mask, scale, False, grad_input=out), inplace)


pack_positive = define(
    "pack_positive(Tensor x, int[] stride) -> Tensor",
    _pack_positive,
    empty_bits,
    pack_workspace,
)
scale_elsewhere = define(
    "scale_elsewhere(Tensor values, Tensor bits, int[] stride, float scale) -> Tensor",
    _scale_elsewhere,
    empty_values,
    unpack_workspace,
)
define_inplace(
    scale_elsewhere,
    "scale_elsewhere_(Tensor(a!) values, Tensor bits, int[] stride, float scale) -> Tensor(a!)",
    functools.partial(_scale_elsewhere, inplace=True),
)
