"""Where the CPU's kernels lay their results in memory: strides from those of the operands, dimensions of size one included.

Nearly all kernels go by one of four rules: element-wise ones by TensorIterator's (aten/src/ATen/TensorIterator.cpp), others
take the format that an operand's strides suggest, keep an operand's strides, or make a contiguous result.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .layouts import channels_last_format
from .torch_internals import OpOverload, dense_strides, is_dense, suggested_format

aten = torch.ops.aten
Strides = tuple[int, ...]
Rule = Callable[[torch.Tensor, tuple], Strides]  # of a result, by PyTorch's fake of it and the operator's arguments


def rules_of(func: Any, args: tuple, kwargs: dict) -> tuple[Rule, ...]:
    """The rules for the first results of an operator called so; none where PyTorch's fake operators are right."""
    if kwargs.get("memory_format") not in (None, torch.preserve_format):
        return ()
    return RULES.get(func) or _rules_by_tag(func, _beside_number(func, args, kwargs))


def iterator_strides(operands: Sequence[torch.Tensor], beside_number: bool = False) -> Strides:
    """The strides of what TensorIterator makes of element-wise operands, in the kernel's order of them.

    beside_number: whether a number takes part as an operand, which keeps TensorIterator from its fast paths.
    """
    shape = torch.broadcast_shapes(*(t.shape for t in operands))
    if not beside_number and all(t.shape == shape for t in operands):
        if all(t.is_contiguous() for t in operands):
            return dense_strides(shape)
        if len(shape) == 4 and all(t.is_contiguous(memory_format=torch.channels_last) for t in operands):
            return dense_strides(shape, torch.channels_last)
        first = operands[0].stride()
        if is_dense(operands[0]) and all(t.stride() == first for t in operands):
            return tuple(first)
    order = _iteration_order([_broadcast_strides(t, shape) for t in operands], shape)
    strides, step = [0] * len(shape), 1
    if order == sorted(order, reverse=True):
        return dense_strides(shape)
    for dim in order:
        strides[dim], step = step, step * shape[dim]
    return tuple(strides)


def view_strides(shape: Sequence[int], strides: Sequence[int], wanted: Sequence[int]) -> Strides | None:
    """The strides of a view in another shape (computeStride in aten/src/ATen/TensorUtils.cpp); None where there is none."""
    if not shape or math.prod(shape) == 0:
        return (1,) * len(wanted) if not shape else tuple(strides) if shape == wanted else dense_strides(wanted)
    found, place = [0] * len(wanted), len(wanted) - 1
    size = covered = 1
    base = strides[-1]
    for dim in reversed(range(len(shape))):
        size *= shape[dim]
        if dim and (shape[dim - 1] == 1 or strides[dim - 1] == size * base):
            continue  # the next dimension goes on where this one ends
        while place >= 0 and (covered < size or wanted[place] == 1):
            found[place] = covered * base
            covered *= wanted[place]
            place -= 1
        if covered != size:
            return None
        if dim:
            base, size, covered = strides[dim - 1], 1, 1
    return tuple(found) if place < 0 else None


def _broadcast_strides(tensor: torch.Tensor, shape: torch.Size) -> list[int]:
    missing = len(shape) - tensor.dim()
    own = zip(tensor.shape, tensor.stride(), shape[missing:], strict=True)
    return [0] * missing + [0 if size == 1 != whole else stride for size, stride, whole in own]


def _iteration_order(strides: list[list[int]], shape: torch.Size) -> list[int]:
    """The dimensions from the innermost out: TensorIterator's insertion sort, which leaves in order what is ambiguous."""

    def comes_after(a: int, b: int) -> bool | None:
        for operand in strides:
            if operand[a] == 0 or operand[b] == 0:
                continue
            if operand[a] != operand[b]:
                return operand[a] > operand[b]
            if shape[a] > shape[b]:
                return True
        return None

    order = list(reversed(range(len(shape))))
    for start in range(1, len(order)):
        place = start
        for before in reversed(range(start)):
            found = comes_after(order[before], order[place])
            if found:
                order[before], order[place] = order[place], order[before]
                place = before
            elif found is False:
                break
    return order


def contiguous(made: torch.Tensor, given: tuple) -> Strides:
    """A contiguous result."""
    return dense_strides(made.shape)


def like(index: int) -> Rule:
    """A result in the format that the strides of operand `index` suggest."""
    return lambda made, given: dense_strides(made.shape, suggested_format(given[index]))


def kept(index: int) -> Rule:
    """A result with the strides of operand `index`, where that is dense."""
    return lambda made, given: tuple(given[index].stride()) if is_dense(given[index]) else as_made(made, given)


def elementwise(*order: int) -> Rule:
    """A result of TensorIterator, from the operands at these places, or else from all in their order."""
    return lambda made, given: iterator_strides([given[i] for i in order] or [t for t in given if isinstance(t, torch.Tensor)])


def beside_number(made: torch.Tensor, given: tuple) -> Strides:
    """A result of TensorIterator, of which one operand is a number."""
    return iterator_strides([t for t in given if isinstance(t, torch.Tensor)], beside_number=True)


def batch_norm(made: torch.Tensor, given: tuple) -> Strides:
    """Batch norm takes a tensor for contiguous that is so in either format, whatever its strides suggest."""
    x = given[0]
    if x.is_contiguous():
        return contiguous(made, given)
    return dense_strides(made.shape, channels_last_format(x) or suggested_format(x))


def batch_norm_backward(made: torch.Tensor, given: tuple) -> Strides:
    """As batch norm, where the gradient is contiguous, too, and its strides suggest the same format."""
    gradient, x = given[:2]
    suggested = suggested_format(x)
    whole = gradient.is_contiguous() or channels_last_format(gradient)
    if whole and suggested_format(gradient) is suggested:
        return batch_norm(made, (x,))
    return dense_strides(made.shape, suggested)


def rolled(made: torch.Tensor, given: tuple) -> Strides:
    """Concatenated from two slices along the first dimension that is rolled, of which an empty one has no format."""
    x, shifts, dims = given[0], given[1], given[2] if len(given) > 2 else ()
    wrapped = any(x.shape[d] > 1 and s % x.shape[d] for s, d in zip(shifts, dims, strict=False))
    return dense_strides(made.shape, suggested_format(x)) if wrapped else dense_strides(made.shape)


def gated(made: torch.Tensor, given: tuple) -> Strides:
    """A gated linear unit is element-wise over the two halves."""
    x, dim = given[0], given[1] if len(given) > 1 else -1
    half = x.shape[dim] // 2
    return iterator_strides([x.narrow(dim, 0, half), x.narrow(dim, half, half)])


def as_made(made: torch.Tensor, given: tuple) -> Strides:
    """What PyTorch's fake operator says."""
    return tuple(made.stride())


def weight_gradient(made: torch.Tensor, given: tuple) -> Strides:
    """Of a convolution of single pixels, the weight's gradient is contiguous, as the weight then is in both formats."""
    return contiguous(made, given) if all(n == 1 for n in made.shape[2:]) else as_made(made, given)


VIEWS = (aten.view.default, aten._unsafe_view.default)
FORMATTED, KEPT = like(0), kept(0)
BATCH_NORMS = (
    aten.native_batch_norm.default, aten._native_batch_norm_legit.no_stats, aten._native_batch_norm_legit_functional.default,
    aten._native_batch_norm_legit_no_training.default,
)  # fmt: skip
ITERATED = (  # element-wise though not tagged so
    aten.hardswish.default, aten.hardswish_backward.default, aten.hardsigmoid_backward.default, aten.hardtanh_backward.default,
    aten.silu_backward.default, aten.mish_backward.default, aten.softplus_backward.default, aten.elu_backward.default,
    aten.mse_loss.default, aten.smooth_l1_loss.default, aten.huber_loss.default,
)  # fmt: skip
REVERSED = (aten.threshold_backward.default, aten.leaky_relu_backward.default)
KEEPING = (
    aten.clone.default, aten._to_copy.default, aten.empty_like.default, aten.zeros_like.default, aten.ones_like.default,
    aten.full_like.default, aten.rand_like.default, aten.randn_like.default, aten.flip.default, aten.hardtanh.default,
    aten._prelu_kernel.default, aten.log_sigmoid_backward.default, aten.bernoulli.p,  # that one as `MatchEager` writes it
)  # fmt: skip
RESAMPLING = (aten.upsample_nearest2d.default, aten.upsample_bilinear2d.default, aten.upsample_bicubic2d.default)
CONTIGUOUS = (
    aten._softmax.default, aten._log_softmax.default, aten._softmax_backward_data.default,
    aten._log_softmax_backward_data.default, aten.native_layer_norm.default, aten.native_layer_norm_backward.default,
    aten.linalg_vector_norm.default, aten.im2col.default, aten.tril.default, aten.triu.default, aten.index_add.default,
    aten.masked_fill.Scalar, aten.masked_fill.Tensor, aten.mse_loss_backward.default, aten.smooth_l1_loss_backward.default,
    aten.huber_loss_backward.default,
)  # fmt: skip
# In place, they leave their operand as it lies; their forms that make a new tensor lay it out by rules of their own.
LAID_ANEW = {
    aten.masked_fill, aten.masked_scatter, aten.tril, aten.triu, aten.cumsum, aten.cumprod, aten.index_add, aten.index_copy,
    aten.scatter, aten.scatter_add, aten.scatter_reduce, aten.renorm,
}  # fmt: skip
RULES: dict[OpOverload, tuple[Rule, ...]] = {  # of the first results of each operator
    **dict.fromkeys(BATCH_NORMS, (batch_norm,)),
    aten.native_batch_norm_backward.default: (batch_norm_backward,),
    aten.native_group_norm.default: (FORMATTED,),
    aten.native_group_norm_backward.default: (like(1),),
    aten.convolution_backward.default: (as_made, weight_gradient),
    aten.native_dropout.default: (elementwise(0), KEPT),
    aten.sort.default: (KEPT, KEPT),
    aten.glu.default: (gated,),
    aten.roll.default: (rolled,),
    aten.log_sigmoid_forward.default: (contiguous, contiguous),
    aten.binary_cross_entropy_backward.default: (kept(1),),
    **dict.fromkeys(ITERATED, (elementwise(),)),
    **dict.fromkeys(REVERSED, (elementwise(1, 0),)),
    **dict.fromkeys(KEEPING, (KEPT,)),
    **dict.fromkeys(RESAMPLING, (FORMATTED,)),
    **dict.fromkeys(CONTIGUOUS, (contiguous,)),
}


@functools.cache
def _rules_by_tag(func: Any, beside: bool) -> tuple[Rule, ...]:
    """The rules of an operator that has none of its own: those of element-wise ones, if it makes a new tensor by them."""
    if torch.Tag.pointwise not in getattr(func, "tags", ()) or func._schema.is_mutable or func.is_view:
        return ()
    return (beside_number if beside else elementwise(),)


def _beside_number(func: Any, args: tuple, kwargs: dict) -> bool:
    """Whether a number is an operand: what the schema calls `self` or `other`, as in `mul.Tensor(x, 2.0)`."""
    named = [(argument.name, value) for argument, value in zip(func._schema.arguments, args, strict=False)]
    return any(name in ("self", "other") and not isinstance(value, torch.Tensor) for name, value in (*named, *kwargs.items()))
