"""A convolution's backward a few images at a time: a library's kernels on a CPU lay all operands out anew, which takes as much
memory again as these, or unfold them, which takes more.

The gradient of an image of the input depends on no other image, but libraries cut the work for several threads by the number of
images, and so add up in another order (with strides of two, for one). The gradients of weight and bias are sums over images,
which slices add up in another order too. Convolutions of single pixels, and those in channels-last, run as their operands lie,
and cuDNN lays nothing out: nothing is to be saved, and nothing is offered.
"""

from __future__ import annotations

import torch
from torch import fx

from ..cost.base import OpCall
from ..cost.copies import LOW_PRECISION
from ..cost.roofline import PARTS
from ..cost.workspace import workspace_bytes
from ..fake_kernels import fake_mode_of
from ..torch_internals import convolution_backend
from .base import Call, Choice, register_implementation
from .operators import chunks, define

aten = torch.ops.aten
BACKWARD = aten.convolution_backward.default
SLICES = 8
LEAST_BYTES = 1 << 24  # every choice more makes plans take longer


@register_implementation("convolution_slices", BACKWARD, exactness="accurate", least_bytes=LEAST_BYTES)
def convolution_slices(node: fx.Node) -> Choice | None:
    """What PyTorch's keeps; gradients are made, or summed up, over an eighth of the images at a time."""
    gradient, x, weight = values = [n.meta["val"] for n in node.args[:3]]
    stride, padding, dilation, transposed, _, groups = node.args[4:10]
    if len(x) < 2 or any(v.device.type != "cpu" or not v.numel() or not v.is_contiguous() for v in values):
        return None
    if transposed or max(weight.shape[2:]) < 2:
        return None
    with fake_mode_of(values):  # of one image, PyTorch picks others for some sizes
        counts = {len(x), *(end - begin for begin, end in _slices(len(x)))}
        kernels = {convolution_backend(x[:n], weight, stride, padding, dilation, groups) for n in counts}
    args, made = (*values, *node.args[3:]), node.meta["val"]
    saved_bytes = workspace_bytes(OpCall(BACKWARD, args, out=made)) - workspace_bytes(OpCall(in_slices, args, out=made))
    if len(kernels) > 1 or saved_bytes <= 0:
        return None
    return Choice(backward=Call(in_slices, node.args))


def _slices(count: int) -> list[tuple[int, int]]:
    return list(chunks(count, -(-count // SLICES)))


def _in_slices(gradient, x, weight, *rest) -> tuple[torch.Tensor | None, ...]:
    wide = torch.float32 if x.dtype in LOW_PRECISION else x.dtype
    d_x, *sums = _room(x, weight, rest[-1], wide)
    for begin, end in _slices(len(x)):
        parts = BACKWARD(gradient[begin:end], x[begin:end], weight, *rest)
        if d_x is not None:
            d_x[begin:end] = parts[0]
        for total, part in zip(sums, parts[1:], strict=True):
            if total is not None:
                total += part
        del parts  # before the next slice's are there
    return d_x, *(None if total is None else total.to(x.dtype) for total in sums)


def _room(x: torch.Tensor, weight: torch.Tensor, mask: list[bool], wide: torch.dtype) -> tuple[torch.Tensor | None, ...]:
    """Gradients of input, weight and bias, those that are wanted."""
    return (
        torch.empty_like(x) if mask[0] else None,
        torch.zeros_like(weight, dtype=wide) if mask[1] else None,
        weight.new_zeros(len(weight), dtype=wide) if mask[2] else None,
    )


def _parts(call: OpCall) -> list[OpCall]:
    """What runs inside, one after the other."""
    gradient, x, weight, *rest = call.args
    found = []
    for begin, end in _slices(len(x)):
        images = x[begin:end]
        made = _room(images.to("meta"), weight.to("meta"), rest[-1], x.dtype)
        found.append(OpCall(BACKWARD, (gradient[begin:end], images, weight, *rest), out=made, on_gpu=call.on_gpu))
        found += [OpCall(aten.clone.default, (d,), out=torch.empty_like(d)) for d in made if d is not None]
    return found


def _workspace(call: OpCall) -> int:
    """That of the first slice, which is the largest, beside what it makes; and sums in float32."""
    first = _parts(call)[0]
    sums_bytes = 8 * call.args[2].numel() if call.args[1].dtype in LOW_PRECISION and call.args[-1][1] else 0
    return workspace_bytes(first) + first.new_output_bytes + sums_bytes


in_slices = define(
    "convolution_backward_in_slices(Tensor gradient, Tensor x, Tensor weight, int[]? bias_sizes, int[] stride, int[] padding, "
    "int[] dilation, bool transposed, int[] output_padding, int groups, bool[3] mask) -> (Tensor, Tensor, Tensor)",
    _in_slices,
    lambda gradient, x, weight, *rest: _room(x, weight, rest[-1], x.dtype),
    _workspace,
)
PARTS[in_slices.overloadpacket] = _parts
