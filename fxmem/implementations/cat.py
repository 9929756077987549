"""What a concatenation joins lies in its result a second time, and a backward that keeps the result can find it there.

An activation before a concatenation (in Inception's blocks, SqueezeNet's, or a U-Net's skips) has a gradient that asks for its
output alone: that is read where it lies in the whole. Whoever else needs a joined tensor, or one that was joined of some of the
same (in DenseNet's blocks), gets a copy of it, which to the solver is one more way to make it again: from what holds it later.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from ..cost.base import OpCall
from ..cost.roofline import PARTS
from ..cost.workspace import workspace_bytes
from ..graph_meta import is_backward, makes_view
from ..layouts import in_usual_format
from .base import Call, Choice, register_implementation
from .operators import define, define_inplace

aten = torch.ops.aten
CAT = aten.cat.default
LEAST_BYTES = 1 << 21  # of a concatenation: every choice more makes plans take longer
FROM_OUTPUT = {  # gradients that read the output, and what their operators are given beside it
    aten.threshold_backward.default: ", Scalar threshold",
    aten.sigmoid_backward.default: "",
    aten.tanh_backward.default: "",
}


@register_implementation("cat_parts", CAT, forward=True, least_bytes=LEAST_BYTES)
def cat_parts(node: fx.Node) -> list[Choice]:
    """What a concatenation joins, where something else keeps the whole: it is copied out of it."""
    found = []
    for joined in dict.fromkeys((node, *node.args[0])):
        whole = _whole(joined) if any(user.target is not CAT for user in joined.users) else None
        if whole is not None:
            value = joined.meta["val"]
            call = Call(part, (whole, _dim(whole), _place(joined, whole), list(value.shape), list(value.stride())))
            found.append(Choice(decode=call, decoded=joined))
    return found


@register_implementation("cat_activation", *FROM_OUTPUT)
def cat_activation(node: fx.Node) -> Choice | None:
    """The concatenation that the output is a part of, where something else keeps it: it is read there."""
    gradient, result, *rest = node.args
    whole = _whole(result)
    if whole is None:
        return None
    at = _dim(whole), _place(result, whole), list(node.meta["val"].stride())
    return Choice(backward=Call(_backward_of_part[node.target], (gradient, whole, *at, *rest)))


def _dim(cat: fx.Node) -> int:
    dim = cat.args[1] if len(cat.args) > 1 else cat.kwargs.get("dim", 0)
    return dim % cat.meta["val"].dim()


def _whole(joined: fx.Node) -> fx.Node | None:
    """The first concatenation that a tensor, or all that it is joined of, lies in; None for one that shares its bytes."""
    value = joined.meta["val"]
    maker = joined.args[0] if joined.target is operator.getitem else joined
    if joined.op != "call_function" or is_backward(joined) or makes_view(maker):
        return None
    if not in_usual_format(value) or value.untyped_storage().nbytes() != value.nbytes or not value.numel():
        return None
    begin = joined.args[0][0] if joined.target is CAT else joined
    cats = {u for n in (joined, begin) for u in n.users if u.target is CAT and u is not joined and not is_backward(u)}
    return next((cat for cat in sorted(cats) if _place(joined, cat) is not None), None)


def _place(joined: fx.Node, cat: fx.Node) -> int | None:
    """Where a tensor begins in a concatenation; None where it does not lie in one piece there, or not as it is."""
    value, whole, dim, outer = joined.meta["val"], cat.meta["val"], _dim(cat), list(cat.args[0])
    shapes = [n.meta["val"].shape for n in outer]
    if value.dtype != whole.dtype or any(len(shape) != whole.dim() for shape in shapes):  # the empty may have another one
        return None
    inner = list(joined.args[0]) if joined not in outer and joined.target is CAT and _dim(joined) == dim else [joined]
    first = next((i for i in range(len(outer)) if outer[i : i + len(inner)] == inner), None)
    return None if first is None else sum(shape[dim] for shape in shapes[:first])


def _room_for_part(whole: torch.Tensor, dim: int, begin: int, size: list[int], stride: list[int]) -> torch.Tensor:
    return torch.empty_strided(size, stride, dtype=whole.dtype, device=whole.device)


def _part(whole: torch.Tensor, dim: int, begin: int, size: list[int], stride: list[int]) -> torch.Tensor:
    return _room_for_part(whole, dim, begin, size, stride).copy_(whole.narrow(dim, begin, size[dim]))


def _copy(call: OpCall) -> list[OpCall]:
    whole, dim, begin, size, _ = call.args
    return [OpCall(aten.clone.default, (whole.narrow(dim, begin, size[dim]),), out=call.out, on_gpu=call.on_gpu)]


part = define(
    "part(Tensor whole, int dim, int begin, int[] size, int[] stride) -> Tensor", _part, _room_for_part, lambda call: 0
)
PARTS[part.overloadpacket] = _copy


def _define_backward(plain: Any, schema: str) -> Any:
    """An operator's form that is given a concatenation, and where in it the output lies."""

    def plain_args(gradient, whole, dim, begin, stride, *rest):
        return gradient, whole.narrow(dim, begin, gradient.shape[dim]), *rest

    def fill(made, *args):
        return plain.overloadpacket.grad_input(*plain_args(*args), grad_input=made)

    def empty(gradient, whole, dim, begin, stride, *_):
        return torch.empty_strided(gradient.shape, stride, dtype=gradient.dtype, device=gradient.device)

    def plain_call(call: OpCall) -> list[OpCall]:
        return [OpCall(plain, plain_args(*call.args), out=call.out, on_gpu=call.on_gpu)]

    name, given = f"{plain.overloadpacket.__name__}_of_part", f"Tensor whole, int dim, int begin, int[] stride{schema}"
    made = define(
        f"{name}(Tensor gradient, {given}) -> Tensor",
        lambda *args: fill(empty(*args), *args),
        empty,
        lambda call: workspace_bytes(plain_call(call)[0]),
    )
    define_inplace(
        made, f"{name}_(Tensor(a!) gradient, {given}) -> Tensor(a!)", lambda gradient, *args: fill(gradient, gradient, *args)
    )
    PARTS[made.overloadpacket] = plain_call
    return made


_backward_of_part = {plain: _define_backward(plain, schema) for plain, schema in FROM_OUTPUT.items()}
