"""The forms of operators that write their results where they are told: aten's own, and a few that are put together here.

Most `out` forms of PyTorch compute elsewhere and copy, which takes more memory, not less. Only those with a kernel of their own
count (`torch_internals.out_overload`). Some operators without one consist of such as have one; these forms are operators of
fxmem's, and compute the same bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from .codegen.operators import dropout_apply
from .inplace import INPLACE_FORMS, InplaceForm
from .layouts import in_usual_format
from .torch_internals import OpOverload, out_names, out_overload

aten = torch.ops.aten
# They return nothing, as PyTorch's compiler wants it of operators other than its own.
_library = torch.library.Library("fxmem", "FRAGMENT")


def _define(schema: str, kernel: Callable) -> Any:
    name = schema.partition("(")[0]
    _library.define(schema)
    _library.impl(name, kernel, "CompositeExplicitAutograd")
    packet, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.fxmem, packet), overload or "default")


def _copy(value: torch.Tensor, *, out: torch.Tensor) -> None:
    """What `clone` and `_to_copy` do once they have memory in the wanted type and format."""
    out.copy_(value)


def _fill(value: float, *, out: torch.Tensor) -> None:
    out.fill_(value)


def _embedding(weight: torch.Tensor, indices: torch.Tensor, *, out: torch.Tensor) -> None:
    torch.index_select(weight, 0, indices.reshape(-1), out=out.view(-1, weight.shape[1]))


def _safe_softmax(value: torch.Tensor, dim: int, *, out: torch.Tensor) -> None:
    """A softmax, and zeros in rows of minus infinity alone."""
    aten._softmax.out(value, dim, False, out=out)
    out.masked_fill_(value.isneginf().all(dim, keepdim=True), 0.0)


def _dropout(value: torch.Tensor, p: float, *, out: torch.Tensor, mask: torch.Tensor) -> None:
    """`native_dropout` on the CPU, which draws the mask by `bernoulli_` and rounds the scale to the values' precision."""
    mask.bernoulli_(1 - p)
    _dropout_apply(value, mask, 1 / (1 - p), out=out)


def _dropout_apply(value: torch.Tensor, mask: torch.Tensor, scale: float, *, out: torch.Tensor) -> None:
    """As `fxmem.codegen.operators.dropout_apply` does, but that the mask becomes numbers in the result, and nowhere else."""
    factor = torch.tensor(scale, dtype=value.dtype) if value.device.type == "cpu" else scale
    out.copy_(mask).mul_(value).mul_(factor)


def _batch_norm(x, weight, bias, mean, variance, training, momentum, eps, *, out, save_mean, save_rstd, new_mean, new_variance):
    """`_native_batch_norm_legit_functional`: running statistics are copied, and the copies move."""
    new_mean.copy_(mean)
    new_variance.copy_(variance)
    statistics = new_mean, new_variance
    results = {"out": out, "save_mean": save_mean, "save_invstd": save_rstd}
    aten._native_batch_norm_legit.out(x, weight, bias, *statistics, training, momentum, eps, **results)


def _normalize(x, weight, bias, mean, variance, eps):
    """A batch norm that moves no statistics."""
    return aten._native_batch_norm_legit_no_training(x, weight, bias, mean, variance, 0.0, eps)[0]


def _normalize_out(x, weight, bias, mean, variance, eps, *, out):
    results = {"out": out, "save_mean": mean.new_empty(0), "save_invstd": mean.new_empty(0)}
    aten._native_batch_norm_legit.out(x, weight, bias, mean, variance, False, 0.0, eps, **results)


def _normalize_(x, weight, bias, mean, variance, eps):
    _normalize_out(x, weight, bias, mean, variance, eps, out=x)
    return x


copy_out = _define("copy.out(Tensor value, *, Tensor(a!) out) -> ()", _copy)
fill_out = _define("fill.out(Scalar value, *, Tensor(a!) out) -> ()", _fill)
embedding_out = _define("embedding.out(Tensor weight, Tensor indices, *, Tensor(a!) out) -> ()", _embedding)
safe_softmax_out = _define("safe_softmax.out(Tensor value, int dim, *, Tensor(a!) out) -> ()", _safe_softmax)
dropout_out = _define("dropout.out(Tensor value, float p, *, Tensor(a!) out, Tensor(b!) mask) -> ()", _dropout)
dropout_apply_out = _define(
    "dropout_apply.out(Tensor value, Tensor mask, float scale, *, Tensor(a!) out) -> ()", _dropout_apply
)
batch_norm_out = _define(
    "batch_norm.out(Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor variance, bool training, float momentum, "
    "float eps, *, Tensor(a!) out, Tensor(b!) save_mean, Tensor(c!) save_rstd, Tensor(d!) new_mean, "
    "Tensor(e!) new_variance) -> ()",
    _batch_norm,
)
_OPERANDS = "Tensor? weight, Tensor? bias, Tensor mean, Tensor variance, float eps"
normalize = _define(f"normalize(Tensor x, {_OPERANDS}) -> Tensor", _normalize)
normalize_out = _define(f"normalize.out(Tensor x, {_OPERANDS}, *, Tensor(a!) out) -> ()", _normalize_out)
INPLACE_FORMS[normalize] = InplaceForm(_define(f"normalize_(Tensor(a!) x, {_OPERANDS}) -> Tensor(a!)", _normalize_))


@dataclass(frozen=True)
class OutForm:
    """How an operator writes where it is told: `target` with these arguments, and one keyword for each result (`names`)."""

    target: OpOverload
    args: tuple
    kwargs: dict[str, Any]

    @property
    def names(self) -> tuple[str, ...]:
        return out_names(self.target)


Form = Callable[..., tuple | None]  # an operator's arguments -> those of its form, or None where it does not apply


def _first(value, *_, **__) -> tuple:
    return (value,)


def _zero(*_, **__) -> tuple:
    return (0,)


def _in_training(value, p, train=None) -> tuple | None:
    return (value, p) if train is not False and 0 < p < 1 else None


def _lookup(weight, indices, *_) -> tuple:
    return weight, indices


def _in_its_dtype(value, dim, dtype=None) -> tuple | None:
    return (value, dim) if dtype is None else None


def _inference_norm(x, weight, bias, mean, variance, momentum, eps) -> tuple:
    return x, weight, bias, mean, variance, False, momentum, eps


def _same(*args) -> tuple:
    return args


def _unscaled(value, other, alpha=1) -> tuple | None:
    return (value, other) if alpha == 1 else None


def _is_odd(args: tuple) -> bool:
    """Whether a batch norm's operand has less precision than its weights, where fake tensors mistake the type of statistics, or
    has gaps, where the kernel begins its sums with whatever lies in the memory that it is given for them."""
    tensors = [a.meta["val"] if isinstance(a, fx.Node) else a for a in args if isinstance(a, fx.Node | torch.Tensor)]
    return len({t.dtype for t in tensors}) > 1 or not in_usual_format(tensors[0])


# operator -> (form, its arguments from the operator's, kinds of devices for which the two are the same)
MADE_UP: dict[Any, tuple[OpOverload, Form, tuple[str, ...]]] = {
    aten.relu.default: (aten.clamp_min.out, lambda x: (x, 0), ("cpu", "cuda")),
    aten.add.Scalar: (aten.add.out, _unscaled, ("cpu", "cuda")),
    aten.sub.Scalar: (aten.sub.out, _unscaled, ("cpu", "cuda")),
    aten.mul.Scalar: (aten.mul.out, _same, ("cpu", "cuda")),
    aten.div.Scalar: (aten.div.out, _same, ("cpu", "cuda")),
    aten.clone.default: (copy_out, _first, ("cpu", "cuda")),
    aten._to_copy.default: (copy_out, _first, ("cpu", "cuda")),
    aten.zeros_like.default: (fill_out, _zero, ("cpu", "cuda")),
    aten.new_zeros.default: (fill_out, _zero, ("cpu", "cuda")),
    aten.embedding.default: (embedding_out, _lookup, ("cpu",)),
    aten._safe_softmax.default: (safe_softmax_out, _in_its_dtype, ("cpu", "cuda")),
    dropout_apply: (dropout_apply_out, _same, ("cpu", "cuda")),
    normalize: (normalize_out, _same, ("cpu",)),
    aten.native_dropout.default: (dropout_out, _in_training, ("cpu",)),
    aten._native_batch_norm_legit_functional.default: (batch_norm_out, _same, ("cpu",)),
    aten._native_batch_norm_legit_no_training.default: (aten._native_batch_norm_legit.out, _inference_norm, ("cpu",)),
}


BATCH_NORMS = {
    aten._native_batch_norm_legit_functional.default, aten._native_batch_norm_legit_no_training.default,
    aten._native_batch_norm_legit.no_stats,
}  # fmt: skip


# Whose forms are kernels of their own by name, and compute elsewhere and copy.
ELSEWHERE = {aten._fft_c2c.default, aten._fft_r2c.default, aten._fft_c2r.default}


def out_form(target: Any, args: tuple, kwargs: dict[str, Any], device_type: str) -> OutForm | None:
    """The form of an operator's call that writes where it is told, by kernels of its own on a kind of device, or None."""
    if not isinstance(target, OpOverload) or target in ELSEWHERE or (target in BATCH_NORMS and _is_odd(args)):
        return None
    if target not in MADE_UP:
        own = out_overload(target, device_type)
        return own and OutForm(own, args, kwargs)
    form, arguments, devices = MADE_UP[target]
    taken = arguments(*args, **kwargs) if device_type in devices else None
    return None if taken is None else OutForm(form, taken, {})
