"""Fused recompute: what a chain of pointwise operators ends in, made again from what the chain begins with, as one kernel.

Between two convolutions of a residual network lie a norm, a sum and a ReLU. Run again one by one each reads and writes all of
it; as one operator (`programs.chain`) they read once and write once, and what lies between them never exists. To the solver it
is one more operator that makes the last of them, in the place of a recompute: it decides for each chain and each time.

Norms are pointwise once their statistics are kept, dropout once its mask is. A chain reaches back from a value that something
else reads, through all that nothing else reads; where it meets a value that something else reads too, it is offered both from
there and through it.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterator

import torch
from torch import fx

from ..codegen.operators import dropout_apply
from ..graph_meta import is_backward
from ..layouts import in_usual_format
from .base import Call, Choice, register_implementation
from .batch_norm import FORWARDS as BATCH_NORMS
from .batch_norm import batch_norm_again
from .programs import chain, generates_code, group_norm_again, layer_norm_again

aten = torch.ops.aten
LEAST_BYTES = 1 << 21  # of what it reads or makes: to call a kernel takes as long as to run the operators on less
LONGEST = 16  # operators
SUMS = (aten.add.Tensor, aten.sub.Tensor)
PRODUCTS = (aten.mul.Tensor, aten.mul.Scalar, aten.leaky_relu.default)
SELECTIONS = (aten.relu.default, aten.hardtanh.default, aten.neg.default)
FUNCTIONS = (
    aten.gelu.default, aten.silu.default, aten.sigmoid.default, aten.tanh.default, aten.elu.default, aten.hardswish.default,
    aten.exp.default, aten.pow.Tensor_Scalar, aten.div.Tensor, aten.div.Scalar, aten.add.Scalar, aten.sub.Scalar,
)  # fmt: skip
POINTWISE = (*SUMS, *PRODUCTS, *SELECTIONS, *FUNCTIONS)


@register_implementation("chain", *POINTWISE, operator.getitem, forward=True, least_bytes=LEAST_BYTES)
def chain_bitwise(node: fx.Node) -> list[Choice]:
    """What the chain begins with: relu, hardtanh, sums, products, batch norm and dropout again as one kernel."""
    return _choices(node, exact=True)


@register_implementation(
    "chain_accurate", *POINTWISE, operator.getitem, exactness="accurate", forward=True, least_bytes=LEAST_BYTES
)
def chain_accurate(node: fx.Node) -> list[Choice]:
    """What the chain begins with: pointwise operators and norms again as one kernel, which rounds less often."""
    return _choices(node, exact=False)


def _choices(node: fx.Node, exact: bool) -> list[Choice]:
    value = node.meta["val"]
    if not isinstance(value, torch.Tensor) or not in_usual_format(value) or not _is_read_elsewhere(node):
        return []
    if not generates_code(value.device):
        return []
    found = []
    for inside in _chains(node):
        calls = {made: _call(made) for made in inside}
        if _is_exact(calls.values(), value) == exact:
            operands, program = _written(node, calls)
            found.append(Choice(decode=Call(chain, (operands, program, exact)), decoded=node))
    return found


def _chains(end: fx.Node) -> Iterator[tuple[fx.Node, ...]]:
    """The values of each chain that ends in `end`, in order; each contains the one before."""
    inside = {end: None} if _call(end) else {}
    while inside and len(inside) < LONGEST:
        begin = {read for made in inside for read in _call(made).args if isinstance(read, fx.Node) and read not in inside}
        more = [v for v in begin if _call(v) and _fits(v, end) and all(u in inside for u in _readers(v))]
        through = [v for v in more if not _is_read_elsewhere(v)]
        if len(inside) > 1 and not through:
            yield tuple(sorted(inside))
        inside |= dict.fromkeys(through or more)
        if not more:
            return


def _call(value: fx.Node) -> Call | None:
    """How a value of the forward is made again by a pointwise operator; None where it is not."""
    if value.target in POINTWISE:
        return None if is_backward(value) else Call(value.target, value.args, dict(value.kwargs))
    if value.target is not operator.getitem or value.args[1] != 0 or is_backward(value):
        return None
    made, results = value.args[0], {u.args[1]: u for u in value.args[0].users if u.target is operator.getitem}
    if made.target is aten.native_dropout.default and 1 in results and 0 < made.args[1] < 1:
        return Call(dropout_apply, (made.args[0], results[1], 1 / (1 - made.args[1])))
    if not {1, 2} <= results.keys() or results[1].meta["val"].dtype != value.meta["val"].dtype:
        return None
    if made.target in BATCH_NORMS and in_usual_format(made.args[0].meta["val"]):
        return Call(batch_norm_again, (*made.args[:3], results[1], results[2]))
    if made.target is aten.native_layer_norm.default:
        return Call(layer_norm_again, (made.args[0], *made.args[2:4], results[1], results[2]))
    if made.target is aten.native_group_norm.default:
        return Call(group_norm_again, (*made.args[:3], results[1], results[2]))
    return None


def _fits(value: fx.Node, end: fx.Node) -> bool:
    """Whether a value lies in memory as the chain's end does."""
    found, wanted = value.meta["val"], end.meta["val"]
    return (found.shape, found.stride(), found.dtype) == (wanted.shape, wanted.stride(), wanted.dtype)


def _readers(value: fx.Node) -> list[fx.Node]:
    """The values of the forward that are made of this one: of an operator with several results, the first."""
    readers = [u for u in value.users if not is_backward(u) and "fxmem_offers" not in u.meta]
    firsts = {u.args[0]: u for r in readers for u in r.users if u.target is operator.getitem and u.args[1] == 0}
    return [firsts.get(r, r) for r in readers]


def _is_read_elsewhere(value: fx.Node) -> bool:
    """Whether something but one pointwise operator of the forward reads a value."""
    others = [u for u in value.users if is_backward(u) or u.op == "output"]
    readers = _readers(value)
    return bool(others) or len(readers) != 1 or _call(readers[0]) is None


def _is_exact(calls: Collection[Call], value: torch.Tensor) -> bool:
    """Whether the kernel rounds as the operators do: each rounds once, and none is contracted with another.

    On a CPU, contraction is for the kernel's own compiler to say. On a GPU a product is contracted with a sum, and batch norm
    is a library's.
    """
    targets = {call.target for call in calls}
    norms, sums = batch_norm_again in targets, not targets.isdisjoint(SUMS)
    scaled = any(call.target in SUMS and call.kwargs.get("alpha", 1) != 1 for call in calls)
    products = scaled or dropout_apply in targets or not targets.isdisjoint(PRODUCTS)
    if targets - {*SUMS, *PRODUCTS, *SELECTIONS, dropout_apply, batch_norm_again}:
        return False
    if value.dtype not in (torch.float32, torch.float64):
        return False
    if value.device.type == "cpu":
        return not (norms and products) and not scaled
    return not norms and not (products and sums)


def _written(end: fx.Node, calls: dict[fx.Node, Call]) -> tuple[list[fx.Node], str]:
    """The operands of a chain, and the program over them."""
    of_images = {a for call in calls.values() if call.target is group_norm_again for a in call.args[3:]}
    whole = end.meta["val"]
    names: dict[fx.Node, str] = {}
    operands: list[fx.Node] = []

    def text(argument) -> str:
        if not isinstance(argument, fx.Node):
            return repr(argument)
        if argument not in names:
            value = argument.meta["val"]
            cut = argument in of_images or value.dim() == whole.dim() > 0 and len(value) == len(whole)
            names[argument] = f"{'x' if cut else 'w'}{len(operands)}"
            operands.append(argument)
        return names[argument]

    lines = []
    for number, (made, call) in enumerate(calls.items()):
        given = [text(a) for a in call.args] + [f"{k}={v!r}" for k, v in call.kwargs.items()]
        names[made] = f"y{number}"
        lines.append(("" if made is end else f"y{number} = ") + f"{call.target}({', '.join(given)})")
    return operands, "; ".join(lines)
