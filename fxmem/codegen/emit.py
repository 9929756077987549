"""Writes a joint graph anew in the order of a schedule: one node for each step, recomputes named after what they repeat.

Views are not steps. A view is made where it is first needed after its base, and once more in every region graph that needs
it, so that only bases are carried from graph to graph.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import fx

from ..graph_meta import is_view, result_of
from ..inplace import INPLACE_FORMS
from ..lowering import BATCH_NORM, Lowered, draws_random_numbers, node_device
from ..schedule import Schedule, Timeline, forward_length
from .operators import dropout_apply, replay, rng_state

aten = torch.ops.aten


def emit(graph_module: fx.GraphModule, lowered: Lowered, schedule: Schedule, timeline: Timeline) -> fx.Graph:
    """The graph of `graph_module` as `schedule` runs it. Every new node carries `meta["fxmem_phase"]` ("forward" or
    "backward"), `meta["fxmem_region"]`, `meta["fxmem_step"]` where it is a step of the schedule, and, where it repeats a node,
    `meta["fxmem_recomputes"]` (that node's name)."""
    return _Emitter(graph_module, lowered, schedule, timeline).run()


class _Emitter:
    """One emission. `current[n]` is the new node that stands for the old node n now; a recompute replaces it."""

    def __init__(self, graph_module: fx.GraphModule, lowered: Lowered, schedule: Schedule, timeline: Timeline):
        self.old = graph_module.graph
        self.infos = graph_module.meta["fxmem_storages"]
        self.lowered, self.schedule, self.timeline = lowered, schedule, timeline
        self.new = fx.Graph(tracer_cls=self.old._tracer_cls)
        self.current: dict[fx.Node, fx.Node] = {}
        self.results: dict[fx.Node, fx.Node] = {}
        self.states: dict[fx.Node, fx.Node] = {}
        self.forward_steps = forward_length(lowered.problem, schedule)
        self.repeated = set(schedule.steps[self.forward_steps :]) & set(lowered.problem.forward)
        self.aliases = self._aliases()
        self.place = ("forward", 0)

    def run(self) -> fx.Graph:
        for node in self.old.nodes:
            if node.op == "placeholder":
                self.current[node] = self.new.node_copy(node)
        output = self.old.output_node()
        awaited = self._awaited(output)
        regions = self._regions()
        for step, index in enumerate(self.schedule.steps):
            node = self.lowered.nodes[index]
            if node is output:  # the end of the forward: incoming gradients are there from here on
                self._enter(("backward", max(region for _, region in regions)))
                continue
            self._enter(regions[step])
            self._run_step(step, index, node)
            self._hand_over(awaited.pop(self.lowered.nodes[self.lowered.problem.program_index(index)], ()))
        values = tuple(self.results[v] if isinstance(v, fx.Node) else v for v in output.args[0])
        copied = self.new.output(values)
        copied.meta = dict(output.meta)
        return self.new

    def _aliases(self) -> dict[int, list[fx.Node]]:
        """For each storage the old nodes that show it."""
        found: dict[int, list[fx.Node]] = {}
        for node in self.old.nodes:
            for storage in node.meta.get("fxmem_storages", ()):
                found.setdefault(storage, []).append(node)
        return found

    def _awaited(self, output: fx.Node) -> dict[fx.Node, list[fx.Node]]:
        """Output values by the node that makes their bytes: they are handed over as soon as it has run."""
        awaited: dict[fx.Node, list[fx.Node]] = {}
        for value in output.all_input_nodes:
            awaited.setdefault(self.infos[value.meta["fxmem_storages"][0]].node, []).append(value)
        for maker in [m for m in awaited if m.op == "placeholder"]:
            self._hand_over(awaited.pop(maker))
        return awaited

    def _hand_over(self, values: Iterable[fx.Node]) -> None:
        """Fix what the graph returns: a later recompute of the same bytes makes another value."""
        for value in values:
            self.results[value] = self._resolve(value)

    def _regions(self) -> list[tuple[str, int]]:
        """(phase, region) of every step: a recompute belongs to the backward operator that it serves."""
        places, backward_region = [], 0
        for step in range(len(self.schedule.steps) - 1, -1, -1):
            index = self.schedule.steps[step]
            region = self.lowered.nodes[index].meta.get("fxmem_region", 0)
            if step < self.forward_steps:
                places.append(("forward", region))
                continue
            if self.lowered.problem.program_index(index) in self.lowered.problem.backward:
                backward_region = region
            places.append(("backward", backward_region))
        return places[::-1]

    def _enter(self, place: tuple[str, int]) -> None:
        """On entry into another graph, forget views: they are made again there from their bases."""
        if place == self.place:
            return
        self.place = place
        for node in [n for n in self.current if is_view(n, self.infos) and not _is_item(n, self.infos)]:
            del self.current[node]

    def _run_step(self, step: int, index: int, node: fx.Node) -> None:
        problem, offer = self.lowered.problem, node.meta.get("fxmem_offers")
        again = step >= self.forward_steps and problem.program_index(index) not in problem.backward
        if draws_random_numbers(node) and not again and index in self.repeated:
            self.states[node] = self._call(rng_state, (str(node_device(node)),), {}, f"{node.name}_rng_state")
        arguments, keywords = fx.map_arg(node.args, self._resolve), fx.map_arg(node.kwargs, self._resolve)
        for storage in set(self.lowered.problem.operators[index].outputs) - self.lowered.problem.outputs:
            for alias in self.aliases[storage]:
                self.current.pop(alias, None)
        if offer is None and index >= problem.num_program:
            self._variant(step, index, node, arguments)
            return
        target, arguments, keywords = self._form(node, again, self.timeline.inplace[step], arguments, keywords)
        stood_for = node.meta.get("fxmem_stands_for", node)
        made = self._call(target, arguments, keywords, f"{node.name}_recomputed" if again else node.name)
        made.meta = node.meta | made.meta | {"fxmem_step": step}
        if again:
            made.meta |= {"fxmem_recomputes": stood_for.name, "fxmem_avoided_bytes": self._used_bytes(step, index)}
        if target is not node.target and self.timeline.inplace[step]:
            made.meta["fxmem_inplace_over"] = arguments[0].name
        self.current[stood_for] = made
        self._items(step, stood_for)

    def _form(self, node: fx.Node, again: bool, pair: tuple[int, int] | None, arguments: tuple, keywords: dict):
        """How a step runs: plainly, in place, or as the repeat of what must not happen twice."""
        if again and node in self.states:
            return replay, (self.states[node], str(node_device(node)), node.target, *arguments), keywords
        if again and node.target is BATCH_NORM and node.args[5] is True:
            # Statistics move once: the repeat neither reads nor makes the running ones.
            return aten._native_batch_norm_legit.no_stats, (*arguments[:3], *arguments[5:]), keywords
        if pair:
            form, target = INPLACE_FORMS[node.target], INPLACE_FORMS[node.target].target
            if pair[0] not in node.args[0].meta["fxmem_storages"]:
                target, arguments = form.second or target, (arguments[1], arguments[0], *arguments[2:])
            return target, arguments, keywords | ({form.out: arguments[0]} if form.out else {})
        return node.target, arguments, keywords

    def _used_bytes(self, step: int, index: int) -> int:
        """Bytes that a recompute makes for a later use, and that were not kept until then."""
        dead = self.timeline.frees[step]
        return sum(self.infos[s].size_bytes for s in self.lowered.problem.operators[index].outputs if s not in dead)

    def _variant(self, step: int, index: int, node: fx.Node, arguments: tuple) -> None:
        """A dropout from its kept mask."""
        result, mask = (result_of(node, i) for i in (0, 1))
        made = self._call(
            dropout_apply, (arguments[0], self._resolve(mask), 1 / (1 - node.args[1])), {}, f"{result.name}_recomputed"
        )
        made.meta = result.meta | made.meta | {"fxmem_step": step}
        made.meta |= {"fxmem_recomputes": result.name, "fxmem_avoided_bytes": self._used_bytes(step, index)}
        self.current[result] = made

    def _items(self, step: int, node: fx.Node) -> None:
        """Take the results that are still needed out of a tuple at once, so that the others die with it."""
        dead = self.timeline.frees[step]
        for user in node.users:
            if _is_item(user, self.infos) and not set(user.meta["fxmem_storages"]) <= set(dead):
                self._resolve(user)

    def _resolve(self, node: fx.Node) -> fx.Node:
        """The new node for an old one, making views on the way."""
        if node in self.current:
            return self.current[node]
        pending = [node]
        while pending:  # chains of views may be long, so no recursion
            top = pending[-1]
            missing = [n for n in top.all_input_nodes if n not in self.current]
            if missing:
                pending.extend(missing)
                continue
            pending.pop()
            if top not in self.current:
                made = self.new.node_copy(top, self.current.__getitem__)
                self._mark(made)
                self.current[top] = made
        return self.current[node]

    def _call(self, target, arguments: tuple, keywords: dict, name: str) -> fx.Node:
        node = self.new.create_node("call_function", target, arguments, keywords, name)
        self._mark(node)
        return node

    def _mark(self, node: fx.Node) -> None:
        node.meta["fxmem_phase"], node.meta["fxmem_region"] = self.place


def _is_item(node: fx.Node, infos) -> bool:
    """Whether the node takes a result with bytes of its own out of an operator's tuple."""
    return (
        node.op == "call_function"
        and len(node.all_input_nodes) == 1
        and any(infos[s].node is node.all_input_nodes[0] for s in node.meta["fxmem_storages"])
        and isinstance(node.all_input_nodes[0].meta["val"], (tuple, list))
    )
