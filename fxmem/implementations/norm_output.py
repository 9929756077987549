"""Norms backward from their output, which tells the normalized input: all that their backward reads of the input.

The output is y = n * weight + bias, n the normalized input, so n is (y - bias) / weight. That is as good as n from the input
where no bias is much larger than its weight, and nothing at all where a weight is zero (residual blocks often begin so, weight
decay leads there). So a `Guard` watches the weights: where they come too near to that, norms go backward from the input.

A batch norm's weights are of channels, as its statistics are, and PyTorch's own backward takes the output for an input with
other statistics. Layer and group norms have statistics of rows and images: some of these at a time are divided by the weights,
while they are in the cache.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import fx

from ..cost.base import OpCall
from ..cost.copies import LOW_PRECISION
from ..cost.roofline import PARTS
from ..cost.workspace import workspace_bytes
from ..graph_meta import result_of
from .base import Call, Choice, Guard, register_implementation
from .operators import alike, chunks, define, define_inplace

aten = torch.ops.aten
BATCH, LAYER, GROUP = (getattr(aten, f"native_{kind}_norm_backward").default for kind in ("batch", "layer", "group"))
LARGEST_BIAS = 8.0  # times its weight: from 16 on, errors come near four times the plain operator's
PIECE_BYTES = 1 << 21  # a few of them are in a CPU's cache
LEAST_PIECES = 4
OPERANDS = "Tensor gradient, Tensor result, Tensor rstd, Tensor? weight, Tensor? bias"


@register_implementation("layer_norm_output", LAYER, exactness="accurate")
def layer_norm_output(node: fx.Node) -> Choice | None:
    """The output, as long as no weight is near zero: it tells the normalized input."""
    shape, rstd, mask = node.args[2], node.args[4], node.args[7]
    if not node.args[0].meta["val"].is_contiguous():
        return None
    return _from_output(node, rstd, slice(2, 4), mask, layer_norm_from_output, list(shape))


@register_implementation("group_norm_output", GROUP, exactness="accurate")
def group_norm_output(node: fx.Node) -> Choice | None:
    """The output, as long as no weight is near zero: it tells the normalized input."""
    return _from_output(node, node.args[3], slice(1, 3), node.args[9], group_norm_from_output, node.args[8])


@register_implementation("batch_norm_output", BATCH, exactness="accurate")
def batch_norm_output(node: fx.Node) -> Choice | None:
    """The output, as long as no weight is near zero: it tells the normalized input."""
    rstd, training, mask = node.args[6], node.args[7], node.args[9]
    return _from_output(node, rstd, slice(1, 3), mask, batch_norm_from_output) if training else None


def _from_output(node: fx.Node, rstd: fx.Node, affine: slice, mask: list[bool], target, *args) -> Choice | None:
    """`target` of the gradient, the norm's output, its inverse deviation, weight and bias. affine: where the forward has the
    latter."""
    forward = rstd.args[0] if isinstance(rstd, fx.Node) and rstd.target is operator.getitem else None
    item = result_of(node, 0)
    result = None if forward is None else result_of(forward, 0)
    if result is None or item is None or not mask[0]:
        return None
    value, (weight, bias) = result.meta["val"], forward.args[affine]
    if not (alike(node.args[0].meta["val"], value, item.meta["val"]) and value.numel()) or (
        weight is None and bias is not None
    ):
        return None
    guard = guard_of_weights(value.dtype, weight, bias) if weight is not None else None
    return Choice(backward=Call(target, (node.args[0], result, rstd, weight, bias, *args, list(mask))), guard=guard)


def guard_of_weights(dtype: torch.dtype, weight: fx.Node, bias: fx.Node | None = None) -> Guard:
    """That an output of this type tells what was multiplied by the weights."""
    limits = torch.finfo(dtype)
    floor = max(math.sqrt(limits.tiny), limits.tiny / limits.eps)  # below it, squares of weights or their products lose digits
    return Guard(functools.partial(nearness, floor), (weight,) if bias is None else (weight, bias))


def nearness(floor: float, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """How near weights are to where the output does not tell the normalized input any more, which it does up to 1. floor: the
    smallest weight that can be divided by; its inverse is the largest."""
    size = weight.abs()
    found = torch.maximum(floor / size, floor * size)
    return found.max() if bias is None else torch.maximum(found, bias.abs() / (LARGEST_BIAS * size)).max()


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in LOW_PRECISION else dtype


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


def _wanted(of_parameters, gradient, result, rstd, weight, bias, *rest) -> list[torch.Tensor | None]:
    """The gradients of weight and bias, as these are, where they are wanted."""
    pairs = zip(of_parameters, (weight, bias), rest[-1][1:], strict=True)
    return [found.to(p.dtype).view_as(p) if wanted else None for found, p, wanted in pairs]


def _room(gradient, result, rstd, weight, bias, *rest) -> tuple[torch.Tensor | None, ...]:
    of_parameters = (torch.empty_like(p) if wanted else None for p, wanted in zip((weight, bias), rest[-1][1:], strict=True))
    return torch.empty_like(result), *of_parameters


batch_norm_from_output = define(
    f"batch_norm_backward_from_output({OPERANDS}, bool[3] mask) -> (Tensor, Tensor, Tensor)",
    _batch_norm,
    _room,
    lambda call: workspace_bytes(_batch_parts(call)[0]) + 4 * 4 * call.args[1].shape[1],
)


def _batch_parts(call: OpCall) -> list[OpCall]:
    return [replace(_batch_call(*call.args), out=call.out, on_gpu=call.on_gpu)]


PARTS[batch_norm_from_output.overloadpacket] = _batch_parts


def _rows(gradient, result, rstd, weight, bias, shape, mask) -> tuple:
    """What a layer norm's backward takes, as rows, and that backward of rows that are normalized already."""
    columns = [math.prod(shape)]

    def backward(gradient, normalized, rstd, weight, bias) -> OpCall:
        return OpCall(LAYER, (gradient, normalized, columns, *_neutral(rstd), weight, bias, mask))

    rows = (t.view(-1, *columns) for t in (gradient, result))
    return *rows, rstd.view(-1, 1), *(None if p is None else p.view(columns) for p in (weight, bias)), backward


def _images(gradient, result, rstd, weight, bias, groups, mask) -> tuple:
    """What a group norm's backward takes, and that backward of images that are normalized already."""

    def backward(gradient, normalized, rstd, weight, bias) -> OpCall:
        sizes = *gradient.shape[:2], math.prod(gradient.shape[2:]), groups
        return OpCall(GROUP, (gradient, normalized, *_neutral(rstd), weight, *sizes, mask))

    return gradient, result, rstd, weight, bias, backward


def _neutral(rstd: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and inverse deviation of what is normalized already."""
    return torch.zeros_like(rstd), torch.ones_like(rstd)


def _fill(arrange: Callable[..., tuple], made: torch.Tensor, *args) -> tuple[torch.Tensor | None, ...]:
    """All gradients; that of the input into `made`, which may be the output's or the output."""
    gradient, result, rstd, *parameters, backward = arrange(*args)
    wide = _wide(result.dtype)
    sums = [torch.zeros_like(p, dtype=wide) if wanted else None for p, wanted in zip(parameters, args[-1][1:], strict=True)]
    for begin, end in _pieces(result):
        normalized = _normalized(result[begin:end], *parameters)
        call = backward(gradient[begin:end], normalized, rstd[begin:end], *parameters)
        part, *of_parameters = call.target(*call.args)
        torch.mul(*_grouped(part, rstd[begin:end]), out=_grouped(made.view(result.shape)[begin:end], rstd[begin:end])[0])
        for total, found in zip(sums, of_parameters, strict=True):
            if total is not None:
                total += found
    return made, *_wanted(sums, *args)


def _pieces(result: torch.Tensor) -> list[tuple[int, int]]:
    """A few at least, so that what is made for one of them takes little; on a GPU, to launch more kernels would take longer."""
    count = len(result)
    fit = PIECE_BYTES * count // result.nbytes
    return list(chunks(count, max(1, min(fit, -(-count // LEAST_PIECES))) if result.device.type == "cpu" else count))


def _normalized(result, weight, bias) -> torch.Tensor:
    if weight is None:
        return result
    divisor, *shift = (p.view(-1, *[1] * (result.dim() - 2)) for p in (weight, bias) if p is not None)
    shift = shift[0] / -divisor if shift else torch.zeros_like(divisor)
    return torch.addcdiv(shift, result, divisor).to(result.dtype)


def _grouped(tensor: torch.Tensor, rstd: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows or images with a dimension for their groups, and the inverse deviation of each."""
    apart = tensor.unflatten(1, (rstd.shape[1], -1))
    return apart, rstd.view(*rstd.shape, *[1] * (apart.dim() - 2))


def _define(name: str, more: str, arrange: Callable[..., tuple]):
    """The operator, its forms in place, and its costs."""
    rest = f"Tensor rstd, Tensor? weight, Tensor? bias, {more}, bool[3] mask"

    def parts(call: OpCall) -> list[OpCall]:
        """What runs over all rows or images: on a CPU less, as they are in the cache."""
        gradient, result, rstd, *parameters, backward = arrange(*call.args)
        whole = replace(backward(gradient, result, rstd, *parameters), out=call.out, on_gpu=call.on_gpu)
        scaled = OpCall(aten.mul.Tensor, (result, rstd), out=result, on_gpu=call.on_gpu)
        divided = OpCall(aten.addcdiv.default, (parameters[0], result, parameters[0]), out=result, on_gpu=call.on_gpu)
        return [whole, scaled] if parameters[0] is None else [divided, whole, scaled]

    def workspace(call: OpCall) -> int:
        """A piece of the normalized input and of its gradient, what makes these, and sums."""
        gradient, result, rstd, *parameters, backward = arrange(*call.args)
        begin, end = _pieces(result)[0]
        piece = backward(gradient[begin:end], result[begin:end], rstd[begin:end], *parameters)
        inside = workspace_bytes(replace(piece, out=result[begin:end], on_gpu=call.on_gpu))
        return inside + 2 * result[begin:end].nbytes + 2 * rstd[begin:end].nbytes + 4 * 4 * result.shape[1]

    made = define(
        f"{name}(Tensor gradient, Tensor result, {rest}) -> (Tensor, Tensor, Tensor)",
        lambda gradient, result, *args: _fill(arrange, torch.empty_like(result), gradient, result, *args),
        _room,
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
