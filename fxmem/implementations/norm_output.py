"""Norms without weights: their output is the normalized input, which is all that their backward reads of it.

A norm with weights would have to divide by them, and where one of them is near zero nothing is left to divide (residual blocks
often begin with weights of zero): no error bound holds there. For those, the output is made again from input and statistics,
which costs as much, keeps as much, and is exact (`batch_norm_statistics`, or a plain recompute).
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from ..cost.base import OpCall
from ..cost.workspace import workspace_bytes
from ..graph_meta import result_of
from .base import Call, Choice, register_implementation
from .operators import alike, define

aten = torch.ops.aten
RESULT = [True, False, False]


@register_implementation("layer_norm_output", aten.native_layer_norm_backward.default, exactness="accurate")
def layer_norm_output(node: fx.Node) -> Choice | None:
    """The output, where there are no weights: it is the normalized input."""
    shape, rstd = node.args[2], node.args[4]
    return _from_output(node, rstd, slice(2, 4), layer_norm_from_output, list(shape))


@register_implementation("group_norm_output", aten.native_group_norm_backward.default, exactness="accurate")
def group_norm_output(node: fx.Node) -> Choice | None:
    """The output, where there are no weights: it is the normalized input."""
    return _from_output(node, node.args[3], slice(1, 3), group_norm_from_output, *node.args[5:9])


@register_implementation("batch_norm_output", aten.native_batch_norm_backward.default, exactness="accurate")
def batch_norm_output(node: fx.Node) -> Choice | None:
    """The output, where there are no weights: it is the normalized input."""
    rstd, training = node.args[6:8]
    return _from_output(node, rstd, slice(1, 3), batch_norm_from_output) if training else None


def _from_output(node: fx.Node, rstd: fx.Node, affine: slice, target, *args) -> Choice | None:
    """`target` of the gradient, the norm's output and its inverse deviation. affine: where the forward has weight and bias; the
    backward does not know of a bias."""
    forward = rstd.args[0] if isinstance(rstd, fx.Node) and rstd.target is operator.getitem else None
    item = result_of(node, 0)
    if forward is None or item is None or any(a is not None for a in forward.args[affine]):
        return None
    result = result_of(forward, 0)
    if result is None or not alike(*(n.meta["val"] for n in (node.args[0], result, item))) or not result.meta["val"].numel():
        return None
    return Choice(backward=Call(target, (node.args[0], result, rstd, *args)), result=item)


def _neutral(rstd: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Statistics of what is normalized already."""
    return torch.zeros_like(rstd), torch.ones_like(rstd)


def _layer_call(gradient, result, rstd, shape) -> OpCall:
    args = (gradient, result, shape, *_neutral(rstd), None, None, RESULT)
    return OpCall(aten.native_layer_norm_backward.default, args)


def _group_call(gradient, result, rstd, images, channels, pixels, groups) -> OpCall:
    args = (gradient, result, *_neutral(rstd), None, images, channels, pixels, groups, RESULT)
    return OpCall(aten.native_group_norm_backward.default, args)


def _batch_call(gradient, result, rstd) -> OpCall:
    args = (gradient, result, None, None, None, *_neutral(rstd), True, 0.0, RESULT)
    return OpCall(aten.native_batch_norm_backward.default, args)


def _workspace(call: OpCall, plain: OpCall) -> int:
    """That of the plain backward, and two more statistics."""
    statistics = call.inputs[2]
    return workspace_bytes(OpCall(plain.target, plain.args, on_gpu=call.on_gpu)) + 2 * statistics.nbytes


def _define(name: str, more: str, plain, scale):
    """The plain backward of what is normalized already, times the inverse deviation, which is one there."""

    def kernel(gradient, result, rstd, *args):
        call = plain(gradient, result, rstd, *args)
        return scale(call.target(*call.args)[0], rstd, *args)

    return define(
        f"{name}(Tensor gradient, Tensor result, Tensor rstd{more}) -> Tensor",
        kernel,
        lambda gradient, result, *_: torch.empty_like(result),
        lambda call: _workspace(call, plain(*call.args)),
    )


def _scale_groups(made, rstd, images, channels, pixels, groups) -> torch.Tensor:
    each = rstd.repeat_interleave(channels // groups, 1)
    return made.mul_(each.view(images, channels, *[1] * (made.dim() - 2)))


layer_norm_from_output = _define(
    "layer_norm_backward_from_output", ", int[] shape", _layer_call, lambda made, rstd, _: made.mul_(rstd)
)
group_norm_from_output = _define(
    "group_norm_backward_from_output", ", int images, int channels, int pixels, int groups", _group_call, _scale_groups
)
batch_norm_from_output = _define(
    "batch_norm_backward_from_output",
    "",
    _batch_call,
    lambda made, rstd: made.mul_(rstd.view(-1, *[1] * (made.dim() - 2))),
)
