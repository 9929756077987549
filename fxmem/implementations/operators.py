"""The operators that implementations run beside aten's own: how one is defined, and which tensors they take."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from ..cost.base import OpCall
from ..cost.operands import OPERANDS
from ..cost.workspace import WORKSPACE
from ..inplace import INPLACE_FORMS, InplaceForm
from ..layouts import in_usual_format

_library = torch.library.Library("fxmem", "FRAGMENT")


def define(
    schema: str,
    kernel: Callable,
    meta: Callable,
    workspace: Callable[[OpCall], int],
    operands: Callable[[tuple], tuple] | None = None,
) -> Any:
    """Make `kernel` an operator of the dispatcher, `torch.ops.fxmem.<name>.default`.

    meta: the result on meta tensors. workspace: bytes that it takes and gives back, from its call on fake tensors.
    operands: where not any tensors of the right shapes will do as arguments, turns such into valid ones, for measuring.
    """
    name = schema.partition("(")[0]
    _library.define(schema)
    _library.impl(name, kernel, "CompositeExplicitAutograd")
    _library.impl(name, meta, "Meta")
    packet = getattr(torch.ops.fxmem, name)
    WORKSPACE[packet] = workspace
    if operands is not None:
        OPERANDS[packet] = operands
    return packet.default


def define_inplace(operator: Any, schema: str, kernel: Callable, second: bool = False) -> None:
    """The form in place of an operator that `define` made: it writes over the first operand. second: the one that takes the
    first two in the other order, after the former has been defined."""
    name = schema.partition("(")[0]
    _library.define(schema)
    _library.impl(name, kernel, "CompositeExplicitAutograd")
    target = getattr(torch.ops.fxmem, name).default
    INPLACE_FORMS[operator] = replace(INPLACE_FORMS[operator], second=target) if second else InplaceForm(target)


def alike(*tensors: torch.Tensor) -> bool:
    """Whether the tensors are dense and lie in memory in the same order."""
    first = tensors[0]
    return all(in_usual_format(t) and t.shape == first.shape and t.stride() == first.stride() for t in tensors)


def is_exact(dtype: torch.dtype, *thresholds: float) -> bool:
    """Whether no kernel has to round these numbers: in half precision, kernels do so in different ways."""
    return dtype in (torch.float32, torch.float64) or all(torch.tensor(t, dtype=dtype).item() == t for t in thresholds)


def flat(tensor: torch.Tensor) -> torch.Tensor:
    """A dense tensor's elements in the order in which they lie in memory."""
    return tensor.as_strided((tensor.numel(),), (1,))


def chunks(count: int, size: int) -> Iterator[tuple[int, int]]:
    """(begin, end) of pieces of `size`."""
    return ((begin, min(count, begin + size)) for begin in range(0, count, size))
