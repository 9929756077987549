"""What all fxmem passes share: an honest `modified`, a lint of what they leave, one log line each.

A pass is a `torch.fx.passes.infra.pass_base.PassBase`: callable on a GraphModule, alone or in a PassManager, before and after
other people's passes. It reads `node.meta["val"]` and never contradicts it; its own keys begin with `fxmem_`.
"""

from __future__ import annotations

import logging
import time
from typing import Any

import torch
from torch import fx
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from ..fake_kernels import fake_mode_of
from ..torch_internals import pytree

log = logging.getLogger(__name__)


class Pass(PassBase):
    """Base of the passes: `apply` changes or annotates the graph module and tells whether it changed the graph."""

    def apply(self, graph_module: fx.GraphModule) -> bool:
        raise NotImplementedError

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        started, before = time.perf_counter(), len(graph_module.graph.nodes)
        modified = self.apply(graph_module)
        if modified:
            graph_module.graph.lint()
            graph_module.recompile()
        log.debug(
            "%s: %.2f s, %+d nodes", type(self).__name__, time.perf_counter() - started, len(graph_module.graph.nodes) - before
        )
        return PassResult(graph_module, modified)


def fake_result(target: Any, args: Any, kwargs: Any) -> Any:
    """What an operator makes of its arguments' `meta["val"]`, on fake tensors."""
    values, named = fx.map_arg((args, kwargs), lambda n: n.meta["val"])
    with torch.no_grad(), fake_mode_of((values, named), allow_real=True):
        return target(*values, **named)


def layouts(value: Any) -> list:
    """Shape, strides and type of each tensor, None for results that are not made."""
    return [leaf if leaf is None else (leaf.shape, leaf.stride(), leaf.dtype) for leaf in pytree.tree_leaves(value)]


def told(tensor: torch.Tensor, *, strides: bool) -> str:
    """ "float32[8, 64]", or "float32[8, 64] with strides (64, 1)"."""
    laid = f" with strides {tensor.stride()}" if strides else ""
    return f"{tensor.dtype}{list(tensor.shape)}{laid}".removeprefix("torch.")


def made_like(node: fx.Node, target: Any, args: tuple, kwargs: dict[str, Any] | None = None) -> fx.Node:
    """A call where the graph inserts now, with the meta of `node` and a value of its own."""
    made = node.graph.call_function(target, args, kwargs or {})
    made.meta = node.meta | {"val": fake_result(target, args, made.kwargs)}
    return made
