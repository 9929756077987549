"""Cross entropy and the linear layer before it, a piece of the rows after the other.

Over a large vocabulary, the logits, their log-softmax and the gradients of both are the largest tensors of a language model's
step. Here, each piece of rows goes from the hidden states to the loss and back to the gradients of hidden states, weight and
bias at once, in the forward, as if the loss's gradient was one; the backward multiplies by what it is. So nothing is computed
twice, and of the logits only a piece exists at a time (the idea of Apple's Cut Cross-Entropy, Wijmans et al. 2024, and of
Liger-Kernel, Hsu et al. 2024). Where something else reads the logits, they are made as they were, and the rest is not.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx

from ..cost.base import OpCall
from ..cost.roofline import PARTS
from ..cost.workspace import workspace_bytes
from .base import Call, Result, Rewrite, register_implementation
from .operators import chunks, define

aten = torch.ops.aten
PIECES = 4  # at least; each reads the weight twice and its gradient once, which on a CPU is felt beyond a few
LARGEST = 1 << 24  # elements of a piece of the logits; in low precision, where each sum is rounded, PIECES are enough
MEAN = 1  # aten's number for it; 2 is the sum
WIDENED = (torch.bfloat16,)
VIEWS = (aten.view.default, aten._unsafe_view.default, aten.alias.default, aten.detach.default, aten.reshape.default)


@register_implementation("chunked_cross_entropy", aten.nll_loss_backward.default, exactness="accurate")
def chunked_cross_entropy(node: fx.Node) -> Rewrite | None:
    """The gradients themselves, made in the forward from a piece of the logits after the other."""
    head = _forward_of(node)
    gradients = head and _gradients_of(head, node)
    if not gradients or not _saves(head):
        return None
    transposed = gradients.get("weight") is not None and gradients["weight"].args[1] is not head.x
    logits = head.logits if _is_read_elsewhere(head) else None
    flags = [gradients.get(what) is not None for what in ("x", "weight", "bias")]
    args = (head.x, head.weight, head.bias, logits, head.targets, head.ignored, head.mean, flags, transposed, head.dtype)
    made: dict[fx.Node, Result | Call] = {head.loss: Result(0)}
    for index, what in enumerate(("x", "weight", "bias"), start=1):
        if gradients.get(what) is not None:
            made[gradients[what]] = Call(aten.mul.Tensor, (Result(index), node.args[0]))
    return Rewrite(made, Call(linear_cross_entropy, args), head.forward)


@dataclass(frozen=True)
class _Head:
    """The forward part: loss = nll_loss(log_softmax(logits)), logits = x @ weight (+ bias)."""

    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    logits: fx.Node
    log_softmax: fx.Node
    targets: fx.Node
    forward: fx.Node
    loss: fx.Node
    mean: bool
    ignored: int
    dtype: torch.dtype


def _forward_of(node: fx.Node) -> _Head | None:
    """What `node`, an nll_loss_backward, differentiates, where that is a linear layer's cross entropy."""
    _, log_softmax, targets, class_weight, reduction, ignored, total = node.args
    forward = total.args[0]
    if log_softmax.target is not aten._log_softmax.default or class_weight is not None or reduction == 0:
        return None
    shape = log_softmax.meta["val"].shape
    if len(shape) != 2 or log_softmax.args[1] not in (1, -1) or set(total.users) != {node}:
        return None
    logits = log_softmax.args[0]
    while logits.target in VIEWS or logits.target is aten._to_copy.default:
        logits = logits.args[0]
    if logits.target not in (aten.mm.default, aten.addmm.default) or logits.kwargs:
        return None
    loss = [u for u in forward.users if u.target is operator.getitem and u.args[1] == 0]
    if logits.meta["val"].shape != shape or len(loss) != 1:
        return None
    bias, x, weight = (None, *logits.args)[-3:]
    if bias is not None and bias.meta["val"].shape != shape[1:]:  # addmm adds matrices too
        return None
    dtype = loss[0].meta["val"].dtype
    return _Head(x, weight, bias, logits, log_softmax, targets, forward, loss[0], reduction == MEAN, ignored, dtype)


def _gradients_of(head: _Head, node: fx.Node) -> dict[str, fx.Node] | None:
    """The nodes that make the gradients of x, weight and bias, where nothing else reads the gradient of the logits."""
    through = list(node.users)
    if len(through) != 1 or through[0].target is not aten._log_softmax_backward_data.default:
        return None
    if set(head.log_softmax.users) != {head.forward, node, through[0]}:
        return None
    found: dict[str, fx.Node] = {}
    for source, user in _readers(through[0]):
        what = _role(head, source, user)
        if what == "turned x":  # of an x that lies in columns; its transpose follows
            what, user = "x", next((u for u in user.users if u.target is aten.t.default and len(user.users) == 1), None)
        if what is None or what in found or user is None:
            return None
        found[what] = user
    return found


def _readers(gradient: fx.Node) -> Iterator[tuple[fx.Node, fx.Node]]:
    """(what is read, by whom), past views and conversions of a gradient of the logits, and its transpose."""
    pending = [gradient]
    while pending:
        source = pending.pop()
        for user in source.users:
            if user.target in VIEWS or user.target in (aten._to_copy.default, aten.t.default):
                pending.append(user)
            else:
                yield source, user


def _role(head: _Head, source: fx.Node, user: fx.Node) -> str | None:
    """Whose gradient `user` makes from `source`, the gradient of the logits."""
    shape, rows = tuple(source.meta["val"].shape), tuple(head.logits.meta["val"].shape)
    if user.target is aten.sum.dim_IntList and user.args[1:] == ([0], True) and shape == rows:
        return "bias" if head.bias is not None else None
    if user.target is not aten.mm.default:
        return None
    left, right = user.args
    if left is source and shape == rows:
        return "x" if _transposes(right, head.weight) else None
    if left is head.weight and source.target is aten.t.default:
        return "turned x"
    if left is source and source.target is aten.t.default and right is head.x:
        return "weight"
    return "weight" if right is source and shape == rows and _transposes(left, head.x) else None


def _transposes(node: fx.Node, other: fx.Node) -> bool:
    return node.target is aten.t.default and node.args[0] is other


def _is_read_elsewhere(head: _Head) -> bool:
    """Whether anything but this loss reads the logits."""
    pending = [head.logits]
    while pending:
        for user in pending.pop().users:
            if user.target in VIEWS or user.target is aten._to_copy.default:
                pending.append(user)
            elif user is not head.log_softmax:
                return True
    return False


def _saves(head: _Head) -> bool:
    """Whether gradients and a piece's buffers are smaller than log-softmax and the gradient of the logits; float16 is scaled
    by the loss's gradient before it is rounded, and has to be."""
    x, weight, logits = (n.meta["val"] for n in (head.x, head.weight, head.log_softmax))
    rows = _rows(*logits.shape, x.dtype)
    kept = (x.numel() + weight.numel()) * x.element_size()
    supported = x.dtype in (torch.float32, torch.float64, *WIDENED) and x.dtype == weight.dtype
    supported = supported and logits.dtype in (x.dtype, _wide(x.dtype))
    return supported and kept + 2 * rows * logits.shape[1] * logits.element_size() < 2 * logits.nbytes


def _rows(count: int, width: int, dtype: torch.dtype) -> int:
    """Rows of a piece."""
    rows = -(-count // PIECES)
    return max(1, rows if dtype in WIDENED else min(rows, LARGEST // width))


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The type in which rows are normalized and losses summed."""
    return torch.float32 if dtype in WIDENED else dtype


def _linear_cross_entropy(x, weight, bias, logits, targets, ignored, mean, wanted, transposed, dtype) -> tuple:
    d_x, d_weight, d_bias = _room(x, weight, wanted, transposed)
    wide, count, width = _wide(x.dtype), len(x), weight.shape[1]
    scale = targets.ne(ignored).to(wide)
    counted = scale.sum()
    if mean:
        scale /= counted.clamp(min=1)  # where none counts, every gradient is zero, though the loss is no number
    loss = x.new_zeros((), dtype=wide)
    rows = min(count, _rows(count, width, x.dtype))
    normalized = x.new_empty((rows, width), dtype=wide)
    made = normalized if wide is x.dtype else x.new_empty((rows, width))
    for begin, end in chunks(count, rows or 1):
        piece, aim, x_rows = made[: end - begin], targets[begin:end], x[begin:end]
        gradient = piece if made is normalized else normalized[: end - begin]
        source = _logits(x_rows, weight, bias, piece) if logits is None else logits[begin:end]
        if source is not gradient:
            gradient.copy_(source)
        aten._log_softmax.out(gradient, 1, False, out=gradient)  # each row is read to its end before it is written
        loss += aten.nll_loss_forward(gradient, aim, None, 2, ignored)[0]
        factor = scale[begin:end].unsqueeze(1)
        gradient.exp_().mul_(factor).scatter_add_(1, aim.where(aim != ignored, 0).unsqueeze(1), -factor)
        gradient = gradient if wide is x.dtype else piece.copy_(gradient)
        if wanted[0]:
            torch.mm(gradient, weight.t(), out=d_x[begin:end])
        if wanted[1]:
            d_weight.addmm_(*((x_rows.t(), gradient) if transposed else (gradient.t(), x_rows)))
        if wanted[2]:
            d_bias += gradient.sum(0, keepdim=True, dtype=wide)
    loss = loss / counted if mean else loss
    return loss.to(dtype), d_x, d_weight, d_bias.to(x.dtype)


def _logits(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> torch.Tensor:
    return torch.mm(x, weight, out=out) if bias is None else torch.addmm(bias, x, weight, out=out)


def _room(x: torch.Tensor, weight: torch.Tensor, wanted: list[bool], transposed: bool) -> tuple[torch.Tensor, ...]:
    """Gradients of x, weight and bias, empty where they are not wanted."""
    size, turned = list(weight.shape), list(weight.shape[::-1])
    return (
        x.new_empty(x.shape if wanted[0] else 0),
        x.new_zeros((size if transposed else turned) if wanted[1] else 0),
        x.new_zeros((1, size[1]) if wanted[2] else 0, dtype=_wide(x.dtype)),
    )


def _shapes(x, weight, bias, logits, targets, ignored, mean, wanted, transposed, dtype) -> tuple:
    d_x, d_weight, d_bias = _room(x, weight, wanted, transposed)
    return x.new_empty((), dtype=dtype), d_x, d_weight, d_bias.to(x.dtype)


def _parts(call: OpCall) -> Iterator[OpCall]:
    """What runs inside, one after the other."""
    x, weight = call.args[:2]
    rows = _rows(len(x), weight.shape[1], x.dtype)
    return itertools.chain.from_iterable(itertools.repeat(_piece(call), -(-len(x) // rows)))


def _piece(call: OpCall) -> list[OpCall]:
    """What runs for one piece of rows, on meta tensors."""
    x, weight, _, logits, _, _, _, wanted, transposed, _ = call.args
    rows = min(len(x), _rows(len(x), weight.shape[1], x.dtype))
    x, weight = (torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta") for t in (x, weight))
    piece = torch.empty((rows, weight.shape[1]), dtype=x.dtype, device="meta")
    wide, factor = piece.to(_wide(x.dtype)), torch.empty((rows, 1), dtype=_wide(x.dtype), device="meta")
    d_weight = torch.empty(weight.shape if transposed else weight.shape[::-1], dtype=x.dtype, device="meta")
    pair = (x[:rows].t(), piece) if transposed else (piece.t(), x[:rows])
    return [
        *([OpCall(aten.mm.default, (x[:rows], weight), out=piece)] if logits is None else []),
        *([OpCall(aten._to_copy.default, (piece,), out=wide)] * 2 if wide.dtype is not x.dtype else []),
        OpCall(aten._log_softmax.default, (wide, 1, False), out=torch.empty_like(wide)),
        OpCall(aten.exp.default, (wide,), out=torch.empty_like(wide)),
        OpCall(aten.mul.Tensor, (wide, factor), out=torch.empty_like(wide)),
        *([OpCall(aten.mm.default, (piece, weight.t()), out=x[:rows])] if wanted[0] else []),
        *([OpCall(aten.addmm.default, (d_weight, *pair), out=torch.empty_like(d_weight))] if wanted[1] else []),
        *([OpCall(aten.sum.dim_IntList, (piece, [0], True), out=torch.empty_like(wide[:1]))] if wanted[2] else []),
    ]


def _workspace(call: OpCall) -> int:
    """A piece as it is summed and, where that is in another type, as it is multiplied; what an operator on it takes; a few
    numbers for each row, and the bias's sums."""
    x, weight = call.args[:2]
    wide_bytes, count = _wide(x.dtype).itemsize, len(x)
    rows = min(count, _rows(count, weight.shape[1], x.dtype))
    narrow_bytes = 0 if wide_bytes == x.element_size() else x.element_size()
    buffers = rows * weight.shape[1] * (wide_bytes + narrow_bytes)
    inside = max(workspace_bytes(part) for part in _piece(call))
    sums = 3 * weight.shape[1] * wide_bytes if call.args[7][2] else 0
    return buffers + inside + count * (2 * wide_bytes + 24) + sums + 1024


linear_cross_entropy = define(
    "linear_cross_entropy(Tensor x, Tensor weight, Tensor? bias, Tensor? logits, Tensor targets, int ignored, bool mean, "
    "bool[3] wanted, bool transposed, ScalarType dtype) -> (Tensor, Tensor, Tensor, Tensor)",
    _linear_cross_entropy,
    _shapes,
    _workspace,
)
PARTS[torch.ops.fxmem.linear_cross_entropy] = _parts
