"""The gradient of an embedding whose weight has another gradient already (a tied head's): added to it row by row.

PyTorch makes a second table, mostly of zeros, and adds the two. Here only the rows that the batch looked up are summed, by
PyTorch's own kernel in its own order, and added to the rows of the first table.
"""

from __future__ import annotations

import math

import torch
from torch import fx

from ..cost.base import OpCall
from .base import Call, Rewrite, register_implementation
from .operators import define, define_inplace

aten = torch.ops.aten
LEAST_WIDTH = 16  # of a row: sorting the indices takes as long as narrow tables do


@register_implementation("embedding_rows", aten.embedding_dense_backward.default)
def embedding_rows(node: fx.Node) -> Rewrite | None:
    """Nothing more than before; no second table is made for a gradient that is added to another one."""
    gradient, indices, rows, padding, by_frequency = node.args
    total = next(iter(node.users), None)
    if total is None or len(node.users) > 1 or total.target is not aten.add.Tensor or total.kwargs or by_frequency:
        return None
    tables = [a for a in total.args if a is not node]
    value = node.meta["val"]
    if len(tables) != 1 or not isinstance(tables[0], fx.Node) or 2 * indices.meta["val"].numel() > rows:
        return None
    table = tables[0].meta["val"]
    if table.shape != value.shape or table.dtype != value.dtype or math.prod(value.shape[1:]) < LEAST_WIDTH:
        return None
    return Rewrite({total: Call(add_rows, (tables[0], gradient, indices, padding))})


def _add_rows(table: torch.Tensor, gradient: torch.Tensor, indices: torch.Tensor, padding: int) -> torch.Tensor:
    return _add_rows_in_place(table.clone(), gradient, indices, padding)


def _add_rows_in_place(table: torch.Tensor, gradient: torch.Tensor, indices: torch.Tensor, padding: int) -> torch.Tensor:
    rows, places = torch.unique(indices, return_inverse=True)
    skipped = len(rows) if padding >= 0 else -1
    if padding >= 0:
        places.masked_fill_(indices == padding, skipped)
    sums = aten.embedding_dense_backward(gradient, places, len(rows) + 1, skipped, False)
    return table.index_put_((rows,), table[rows].add_(sums[:-1]))


def _workspace(call: OpCall) -> int:
    """The rows' sums and the rows themselves, as many as indices at most, a gradient that is not contiguous once more, and
    the sorting of the indices."""
    table, gradient, indices = call.inputs[:3]
    width = math.prod(table.shape[1:])
    copy = 0 if gradient.is_contiguous() else gradient.nbytes
    return (2 * indices.numel() + 1) * width * table.element_size() + copy + 40 * indices.numel() + 1024


def _spread(args: tuple) -> tuple:
    """Every index another row, as far as there are rows."""
    table, gradient, indices, padding = args
    places = torch.arange(indices.numel(), device=indices.device).remainder_(max(1, len(table)))
    return table, gradient, places.view(indices.shape).to(indices.dtype), padding


add_rows = define(
    "embedding_add_rows(Tensor table, Tensor gradient, Tensor indices, int padding) -> Tensor",
    _add_rows,
    lambda table, *_: torch.empty_like(table),
    _workspace,
    _spread,
)
define_inplace(
    add_rows,
    "embedding_add_rows_(Tensor(a!) table, Tensor gradient, Tensor indices, int padding) -> Tensor(a!)",
    _add_rows_in_place,
)
