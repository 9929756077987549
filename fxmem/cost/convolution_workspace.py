"""Workspace of convolutions. On a CPU, oneDNN lays operands out anew, in blocks; the forms that it does not know, in float64
and with wide kernels, run as matrix products of an unfolded input. Fitted like all of `workspace`."""

from __future__ import annotations

import math

import torch

from ..torch_internals import has_float16_convolutions
from .base import OpCall
from .copies import LOW_PRECISION, bytes_of, contiguous_copies, is_channels_last, on_cpu

WIDEST_KERNEL = 14  # elements in a row up to which oneDNN has kernels for convolutions
FARTHEST_PADDING = 10  # elements around an image up to which it has kernels for their backward
UNFOLDED_BLOCK = 1 << 20  # bytes for each thread that the forward unfolds at once, at most
CHANNEL_BLOCK = 16  # oneDNN's widest blocked layout (nChw16c) pads channels to a multiple of this


def _blocked(tensor: torch.Tensor, channel_dims: tuple[int, ...]) -> int:
    """Bytes of `tensor` in oneDNN's blocked layout, with its channels padded."""
    shape = [math.ceil(n / CHANNEL_BLOCK) * CHANNEL_BLOCK if d in channel_dims else n for d, n in enumerate(tensor.shape)]
    return math.prod(shape) * tensor.element_size()


def _columns(x: torch.Tensor, w: torch.Tensor, spatial: torch.Size) -> int:
    """The unfolded input of a convolution that runs as one matrix product: what float64 gets, for the whole batch."""
    return x.shape[0] * x.shape[1] * math.prod(w.shape[2:]) * math.prod(spatial) * x.element_size()


def _is_wide(x: torch.Tensor, w: torch.Tensor) -> bool:
    """Whether a convolution runs as a matrix product: oneDNN has kernels of its own for rows of up to WIDEST_KERNEL elements;
    their number does not matter. Low precision was not fitted there."""
    return x.dtype is torch.float32 and w.shape[-1] > WIDEST_KERNEL


def _is_far_padded(x: torch.Tensor, padding: list[int]) -> bool:
    """Whether a convolution may run as a matrix product for its padding, as in an atrous pyramid; which operators do depends on
    dilation and sizes."""
    return x.dtype is torch.float32 and max(padding) > FARTHEST_PADDING


def _is_far_padded_backward(call: OpCall) -> bool:
    """Whether the transposed convolution that leads back to the input has such a padding, or cuts more off than it has."""
    missing = [(k - 1) * d - p for k, d, p in zip(call.args[2].shape[2:], call.args[6], call.args[5], strict=True)]
    return max(missing) > FARTHEST_PADDING or min(missing) < 0


def _is_half_without_kernels(x: torch.Tensor) -> bool:
    """Whether oneDNN has no kernels for a type on this processor."""
    return x.dtype is torch.float16 and not has_float16_convolutions()


def _images_at_once(x: torch.Tensor) -> int:
    """One for each thread, as far as there are."""
    return min(torch.get_num_threads(), x.shape[0])


def _unfolded(x: torch.Tensor, w: torch.Tensor, spatial: torch.Size, padding: list[int]) -> int:
    """The unfolded input of one image and group, for as many images as run at once; 0 where there is no need of it."""
    if not _is_wide(x, w) and not _is_far_padded(x, padding):
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


def convolution(call: OpCall) -> int:
    """oneDNN reorders input and weight into blocks, computes a blocked output, frees the first two and copies the third
    into the plain layout; a transposed one holds two more outputs for a moment. Channels-last runs as it lies, but for the
    weight. cuDNN's implicit matrix products take nothing worth counting; measure, where it may pick other algorithms."""
    if not on_cpu(call):
        return contiguous_copies(call)
    x, w, strides, padding, transposed = call.args[0], call.args[1], call.args[3], call.args[4], call.args[6]
    out = call.outputs[0]
    spatial = x.shape[2:] if transposed else out.shape[2:]
    if x.dtype is torch.float64:
        return contiguous_copies(call) + _columns(x, w, spatial)
    if _is_half_without_kernels(x):
        return contiguous_copies(call) + max(_columns(x, w, spatial), 2 * bytes_of(out))
    if is_channels_last(x):
        return (6 if transposed else 2) * _blocked(w, (0,))
    out_bytes = _blocked(out, (1,))
    computing = _reordered_input(x, w) + 2 * _blocked(w, (0,)) - bytes_of(w) + out_bytes - bytes_of(out)
    computing += _unit_stride_copy(x, w, strides, out.shape[2:])
    unfolded = _unfolded(x, w, spatial, padding)
    computing += min(unfolded, torch.get_num_threads() * UNFOLDED_BLOCK)
    return contiguous_copies(call) + max(computing, (2 if transposed else 1) * out_bytes)


def convolution_backward(call: OpCall) -> int:
    """First the input's gradient, in blocks and then plain (twice in blocks where the convolution is strided and not
    depthwise); then output gradient and input in blocks while the weight's gradient is summed up, with one more partial sum
    for each further thread where activations outweigh weights; then the weight's gradient in blocks beside the plain one.
    cuDNN: one more copy of the weight's gradient."""
    if not on_cpu(call):
        return contiguous_copies(call) + bytes_of(call.args[2])
    grad, x, w, _, strides, padding = call.args[:6]
    of_weights, spatial = _makes_the_weights(call), x.shape[2:] if call.args[7] else grad.shape[2:]
    if x.dtype is torch.float64:
        return contiguous_copies(call) + _columns(x, w, spatial)
    if _is_half_without_kernels(x):
        columns = _columns(x, w, spatial)
        return contiguous_copies(call) + max(columns if call.args[10][1] else 0, 2 * bytes_of(grad)) + 2 * bytes_of(w)
    if _is_wide(x, w):
        return contiguous_copies(call) + _product_backward(call)
    w_bytes, splits = _blocked(w, (0,)) * (4 // min(4, w.element_size())), _images_at_once(x) - 1
    partial = w_bytes * splits + (64 << 10) if bytes_of(grad) + bytes_of(x) > bytes_of(w) else 0
    if x.dtype in LOW_PRECISION:
        partial += bytes_of(x) + w_bytes
    if is_channels_last(x) or is_channels_last(grad):
        converted = sum(bytes_of(t) for t in (x, grad) if not is_channels_last(t))
        mixed = 2 * bytes_of(grad) if converted else 0
        return partial + 3 * w_bytes + converted + mixed + _blocks_of_each_group(w, call.args[9])
    grad_bytes, x_bytes = _blocked(grad, (1,)), _reordered_input(x, w)
    made_bytes = _blocked(x, (1,))  # of few channels, too
    input_phase = max(grad_bytes + w_bytes, made_bytes) + made_bytes - call.new_output_bytes if call.args[10][0] else 0
    if call.args[10][0] and max(strides) > 1 and w.shape[1] > 1:
        input_phase = max(input_phase, 3 * made_bytes - call.new_output_bytes)
    weight_phase = grad_bytes + x_bytes + partial + _unit_stride_copy(x, w, strides, grad.shape[2:]) if of_weights else 0
    if of_weights and not call.args[10][1]:
        weight_phase += bytes_of(w)  # the gradient that nobody wants
    product = _product_backward(call) if _is_far_padded(x, padding) else 0
    return contiguous_copies(call) + max(input_phase, weight_phase, w_bytes, product)


def _makes_the_weights(call: OpCall) -> bool:
    """Whether a backward makes the weight's gradient: the bias's, too, is made with it, even alone."""
    return call.args[10][1] or call.args[10][2]


def _product_backward(call: OpCall) -> int:
    """Gradients by matrix products: of the weight with four partial sums of it for each thread."""
    grad, x, w = call.args[:3]
    layouts, images = {is_channels_last(x), is_channels_last(w)}, _images_at_once(x)
    unfolded = _unfolded(x, w, x.shape[2:] if call.args[7] else grad.shape[2:], call.args[5])
    unfolded *= 2 if is_channels_last(x) else 1
    weight_phase = unfolded + 4 * bytes_of(w) * images + (bytes_of(w) if len(layouts) > 1 else 0) + 256
    input_phase = _blocked(w, (0, 1)) + 2 * bytes_of(grad) + bytes_of(x)
    if not _is_wide(x, w):
        input_phase = unfolded + 256 if _is_far_padded_backward(call) else 0
    return max(input_phase if call.args[10][0] else 0, weight_phase if _makes_the_weights(call) else 0)


def _blocks_of_each_group(w: torch.Tensor, groups: int) -> int:
    """In channels-last, the weights of a grouped convolution are laid out with both channels of every group in whole blocks."""
    if groups == 1:
        return 0
    out_channels, in_channels = w.shape[0] // groups, w.shape[1]
    padded = math.prod(-(-n // CHANNEL_BLOCK) * CHANNEL_BLOCK for n in (out_channels, in_channels))
    return groups * padded * math.prod(w.shape[2:]) * 4
