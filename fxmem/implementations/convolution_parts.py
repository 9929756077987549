"""The backward of a convolution of a concatenation, a part after the other.

U-Nets, Inception's blocks and their kin join tensors in channels and convolve what comes out. The gradient of the weight is
made of those of its parts, each of which reads one of the joined tensors: these are there, or made again from less, and the
concatenation need not be. And what the gradient of the concatenation is cut into can be made apart, so that the gradient of a
skip, which waits for the encoder's backward, does not hold on to the rest until then. Which channels a kernel takes at once
decides in which order it adds up: last bits may differ.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import fx

from ..cost.base import OpCall
from ..cost.roofline import PARTS
from ..cost.workspace import workspace_bytes
from ..graph_meta import is_backward, result_of
from ..torch_internals import suggested_format
from .base import Call, Choice, Rewrite, register_implementation
from .convolution import INPUT_ALONE, transposed_of
from .operators import define

aten = torch.ops.aten
BACKWARD, CONVOLUTION = aten.convolution_backward.default, aten.convolution.default
LEAST_BYTES = 1 << 21  # of a concatenation: every choice more makes plans take longer
LEAST_CHANNELS = 8  # of a part whose gradient is made apart: kernels work on about as many at once


@register_implementation("convolution_parts", BACKWARD, exactness="accurate", least_bytes=LEAST_BYTES)
def convolution_parts(node: fx.Node) -> Choice | Rewrite | None:
    """What a concatenation joins, instead of the whole; the gradient of each of them is made by itself."""
    _, x, weight, *_, is_transposed, _, groups, mask = node.args
    if is_transposed or groups > 1 or any(n.meta["val"].numel() == 0 for n in (x, weight)):
        return None
    if list(mask) == INPUT_ALONE:
        return _apart(node)
    return _of_parts(node) if mask[1] and not mask[0] else None


def _of_parts(node: fx.Node) -> Choice | None:
    """The weight's gradient from what the input is joined of."""
    gradient, x, weight, bias_sizes, stride, padding, dilation, _, missing, _, mask = node.args
    if x.target is not aten.cat.default or len(x.args[0]) < 2 or _is_read_again(x, node):
        return None
    parts, value = list(x.args[0]), x.meta["val"]
    joined = [n.meta["val"] for n in parts]
    if (x.args[1:] or (0,))[0] % value.dim() != 1 or any(p.dtype != value.dtype or p.numel() == 0 for p in joined):
        return None
    laid = list(node.meta["val"][1].stride())
    return Choice(
        backward=Call(of_parts, (gradient, parts, weight, laid, bias_sizes, stride, padding, dilation, missing, mask[2]))
    )


def _is_read_again(x: fx.Node, node: fx.Node) -> bool:
    """Whether something else in the backward reads the values of a concatenation, so that it has to be there anyway; what makes
    the gradient of a convolution's input asks for its shape alone."""
    for user in x.users:
        for_shape = user.target is BACKWARD and list(user.args[10]) == INPUT_ALONE
        if is_backward(user) and user is not node and not for_shape:
            return True
    return False


def _apart(node: fx.Node) -> Rewrite | None:
    """The gradients of what the input is joined of, each by a convolution of its own; always, as it takes no more time."""
    gradient, weight = node.args[0], node.args[2]
    whole = result_of(node, 0)
    cuts = list(whole.users) if whole is not None and whole.meta["val"].nbytes >= LEAST_BYTES else []
    places = [_channels(cut) for cut in cuts]
    if not cuts or None in places or max(weight.meta["val"].shape[2:]) < 2:
        return None
    overlap = any(begin < end for (_, end), (begin, _) in pairwise(sorted(places)))
    settings = None if overlap or min(end - begin for begin, end in places) < LEAST_CHANNELS else transposed_of(node)
    if settings is None:
        return None
    return Rewrite(
        {cut: Call(gradient_of_part, (gradient, weight, *at, *settings)) for cut, at in zip(cuts, places, strict=True)}
    )


def _channels(cut: fx.Node) -> tuple[int, int] | None:
    """(begin, end) of the channels that a slice takes; None of any other user, and of the whole."""
    if cut.target is not aten.slice.Tensor:
        return None
    whole, dim, begin, _, step = (*cut.args, *(None, 0, None, None, 1)[len(cut.args) :])
    begin, count = begin or 0, cut.meta["val"].shape[1]
    is_part = dim == 1 and step == 1 and begin >= 0 and count < whole.meta["val"].shape[1]
    return (begin, begin + count) if is_part else None


def _pieces(gradient, parts, weight, laid, bias_sizes, stride, padding, dilation, missing, with_bias) -> Iterator[tuple]:
    """Which channels, and the arguments of the plain operator, for one part after the other; the bias is the first one's."""
    begin = 0
    for part in parts:
        end = begin + part.shape[1]
        settings = bias_sizes, stride, padding, dilation, False, missing, 1, [False, True, with_bias and begin == 0]
        yield (begin, end), (gradient, part, weight[:, begin:end], *settings)
        begin = end


def _in_turn(*args) -> tuple[None, torch.Tensor, torch.Tensor | None]:
    _, d_weight, d_bias = _room(*args)
    for (begin, end), given in _pieces(*args):
        _, d_weight[:, begin:end], bias = BACKWARD(*given)
        d_bias = bias if begin == 0 else d_bias
    return None, d_weight, d_bias


def _room(gradient, parts, weight, laid, *rest) -> tuple[None, torch.Tensor, torch.Tensor | None]:
    return None, weight.new_empty_strided(weight.shape, laid), weight.new_empty(len(weight)) if rest[-1] else None


def _calls_of_parts(call: OpCall) -> list[OpCall]:
    """What runs inside, one after the other."""
    return [
        OpCall(BACKWARD, given, out=(None, torch.empty_like(given[2]), torch.empty(0)), on_gpu=call.on_gpu)
        for _, given in _pieces(*call.args)
    ]


def _workspace_of_parts(call: OpCall) -> int:
    """That of the largest part, beside its share of the weight and of its gradient."""
    return max(workspace_bytes(part) + 2 * part.args[2].nbytes for part in _calls_of_parts(call))


of_parts = define(
    "convolution_backward_of_parts(Tensor gradient, Tensor[] parts, Tensor weight, int[] laid, int[]? bias_sizes, "
    "int[] stride, int[] padding, int[] dilation, int[] missing, bool with_bias) -> (Tensor, Tensor, Tensor)",
    _in_turn,
    _room,
    _workspace_of_parts,
)
PARTS[of_parts.overloadpacket] = _calls_of_parts


def _given(gradient, weight, begin, end, stride, padding, dilation, missing) -> tuple:
    return gradient, weight[:, begin:end], None, stride, padding, dilation, True, missing, 1


def _gradient_of_part(gradient, *rest) -> torch.Tensor:
    return CONVOLUTION(*_given(gradient, *rest)).contiguous(memory_format=suggested_format(gradient))


def _calls_of_part(call: OpCall) -> list[OpCall]:
    return [OpCall(CONVOLUTION, _given(*call.args), out=call.out, on_gpu=call.on_gpu)]


gradient_of_part = define(
    "convolution_gradient_of_part(Tensor gradient, Tensor weight, int begin, int end, int[] stride, int[] padding, "
    "int[] dilation, int[] missing) -> Tensor",
    _gradient_of_part,
    _gradient_of_part,
    lambda call: workspace_bytes(_calls_of_part(call)[0]),
)
PARTS[gradient_of_part.overloadpacket] = _calls_of_part
