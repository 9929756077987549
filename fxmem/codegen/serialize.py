"""fx graphs as plain data that pickle and deepcopy take: nodes as tuples, operators by their names.

`torch.fx.Graph` itself does not pickle (aten operators do not), and `GraphModule`'s own pickling goes through the printed code
and a new trace, which loses metadata and boxed arguments.
"""

from __future__ import annotations

import functools
import importlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..torch_internals import OpOverload

KEPT_META = (
    "fxmem_recomputes", "fxmem_avoided_bytes", "fxmem_phase", "fxmem_region", "fxmem_offers", "fxmem_implementation",
    "fxmem_inplace_over", "fxmem_slots",
)  # fmt: skip


@dataclass(frozen=True)
class _Node:
    name: str


@dataclass(frozen=True)
class _Op:
    name: str


@dataclass(frozen=True)
class _TorchName:
    """A memory format or a layout: torch's own pickling of them fails in the protocol that torch.save uses."""

    name: str


def graph_to_data(graph: fx.Graph) -> list[tuple]:
    """One tuple (op, name, target, args, kwargs, meta) for each node."""
    return [
        (n.op, n.name, _encode(n.target), _encode(n.args), _encode(n.kwargs), {k: n.meta[k] for k in KEPT_META if k in n.meta})
        for n in graph.nodes
    ]


def graph_from_data(data: list[tuple]) -> fx.Graph:
    """The graph that `graph_to_data` was given, node for node and name for name."""
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}
    for op, name, target, args, kwargs, meta in data:
        target, args, kwargs = (_decode(part, nodes) for part in (target, args, kwargs))
        nodes[name] = graph.create_node(op, target, args, kwargs, name)
        nodes[name].meta.update(meta)
    return graph


def _encode(part: Any) -> Any:
    if isinstance(part, fx.Node):
        return _Node(part.name)
    if isinstance(part, OpOverload):
        return _Op(part.name() if part._overloadname != "default" else f"{part.name()}.default")
    if isinstance(part, (torch.memory_format, torch.layout)):
        return _TorchName(str(part).removeprefix("torch."))
    if isinstance(part, (tuple, list)):
        encoded = [_encode(p) for p in part]
        return tuple(encoded) if isinstance(part, tuple) else encoded
    if isinstance(part, dict):
        return {k: _encode(v) for k, v in part.items()}
    if isinstance(part, slice):
        return slice(_encode(part.start), _encode(part.stop), _encode(part.step))
    return part


def _decode(part: Any, nodes: dict[str, fx.Node]) -> Any:
    if isinstance(part, _Node):
        return nodes[part.name]
    if isinstance(part, _Op):
        return _operator(part.name)
    if isinstance(part, _TorchName):
        return getattr(torch, part.name)
    if isinstance(part, (tuple, list)):
        decoded = [_decode(p, nodes) for p in part]
        return tuple(decoded) if isinstance(part, tuple) else decoded
    if isinstance(part, dict):
        return {k: _decode(v, nodes) for k, v in part.items()}
    if isinstance(part, slice):
        return slice(_decode(part.start, nodes), _decode(part.stop, nodes), _decode(part.step, nodes))
    return part


def _operator(name: str) -> Any:
    """torch.ops.aten.add.Tensor from "aten::add.Tensor"."""
    namespace, rest = name.split("::")
    if namespace == "fxmem":
        for definitions in ("fxmem.implementations", "fxmem.outforms"):  # in a process that has only unpickled so far
            importlib.import_module(definitions)
    return functools.reduce(getattr, rest.split("."), getattr(torch.ops, namespace))
