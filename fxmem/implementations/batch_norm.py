"""Batch norm again from the statistics that its backward keeps anyway: one pass over the input instead of two or three."""

from __future__ import annotations

import operator

import torch
from torch import fx

from ..cost.base import OpCall
from ..graph_meta import result_of
from ..layouts import in_usual_format
from .base import Call, Choice, register_implementation
from .operators import define

aten = torch.ops.aten
FORWARDS = (aten._native_batch_norm_legit_functional.default, aten._native_batch_norm_legit.no_stats)


@register_implementation("batch_norm_statistics", aten.native_batch_norm_backward.default)
def batch_norm_statistics(node: fx.Node) -> Choice | None:
    """Mean and inverse deviation: the output is made again from them."""
    x, mean, rstd = node.args[1], node.args[5], node.args[6]
    forward = mean.args[0] if isinstance(mean, fx.Node) and mean.target is operator.getitem else None
    if forward is None or forward.target not in FORWARDS or not node.args[7] or x.meta["val"].device.type != "cpu":
        return None
    item = result_of(forward, 0)
    if item is None or mean.meta["val"].dtype not in (torch.float32, torch.float64):
        return None  # in lower precision the kernel's own statistics are not those that it hands out
    if not in_usual_format(x.meta["val"]):
        return None  # there it multiplies one after the other, by the inverse deviation and by the weight
    return Choice(decode=Call(batch_norm_again, (x, *forward.args[1:3], mean, rstd)), decoded=item)


def _batch_norm_again(x, weight, bias, mean, rstd) -> torch.Tensor:
    """PyTorch's kernel for evaluation scales by weight / sqrt(variance), the one for training by weight * rstd. So the former
    is given that product as its weight, and a variance of one."""
    scale = rstd if weight is None else rstd * weight
    shift = torch.zeros_like(mean) if bias is None else bias
    return aten._native_batch_norm_legit(x, scale, shift, mean, torch.ones_like(rstd), False, 0.0, 0.0)[0]


def _workspace(call: OpCall) -> int:
    """Statistics."""
    return 5 * call.inputs[-1].nbytes


batch_norm_again = define(
    "batch_norm_again(Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor rstd) -> Tensor",
    _batch_norm_again,
    lambda x, *_: torch.empty_like(x),
    _workspace,
)
