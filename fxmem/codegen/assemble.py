"""The graph of the chain: inputs, parameters, one call for each region, outputs; and the PlannedModule around it."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch import fx, nn

from ..capture import Capture
from ..guards import ValueGuard
from ..roles import Role
from ..torch_internals import pytree, spec_children
from .arena import ArenaPool, Layout
from .calls import Call
from .partition import RegionGraphs
from .planned import PlannedModule, RegionChain
from .runtime import Region


def assemble(
    source: nn.Module,
    captured: Capture,
    parts: tuple[RegionGraphs, ...],
    args: tuple,
    kwargs: Mapping[str, Any],
    plan: Any,
    replan: Callable | None,
    layout: Layout | None = None,
    infer: Callable | None = None,
    guards: Collection[ValueGuard] = (),
) -> PlannedModule:
    """The PlannedModule of a captured module, cut into `parts`, called as `source(*args, **kwargs)` (see `canonical_call`).

    layout: of the arena that its graphs write into; None where they write into none. replan, infer: plan other kinds of calls,
        with gradients and without; a module without the former runs for this kind of call alone. guards: see `guards_of`.
    """
    expected, attached = frozenset(captured.differentiated), frozenset(captured.attached)
    arenas = [ArenaPool(layout) if layout and layout.slots else None] + [None] * len(parts)
    regions = [Region(part, i, len(parts), expected, attached, arenas[i]) for i, part in enumerate(parts)]
    chain = RegionChain(regions, captured.constants, captured.attributes, captured.out_spec)
    graph = _Outer(source, captured, args, kwargs).build([part.spec for part in parts])
    call = Call.of(source, args, kwargs, (*captured.read.constants, *captured.attributes))
    return PlannedModule(source, graph, chain, plan, call, replan, infer, guards)


class _Outer:
    """Builds the graph of the chain: inputs, parameters, one call for each region, outputs."""

    def __init__(self, source: nn.Module, captured: Capture, args: tuple, kwargs: Mapping[str, Any]):
        self.source, self.captured = source, captured
        self.graph = fx.Graph()
        self.nodes: dict[Role, fx.Node] = {}
        self.leaves = self._placeholders(args, dict(kwargs))

    def build(self, specs: list) -> fx.Graph:
        previous: list[fx.Node] = []
        for spec in specs:
            arguments = [self._argument(role) for role in spec.arguments]
            node = self.graph.create_node(
                "call_module", f"fxmem_regions.{spec.name}", (*previous, *arguments), {}, name=spec.name
            )
            previous = [node]
        self.graph.output(self._outputs(previous[0], specs[-1].results))
        return self.graph

    def _placeholders(self, args: tuple, kwargs: dict) -> list[tuple[fx.Node, tuple]]:
        """Placeholders named as the module names its arguments; for each input leaf its placeholder and the path into it."""
        parameters = inspect.signature(self.source.forward).parameters.values()
        positional = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        names = [positional[i] if i < len(positional) else f"arg_{i}" for i in range(len(args))]
        tops = [self.graph.placeholder(name) for name in (*names, *kwargs)]
        leaves = []
        for top, value in zip(tops, (*args, *kwargs.values()), strict=True):
            leaves += [(top, path) for path, _ in pytree.tree_flatten_with_path(value)[0]]
        return leaves

    def _argument(self, role: Role) -> fx.Node:
        if role not in self.nodes:
            if role.kind == "input":
                top, path = self.leaves[role.key]
                self.nodes[role] = self._walk(top, path)
            else:
                name = f"fxmem_regions.{role.key}" if role.key in self.captured.constants else role.key
                self.nodes[role] = self.graph.get_attr(name)
        return self.nodes[role]

    def _walk(self, node: fx.Node, path: tuple) -> fx.Node:
        """The leaf of a nested input: one getitem or getattr for each step of its path."""
        for step in path:
            key = getattr(step, "idx", getattr(step, "key", None))
            if key is None:
                node = self.graph.call_function(getattr, (node, step.name))
            else:
                node = self.graph.call_function(operator.getitem, (node, key))
        return node

    def _outputs(self, last: fx.Node, results: tuple) -> Any:
        leaves = dict(self.captured.fixed_outputs)
        for position, (leaf, _, _) in enumerate(results):
            leaves[leaf] = self.graph.create_node("call_function", operator.getitem, (last, position), name=f"output_{leaf}")
        ordered = [leaves[i] for i in range(self.captured.out_spec.num_leaves)]
        if _is_plain(self.captured.out_spec):
            return pytree.tree_unflatten(ordered, self.captured.out_spec)
        return self.graph.call_module("fxmem_regions.output_structure", tuple(ordered))


def _is_plain(spec: Any) -> bool:
    """Whether the structure is made of what an fx graph can return as it stands."""
    return spec.is_leaf() or (spec.type in (tuple, list, dict) and all(_is_plain(child) for child in spec_children(spec)))
