"""The gradient of a convolution's input, of which aten's backward asks for the input itself, though it reads only its shape."""

from __future__ import annotations

import torch
from torch import fx

from ..fake_kernels import fake_mode_of
from ..graph_meta import result_of
from ..torch_internals import convolution_backends
from .base import Call, Choice, register_implementation

aten = torch.ops.aten
INPUT_ALONE = [True, False, False]
SAME_KERNEL = {("Mkldnn", "MkldnnTranspose"), ("Cudnn", "CudnnTranspose")}


@register_implementation("convolution_transposed", aten.convolution_backward.default)
def convolution_transposed(node: fx.Node) -> Choice | None:
    """The transposed convolution of the output's gradient, without groups: the same kernel, from gradient and weight alone."""
    item = result_of(node, 0)
    settings = transposed_of(node) if item is not None else None
    if settings is None:
        return None
    *settings, missing = settings
    call = Call(aten.convolution.default, (node.args[0], node.args[2], None, *settings, True, missing, 1))
    return Choice(backward=call, result=item)


def transposed_of(node: fx.Node) -> tuple[list[int], ...] | None:
    """Stride, padding, dilation and output padding of the transposed convolution that makes what an operator makes that makes
    the input's gradient alone, by the same kernel; None where there is none."""
    gradient, x, weight, _, stride, padding, dilation, transposed, _, groups, mask = node.args
    values = gradient.meta["val"], x.meta["val"], weight.meta["val"]
    stride, padding, dilation = (list(p) * (values[1].dim() - 2 if len(p) == 1 else 1) for p in (stride, padding, dilation))
    told = len(values[1]) > 1 or all(v.is_contiguous() for v in values)  # of one image, strides do not tell the format
    if transposed or groups > 1 or list(mask) != INPUT_ALONE or not told:
        return None  # the kernels of groups differ in strides
    if any(v.numel() == 0 for v in values):
        return None
    made = zip(values[0].shape[2:], values[1].shape[2:], values[2].shape[2:], stride, padding, dilation, strict=True)
    missing = [x - ((y - 1) * s - 2 * p + d * (k - 1) + 1) for y, x, k, s, p, d in made]
    with fake_mode_of(values):
        backends = convolution_backends(*values[1:], stride, padding, dilation, groups, missing, values[0])
    return (stride, padding, dilation, missing) if backends in SAME_KERNEL else None
