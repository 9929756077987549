"""Masks as bits: eight elements a byte, in the order in which the elements lie in memory.

Eight bools, read as one integer, are brought together by one multiplication; a table of 256 rows takes them apart again, into
numbers of the values' own type, since aten's kernels are fast on those and slow on bools. Worked on in pieces that stay in the
cache, so that nothing of the mask's own size exists beside the bits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from ..cost.base import OpCall
from ..layouts import with_strides
from .operators import chunks, define, define_inplace, flat

CHUNK = 1 << 18  # elements; a multiple of 8
GPU_CHUNK = 1 << 24
GATHER = sum(1 << 56 - 7 * i for i in range(8))  # moves the lowest bit of byte i to bit i of the highest byte
EVERY = sum(1 << 8 * i for i in range(8))  # the lowest bit of each byte
TABLE_BYTES = 3 * 256 * 8 * 8  # while a table is made


def pack(
    x: torch.Tensor, stride: list[int], test: Callable[[torch.Tensor], torch.Tensor], *, inverted: bool = False
) -> torch.Tensor:
    """Bits of `test(piece)`, which gives a new bool tensor, over all pieces of a dense tensor in the order that `stride` gives;
    or of its opposite."""
    elements = flat(with_strides(x, stride))
    bits = torch.empty(packed_bytes(x), dtype=torch.uint8, device=x.device)
    for begin, end in chunks(elements.numel(), _chunk(x)):
        mask = test(elements[begin:end])
        if len(mask) % 8:
            mask = torch.nn.functional.pad(mask, (0, -len(mask) % 8))
        eights = mask.view(torch.int64)
        if inverted:
            eights.bitwise_xor_(EVERY)
        bits[begin // 8 : begin // 8 + len(eights)].copy_(eights.mul_(GATHER).bitwise_right_shift_(56))
    return bits


def table(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Row b holds the bits of byte b, lowest first, as ones and zeros."""
    rows = torch.arange(256, device=device).unsqueeze_(1)
    return rows.bitwise_right_shift(torch.arange(8, device=device)).bitwise_and_(1).to(dtype)


def unpack(bits: torch.Tensor, begin: int, end: int, rows: torch.Tensor) -> torch.Tensor:
    """Elements [begin, end) as ones and zeros, by the rows of a `table`; begin is a multiple of 8."""
    return torch.index_select(rows, 0, bits[begin // 8 : -(-end // 8)].to(torch.int32)).view(-1)[: end - begin]


def merge(
    values: torch.Tensor,
    bits: torch.Tensor,
    stride: list[int],
    combine: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], object],
    inplace: bool = False,
) -> torch.Tensor:
    """A new tensor like `values` with `stride`, in whose order the bits are, or those themselves; combine(ones and zeros,
    values, out) fills each piece of it."""
    given, values = values, with_strides(values, stride)
    made = values if inplace else torch.empty_like(values)
    source, target, rows = flat(values), flat(made), table(values.dtype, values.device)
    for begin, end in chunks(source.numel(), _chunk(values)):
        combine(unpack(bits, begin, end, rows), source[begin:end], target[begin:end])
    return given.copy_(made) if inplace and given is not made else made


def packed_bytes(x: torch.Tensor) -> int:
    """Bytes of a mask for x."""
    return -(-x.numel() // 8)


def pack_workspace(call: OpCall) -> int:
    """A piece's bools twice."""
    return 2 * _padded(call.inputs[0], call)


def unpack_workspace(call: OpCall) -> int:
    """A piece's mask in the values' type, the bytes that it comes from as indices, and the table."""
    out = call.outputs[0]
    return _padded(out, call) * out.element_size() + _padded(out, call) // 2 + TABLE_BYTES


def _padded(x: torch.Tensor, call: OpCall) -> int:
    """Elements of a piece, a multiple of 8."""
    chunk = _chunk(x) if call.on_gpu is None else GPU_CHUNK if call.on_gpu else CHUNK
    return -(-min(x.numel(), chunk) // 8) * 8


def _chunk(x: torch.Tensor) -> int:
    return GPU_CHUNK if x.device.type == "cuda" else CHUNK


def empty_bits(x: torch.Tensor, *_) -> torch.Tensor:
    """Room for the bits of x, the result of packing it."""
    return torch.empty(packed_bytes(x), dtype=torch.uint8, device=x.device)


def empty_values(values: torch.Tensor, bits: torch.Tensor, stride: list[int], *_) -> torch.Tensor:
    """Room for the result of a merge."""
    return torch.empty_strided(values.shape, stride, dtype=values.dtype, device=values.device)


def _pack_mask(mask: torch.Tensor, stride: list[int]) -> torch.Tensor:
    return pack(mask, stride, torch.clone)


def _pack_above(x: torch.Tensor, stride: list[int], threshold: float) -> torch.Tensor:
    """1 but where x <= threshold: NaN counts as above, as in `threshold_backward`."""
    return pack(x, stride, lambda piece: torch.le(piece, threshold), inverted=True)


def _keep_where(values: torch.Tensor, bits: torch.Tensor, stride: list[int], inplace: bool = False) -> torch.Tensor:
    """Values where the bit is set, else 0."""
    keep = torch.ops.aten.threshold_backward.grad_input
    return merge(values, bits, stride, lambda mask, piece, out: keep(piece, mask, 0, grad_input=out), inplace)


def _unpack_mask(bits: torch.Tensor, size: list[int], stride: list[int]) -> torch.Tensor:
    mask = torch.empty_strided(size, stride, dtype=torch.bool, device=bits.device)
    elements, rows = flat(mask), table(torch.bool, bits.device)
    for begin, end in chunks(elements.numel(), _chunk(mask)):
        elements[begin:end].copy_(unpack(bits, begin, end, rows))
    return mask


pack_mask = define("pack_mask(Tensor mask, int[] stride) -> Tensor", _pack_mask, empty_bits, pack_workspace)
pack_above = define("pack_above(Tensor x, int[] stride, Scalar threshold) -> Tensor", _pack_above, empty_bits, pack_workspace)
keep_where = define(
    "keep_where(Tensor values, Tensor bits, int[] stride) -> Tensor", _keep_where, empty_values, unpack_workspace
)
unpack_mask = define(
    "unpack_mask(Tensor bits, int[] size, int[] stride) -> Tensor",
    _unpack_mask,
    lambda bits, size, stride: torch.empty_strided(size, stride, dtype=torch.bool, device=bits.device),
    unpack_workspace,
)
define_inplace(
    keep_where,
    "keep_where_(Tensor(a!) values, Tensor bits, int[] stride) -> Tensor(a!)",
    functools.partial(_keep_where, inplace=True),
)
