"""Real operands for one operator, made from fake ones: same shapes, strides, types and aliasing, valid values.

Floating point values lie in (0, 1): valid as probabilities, logarithms' and roots' arguments, never denormal. Integers are
zeros, which index anything, but for the operators whose time depends on where their indices point: those get spread ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..layouts import span
from ..torch_internals import pytree, storage_key
from .base import OpCall

aten = torch.ops.aten
TILE = 1 << 16
OPERANDS: dict[object, Callable[[tuple], tuple]] = {}  # for operators of which made-up arguments would not be valid: valid ones


def real_operands(call: OpCall, device: torch.device) -> tuple[tuple, dict]:
    """Arguments and keyword arguments for `call.target`, on each tensor's own device (`device` for meta tensors).

    Fake tensors that share a storage get tensors that share one. Only the span that the operator can reach is allocated.
    """
    spans: dict[tuple, list[int]] = {}
    for tensor in call.inputs:
        first, last = span(tensor)
        known = spans.setdefault(_storage_group(tensor), [first, last])
        known[:] = [min(known[0], first), max(known[1], last)]
    bounds = _index_bounds(call)
    buffers: dict[tuple, torch.Tensor] = {}

    def real(leaf: Any) -> Any:
        if isinstance(leaf, torch.device):
            return device if leaf.type == "meta" else leaf
        if not isinstance(leaf, torch.Tensor):
            return leaf
        group = _storage_group(leaf)
        first, last = spans[group]
        if group not in buffers:
            place = device if leaf.device.type == "meta" else leaf.device
            buffers[group] = _filled(last - first, leaf.dtype, place, bounds.get(id(leaf), 1))
        made = torch.as_strided(buffers[group], leaf.shape, leaf.stride(), leaf.storage_offset() - first)
        made = made.conj() if leaf.is_conj() else made  # which some kernels first write out
        return aten._neg_view.default(made) if leaf.is_neg() else made

    args, kwargs = pytree.tree_map(real, (call.args, call.kwargs))
    return OPERANDS.get(call.packet, tuple)(args), kwargs


def _storage_group(tensor: torch.Tensor) -> tuple:
    return storage_key(tensor), tensor.dtype


def _filled(numel: int, dtype: torch.dtype, device: torch.device, bound: int) -> torch.Tensor:
    """A flat tensor of valid values: integers below `bound`, true, or a repeated tile of numbers in (0, 1)."""
    if dtype is torch.bool:
        return torch.ones(numel, dtype=dtype, device=device)
    if not dtype.is_floating_point and not dtype.is_complex:
        if bound == 1:
            return torch.zeros(numel, dtype=dtype, device=device)
        return (torch.arange(numel, device=device) % bound).to(dtype)
    generator = torch.Generator().manual_seed(0)
    tile = torch.rand(min(numel, TILE), generator=generator).clamp_(min=1e-3).to(device)
    flat = torch.empty(numel, dtype=dtype, device=device)
    whole = numel // TILE * TILE
    flat[:whole].view(-1, TILE).copy_(tile.expand(max(1, whole // TILE), -1) if whole else flat[:0].view(0, TILE))
    flat[whole:].copy_(tile[: numel - whole])
    return flat


def _along(dim: int) -> Callable[[tuple], int]:
    """Bound of an index into the first argument along the dimension that argument `dim` names."""
    return lambda args: args[0].shape[args[dim]] if args[0].dim() else 1


INDICES: dict[object, tuple[int, Callable[[tuple], int]]] = {
    aten.embedding: (1, lambda args: args[0].shape[0]),
    aten.embedding_dense_backward: (1, lambda args: args[2]),
    aten.nll_loss_forward: (1, lambda args: args[0].shape[-1]),
    aten.nll_loss_backward: (2, lambda args: args[1].shape[-1]),
    aten.nll_loss2d_forward: (1, lambda args: args[0].shape[1]),
    aten.nll_loss2d_backward: (2, lambda args: args[1].shape[1]),
    aten.gather: (2, _along(1)),
    aten.scatter: (2, _along(1)),
    aten.scatter_add: (2, _along(1)),
    aten.index_select: (2, _along(1)),
    aten.index_add: (2, _along(1)),
    aten.max_pool2d_with_indices_backward: (7, lambda args: args[1].shape[-1] * args[1].shape[-2]),
}


def _with_ones(position: int) -> Callable[[tuple], tuple]:
    """One argument's values as ones: bags that are empty are passed over."""
    return lambda args: (*args[:position], torch.ones_like(args[position]), *args[position + 1 :])


OPERANDS[aten._embedding_bag_backward] = _with_ones(4)
OPERANDS[aten._embedding_bag_dense_backward] = _with_ones(3)


def _index_bounds(call: OpCall) -> dict[int, int]:
    """For the index tensors among the arguments, by id, one more than the largest index that is valid."""
    if call.packet in (aten.index, aten.index_put):
        table, indices = call.args[:2]
        return {id(index): table.shape[dim] for dim, index in enumerate(indices) if index is not None}
    if call.packet not in INDICES:
        return {}
    position, bound = INDICES[call.packet]
    return {id(call.args[position]): max(1, bound(call.args))}
