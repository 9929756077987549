"""The forms in place of operators, by their targets: aten's own here, those of fxmem's operators where these are defined.

Only forms whose kernel writes where it is told: some `out=` forms of PyTorch compute elsewhere and copy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

aten = torch.ops.aten


@dataclass(frozen=True)
class InplaceForm:
    """How an operator runs in place: `target` with the same arguments.

    commutes: the first two operands may change places. second: another form, which takes them in the other order and writes
    over the second operand. out: the keyword that names what is written, for operators whose form in place is the one with a
    given result; it is the first operand itself.
    """

    target: Any
    commutes: bool = False
    second: Any = None
    out: str | None = None


INPLACE_FORMS: dict[Any, InplaceForm] = {
    aten.add.Tensor: InplaceForm(aten.add_.Tensor, commutes=True),
    aten.mul.Tensor: InplaceForm(aten.mul_.Tensor, commutes=True),
    aten.mul.Scalar: InplaceForm(aten.mul_.Tensor),  # `mul_.Scalar` rounds otherwise in low precision
    aten.div.Tensor: InplaceForm(aten.div_.Tensor),
    aten.div.Scalar: InplaceForm(aten.div_.Scalar),
    aten.sub.Tensor: InplaceForm(aten.sub_.Tensor),
    aten.neg.default: InplaceForm(aten.neg_.default),
    aten.relu.default: InplaceForm(aten.relu_.default),
    aten.hardtanh.default: InplaceForm(aten.hardtanh_.default),
    aten.leaky_relu.default: InplaceForm(aten.leaky_relu_.default),
    aten.elu.default: InplaceForm(aten.elu_.default),
    aten.silu.default: InplaceForm(aten.silu_.default),
    aten.gelu.default: InplaceForm(aten.gelu_.default),
    aten.hardswish.default: InplaceForm(aten.hardswish_.default),
    aten.sigmoid.default: InplaceForm(aten.sigmoid_.default),
    aten.tanh.default: InplaceForm(aten.tanh_.default),
    aten.scatter.src: InplaceForm(aten.scatter_.src),
    aten.scatter_add.default: InplaceForm(aten.scatter_add_.default),
    aten.index_put.default: InplaceForm(aten.index_put_.default),
    aten.index_add.default: InplaceForm(aten.index_add_.default),
    aten.put.default: InplaceForm(aten.put_.default),
    aten.threshold_backward.default: InplaceForm(aten.threshold_backward.grad_input, out="grad_input"),
    aten.hardtanh_backward.default: InplaceForm(aten.hardtanh_backward.grad_input, out="grad_input"),
    aten.leaky_relu_backward.default: InplaceForm(aten.leaky_relu_backward.grad_input, out="grad_input"),
    aten.elu_backward.default: InplaceForm(aten.elu_backward.grad_input, out="grad_input"),
    aten.silu_backward.default: InplaceForm(aten.silu_backward.grad_input, out="grad_input"),
    aten.gelu_backward.default: InplaceForm(aten.gelu_backward.grad_input, out="grad_input"),
    aten.sigmoid_backward.default: InplaceForm(aten.sigmoid_backward.grad_input, out="grad_input"),
    aten.tanh_backward.default: InplaceForm(aten.tanh_backward.grad_input, out="grad_input"),
}
