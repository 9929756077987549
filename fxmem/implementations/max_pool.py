"""Max pooling keeps its input, of which the backward reads nothing but the shape, and an int64 index for each element of the
output; where in its window the largest element lay fits into a byte."""

from __future__ import annotations

import math

import torch
from torch import fx

from ..cost.base import OpCall
from .base import CODE, Call, Choice, register_implementation
from .operators import chunks, define

aten = torch.ops.aten
STEPS_BYTES = 32 << 10
CHUNK = 1 << 20  # elements of the output whose indices exist at once, in whole images


@register_implementation("max_pool_indices", aten.max_pool2d_with_indices_backward.default)
def max_pool_indices(node: fx.Node) -> Choice | None:
    """The indices alone."""
    if not _is_plain(node):
        return None
    gradient, x, *window, indices = node.args
    return Choice(backward=Call(backward_from_indices, (gradient, indices, list(x.meta["val"].shape), *_window(*window))))


@register_implementation("max_pool_offsets", aten.max_pool2d_with_indices_backward.default)
def max_pool_offsets(node: fx.Node) -> Choice | None:
    """A byte for each element of the output: its place in its window."""
    gradient, x, *window, indices = node.args
    kernel, stride, padding, dilation, ceil_mode = _window(*window)
    if not _is_plain(node) or math.prod(kernel) > 256:
        return None
    size = list(x.meta["val"].shape)
    return Choice(
        encode=Call(offsets_in_window, (indices, size[-1], kernel, stride, padding, dilation)),
        backward=Call(backward_from_offsets, (gradient, CODE, size, kernel, stride, padding, dilation, ceil_mode)),
    )


def _is_plain(node: fx.Node) -> bool:
    """Whether batches of images in the usual order are pooled, which the operators here take."""
    values = [node.args[i].meta["val"] for i in (0, 1, -1)]
    return all(v.dim() == 4 and v.is_contiguous() and v.numel() for v in values)


def _window(kernel, stride, padding, dilation, ceil_mode) -> tuple:
    """Each as a pair, the stride spelt out."""
    pairs = [list(p) if len(p) == 2 else [p[0]] * 2 for p in (kernel, stride or kernel, padding, dilation)]
    return *pairs, ceil_mode


def _corners(size: tuple[int, ...], width: int, stride: list[int], padding: list[int], device: torch.device) -> torch.Tensor:
    """The index of each window's first element in the input's plane, as if the padding had indices too."""
    rows = torch.arange(size[-2], device=device).mul_(stride[0]).sub_(padding[0]).mul_(width).unsqueeze_(1)
    return rows.add(torch.arange(size[-1], device=device).mul_(stride[1]).sub_(padding[1]))


def _steps(width: int, kernel: list[int], dilation: list[int], device: torch.device) -> torch.Tensor:
    """For each place in a window, how far from the window's first element it lies in the plane."""
    rows = torch.arange(kernel[0], device=device).mul_(dilation[0] * width).unsqueeze_(1)
    return rows.add(torch.arange(kernel[1], device=device).mul_(dilation[1])).view(-1)


def _images(indices: torch.Tensor) -> int:
    return max(1, CHUNK // max(1, indices[0].numel()))


def _offsets_in_window(indices, width, kernel, stride, padding, dilation) -> torch.Tensor:
    indices = indices.contiguous()  # as it was planned: no copy
    offsets = torch.empty_like(indices, dtype=torch.uint8)
    corners = _corners(indices.shape, width, stride, padding, indices.device)
    steps = _steps(width, kernel, dilation, indices.device)
    farthest = (kernel[0] - 1) * dilation[0] * width + (kernel[1] - 1) * dilation[1]
    places = torch.zeros(farthest + 1, dtype=torch.uint8, device=indices.device)
    places[steps] = torch.arange(len(steps), dtype=torch.uint8, device=indices.device)
    for begin, end in chunks(len(indices), _images(indices)):
        far = indices[begin:end].sub(corners).view(-1)
        torch.index_select(places, 0, far, out=offsets[begin:end].view(-1))
    return offsets


def _pool_indices(offsets: torch.Tensor, steps: torch.Tensor, corners: torch.Tensor) -> torch.Tensor:
    return torch.index_select(steps, 0, offsets.view(-1).to(torch.int32)).view(offsets.shape).add_(corners)


def _places_inside(size: tuple[int, ...], kernel, stride, padding, dilation, device: torch.device) -> torch.Tensor:
    """For each window the first place that is not in the padding."""
    first = [
        torch.arange(n, device=device).mul(-s).add(p + d - 1).div(d, rounding_mode="floor").clamp_(min=0)
        for n, s, p, d in zip(size[-2:], stride, padding, dilation, strict=True)
    ]
    return (first[0].unsqueeze(1) * kernel[1] + first[1]).expand(size).contiguous()


def _valid_indices(args: tuple) -> tuple:
    indices, width, kernel, stride, padding, dilation = args
    places = _places_inside(indices.shape, kernel, stride, padding, dilation, indices.device)
    corners = _corners(indices.shape, width, stride, padding, indices.device)
    return _pool_indices(places, _steps(width, kernel, dilation, indices.device), corners), *args[1:]


def _valid_offsets(args: tuple) -> tuple:
    gradient, offsets, size, kernel, stride, padding, dilation, ceil_mode = args
    places = _places_inside(offsets.shape, kernel, stride, padding, dilation, offsets.device)
    return gradient, places.to(torch.uint8), *args[2:]


def _pool_backward(gradient, indices, size, window: tuple, out: torch.Tensor) -> None:
    """aten's own kernel, which reads of the input nothing but its shape."""
    shape_only = gradient.new_empty(()).expand(size)
    aten.max_pool2d_with_indices_backward.grad_input(gradient, shape_only, *window, indices, grad_input=out)


def _backward_from_indices(gradient, indices, size, kernel, stride, padding, dilation, ceil_mode) -> torch.Tensor:
    made = gradient.new_empty(size)
    _pool_backward(gradient, indices, size, (kernel, stride, padding, dilation, ceil_mode), made)
    return made


def _backward_from_offsets(gradient, offsets, size, kernel, stride, padding, dilation, ceil_mode) -> torch.Tensor:
    made = gradient.new_empty(size)
    corners = _corners(offsets.shape, size[-1], stride, padding, offsets.device)
    steps = _steps(size[-1], kernel, dilation, offsets.device)
    for begin, end in chunks(len(offsets), _images(offsets)):
        indices = _pool_indices(offsets[begin:end], steps, corners)
        part, window = [end - begin, *size[1:]], (kernel, stride, padding, dilation, ceil_mode)
        _pool_backward(gradient[begin:end], indices, part, window, made[begin:end])
    return made


def _workspace_of_indices(call: OpCall) -> int:
    """An integer of eight and one of four bytes for each element of a piece, and the corners while they are made; the steps are
    few."""
    small = min(call.inputs + call.outputs, key=torch.Tensor.numel)
    images = min(len(small), _images(small))
    return images * small[0].numel() * 12 + 24 * math.prod(small.shape[-2:]) + STEPS_BYTES


offsets_in_window = define(
    "max_pool_offsets(Tensor indices, int width, int[] kernel, int[] stride, int[] padding, int[] dilation) -> Tensor",
    _offsets_in_window,
    lambda indices, *_: torch.empty_like(indices, dtype=torch.uint8),
    _workspace_of_indices,
    _valid_indices,
)
backward_from_indices = define(
    "max_pool_backward_from_indices(Tensor gradient, Tensor indices, int[] size, int[] kernel, int[] stride, int[] padding, "
    "int[] dilation, bool ceil_mode) -> Tensor",
    _backward_from_indices,
    lambda gradient, indices, size, *_: gradient.new_empty(size),
    lambda call: call.inputs[0].element_size(),
)
backward_from_offsets = define(
    "max_pool_backward_from_offsets(Tensor gradient, Tensor offsets, int[] size, int[] kernel, int[] stride, int[] padding, "
    "int[] dilation, bool ceil_mode) -> Tensor",
    _backward_from_offsets,
    lambda gradient, offsets, size, *_: gradient.new_empty(size),
    lambda call: _workspace_of_indices(call) + call.inputs[0].element_size(),
    _valid_offsets,
)
