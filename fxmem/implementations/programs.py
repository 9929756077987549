"""Chains of pointwise operators as one operator: `fxmem.chain` of a program's operands and its text.

PyTorch's code generation (torch.compile: C++ on a CPU, Triton on a GPU) makes one kernel of it at the first run, which reads
every operand once and writes the result once; in between nothing exists. Sizes are left open, so layers that differ in size
alone share a kernel. A program that has to give the bits of its operators is tried first, on small operands that have the same
pattern of sizes and strides; where its kernel gives others, or cannot be made, the operators run one by one, a few images at a
time.

A program is a line of text, so that printed code can be read and a module pickled. x0, w1, ... are the operands; those called w
are the same for all images.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import logging
import math
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from ..codegen.operators import dropout_apply
from ..cost.base import OpCall
from ..cost.measured import STAND_INS
from ..torch_internals import COMPILE_ERRORS
from .batch_norm import batch_norm_again
from .operators import define

log = logging.getLogger(__name__)

aten = torch.ops.aten
PIECE_BYTES = 1 << 20  # of what runs operator by operator
DECOMPOSITIONS: dict[Any, Callable] = {}  # of operators that code generation does not know


def generates_code(device: torch.device) -> bool:
    """Whether a C++ compiler, or Triton, is at hand for a device; for one that is not there yet, it will be."""
    if device.type == "cpu":
        return shutil.which(os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")) is not None
    return device.type == "meta" or importlib.util.find_spec("triton") is not None


@functools.cache
def graph_of(program: str) -> fx.Graph:
    """The graph that a program stands for. Its placeholders are the operands, in order."""
    graph, known = fx.Graph(), {"inf": math.inf, "nan": math.nan}
    tree = ast.parse(program)
    names = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and n.id[0] in "xw" and n.id[1:].isdigit()}
    for name in sorted(names, key=lambda name: int(name[1:])):
        known[name] = graph.placeholder(name)

    def value(expression: ast.expr) -> Any:
        if isinstance(expression, ast.Name):
            return known[expression.id]
        if isinstance(expression, ast.UnaryOp):
            return -value(expression.operand)
        if isinstance(expression, ast.List):
            return [value(e) for e in expression.elts]
        if isinstance(expression, ast.Call):
            keywords = {k.arg: value(k.value) for k in expression.keywords}
            return graph.call_function(_target(ast.unparse(expression.func)), tuple(map(value, expression.args)), keywords)
        return ast.literal_eval(expression)

    for statement in tree.body:
        made = value(statement.value)
        if isinstance(statement, ast.Assign):
            known[statement.targets[0].id] = made
    graph.output(made)
    return graph


def _operands(graph: fx.Graph) -> list[str]:
    return [node.name for node in graph.nodes if node.op == "placeholder"]


def _target(name: str) -> Any:
    """aten.add.Tensor, by that name."""
    return functools.reduce(getattr, name.split("."), torch.ops)


@functools.cache
def _one_by_one(program: str) -> fx.GraphModule:
    return fx.GraphModule({}, graph_of(program))


@functools.cache
def _generated(program: str) -> Callable[..., torch.Tensor]:
    graph = fx.Graph()
    graph.output(graph.graph_copy(graph_of(program), {}))
    for node in graph.nodes:
        node.target = DECOMPOSITIONS.get(node.target, node.target) if node.op == "call_function" else node.target
    # PyTorch's own batch norm multiplies and adds in one instruction.
    contract = "fast" if "batch_norm_again" in program else "off"
    options = {"cpp.enable_floating_point_contract_flag": contract}
    return torch.compile(fx.GraphModule({}, graph), fullgraph=True, dynamic=True, options=options)


_trusted: dict[tuple, bool] = {}


def _chain(operands: Sequence[torch.Tensor], program: str, exact: bool) -> torch.Tensor:
    operands = [o.detach() for o in operands]  # Dynamo fixes the sizes of what is a parameter
    key = program, exact, operands[0].device, _pattern(operands)
    if key not in _trusted:
        _trusted[key] = _is_right(program, exact, operands)
    if _trusted[key]:
        try:
            return _generated(program)(*operands)
        except COMPILE_ERRORS as error:  # for these sizes it is made anew
            _trusted[key] = False
            _warn_of(program, error)
    return _in_pieces(program, operands)


def _is_right(program: str, exact: bool, operands: Sequence[torch.Tensor]) -> bool:
    """Whether a kernel can be made, and, where the bits matter, gives those of the operators one by one."""
    if not generates_code(operands[0].device):
        log.warning("%s runs operator by operator: there is neither a C++ compiler nor Triton to generate code with", program)
        return False
    try:
        if not exact:
            _generated(program)(*operands)
            return True
        small = _small(operands)
        made, wanted = _generated(program)(*small), _one_by_one(program)(*small)
    except Exception as error:  # whatever happens inside of a compiler, the step goes on
        _warn_of(program, error)
        return False
    right = bool(((made == wanted) | (made.isnan() & wanted.isnan())).all())
    if not right:
        log.warning("%s runs operator by operator: the code that was generated for it rounds otherwise", program)
    return right


def _warn_of(program: str, error: Exception) -> None:
    log.warning("%s runs operator by operator: no code could be generated for it (%s)", program, str(error).split("\n")[0])


def _pattern(operands: Sequence[torch.Tensor]) -> tuple[tuple[torch.dtype, tuple[int, ...], tuple[int, ...]], ...]:
    """Of each operand the type, a small shape, and its dimensions from the largest stride to the least. Sizes that are equal,
    zero or one stay so.
    """
    few = {0: 0, 1: 1}
    for size in (n for o in operands for n in o.shape):
        few.setdefault(size, 5 + 3 * (len(few) - 2))
    orders = (sorted(range(o.dim()), key=lambda d, o=o: (o.stride(d), -d), reverse=True) for o in operands)
    return tuple((o.dtype, tuple(few[n] for n in o.shape), tuple(order)) for o, order in zip(operands, orders, strict=True))


def _small(operands: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Operands of the same pattern, of a few elements each; infinities and NaN are among the largest ones'."""
    generator, pattern = torch.Generator().manual_seed(0), _pattern(operands)
    most, made = max(len(shape) for _, shape, _ in pattern), []
    for operand, (dtype, shape, order) in zip(operands, pattern, strict=True):
        values = torch.randn([shape[d] for d in order], generator=generator, dtype=torch.float64)
        if len(shape) == most:
            values.view(-1)[:: max(7, values.numel() // 5)] = math.inf
            values.view(-1)[1 :: max(7, values.numel() // 5)] = math.nan
        values = values > 0 if dtype is torch.bool else values.to(dtype)
        made.append(values.permute([order.index(d) for d in range(len(shape))]).to(operand.device))
    return made


def _in_pieces(program: str, operands: Sequence[torch.Tensor]) -> torch.Tensor:
    """The operators one by one, on so many images at a time that what lies between them is small."""
    run, cut = _one_by_one(program), [name.startswith("x") for name in _operands(graph_of(program))]
    made = torch.empty_like(_meta(operands, program, True), device=operands[0].device)
    if not made.dim():
        return run(*operands)
    step = _images_at_a_time(made)
    for begin in range(0, len(made), step):
        pieces = [o[begin : begin + step] if cut else o for o, cut in zip(operands, cut, strict=True)]
        made[begin : begin + step] = run(*pieces)
    return made


def _images_at_a_time(made: torch.Tensor) -> int:
    return max(1, PIECE_BYTES * len(made) // max(1, made.nbytes))


def _workspace(call: OpCall) -> int:
    """Nothing where code is generated; else every value of a piece."""
    made, count = call.outputs[0], len(graph_of(call.args[1]).nodes)
    if generates_code(made.device) or not made.dim() or not len(made):
        return 0
    return count * min(len(made), _images_at_a_time(made)) * (made.nbytes // len(made))


def _meta(operands: Sequence[torch.Tensor], program: str, exact: bool) -> torch.Tensor:
    return _one_by_one(program)(*(o.to("meta") for o in operands))


def _stand_ins(call: OpCall) -> list[OpCall]:
    """Operators that are there already, of which the slowest takes as long as the chain's kernel, which is yet to be made: a
    sum, and each of its own operators alone."""
    operands, program = call.args[0], call.args[1]
    values: dict[fx.Node, torch.Tensor] = {}
    found = [OpCall(aten.add.Tensor, _large_two(operands, call.out), out=call.out)]
    placeholders = iter(operands)
    for node in graph_of(program).nodes:
        if node.op == "placeholder":
            values[node] = next(placeholders)
        elif node.op == "call_function":
            args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
            values[node] = node.target(*args, **kwargs)
            found.append(OpCall(node.target, args, kwargs, values[node]))
    return found


def _large_two(operands: Sequence[torch.Tensor], out: torch.Tensor) -> tuple:
    large = [o for o in operands if o.shape == out.shape and o.dtype == out.dtype]
    return tuple(large[:2]) if len(large) > 1 else (out, 0)


chain = define("chain(Tensor[] operands, str program, bool exact) -> Tensor", _chain, _meta, _workspace)
STAND_INS[torch.ops.fxmem.chain] = _stand_ins
DECOMPOSITIONS[dropout_apply] = lambda value, mask, scale: value * mask * scale


def _normalized(name: str, again: Callable) -> Any:
    """An operator that makes a norm's result from its input, weight, bias, mean and inverse deviation."""
    made = define(
        f"{name}(Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor rstd) -> Tensor",
        again,
        lambda x, *_: torch.empty_like(x),
        lambda call: 2 * call.inputs[0].nbytes,
    )
    DECOMPOSITIONS[made] = again
    return made


def _batch_norm(x, weight, bias, mean, rstd):
    """As PyTorch's kernel on the CPU computes it."""
    scale = rstd if weight is None else rstd * weight
    shift = -mean * scale if bias is None else bias - mean * scale
    scale, shift = (v.view(-1, *[1] * (x.dim() - 2)) for v in (scale, shift))
    return x * scale + shift


def _layer_norm(x, weight, bias, mean, rstd):
    made = (x - mean) * rstd
    made = made if weight is None else made * weight
    return made if bias is None else made + bias


def _group_norm(x, weight, bias, mean, rstd):
    images, channels = x.shape[:2]
    pixels = [1] * (x.dim() - 2)

    def each(statistic):
        groups = statistic.shape[1]
        return statistic.unsqueeze(-1).expand(images, groups, channels // groups).reshape(images, channels, *pixels)

    weight, bias = (None if v is None else v.view(-1, *pixels) for v in (weight, bias))
    return _layer_norm(x, weight, bias, each(mean), each(rstd))


DECOMPOSITIONS[batch_norm_again] = _batch_norm
layer_norm_again = _normalized("layer_norm_again", _layer_norm)
group_norm_again = _normalized("group_norm_again", _group_norm)
