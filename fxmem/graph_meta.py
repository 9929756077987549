"""What can be read off the nodes of a graph: where they come from in the user's model, and what the passes noted on them."""

from __future__ import annotations

import operator
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx

from .errors import CaptureError
from .torch_internals import OpOverload, is_view_operator

TORCH_FOLDER = os.path.dirname(torch.__file__) + os.sep
TRACER_FOLDER = os.path.join(TORCH_FOLDER, "_dynamo")


@dataclass(frozen=True)
class StorageInfo:
    """One storage of a graph: the node that makes it (a placeholder for what is there before), and its bytes."""

    node: fx.Node
    size_bytes: int

    @property
    def is_input(self) -> bool:
        return self.node.op in ("placeholder", "get_attr")


def rounded(size_bytes: int, alignment_bytes: int) -> int:
    """What an allocator that hands out multiples of alignment_bytes takes for a storage."""
    return -(-size_bytes // alignment_bytes) * alignment_bytes


def module_of(node: fx.Node) -> str:
    """The path of the user's module that the node, forward or backward, belongs to; "" at the root."""
    stack = node.meta.get("fwd_nn_module_stack") or node.meta.get("nn_module_stack") or {}
    return clean_path(list(stack.values())[-1][0]) if stack else ""


def source_of(node: fx.Node) -> str:
    """ "node 'add_1' of module 'layer1.0', at model.py:12" as far as it is known."""
    path = module_of(node)
    where = f" of module {path!r}" if path else ""
    frames = _frames(node)
    line = f", at {frames[-1][0]}:{frames[-1][1]}" if frames else ""
    return f"node {node.name!r}{where}{line}"


def line_of(node: fx.Node) -> str:
    """ "resnet.py:97", the innermost line outside of PyTorch that calls what the node computes; "" where none is known."""
    own = [(path, line) for path, line in _frames(node) if not path.startswith(TORCH_FOLDER)]
    if not own:
        return ""
    path, line = own[-1]
    return f"{'cell' if 'ipykernel' in path else os.path.basename(path)}:{line}"


def _frames(node: fx.Node) -> list[tuple[str, str]]:
    """Files and lines of the user's calls that led to a node, the innermost last; code that fx has generated is in no file, and
    of the tracer's own nobody wants to know."""
    frames = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    return [(path, line) for path, line in frames if not path.startswith(("<eval_with_key>", TRACER_FOLDER))]


def clean_path(path: str) -> str:
    """A module path as the user writes it: Dynamo says "L['self'].layer1[0]", "L['self'].__dict__['_modules']['layer1']", and
    of a GraphModule's code "getattr(L['self'].layer1, '0')"."""
    found = None
    while path != found:
        found, path = path, re.sub(r"getattr\(([^()]*), ['\"]([^'\"]*)['\"]\)", r"\1.\2", path)
    path = re.sub(r"@\d+$", "", path).replace(".__dict__['_modules']", "").replace("__dict__._modules", "")
    path = re.sub(r"^(L\['self'\]|L__self__)\.?(_export_root)?", "", path)
    return re.sub(r"\[['\"]?([^\]'\"]+)['\"]?\]", r".\1", path).replace("..", ".").strip("._")


def require(graph_module: fx.GraphModule, key: str, made_by: str) -> None:
    """Raise CaptureError unless the pass `made_by` has left its `key` in the graph module's meta."""
    if key not in graph_module.meta:
        raise CaptureError(f"this graph module has no {key!r} yet: run fxmem.passes.{made_by} before this pass")


def is_backward(node: fx.Node) -> bool:
    """Whether the node belongs to the backward part of a joint graph."""
    return node.meta.get("fxmem_backward", False)


def is_view(node: fx.Node, infos: tuple[StorageInfo, ...]) -> bool:
    """Whether `node` makes no storage of its own: it only shows bytes that are there, and has no other effect."""
    if node.op != "call_function" or "fxmem_writes" in node.meta or "fxmem_offers" in node.meta:
        return False
    return bool(node.meta["fxmem_storages"]) and all(infos[s].node is not node for s in node.meta["fxmem_storages"])


def storages_read(node: fx.Node) -> list[int]:
    """The storages of what a node reads, one after the other."""
    return [s for n in node.all_input_nodes for s in n.meta["fxmem_storages"]]


def result_of(node: fx.Node, index: int) -> fx.Node | None:
    """The node that takes one of an operator's results out of its tuple; None where nobody wants it."""
    return next((u for u in node.users if u.target is operator.getitem and u.args[1] == index), None)


def readers(node: fx.Node) -> Iterator[fx.Node]:
    """The nodes that read what a node makes, by itself or through views; the views too."""
    pending = [node]
    while pending:
        for user in pending.pop().users:
            yield user
            if makes_view(user):
                pending.append(user)


def makes_view(node: fx.Node) -> bool:
    """Whether the node's operator always returns a view; nothing need be known of storages."""
    return isinstance(node.target, OpOverload) and is_view_operator(node.target)
