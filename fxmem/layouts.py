"""How tensors lie in memory: the formats that kernels know, and what of a storage a tensor covers."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .torch_internals import dense_strides, is_dense


def channels_last_format(tensor: torch.Tensor) -> torch.memory_format | None:
    """The channels-last format in which a tensor is contiguous."""
    found = {4: torch.channels_last, 5: torch.channels_last_3d}.get(tensor.dim())
    return found if found and tensor.is_contiguous(memory_format=found) else None


def in_usual_format(tensor: torch.Tensor) -> bool:
    """Whether the tensor fills its memory without gaps, in one of the usual formats."""
    return tensor.is_contiguous() or channels_last_format(tensor) is not None


def gradient_layout(tensor: torch.Tensor) -> tuple[int, ...]:
    """The strides with which autograd keeps a leaf's gradient (torch/csrc/autograd/functions/accumulate_grad.h)."""
    return tuple(tensor.stride()) if is_dense(tensor) else dense_strides(tensor.shape)


def fills_its_storage(tensor: torch.Tensor) -> bool:
    """Whether the tensor's elements are all that its storage holds, each once."""
    whole = tensor.storage_offset() == 0 and tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return whole and is_dense(tensor)


def lies_as(tensor: torch.Tensor, stride: Sequence[int]) -> bool:
    """Whether the tensor has these strides, where they mean anything."""
    return all(n < 2 or found == wanted for n, found, wanted in zip(tensor.shape, tensor.stride(), stride, strict=True))


def with_strides(tensor: torch.Tensor, stride: Sequence[int]) -> torch.Tensor:
    """The tensor itself where it lies in memory as it was planned to, else a copy that does: what fake tensors say of strides
    is not always what a kernel makes of operands in two formats."""
    if lies_as(tensor, stride):
        return tensor
    return torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def span(tensor: torch.Tensor) -> tuple[int, int]:
    """The first element of its storage that the tensor reaches, and one past the last."""
    first = tensor.storage_offset()
    if tensor.numel() == 0:
        return first, first
    return first, first + 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
