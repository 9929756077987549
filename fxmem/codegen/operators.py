"""The few operators that rewritten graphs call beside aten's own, so that printed code can be read and run."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..inplace import INPLACE_FORMS, InplaceForm
from ..torch_internals import is_dense, suggested_format

__all__ = [
    "SCATTERS",
    "as_strided_scatter",
    "bernoulli",
    "dropout_apply",
    "in_format_of",
    "in_kernel_format",
    "laid_out",
    "replay",
    "rng_state",
]


_library = torch.library.Library("fxmem", "FRAGMENT")
_library.define("dropout_apply(Tensor value, Tensor mask, float scale) -> Tensor", tags=(torch.Tag.pointwise,))


def _dropout_apply(value: torch.Tensor, mask: torch.Tensor, scale: float) -> torch.Tensor:
    """`value` where `mask`, else 0, times `scale`: what `native_dropout` computes once its mask is drawn, bit for bit."""
    if value.device.type == "cpu":  # there the noise, and with it the scale, is rounded to the values' own precision
        return value.mul(mask).mul_(torch.tensor(scale, dtype=value.dtype))
    return value.mul(mask).mul_(scale)


def _dropout_apply_(value: torch.Tensor, mask: torch.Tensor, scale: float) -> torch.Tensor:
    """The same in place."""
    factor = torch.tensor(scale, dtype=value.dtype) if value.device.type == "cpu" else scale
    return value.mul_(mask).mul_(factor)


_library.impl("dropout_apply", _dropout_apply, "CompositeExplicitAutograd")
_library.define("dropout_apply_(Tensor(a!) value, Tensor mask, float scale) -> Tensor(a!)")
_library.impl("dropout_apply_", _dropout_apply_, "CompositeExplicitAutograd")
dropout_apply = torch.ops.fxmem.dropout_apply.default
INPLACE_FORMS[dropout_apply] = InplaceForm(torch.ops.fxmem.dropout_apply_.default)


def _bernoulli(like: torch.Tensor, p: float) -> torch.Tensor:
    """What `like.bernoulli_(p)` draws: in the order in which that lies in memory, not in that of a contiguous tensor."""
    drawn = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=like.device).bernoulli_(p)
    return drawn if is_dense(drawn) else drawn.contiguous()


_library.define("bernoulli(Tensor like, float p) -> Tensor", tags=(torch.Tag.nondeterministic_seeded,))
_library.impl("bernoulli", _bernoulli, "CompositeExplicitAutograd")
bernoulli = torch.ops.fxmem.bernoulli.default


def _laid_out(value: torch.Tensor, size: list[int], stride: list[int], dtype: torch.dtype) -> torch.Tensor:
    """A copy of `value`, broadcast to a size, with strides and a type of its own."""
    return torch.empty_strided(size, stride, dtype=dtype, device=value.device).copy_(value)


_library.define("laid_out(Tensor value, int[] size, int[] stride, *, ScalarType dtype) -> Tensor")
_library.impl("laid_out", _laid_out, "CompositeExplicitAutograd")
laid_out = torch.ops.fxmem.laid_out.default


def _scatter(view: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """`self` with `src` where a view of it lies, strides included; aten's own clone the whole storage that `self` lies in."""

    def scatter(self: torch.Tensor, src: torch.Tensor, *where) -> torch.Tensor:
        overlaps = any(stride == 0 and size > 1 for size, stride in zip(self.shape, self.stride(), strict=True))
        made = self.clone() if overlaps else _laid_out(self, self.shape, self.stride(), self.dtype)
        view(made, *where).copy_(src)
        return made

    return scatter


SCATTERS = {}
for _name, _where, _view in (
    ("slice_scatter", "int dim=0, int? start=None, int? end=None, int step=1", torch.ops.aten.slice.Tensor),
    ("select_scatter", "int dim, int index", torch.select),
    ("diagonal_scatter", "int offset=0, int dim1=0, int dim2=1", torch.diagonal),
    ("as_strided_scatter", "int[] size, int[] stride, int storage_offset=0", torch.as_strided),
):
    _library.define(f"{_name}(Tensor self, Tensor src, {_where}) -> Tensor")
    _library.impl(_name, _scatter(_view), "CompositeExplicitAutograd")
    SCATTERS[getattr(torch.ops.aten, _name).default] = getattr(torch.ops.fxmem, _name).default
as_strided_scatter = torch.ops.fxmem.as_strided_scatter.default


@torch.fx.wrap
def in_kernel_format(value: torch.Tensor) -> torch.Tensor:
    """`value`, made contiguous where it is not so in the format that its strides suggest, as `torch.group_norm` does inside.

    Strides of dimensions of size one mean nothing, but formats are read off them, and fake operators choose them differently.
    """
    return value if value.is_contiguous(memory_format=suggested_format(value)) else value.contiguous()


@torch.fx.wrap
def in_format_of(value: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """`value`, made contiguous in the format that the strides of `other` suggest, as group norm's backward does."""
    return value.contiguous(memory_format=suggested_format(other))


@torch.fx.wrap
def rng_state(device: str) -> torch.Tensor:
    """The state of the device's random generator, before an operator that draws from it and will be repeated."""
    return torch.cuda.get_rng_state(device) if torch.device(device).type == "cuda" else torch.get_rng_state()


@torch.fx.wrap
def replay(state: torch.Tensor, device: str, operator: Callable, /, *args, **kwargs):
    """Run `operator(*args, **kwargs)` on the random numbers that it drew from `state`; the generator ends up as it was."""
    before = rng_state(device)
    set_state(state, device)
    try:
        return operator(*args, **kwargs)
    finally:
        set_state(before, device)


def set_state(state: torch.Tensor, device: str) -> None:
    """Put the device's random generator into `state`."""
    if torch.device(device).type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)
