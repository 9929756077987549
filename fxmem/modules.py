"""Where a graph node comes from in the user's model: module path and source line."""

from __future__ import annotations

import re

from torch import fx


def module_of(node: fx.Node) -> str:
    """The path of the user's module that the node, forward or backward, belongs to; "" at the root."""
    stack = node.meta.get("fwd_nn_module_stack") or node.meta.get("nn_module_stack") or {}
    return clean_path(list(stack.values())[-1][0]) if stack else ""


def source_of(node: fx.Node) -> str:
    """"node 'add_1' of module 'layer1.0', at model.py:12" as far as it is known."""
    path = module_of(node)
    where = f" of module {path!r}" if path else ""
    frames = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    line = f", at {frames[-1][0]}:{frames[-1][1]}" if frames else ""
    return f"node {node.name!r}{where}{line}"


def clean_path(path: str) -> str:
    """A module path as the user writes it: Dynamo says "L['self'].layer1[0]", or "L['self'].__dict__['_modules']['layer1']"."""
    path = re.sub(r"@\d+$", "", path).replace(".__dict__['_modules']", "").replace("__dict__._modules", "")
    path = re.sub(r"^(L\['self'\]|L__self__)\.?(_export_root)?", "", path)
    return re.sub(r"\[['\"]?([^\]'\"]+)['\"]?\]", r".\1", path).replace("..", ".").strip("._")
