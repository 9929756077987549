"""Workspace of operators: bytes that an operator allocates beyond its outputs and gives back before it returns.

Each formula is a function of an `OpCall` and was fitted to the allocator's own events around the single operator (PyTorch
2.13, x86, oneDNN), rounded up: a plan may be a little pessimistic about an operator, never optimistic. What is not listed
takes next to nothing. Operators differ in three ways only: some reorder their operands into a kernel's own layout
(convolutions), some make an operand contiguous or convert its type first, some keep one private buffer a thread.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from .base import OpCall

aten = torch.ops.aten
LOW_PRECISION = (torch.bfloat16, torch.float16)
WIDEST_KERNEL = 14  # elements in a row up to which oneDNN has kernels for convolutions
UNFOLDED_BLOCK = 1 << 20  # bytes for each thread that the forward unfolds at once, at most
CHANNEL_BLOCK = 16  # oneDNN's widest blocked layout (nChw16c) pads channels to a multiple of this


def workspace_bytes(call: OpCall) -> int:
    """Bytes that `call` takes above its inputs and outputs, at most; 0 for views and for what is no dispatcher operator."""
    if call.packet is None or call.is_alias or not call.inputs:
        return 0
    formula = WORKSPACE.get(call.packet)
    if formula is not None:
        return formula(call)
    if _on_cpu(call) and torch.Tag.pointwise in getattr(call.target, "tags", ()):
        return _promotion(call)
    return 0


def _on_cpu(call: OpCall) -> bool:
    if call.on_gpu is not None:
        return not call.on_gpu
    return all(t.device.type in ("cpu", "meta") for t in call.inputs)


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _blocked(tensor: torch.Tensor, channel_dims: tuple[int, ...]) -> int:
    """Bytes of `tensor` in oneDNN's blocked layout, with its channels padded."""
    shape = [math.ceil(n / CHANNEL_BLOCK) * CHANNEL_BLOCK if d in channel_dims else n for d, n in enumerate(tensor.shape)]
    return math.prod(shape) * tensor.element_size()


def _channels_last(tensor: torch.Tensor) -> bool:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return tensor.dim() in formats and tensor.is_contiguous(memory_format=formats[tensor.dim()]) and not tensor.is_contiguous()


def _columns(x: torch.Tensor, w: torch.Tensor, spatial: torch.Size) -> int:
    """The unfolded input of a convolution that runs as one matrix product: what float64 gets, for the whole batch."""
    return x.shape[0] * x.shape[1] * math.prod(w.shape[2:]) * math.prod(spatial) * x.element_size()


def _is_wide(x: torch.Tensor, w: torch.Tensor) -> bool:
    """Whether a convolution runs as a matrix product: oneDNN has kernels of its own for rows of up to WIDEST_KERNEL elements;
    their number does not matter. Low precision was not fitted there."""
    return x.dtype is torch.float32 and w.shape[-1] > WIDEST_KERNEL


def _images_at_once(x: torch.Tensor) -> int:
    """One for each thread, as far as there are."""
    return min(torch.get_num_threads(), x.shape[0])


def _unfolded(x: torch.Tensor, w: torch.Tensor, spatial: torch.Size) -> int:
    """The unfolded input of one image and group, for as many images as run at once; 0 where there is no need of it."""
    if not _is_wide(x, w):
        return 0
    return _images_at_once(x) * w.shape[1] * math.prod(w.shape[2:]) * math.prod(spatial) * x.element_size()


def _reordered_input(x: torch.Tensor, w: torch.Tensor) -> int:
    """The input in blocks; an image of a few channels is read as it lies, unless the kernel is a large patch."""
    plain = x.shape[1] <= 4 and math.prod(w.shape[2:]) <= 49
    return 0 if plain else _blocked(x, (1,))


def _unit_stride_copy(x: torch.Tensor, w: torch.Tensor, strides: list[int], spatial: torch.Size) -> int:
    """A strided 1x1 convolution gathers the pixels that it looks at: one image for each thread."""
    if math.prod(w.shape[2:]) > 1 or max(strides) == 1:
        return 0
    return torch.get_num_threads() * x.shape[1] * math.prod(spatial) * x.element_size()


def _convolution(call: OpCall) -> int:
    """oneDNN reorders input and weight into blocks, computes a blocked output, frees the first two and copies the third
    into the plain layout; a transposed one holds two more outputs for a moment. Channels-last runs as it lies, but for the
    weight. cuDNN's implicit matrix products take nothing worth counting; measure, where it may pick other algorithms."""
    if not _on_cpu(call):
        return _contiguous_copies(call)
    x, w, strides, transposed = call.args[0], call.args[1], call.args[3], call.args[6]
    out = call.outputs[0]
    if x.dtype is torch.float64:
        return _contiguous_copies(call) + _columns(x, w, x.shape[2:] if transposed else out.shape[2:])
    if _channels_last(x):
        return 2 * _blocked(w, (0,))
    out_bytes = _blocked(out, (1,))
    computing = _reordered_input(x, w) + 2 * _blocked(w, (0,)) - _bytes(w) + out_bytes - _bytes(out)
    computing += _unit_stride_copy(x, w, strides, out.shape[2:])
    unfolded = _unfolded(x, w, x.shape[2:] if transposed else out.shape[2:])
    computing += min(unfolded, torch.get_num_threads() * UNFOLDED_BLOCK)
    return _contiguous_copies(call) + max(computing, (2 if transposed else 1) * out_bytes)


def _convolution_backward(call: OpCall) -> int:
    """First the input's gradient, in blocks and then plain (twice in blocks where the convolution is strided and not
    depthwise); then output gradient and input in blocks while the weight's gradient is summed up, with one more partial sum
    for each further thread where activations outweigh weights; then the weight's gradient in blocks beside the plain one.
    cuDNN: one more copy of the weight's gradient."""
    if not _on_cpu(call):
        return _contiguous_copies(call) + _bytes(call.args[2])
    grad, x, w, _, strides = call.args[:5]
    if x.dtype is torch.float64:
        return _contiguous_copies(call) + _columns(x, w, x.shape[2:] if call.args[7] else grad.shape[2:])
    if _is_wide(x, w):
        return _contiguous_copies(call) + _wide_convolution_backward(call)
    w_bytes, splits = _blocked(w, (0,)) * (4 // min(4, w.element_size())), _images_at_once(x) - 1
    partial = w_bytes * splits + (64 << 10) if _bytes(grad) + _bytes(x) > _bytes(w) else 0
    if x.dtype in LOW_PRECISION:
        partial += _bytes(x) + w_bytes
    if _channels_last(x) or _channels_last(grad):
        converted = sum(_bytes(t) for t in (x, grad) if not _channels_last(t))
        mixed = 2 * _bytes(grad) if converted else 0
        return partial + 3 * w_bytes + converted + mixed + _blocks_of_each_group(w, call.args[9])
    grad_bytes, x_bytes = _blocked(grad, (1,)), _reordered_input(x, w)
    made_bytes = _blocked(x, (1,))  # of few channels, too
    input_phase = max(grad_bytes + w_bytes, made_bytes) + made_bytes - call.new_output_bytes if call.args[10][0] else 0
    if call.args[10][0] and max(strides) > 1 and w.shape[1] > 1:
        input_phase = max(input_phase, 3 * made_bytes - call.new_output_bytes)
    weight_phase = grad_bytes + x_bytes + partial + _unit_stride_copy(x, w, strides, grad.shape[2:]) if call.args[10][1] else 0
    return _contiguous_copies(call) + max(input_phase, weight_phase, w_bytes)


def _wide_convolution_backward(call: OpCall) -> int:
    """Gradients by matrix products: of the weight with four partial sums of it for each thread."""
    grad, x, w = call.args[:3]
    layouts, images = {_channels_last(x), _channels_last(w)}, _images_at_once(x)
    unfolded = _unfolded(x, w, x.shape[2:] if call.args[7] else grad.shape[2:]) * (2 if _channels_last(x) else 1)
    weight_phase = unfolded + 4 * _bytes(w) * images + (_bytes(w) if len(layouts) > 1 else 0)
    input_phase = _blocked(w, (0, 1)) + 2 * _bytes(grad) + _bytes(x)
    return max(input_phase if call.args[10][0] else 0, weight_phase if call.args[10][1] else 0)


def _blocks_of_each_group(w: torch.Tensor, groups: int) -> int:
    """In channels-last, the weights of a grouped convolution are laid out with both channels of every group in whole blocks."""
    if groups == 1:
        return 0
    out_channels, in_channels = w.shape[0] // groups, w.shape[1]
    padded = math.prod(-(-n // CHANNEL_BLOCK) * CHANNEL_BLOCK for n in (out_channels, in_channels))
    return groups * padded * math.prod(w.shape[2:]) * 4


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
    return _promotion(call) if _on_cpu(call) else 0


def _contiguous_copies(call: OpCall) -> int:
    """Kernels that take plain layouts only: a copy of each operand that lies otherwise."""
    return sum(_bytes(t) for t in call.inputs if not (t.is_contiguous() or _channels_last(t)))


def _resampling(call: OpCall) -> int:
    """The CPU's kernel for small images takes channels-last: input and output once more."""
    small = call.outputs[0].shape[-1] < 96
    return _contiguous_copies(call) + (call.new_output_bytes + _bytes(call.inputs[0]) if _on_cpu(call) and small else 0)


def _safe_softmax(call: OpCall) -> int:
    """A mask of the entries that are minus infinity, and one of the rows that are."""
    x = call.inputs[0]
    return _softmax(call) + x.numel() + 2 * x.numel() // max(1, x.shape[call.args[1]])


def _softmax(call: OpCall) -> int:
    """A copy of an operand that is not contiguous, and then of the result before it is laid out like it."""
    return 2 * _contiguous_copies(call)


def _reduction(call: OpCall) -> int:
    """On the CPU a sum in a wider type than its input's converts the whole input first."""
    x = call.inputs[0]
    if not _on_cpu(call) or x.dtype in (torch.float32, torch.float64, torch.int64) or x.is_complex():
        return 0
    return x.numel() * (4 if x.is_floating_point() else 8) + 2 * sum(t.numel() * 4 for t in call.outputs)


def _batch_norm(call: OpCall) -> int:
    """The CPU takes operands as they lie."""
    return 0 if _on_cpu(call) else _contiguous_copies(call)


def _batch_norm_backward(call: OpCall) -> int:
    """One temporary of the input's size on the CPU where both operands are contiguous."""
    if not _on_cpu(call):
        return _contiguous_copies(call)
    return _bytes(call.inputs[1]) if all(t.is_contiguous() for t in call.inputs[:2]) else 0


def _layer_norm_backward(call: OpCall) -> int:
    """Partial sums of the two parameter gradients, a row for each thread (a block of rows on a GPU)."""
    rows = torch.get_num_threads() if _on_cpu(call) else 64
    return _contiguous_copies(call) + 2 * rows * math.prod(call.args[2]) * 4


def _group_norm_backward(call: OpCall) -> int:
    """Two sums for each image and channel."""
    x = call.inputs[1]
    return _contiguous_copies(call) + 2 * x.shape[0] * x.shape[1] * 4


def _dropout(call: OpCall) -> int:
    """The CPU draws the mask in the input's type before it converts it to bool."""
    return _bytes(call.inputs[0]) if _on_cpu(call) else 0


def _matmul(call: OpCall) -> int:
    """BLAS takes matrices with one unit stride; others are copied, and so are conjugates that are not written out. Low
    precision packs blocks, in a buffer for each thread."""
    matrices = [t for t in call.inputs if t.dim() >= 2]
    strided = [t for t in matrices if 1 not in t.stride()[-2:] and min(t.shape[-2:], default=0) > 1]
    copies = sum(_bytes(t) for t in (*strided, *(t for t in matrices if t.is_conj())))
    packed = torch.get_num_threads() << 18 if _on_cpu(call) and matrices[0].dtype in LOW_PRECISION else 0
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
    packing = 2 * (_bytes(key) + _bytes(value)) + torch.get_num_threads() * rows * columns * 2 if low else 0
    return torch.get_num_threads() * tile + packing


def _cpu_attention_backward(call: OpCall) -> int:
    """For each thread two tiles of scores and the sums of their rows; the output gradient once more where it does not lie as
    (batch, length, heads)."""
    grad, query, key = call.inputs[:3]
    rows, columns = _attention_tile(OpCall(call.target, (query, key)), query)
    copy = 0 if grad.transpose(1, 2).is_contiguous() else _bytes(grad)
    low = torch.get_num_threads() * rows * columns * 4 if query.dtype in LOW_PRECISION else 0
    return copy + torch.get_num_threads() * (2 * rows * columns + rows) * 4 + low


def _gpu_attention_backward(call: OpCall) -> int:
    """The query's gradient summed in fp32, and a row sum for each query."""
    query = call.inputs[1]
    return query.numel() * 4 + 2 * math.prod(query.shape[:3]) * 4


WORKSPACE: dict[object, Callable[[OpCall], int]] = {
    aten.convolution: _convolution,
    aten.convolution_backward: _convolution_backward,
    aten.native_batch_norm: _batch_norm,
    aten._native_batch_norm_legit: _batch_norm,
    aten._native_batch_norm_legit_functional: _batch_norm,
    aten.native_batch_norm_backward: _batch_norm_backward,
    aten.native_layer_norm: _contiguous_copies,
    aten.native_layer_norm_backward: _layer_norm_backward,
    aten.native_group_norm: _contiguous_copies,
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
    aten.max_pool2d_with_indices: _contiguous_copies,
    aten.max_pool2d_with_indices_backward: _contiguous_copies,
    aten.avg_pool2d: _contiguous_copies,
    aten.avg_pool2d_backward: _contiguous_copies,
    aten._adaptive_avg_pool2d: _contiguous_copies,
    aten._adaptive_avg_pool2d_backward: _contiguous_copies,
    aten.upsample_nearest2d_backward: _contiguous_copies,
    aten.upsample_bilinear2d_backward: _contiguous_copies,
    aten.embedding_dense_backward: _contiguous_copies,
    aten.nll_loss_forward: _contiguous_copies,
    aten.nll_loss_backward: _contiguous_copies,
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
}
