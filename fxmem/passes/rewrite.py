"""Several operators written as others, where an implementation offers that."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import fx

from ..errors import ImplementationError
from ..graph_meta import is_backward
from ..implementations import Call, Implementation, Result, Rewrite, choose_implementations
from ..torch_internals import pytree
from .base import Pass, fake_result
from .offer import naming_failures


class RewriteParts(Pass):
    """Applies every `Rewrite` that implementations offer; new nodes carry `meta["fxmem_implementation"]`, the graph module the
    number of rewrites in `meta["fxmem_rewrites"]`.

    names, exactness: as for `fxmem.transform`. forward: whether those are applied that change the forward, too; if the step is
    better so is for the caller to find out. Needs `meta["val"]`, and runs before ShapeProp. Raises ImplementationError, naming
    it, for an implementation that fails.
    """

    def __init__(self, names: Sequence[str] | None = None, exactness: str = "bitwise", forward: bool = True):
        super().__init__()
        chosen = choose_implementations(names, exactness)
        self.implementations, self.forward = [i for i in chosen if not i.forward], forward

    def apply(self, graph_module: fx.GraphModule) -> bool:
        count = 0
        for implementation, node, found in self._found(graph_module.graph):
            with naming_failures(implementation, node):
                _Writer(graph_module.graph, found, implementation).write()
            count += 1
        graph_module.meta["fxmem_rewrites"] = graph_module.meta.get("fxmem_rewrites", 0) + count
        return count > 0

    def applies(self, graph_module: fx.GraphModule) -> bool:
        """Whether there is anything to rewrite."""
        return next(self._found(graph_module.graph), None) is not None

    def _found(self, graph: fx.Graph) -> Iterator[tuple[Implementation, fx.Node, Rewrite]]:
        for implementation in self.implementations:
            for target in implementation.serves:
                for node in [n for n in graph.find_nodes(op="call_function", target=target) if is_backward(n)]:
                    with naming_failures(implementation, node):
                        found = implementation.choose(node)
                    if isinstance(found, Rewrite) and (self.forward or not found.forward):
                        yield implementation, node, found


class _Writer:
    """One rewrite of a graph."""

    def __init__(self, graph: fx.Graph, rewrite: Rewrite, implementation: Implementation):
        self.graph, self.rewrite, self.implementation = graph, rewrite, implementation
        self.results: dict[int, fx.Node] = {}
        self.made: dict[fx.Node, fx.Node] = {}

    def write(self) -> None:
        made = self.rewrite.made
        if self.rewrite.forward:
            wanted = {a.index for n in made for a in pytree.tree_leaves(_arguments(made[n])) if isinstance(a, Result)}
            self._run_forward(self.rewrite.forward, self.rewrite.at, sorted(wanted))
        for node, source in made.items():
            with self.graph.inserting_before(node):
                new = self._moved(source, node) if isinstance(source, Call) else self.results[source.index]
            node.replace_all_uses_with(new)
            self.made[node] = new
        self._erase(made)

    def _run_forward(self, call: Call, at: fx.Node, wanted: list[int]) -> None:
        with self.graph.inserting_before(at):
            whole = self._call(call, at, f"{at.name}_{self.implementation.name}")
            for index in wanted:
                self.results[index] = self._call(Call(operator.getitem, (whole, index)), at, f"{whole.name}_{index}")

    def _moved(self, call: Call, place: fx.Node) -> fx.Node:
        """A node in that place, named after the one that did the same."""
        same = next((n for n in self.rewrite.made if n.target is call.target), place)
        return self._call(call, same, same.name)

    def _call(self, call: Call, beside: fx.Node, name: str) -> fx.Node:
        """A node of the module of `beside`, on the same side of the step."""
        args, kwargs = pytree.tree_map(self._stands_for, (call.args, dict(call.kwargs)))
        node = self.graph.create_node("call_function", call.target, args, kwargs, name)
        late = next((read.name for read in node.all_input_nodes if node < read), None)
        if late is not None:
            raise ImplementationError(f"in the place of {beside.name!r} it reads {late!r}, which is made only behind that")
        value = fake_result(call.target, args, kwargs)
        node.meta = beside.meta | {"val": value, "fxmem_implementation": self.implementation.name}
        return node

    def _stands_for(self, argument: Any) -> Any:
        if isinstance(argument, Result):
            return self.results[argument.index]
        return self.made.get(argument, argument) if isinstance(argument, fx.Node) else argument

    def _erase(self, nodes: Iterable[fx.Node]) -> None:
        """Take out nodes that nobody reads, and what then nobody reads."""
        pending = dict.fromkeys(nodes)
        while pending:
            top, _ = pending.popitem()
            if not top.users and top.op == "call_function" and not top.is_impure():
                pending |= dict.fromkeys(top.all_input_nodes)
                self.graph.erase_node(top)


def _arguments(source: Result | Call) -> Any:
    return (source.args, source.kwargs) if isinstance(source, Call) else source
