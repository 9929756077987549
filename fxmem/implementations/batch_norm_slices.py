"""Batch norm's backward a few channels at a time, so that it can run in place: the gradient of the output, the input and the
gradient of the input, all of one size, are what many convolutional networks' least peak consists of.

No channel's gradient depends on another channel. So the gradient of the input is made for some channels, from copies of these
alone, and then written over the output's, or over the input, whichever nobody needs any more. PyTorch's kernels have no such
form, and on a CPU take a temporary as large as the input besides. They treat channel after channel, so slices of channels give
the same bits where they run by the same kernel: single pixels, single channels, channels-last and what 32 bits cannot index may
have others, and nothing is offered, on any device.
"""

from __future__ import annotations

import torch
from torch import fx

from ..cost.base import OpCall
from ..cost.roofline import PARTS
from ..cost.workspace import workspace_bytes
from .base import Call, Choice, register_implementation
from .operators import chunks, define, define_inplace

aten = torch.ops.aten
BACKWARD = aten.native_batch_norm_backward.default
SLICES = 16
LEAST_BYTES = 1 << 21  # every choice more makes plans take longer
LARGEST_INDEX = 1 << 31


@register_implementation("batch_norm_slices", BACKWARD, least_bytes=LEAST_BYTES)
def batch_norm_slices(node: fx.Node) -> Choice | None:
    """What PyTorch's keeps; made a sixteenth of the channels at a time, in place of the output's gradient or the input."""
    gradient, x = (n.meta["val"] for n in node.args[:2])
    if not (node.args[9][0] and x.numel() and gradient.is_contiguous() and x.is_contiguous()) or x.numel() >= LARGEST_INDEX:
        return None
    slices = _slices(x)
    if x.dim() < 3 or x.stride(1) < 2 or len(slices) < 2:
        return None
    return Choice(backward=Call(in_slices, node.args))


def _slices(x: torch.Tensor) -> list[tuple[int, int]]:
    """Ranges of channels of one size, but for the last; a single channel that would be left over goes with those before it."""
    channels = x.shape[1]
    found = list(chunks(channels, max(2, -(-channels // SLICES))))
    if len(found) > 1 and found[-1][1] - found[-1][0] == 1:
        found[-2:] = [(found[-2][0], channels)]
    return found


def _of_channels(begin: int, end: int, gradient, x, weight, mean, variance, save_mean, save_rstd, *rest) -> tuple:
    """The backward's arguments for some channels."""
    images = (t[:, begin:end].contiguous() for t in (gradient, x))
    each = (None if t is None else t[begin:end] for t in (weight, mean, variance, save_mean, save_rstd))
    return *images, *each, *rest


def _parameter_gradients(gradient, x, weight, *rest) -> tuple[torch.Tensor | None, ...]:
    """Room for those of weight and bias that are wanted."""
    dtype = x.dtype if weight is None else weight.dtype
    return tuple(x.new_empty(x.shape[1], dtype=dtype) if wanted else None for wanted in rest[-1][1:])


def _fill(made: torch.Tensor, *args) -> tuple[torch.Tensor | None, ...]:
    """All gradients; that of the input into `made`, which may be the output's."""
    of_parameters = _parameter_gradients(*args)
    for begin, end in _slices(args[1]):
        parts = BACKWARD(*_of_channels(begin, end, *args))
        made[:, begin:end] = parts[0]
        for whole, part in zip(of_parameters, parts[1:], strict=True):
            if whole is not None:
                whole[begin:end] = part
        del parts, part  # before the next slice's are there
    return made, *of_parameters


def _parts(call: OpCall) -> list[OpCall]:
    """What runs inside. All slices but the last are as large as the first."""
    slices = _slices(call.args[1])
    first, last = (_parts_of(call, *channels) for channels in (slices[0], slices[-1]))
    return first * (len(slices) - 1) + last


def _parts_of(call: OpCall, begin: int, end: int) -> list[OpCall]:
    """The backward of some channels, and the copies of operands and result."""
    args = _of_channels(begin, end, *call.args)
    made = torch.empty_like(args[1])
    copies = [OpCall(aten.clone.default, (t,), out=torch.empty_like(t), on_gpu=call.on_gpu) for t in (*args[:2], made)]
    return [OpCall(BACKWARD, args, out=(made, *_parameter_gradients(*args)), on_gpu=call.on_gpu), *copies]


def _workspace(call: OpCall) -> int:
    """Copies of the channels of the largest slice, what is made of them, and the kernel's own."""
    inside = _parts_of(call, *max(_slices(call.args[1]), key=lambda channels: channels[1] - channels[0]))[0]
    copied_bytes = sum(t.nbytes for t in inside.args[:2]) if len(inside.args[1]) > 1 else 0  # of one image they lie together
    return copied_bytes + inside.new_output_bytes + workspace_bytes(inside)


_REST = (
    "Tensor? weight, Tensor? mean, Tensor? variance, Tensor? save_mean, Tensor? save_rstd, bool training, "
    "float eps, bool[3] mask"
)
in_slices = define(
    f"batch_norm_backward_in_slices(Tensor gradient, Tensor x, {_REST}) -> (Tensor, Tensor, Tensor)",
    lambda gradient, x, *rest: _fill(torch.empty_like(x), gradient, x, *rest),
    lambda gradient, x, *rest: (torch.empty_like(x), *_parameter_gradients(gradient, x, *rest)),
    _workspace,
)
define_inplace(
    in_slices,
    f"batch_norm_backward_in_slices_(Tensor(a!) gradient, Tensor x, {_REST}) -> (Tensor(a!), Tensor, Tensor)",
    lambda gradient, x, *rest: _fill(gradient, gradient, x, *rest),
)
define_inplace(
    in_slices,
    f"batch_norm_backward_over_input_(Tensor(a!) x, Tensor gradient, {_REST}) -> (Tensor(a!), Tensor, Tensor)",
    lambda x, gradient, *rest: _fill(x, gradient, x, *rest),
    second=True,
)
PARTS[in_slices.overloadpacket] = _parts
