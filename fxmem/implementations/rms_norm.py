"""RMS norm, which autograd differentiates operator by operator: `nn.RMSNorm` on a CPU, and those that models write by hand.

x is divided by its root mean square: y = x r with r = rsqrt(mean(x^2) + eps). The gradient of x is gradient * r and what comes
through r, x * -r^3 mean(gradient * x) (Zhang and Sennrich, 2019). Autograd takes ten operators for the latter, five of which
make tensors as large as x. Here it is one, which makes its result alone, out of the same roundings. And since x r is y, it is
y * -r mean(gradient * y) as well: then the input need not be kept.

y is the normalized input before it is multiplied by weights. Where their product is kept, as the next layer's input, y is had
from that, as long as no weight is near zero: a `Guard` watches them.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..cost.base import OpCall
from ..cost.roofline import PARTS
from ..cost.workspace import workspace_bytes
from ..graph_meta import is_backward
from ..torch_internals import is_dense
from .base import Call, Choice, Rewrite, register_implementation
from .norm_output import guard_of_weights
from .operators import define, define_inplace

aten = torch.ops.aten
MUL, SCALED, POWER = aten.mul.Tensor, aten.mul.Scalar, aten.pow.Tensor_Scalar
SCHEMA = "(Tensor{} gradient, Tensor {}, Tensor rstd, int[] dims, int count) -> Tensor{}"


def _from_input(gradient, x, rstd, dims, count, inplace=False) -> torch.Tensor:
    """In autograd's own roundings: a product with two, or with half, is exact."""
    made = gradient if inplace else torch.empty_like(gradient)
    torch.mul(gradient, x, out=made)
    factor = made.sum(dims, True).mul_(-0.5).mul_(rstd.pow(3)).div_(count)
    return torch.mul(x, 2.0, out=made).mul_(factor)


def _from_output(gradient, result, rstd, dims, count, inplace=False) -> torch.Tensor:
    made = gradient if inplace else torch.empty_like(gradient)
    torch.mul(gradient, result, out=made)
    factor = made.sum(dims, True).mul_(rstd).div_(-count)
    return torch.mul(result, factor, out=made)


def _sum(call: OpCall) -> OpCall:
    x, rstd, dims = call.args[1:4]
    return OpCall(aten.sum.dim_IntList, (x, dims, True), out=rstd, on_gpu=call.on_gpu)


def _workspace(call: OpCall) -> int:
    """Two statistics, and what a sum takes."""
    return 2 * call.args[2].nbytes + workspace_bytes(_sum(call))


def _passes(call: OpCall) -> list[OpCall]:
    """What runs inside, over all elements."""
    gradient, x, rstd = call.args[:3]
    product = OpCall(MUL, (gradient, x), out=call.out)
    twice = [OpCall(SCALED, (x, 2.0), out=call.out)] if call.target is from_input else []
    return [product, _sum(call), *twice, OpCall(MUL, (x, rstd), out=call.out)]


def _define(name: str, operand: str, kernel) -> Any:
    made = define(name + SCHEMA.format("", operand, ""), kernel, lambda gradient, *_: torch.empty_like(gradient), _workspace)
    define_inplace(made, f"{name}_" + SCHEMA.format("(a!)", operand, "(a!)"), functools.partial(kernel, inplace=True))
    PARTS[made.overloadpacket] = _passes
    return made


from_input = _define("rms_norm_from_input", "x", _from_input)
from_output = _define("rms_norm_from_output", "result", _from_output)


@register_implementation("rms_norm_input", MUL)
def rms_norm_input(node: fx.Node) -> Rewrite | None:
    """The input: what its gradient gets through the root mean square, as one operator."""
    found = _through_statistics(node)
    if found is None or not _alike(node, found.gradient, found.x):
        return None
    return Rewrite({node: Call(from_input, (found.gradient, found.x, found.rstd, found.dims, found.count))})


@dataclass(frozen=True)
class _Found:
    """The operands of x * 2 * (-0.5 * sum(gradient * x) * rstd^3 / count)."""

    gradient: fx.Node
    x: fx.Node
    rstd: fx.Node
    dims: list[int]
    count: int


def _through_statistics(node: fx.Node) -> _Found | None:
    """What autograd makes of rsqrt, mean and square, where nothing else reads what lies between."""
    for mean, twice in _factors(node):
        x = _operand(_operand(twice, SCALED, 2), POWER, 1)
        factor = _operand(_operand(mean, aten.div.Scalar), aten.expand.default)
        for total, cube in _factors(factor):
            summed, rstd = _operand(total, SCALED, -0.5), _operand(cube, POWER, 3)
            product = _operand(summed, aten.sum.dim_IntList)
            for gradient, other in _factors(product):
                if other is x and _are_statistics(rstd, summed) and len(product.users) == len(factor.users) == 1:
                    return _Found(gradient, x, rstd, list(summed.args[1]), mean.args[1])
    return None


def _are_statistics(*nodes: fx.Node | None) -> bool:
    """Whether there is one number for each group of normalized ones, in each of two tensors, alike."""
    values = [n.meta["val"] for n in nodes if n is not None]
    return len(values) == 2 and len({(v.dtype, v.shape) for v in values}) == 1


def _factors(node: fx.Node | None) -> list[tuple[fx.Node, fx.Node]]:
    """The two tensors that a node multiplies, in both orders."""
    if node is None or node.target is not MUL or not all(isinstance(a, fx.Node) for a in node.args):
        return []
    return [(node.args[0], node.args[1]), (node.args[1], node.args[0])]


def _operand(node: fx.Node | None, target: Any, *numbers: float) -> fx.Node | None:
    """What a node that one other reads calls `target` on; numbers: its other arguments, where these matter."""
    if node is None or node.target is not target or len(node.users) > 1 or (numbers and node.args[1:] != numbers):
        return None
    return node.args[0]


def _alike(*nodes: fx.Node) -> bool:
    """Whether values are of one type and lie in memory in one order, whichever that is."""
    values = [n.meta["val"] for n in nodes]
    return is_dense(values[0]) and len({(v.dtype, v.shape, v.stride()) for v in values}) == 1


@register_implementation("rms_norm_output", MUL, from_input, exactness="accurate")
def rms_norm_output(node: fx.Node) -> list[Choice] | Rewrite | None:
    """The output before it is multiplied by weights, or divided by them where none is near zero: it is the normalized input."""
    if node.target is MUL:
        return rms_norm_input(node)
    gradient, x, rstd, *rest = node.args
    made = next((u for u in x.users if u.target is MUL and set(u.args) == {x, rstd} and not is_backward(u)), None)
    if made is None or not _alike(gradient, made) or not made.meta["val"].numel():
        return None
    from_weighted = (_divided(u, made) for u in made.users if u.target is MUL and not is_backward(u) and _alike(made, u))
    return [Choice(backward=Call(from_output, (gradient, made, rstd, *rest))), *filter(None, from_weighted)]


def _divided(product: fx.Node, made: fx.Node) -> Choice | None:
    """The output again from its product with weights."""
    weight = product.args[1] if product.args[0] is made else product.args[0]
    if not isinstance(weight, fx.Node) or weight.op != "placeholder":
        return None
    guard = guard_of_weights(made.meta["val"].dtype, weight)
    return Choice(decode=Call(aten.div.Tensor, (product, weight)), decoded=made, guard=guard)
