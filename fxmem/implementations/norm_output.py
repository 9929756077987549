"""Norms backward from their output, which tells the normalized input: all that their backward reads of the input.

The output is y = n * weight + bias, n the normalized input, so n is (y - bias) / weight. That is as good as n from the input
where no bias is much larger than its weight, and nothing at all where a weight is zero (residual blocks often begin so, weight
decay leads there). So a `Guard` watches the weights: where they come too near to that, norms go backward from the input.

The forward of a batch norm rounds alike in all of a channel (mean and bias are one number there), of a group norm in all of a
channel of an image. That adds up in the gradient of a weight, to hundreds of times the plain operator's error where a channel
is constant. So these go backward from their output where their weights get no gradient; layer norms, whose rows are rounded
apart, do where they get one, too, but not in types of 16 bits.

A batch norm's weights are of channels, as its statistics are, and PyTorch's own backward takes the output for an input with
other statistics. Layer and group norms have statistics of rows and images: some of these at a time are divided by the weights,
while they are in the cache.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import fx

from ..codegen.operators import in_format_of
from ..cost.base import OpCall
from ..cost.copies import LOW_PRECISION
from ..cost.roofline import PARTS
from ..cost.workspace import workspace_bytes
from ..graph_meta import is_backward, readers, result_of
from .base import Call, Choice, Guard, register_implementation
from .operators import alike, chunks, define, define_inplace

aten = torch.ops.aten
BATCH, LAYER, GROUP = (getattr(aten, f"native_{kind}_norm_backward").default for kind in ("batch", "layer", "group"))
LARGEST_BIAS = {LAYER: 4.0, BATCH: 0.125, GROUP: 0.125}  # times its weight: from twice as much on, errors may be too large
PIECE_BYTES = 1 << 21  # a few of them are in a CPU's cache
LEAST_PIECES = 4
PARAMETERS = "Tensor rstd, Tensor? weight, Tensor? bias"


@register_implementation("layer_norm_output", LAYER, exactness="accurate")
def layer_norm_output(node: fx.Node) -> Choice | None:
    """The output, where something else keeps it and no weight is near zero."""
    shape, rstd, mask = node.args[2], node.args[4], node.args[7]
    if not node.args[0].meta["val"].is_contiguous():
        return None  # rows have to lie one after the other
    return _from_output(node, rstd, slice(2, 4), layer_norm_from_output, list(shape), list(mask))


@register_implementation("group_norm_output", GROUP, exactness="accurate")
def group_norm_output(node: fx.Node) -> Choice | None:
    """The output, where something else keeps it, no weight is near zero, and none gets a gradient."""
    rstd, groups, mask = node.args[3], *node.args[8:10]
    return _from_output(node, rstd, slice(1, 3), group_norm_from_output, groups, list(mask))


@register_implementation("batch_norm_output", BATCH, exactness="accurate")
def batch_norm_output(node: fx.Node) -> Choice | None:
    """The output, where something else keeps it, no weight is near zero, and none gets a gradient."""
    rstd, training, mask = node.args[6], node.args[7], node.args[9]
    return _from_output(node, rstd, slice(1, 3), batch_norm_from_output, list(mask)) if training else None


def _from_output(node: fx.Node, rstd: fx.Node, affine: slice, target, *rest) -> Choice | None:
    """`target` of the gradient, the norm's output, its inverse deviation, weight and bias, and the rest. affine: where the
    forward has weight and bias."""
    forward = rstd.args[0] if isinstance(rstd, fx.Node) and rstd.target is operator.getitem else None
    result, made, mask = forward and result_of(forward, 0), result_of(node, 0), rest[-1]
    if result is None or made is None or not mask[0] or not _is_kept(result):
        return None
    value, (weight, bias) = result.meta["val"], forward.args[affine]
    if not alike(node.args[0].meta["val"], value, made.meta["val"]) or not value.numel():
        return None
    if (weight is None and bias is not None) or (mask[1] and (node.target is not LAYER or value.dtype in LOW_PRECISION)):
        return None
    if value.dtype is torch.float16 and node.target is not BATCH:
        return None  # the gradient of the normalized input, before it is scaled, may be beyond its range
    if node.args[0].target is in_format_of:
        return None  # which reads the input, for its format
    guard = guard_of_weights(value.dtype, weight, bias, LARGEST_BIAS[node.target]) if weight is not None else None
    return Choice(backward=Call(target, (node.args[0], result, rstd, weight, bias, *rest)), guard=guard)


def _is_kept(result: fx.Node) -> bool:
    """Whether anything else in the backward reads the output. Where only a ReLU behind it does in the forward, the input is as
    good: that is made again from it in one pass, too (see `chains`)."""
    return any(is_backward(reader) and "fxmem_offers" not in reader.meta for reader in readers(result))


def guard_of_weights(dtype: torch.dtype, weight: fx.Node, bias: fx.Node | None = None, largest_bias: float = math.inf) -> Guard:
    """That an output of this type tells what was multiplied by the weights before the bias was added."""
    limits = torch.finfo(dtype)
    least = max(limits.tiny**0.25, limits.tiny / limits.eps)  # below it, squares of weights or their products lose digits
    return Guard(WeightLimits(least, largest_bias), (weight,) if bias is None else (weight, bias))


@dataclass(frozen=True)
class WeightLimits:
    """Called with weight and bias: how much of what they may be they are. least: the smallest weight; its inverse is the
    largest. largest_bias: times its weight."""

    least: float
    largest_bias: float

    def __call__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        size = weight.abs()
        shares = torch.maximum(self.least / size, self.least * size)
        return (shares if bias is None else torch.maximum(shares, bias.abs() / (self.largest_bias * size))).max()


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in LOW_PRECISION else dtype


def _wanted(of_parameters, gradient, result, rstd, weight, bias, *rest) -> list[torch.Tensor | None]:
    """The gradients of weight and bias, as these are, where they are wanted."""
    pairs = zip(of_parameters, (weight, bias), rest[-1][1:], strict=True)
    return [found.to(p.dtype).view_as(p) if wanted else None for found, p, wanted in pairs]


def _empty_results(gradient, result, rstd, weight, bias, *rest) -> tuple[torch.Tensor | None, ...]:
    of_parameters = (torch.empty_like(p) if wanted else None for p, wanted in zip((weight, bias), rest[-1][1:], strict=True))
    return torch.empty_like(result), *of_parameters


def _batch_call(gradient, result, rstd, weight, bias, mask) -> OpCall:
    """PyTorch's own backward, which normalizes the output where it is told of an inverse deviation of 1 / weight and a mean of
    bias; and of a weight that makes it scale the gradient by weight * rstd all the same."""
    rstd = rstd.to(_wide(result.dtype))
    scale = torch.ones_like(rstd) if weight is None else weight.to(rstd.dtype)
    mean = torch.zeros_like(rstd) if bias is None else bias.to(rstd.dtype)
    return OpCall(BATCH, (gradient, result, scale * scale * rstd, None, None, mean, 1 / scale, True, 0.0, mask))


def _batch_norm(*args) -> tuple[torch.Tensor | None, ...]:
    call = _batch_call(*args)
    made, *of_parameters = BATCH(*call.args)
    return made, *_wanted(of_parameters, *args)


def _batch_parts(call: OpCall) -> list[OpCall]:
    return [replace(_batch_call(*call.args), out=call.out, on_gpu=call.on_gpu)]


def _batch_workspace(call: OpCall) -> int:
    """PyTorch's, and eight numbers at most for each channel: statistics, and gradients before they are of the weights' type."""
    return workspace_bytes(_batch_parts(call)[0]) + 8 * _wide(call.args[1].dtype).itemsize * call.args[1].shape[1]


batch_norm_from_output = define(
    f"batch_norm_backward_from_output(Tensor gradient, Tensor result, {PARAMETERS}, bool[3] mask) -> (Tensor, Tensor, Tensor)",
    _batch_norm,
    _empty_results,
    _batch_workspace,
)
PARTS[batch_norm_from_output.overloadpacket] = _batch_parts


def _rows(gradient, result, rstd, weight, bias, shape, mask) -> tuple:
    """What a layer norm's backward takes, as rows, and that backward of rows that are normalized already."""
    columns = [math.prod(shape)]

    def backward_call(gradient, normalized, rstd, weight, bias) -> OpCall:
        return OpCall(LAYER, (gradient, normalized, columns, *_neutral(rstd), weight, bias, mask))

    rows = (t.view(-1, *columns) for t in (gradient, result))
    return *rows, rstd.view(-1, 1), *(None if p is None else p.view(columns) for p in (weight, bias)), backward_call


def _images(gradient, result, rstd, weight, bias, groups, mask) -> tuple:
    """What a group norm's backward takes, and that backward of images that are normalized already."""

    def backward_call(gradient, normalized, rstd, weight, bias) -> OpCall:
        sizes = *gradient.shape[:2], math.prod(gradient.shape[2:]), groups
        return OpCall(GROUP, (gradient, normalized, *_neutral(rstd), weight, *sizes, mask))

    return gradient, result, rstd, weight, bias, backward_call


def _neutral(rstd: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and inverse deviation of what is normalized already."""
    return torch.zeros_like(rstd), torch.ones_like(rstd)


def _fill(arrange: Callable[..., tuple], made: torch.Tensor, *args) -> tuple[torch.Tensor | None, ...]:
    """All gradients. made: where the input's is written; it may be the memory of the output's, or of the output, of which each
    piece is read before it is written over."""
    gradient, result, rstd, *parameters, backward_call = arrange(*args)
    wide = _wide(result.dtype)
    sums = [torch.zeros_like(p, dtype=wide) if wanted else None for p, wanted in zip(parameters, args[-1][1:], strict=True)]
    for begin, end in _pieces(result):
        pieces = (t[begin:end] for t in (made.view(result.shape), gradient, result, rstd))
        _fill_piece(*pieces, parameters, backward_call, sums)
    return made, *_wanted(sums, *args)


def _fill_piece(made, gradient, result, rstd, parameters, backward_call, sums) -> None:
    """A function of its own, so that nothing of a piece is there with the next one."""
    call = backward_call(gradient, _normalized(result, *parameters), rstd, *parameters)
    part, *of_parameters = call.target(*call.args)
    scale = rstd if rstd.shape[1] == 1 else rstd.repeat_interleave(part.shape[1] // rstd.shape[1], 1)
    torch.mul(part, scale.view(*scale.shape, *[1] * (part.dim() - 2)), out=made)
    for total, found in zip(sums, of_parameters, strict=True):
        if total is not None:
            total += found


def _pieces(result: torch.Tensor) -> list[tuple[int, int]]:
    """A few at least, so that what is made for one of them takes little; on a GPU, to launch more kernels would take longer."""
    count = len(result)
    fit = PIECE_BYTES * count // result.nbytes
    return list(chunks(count, max(1, min(fit, -(-count // LEAST_PIECES))) if result.device.type == "cpu" else count))


def _normalized(result, weight, bias) -> torch.Tensor:
    """First the bias, then the weight: so no rounding is the same for a whole channel."""
    if weight is None:
        return result
    weight, bias = (p if p is None else p.view(-1, *[1] * (result.dim() - 2)) for p in (weight, bias))
    made = result.to(_wide(result.dtype))
    return (made / weight if bias is None else (made - bias).div_(weight)).to(result.dtype)


def _define(name: str, extra_arguments: str, arrange: Callable[..., tuple]):
    """The operator, its forms in place, and its costs."""
    rest = f"{PARAMETERS}, {extra_arguments}, bool[3] mask"

    def parts(call: OpCall) -> list[OpCall]:
        """What runs over all rows or images: on a CPU less, as they are in the cache."""
        gradient, result, rstd, *parameters, backward_call = arrange(*call.args)
        whole = replace(backward_call(gradient, result, rstd, *parameters), out=call.out, on_gpu=call.on_gpu)
        copy = OpCall(aten.clone.default, (result,), out=torch.empty_like(result), on_gpu=call.on_gpu)
        return [whole, copy, *[copy for parameter in parameters if parameter is not None]]

    def workspace(call: OpCall) -> int:
        """A piece of the normalized input and of its gradient, what makes these, and a few numbers for each row and column."""
        gradient, result, rstd, *parameters, backward_call = arrange(*call.args)
        begin, end = max(_pieces(result), key=lambda piece: piece[1] - piece[0])
        piece, wide = result[begin:end], _wide(result.dtype)
        made = torch.empty_like(piece)
        inside = replace(backward_call(gradient[begin:end], piece, rstd[begin:end], *parameters), out=made, on_gpu=call.on_gpu)
        widened_bytes = 0 if wide is result.dtype else 2 * piece.numel() * wide.itemsize
        numbers = 3 * rstd[begin:end].numel() + math.prod(piece.shape[:2]) * (result.dim() > 2)
        if parameters[0] is None:
            return piece.nbytes + max(widened_bytes, workspace_bytes(inside)) + numbers * wide.itemsize
        numbers += 8 * result.shape[1]
        return 2 * piece.nbytes + max(widened_bytes, workspace_bytes(inside)) + numbers * wide.itemsize

    made = define(
        f"{name}(Tensor gradient, Tensor result, {rest}) -> (Tensor, Tensor, Tensor)",
        lambda gradient, result, *args: _fill(arrange, torch.empty_like(result), gradient, result, *args),
        _empty_results,
        workspace,
    )
    define_inplace(
        made,
        f"{name}_(Tensor(a!) gradient, Tensor result, {rest}) -> (Tensor(a!), Tensor, Tensor)",
        lambda gradient, *args: _fill(arrange, gradient, gradient, *args),
    )
    define_inplace(
        made,
        f"{name}_over_it(Tensor(a!) result, Tensor gradient, {rest}) -> (Tensor(a!), Tensor, Tensor)",
        lambda result, gradient, *args: _fill(arrange, result, gradient, result, *args),
        second=True,
    )
    PARTS[made.overloadpacket] = parts
    return made


layer_norm_from_output = _define("layer_norm_backward_from_output", "int[] shape", _rows)
group_norm_from_output = _define("group_norm_backward_from_output", "int groups", _images)
