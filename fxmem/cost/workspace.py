"""Workspace of operators: bytes that an operator allocates beyond its outputs and gives back before it returns.

Each formula is a function of an `OpCall` and was fitted to the allocator's own events around the single operator (PyTorch
2.13, x86, oneDNN), rounded up: a plan may be a little pessimistic about an operator that is listed, never optimistic. What is
not listed counts as taking nothing. Operators differ in four ways: some reorder their operands into a kernel's own layout
(`convolution_workspace`), some make an operand contiguous (`copies`) or convert its type first, some are made of several
others, whose results between count, and some keep one private buffer a thread.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from ..layouts import channels_last_format, in_usual_format
from .base import OpCall
from .convolution_workspace import convolution, convolution_backward
from .copies import (
    LOW_PRECISION,
    bytes_of,
    contiguous_copies,
    in_the_gradients_format,
    in_the_inputs_format,
    is_channels_last,
    on_cpu,
    plain_copies,
)

aten = torch.ops.aten


def workspace_bytes(call: OpCall) -> int:
    """Bytes that `call` takes above its inputs and outputs, at most; 0 for views and for what is no dispatcher operator."""
    if call.packet is None or call.is_alias or not call.inputs:
        return 0
    formula = WORKSPACE.get(call.packet)
    if formula is not None:
        return formula(call)
    if on_cpu(call) and torch.Tag.pointwise in getattr(call.target, "tags", ()):
        return _promotion(call)
    return 0


def _promotion(call: OpCall) -> int:
    """The CPU's element-wise kernels convert an operand of another type than the common one in a whole copy."""
    tensors = call.inputs[1:] if call.packet is aten.where else call.inputs
    tensors = [t for t in tensors if t.dim() > 0]
    if call.packet is aten.masked_fill or len({t.dtype for t in tensors}) < 2:
        return 0
    common = tensors[0].dtype
    for tensor in tensors[1:]:
        common = torch.promote_types(common, tensor.dtype)
    return sum(t.numel() * common.itemsize for t in tensors if t.dtype != common)


def _promoted_operands(call: OpCall) -> int:
    """Concatenation and dropout's backward convert like element-wise kernels."""
    return _promotion(call) if on_cpu(call) else 0


def _resampling(call: OpCall) -> int:
    """The CPU's kernel for small images takes channels-last: input and output once more."""
    small = call.outputs[0].shape[-1] < 96 and not is_channels_last(call.inputs[0])
    return contiguous_copies(call) + (call.new_output_bytes + bytes_of(call.inputs[0]) if on_cpu(call) and small else 0)


def _safe_softmax(call: OpCall) -> int:
    """A mask of the entries that are minus infinity, and one of the rows that are."""
    x = call.inputs[0]
    return _softmax(call) + x.numel() + 2 * x.numel() // max(1, x.shape[call.args[1]])


def _softmax(call: OpCall) -> int:
    """A copy of an operand that is not contiguous, and then, unless it is channels-last, of the result before it is laid out
    like it."""
    return plain_copies(call) + contiguous_copies(call)


def _reduction(call: OpCall) -> int:
    """On the CPU a sum in a wider type than its input's converts the whole input first."""
    x = call.inputs[0]
    if not on_cpu(call) or x.dtype in (torch.float32, torch.float64, torch.int64) or x.is_complex():
        return 0
    return x.numel() * (4 if x.is_floating_point() else 8) + 2 * sum(t.numel() * 4 for t in call.outputs)


def _batch_norm(call: OpCall) -> int:
    """The CPU takes operands as they lie; in low precision it converts those with gaps."""
    x = call.inputs[0]
    if not on_cpu(call):
        return contiguous_copies(call)
    return 4 * x.numel() if x.dtype in LOW_PRECISION and not in_usual_format(x) else 0


def _batch_norm_backward(call: OpCall) -> int:
    """One temporary of the input's size on the CPU where both operands have the same usual format; a conversion of the input in
    low precision where they have not."""
    gradient, x = call.inputs[:2]
    if not on_cpu(call):
        return contiguous_copies(call)
    last = all(channels_last_format(t) for t in (gradient, x))
    if last or all(t.is_contiguous() for t in (gradient, x)):
        return bytes_of(x)
    return 4 * x.numel() if x.dtype in LOW_PRECISION else 0


def _layer_norm_backward(call: OpCall) -> int:
    """Partial sums of the two parameter gradients, a row for each thread (a block of rows on a GPU)."""
    rows = torch.get_num_threads() if on_cpu(call) else 64
    return plain_copies(call) + 2 * rows * math.prod(call.args[2]) * 4


def _group_norm_backward(call: OpCall) -> int:
    """Two sums for each image and channel."""
    x = call.inputs[1]
    return (0 if on_cpu(call) else contiguous_copies(call)) + 2 * x.shape[0] * x.shape[1] * 4


def _loss(call: OpCall) -> int:
    """The losses of all elements before they are summed up."""
    return max(map(bytes_of, call.inputs)) + _summed_in_floats(call) if _reduction_of(call) else 0


def _loss_with_logits(call: OpCall) -> int:
    """Composed of other operators: a term, the losses, and what is not contiguous."""
    x = call.inputs[0]
    terms = 1 + (not x.is_contiguous()) + (_reduction_of(call) != 0)
    return terms * bytes_of(x) + _summed_in_floats(call)


def _reduction_of(call: OpCall) -> int:
    """A loss's argument of that name: 0 for none, 1 for the mean, 2 for the sum."""
    if "reduction" in call.kwargs:
        return call.kwargs["reduction"]
    place = [argument.name for argument in call.target._schema.arguments].index("reduction")
    return call.args[place] if len(call.args) > place else 1


def _summed_in_floats(call: OpCall) -> int:
    """A mean in low precision converts all that it sums up; no more where the losses of all elements lie in the result's own
    memory."""
    x = call.inputs[0]
    return 4 * x.numel() if on_cpu(call) and x.dtype in LOW_PRECISION and _reduction_of(call) == 1 else 0


def _twice(call: OpCall) -> int:
    """Two more tensors like the forward's input on the way."""
    return 2 * bytes_of(call.inputs[1])


def _once_more(call: OpCall) -> int:
    """A tensor like the operand on the way, and of what is not contiguous a copy."""
    return bytes_of(call.inputs[0]) + plain_copies(call)


def _logsumexp(call: OpCall) -> int:
    """The exponentials, and maxima and sums of them."""
    return bytes_of(call.inputs[0]) + 3 * call.new_output_bytes


def _roll(call: OpCall) -> int:
    """One dimension after the other."""
    return bytes_of(call.inputs[0]) if len(call.args[1]) > 1 else 0


def _kth_value(call: OpCall) -> int:
    """Values and indices, to be sorted in part."""
    x = call.inputs[0]
    return bytes_of(x) + 8 * x.numel()


def _embedding_bag(call: OpCall) -> int:
    """Which bag each index is in."""
    return 8 * (call.args[1].numel() + call.args[2].numel() + 1)


def _embedding_bag_backward(call: OpCall) -> int:
    """The indices sorted, and where they came from; of maxima, what is selected of the gradient."""
    gradient, indices, maximum = call.args[0], call.args[1], call.args[8] == 2
    return 3 * bytes_of(gradient) + 8 * len(gradient) if maximum else 32 * indices.numel() + 64


def _gelu_backward(call: OpCall) -> int:
    """oneDNN's, which takes the gradient contiguous where the input is, by two steps."""
    gradient, x = call.inputs
    return 2 * bytes_of(gradient) if on_cpu(call) and x.is_contiguous() and not gradient.is_contiguous() else 0


def _scattered(call: OpCall) -> int:
    """In low precision the CPU gathers and scatters floats."""
    return 4 * call.outputs[0].numel() if on_cpu(call) and call.inputs[0].dtype in LOW_PRECISION else 0


def _grid_sampler_backward(call: OpCall) -> int:
    """The gradient alone has to be contiguous."""
    gradient = call.inputs[0]
    return 0 if gradient.is_contiguous() else bytes_of(gradient)


def _unfold_backward(call: OpCall) -> int:
    """The places along the dimension, as integers."""
    return 8 * call.args[1][call.args[2]] if call.args[1] else 0


def _dropout(call: OpCall) -> int:
    """The CPU draws the mask in the input's type before it converts it to bool."""
    return bytes_of(call.inputs[0]) if on_cpu(call) else 0


def _matmul(call: OpCall) -> int:
    """BLAS takes matrices with one unit stride; others are copied, and so are conjugates that are not written out. Low
    precision packs blocks, in a buffer for each thread."""
    matrices = [t for t in call.inputs if t.dim() >= 2]
    strided = [t for t in matrices if 1 not in t.stride()[-2:] and min(t.shape[-2:], default=0) > 1]
    copies = sum(bytes_of(t) for t in (*strided, *(t for t in matrices if t.is_conj())))
    packed = torch.get_num_threads() << 18 if on_cpu(call) and matrices[0].dtype in LOW_PRECISION else 0
    return copies + packed


def _attention_tile(call: OpCall, query: torch.Tensor) -> tuple[int, int]:
    """Rows and columns of the tile of scores that PyTorch's CPU flash attention works on."""
    length = query.shape[2]
    rows = 256 if length >= 768 else 64 if length >= 192 else 32
    return min(rows, length), min(512, call.inputs[1].shape[2])


def _cpu_attention(call: OpCall) -> int:
    """For each thread a tile of scores, its row maxima and sums, and its share of the output, all in fp32; low precision
    has the tile once more and packs keys and values."""
    query, key, value = call.inputs[:3]
    rows, columns = _attention_tile(call, query)
    tile = rows * (columns + 2 + query.shape[3]) * 4
    low = query.dtype in LOW_PRECISION
    packing = 2 * (bytes_of(key) + bytes_of(value)) + torch.get_num_threads() * rows * columns * 2 if low else 0
    return torch.get_num_threads() * tile + packing


def _cpu_attention_backward(call: OpCall) -> int:
    """For each thread two tiles of scores and the sums of their rows; the output gradient once more where it does not lie as
    (batch, length, heads)."""
    grad, query, key = call.inputs[:3]
    rows, columns = _attention_tile(OpCall(call.target, (query, key)), query)
    copy = 0 if grad.transpose(1, 2).is_contiguous() else bytes_of(grad)
    low = torch.get_num_threads() * rows * columns * 4 if query.dtype in LOW_PRECISION else 0
    return copy + torch.get_num_threads() * (2 * rows * columns + rows) * 4 + low


def _gpu_attention_backward(call: OpCall) -> int:
    """The query's gradient summed in fp32, and a row sum for each query."""
    query = call.inputs[1]
    return query.numel() * 4 + 2 * math.prod(query.shape[:3]) * 4


WORKSPACE: dict[object, Callable[[OpCall], int]] = {
    **dict.fromkeys(
        (
            aten.native_group_norm,
            aten.max_pool2d_with_indices,
            aten.avg_pool2d,
            aten._adaptive_avg_pool2d,
            aten.upsample_nearest2d_backward,
            aten.upsample_bilinear2d_backward,
            aten.reflection_pad2d,
            aten.replication_pad2d,
            aten.pixel_shuffle,
            aten.pixel_unshuffle,
            aten.adaptive_max_pool2d,
            aten.channel_shuffle,
            aten.native_channel_shuffle,
            aten.max_pool3d_with_indices,
        ),
        contiguous_copies,
    ),
    **dict.fromkeys(
        (
            aten.native_layer_norm,
            aten.embedding_dense_backward,
            aten.nll_loss_forward,
            aten.nll_loss_backward,
            aten.nll_loss2d_forward,
            aten.log_sigmoid_forward,
            aten.upsample_bicubic2d_backward,
            aten.tril,
            aten.triu,
            aten.avg_pool3d,
        ),
        plain_copies,
    ),
    **dict.fromkeys(
        (
            aten.max_pool2d_with_indices_backward,
            aten.avg_pool2d_backward,
            aten._adaptive_avg_pool2d_backward,
            aten.reflection_pad2d_backward,
            aten.replication_pad2d_backward,
        ),
        in_the_gradients_format,
    ),
    aten.convolution: convolution,
    aten.convolution_backward: convolution_backward,
    aten.native_batch_norm: _batch_norm,
    aten._native_batch_norm_legit: _batch_norm,
    aten._native_batch_norm_legit_functional: _batch_norm,
    aten.native_batch_norm_backward: _batch_norm_backward,
    aten.native_layer_norm_backward: _layer_norm_backward,
    aten.native_group_norm_backward: _group_norm_backward,
    aten.native_dropout: _dropout,
    aten.native_dropout_backward: _promoted_operands,
    aten.cat: _promoted_operands,
    aten.upsample_nearest2d: _resampling,
    aten.upsample_bilinear2d: _resampling,
    aten._softmax: _softmax,
    aten._safe_softmax: _safe_softmax,
    aten._log_softmax: _softmax,
    aten._softmax_backward_data: _softmax,
    aten._log_softmax_backward_data: _softmax,
    aten.sum: _reduction,
    aten.mean: _reduction,
    aten.mm: _matmul,
    aten.addmm: _matmul,
    aten.bmm: _matmul,
    aten.baddbmm: _matmul,
    aten._scaled_dot_product_flash_attention_for_cpu: _cpu_attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _cpu_attention_backward,
    aten._scaled_dot_product_flash_attention_backward: _gpu_attention_backward,
    aten._scaled_dot_product_efficient_attention_backward: _gpu_attention_backward,
    aten._scaled_dot_product_cudnn_attention_backward: _gpu_attention_backward,
    aten.adaptive_max_pool2d_backward: in_the_inputs_format,
    aten.mse_loss: _loss,
    aten.smooth_l1_loss: _loss,
    aten.huber_loss: _loss,
    aten.soft_margin_loss: _summed_in_floats,
    aten.binary_cross_entropy: _summed_in_floats,
    aten.binary_cross_entropy_with_logits: _loss_with_logits,
    aten.soft_margin_loss_backward: _twice,
    aten.im2col: _once_more,
    aten.unfold_backward: _unfold_backward,
    aten.median: _once_more,
    aten.logsumexp: _logsumexp,
    aten.roll: _roll,
    aten.kthvalue: _kth_value,
    aten.gelu_backward: _gelu_backward,
    aten._embedding_bag: _embedding_bag,
    aten._embedding_bag_backward: _embedding_bag_backward,
    aten.gather: _scattered,
    aten.scatter: _scattered,
    aten.scatter_add: _scattered,
    aten.grid_sampler_2d_backward: _grid_sampler_backward,
}
