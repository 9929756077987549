"""Other implementations of the backward's operators, written beside the graph for the solver to choose from."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import fx

from ..errors import ImplementationError
from ..graph_meta import StorageInfo, is_backward, require, rounded, source_of
from ..guards import ValueGuard
from ..implementations import CODE, Call, Choice, Guard, Implementation, Rewrite, choose_implementations
from ..torch_internals import pytree, tensors_in
from .base import Pass, fake_result, layouts, told


class OfferImplementations(Pass):
    """Adds nodes that nothing reads yet: encoders (`meta["fxmem_offers"] = "encoder"`), makers of an operand ("variant") and of
    a backward node's result ("alternative"), the latter two with `meta["fxmem_stands_for"]`, the node that they stand for;
    all with `meta["fxmem_implementation"]`.

    names, exactness: as for `fxmem.transform`. everywhere: whatever `least_bytes` an implementation has. holds: whether a guard
    does; where it is not given, what has one is not offered. Needs ShapeProp. What has to hold at each call stands in
    `meta["fxmem_guard"]` of an offer, the keys of guards that do not hold in the graph module's `meta["fxmem_withheld"]`.
    Raises ImplementationError for a name that is not known, and, naming it, for an implementation that fails. One that makes
    something of another shape, layout or type is not offered; `meta["fxmem_not_offered"]` says why, for the first such place of
    each.
    """

    def __init__(
        self,
        names: Sequence[str] | None = None,
        exactness: str = "bitwise",
        everywhere: bool = False,
        holds: Callable[[ValueGuard], bool] = lambda guard: False,
    ):
        super().__init__()
        self.implementations, self.everywhere = choose_implementations(names, exactness), everywhere
        self.holds = holds

    def apply(self, graph_module: fx.GraphModule) -> bool:
        require(graph_module, "fxmem_storages", "ShapeProp")
        offers = _Offers(graph_module, self.holds)
        for node in [n for n in graph_module.graph.nodes if n.op == "call_function"]:
            for implementation in self.implementations:
                if self._is_for(implementation, node):
                    offers.add(implementation, node)
        graph_module.meta["fxmem_storages"] = tuple(offers.infos)
        graph_module.meta["fxmem_not_offered"] = offers.refused
        graph_module.meta["fxmem_withheld"] = tuple(sorted(offers.withheld))
        return offers.added

    def _is_for(self, implementation: Implementation, node: fx.Node) -> bool:
        if node.target not in implementation.serves or implementation.forward == is_backward(node):
            return False
        return self.everywhere or implementation.least_bytes <= largest_bytes(node)


def largest_bytes(node: fx.Node) -> int:
    """Bytes of the largest tensor that a node reads or makes."""
    leaves = pytree.tree_leaves([n.meta["val"] for n in (node, *node.all_input_nodes)])
    return max((leaf.nbytes for leaf in leaves if isinstance(leaf, torch.Tensor)), default=0)


@contextlib.contextmanager
def naming_failures(implementation: Implementation, node: fx.Node) -> Iterator[None]:
    """Whatever an implementation raises, as an ImplementationError that names it and the node."""
    try:
        yield
    except Exception as error:
        raise ImplementationError(f"implementation {implementation.name!r} fails on {source_of(node)}: {error}") from error


class _Offers:
    """The nodes added so far; what two implementations encode alike is encoded once."""

    def __init__(self, graph_module: fx.GraphModule, holds: Callable[[ValueGuard], bool]):
        self.holds, self.withheld = holds, set[tuple[str, ...]]()
        self.graph = graph_module.graph
        self.infos: list[StorageInfo] = list(graph_module.meta["fxmem_storages"])
        self.alignment_bytes = graph_module.meta["fxmem_alignment_bytes"]
        self.order = {node: place for place, node in enumerate(self.graph.nodes)}
        self.codes: dict[tuple, fx.Node] = {}
        self.decoded: set[tuple] = set()
        self.refused: dict[str, str] = {}
        self.added = False

    def add(self, implementation: Implementation, node: fx.Node) -> None:
        with naming_failures(implementation, node):
            found = implementation.choose(node)
            for choice in found if isinstance(found, Sequence) else (found,):
                if isinstance(choice, Choice):
                    self._write(choice, node, implementation)
                elif not (choice is None or isinstance(choice, Rewrite)):
                    raise TypeError(f"it gave {choice!r}, which is no Choice, no Rewrite, and not None")

    def _write(self, choice: Choice, node: fx.Node, implementation: Implementation) -> None:
        for call in filter(None, (choice.encode, choice.decode, choice.backward)):
            stranger = next((n for n in _nodes(call) if n not in self.order and n not in self.codes.values()), None)
            if stranger is not None:
                raise ValueError(f"{stranger.name!r}, which it reads, is a node of another graph")
        if choice.encode and not self._encodes_forward(choice.encode):
            self._refuse(implementation, node, "it encodes results of more than one operator, or of the backward")
            return
        guard = self._guard(choice.guard, implementation)
        if choice.guard and not guard:
            self._refuse(implementation, node, "its guard is of what is neither parameter nor buffer")
            return
        if guard and not self.holds(guard):
            self.withheld.add(guard.key)
            self._refuse(implementation, node, f"its guard does not hold of the values of {guard}")
            return
        code = self._encoder(choice.encode, implementation) if choice.encode else None
        decoding = choice.decoded, code, repr(choice.decode)
        if choice.decode and decoding not in self.decoded:
            self.decoded.add(decoding)
            self._stand_in(choice.decode, choice.decoded, code, "variant", implementation, guard)
        if not choice.backward:
            return
        if self._gradients(choice.backward) == self._gradients(Call(node.target, node.args, node.kwargs)):
            self._stand_in(choice.backward, choice.result or node, code, "alternative", implementation, guard)
        else:
            self._refuse(implementation, node, "it reads other gradients than the operator that it stands for")

    def _refuse(self, implementation: Implementation, node: fx.Node, why: str) -> None:
        self.refused.setdefault(implementation.name, f"for {source_of(node)}, {why}")

    def _encodes_forward(self, call: Call) -> bool:
        """Whether an encoder reads results of one forward operator, and what is there from the start."""
        makers = {self.infos[s].node for n in _nodes(call) for s in n.meta["fxmem_storages"]}
        made = [maker for maker in makers if maker.op == "call_function"]
        return len(made) <= 1 and not any(map(is_backward, made))

    def _gradients(self, call: Call) -> set[int]:
        """The storages that the backward makes, of those that a call reads: an alternative has to read the same ones."""
        read = {s for n in _nodes(call) for s in n.meta["fxmem_storages"]}
        return {s for s in read if is_backward(self.infos[s].node)}

    def _encoder(self, call: Call, implementation: Implementation) -> fx.Node:
        key = (call.target, repr(call.args), repr(call.kwargs))
        if key not in self.codes:
            source = max(_nodes(call), key=self._place)
            node = self._call(call, None, source, source, f"{source.name}_{implementation.name}")
            node.meta |= {"fxmem_offers": "encoder", "fxmem_storages": (len(self.infos),)}
            node.meta["fxmem_implementation"] = implementation.name
            size_bytes = node.meta["val"].untyped_storage().nbytes()
            self.infos.append(StorageInfo(node, rounded(size_bytes, self.alignment_bytes)))
            self.codes[key] = node
        return self.codes[key]

    def _place(self, node: fx.Node) -> int:
        return self.order[node]

    def _guard(self, guard: Guard | None, implementation: Implementation) -> ValueGuard | None:
        """None where there is none, and where it is of anything else than parameters and buffers."""
        if not (guard is None or isinstance(guard, Guard)):
            raise TypeError(f"guard={guard!r} is no Guard: give Guard(function, nodes), as in Guard(share, (weight,))")
        roles = [n.meta.get("fxmem_role") for n in guard.tensors] if guard else []
        if not roles or not all(role and role.kind in ("parameter", "buffer") for role in roles):
            return None
        return ValueGuard(implementation.name, guard.share_of_limit, tuple(role.key for role in roles))

    def _stand_in(
        self,
        call: Call,
        node: fx.Node,
        code: fx.Node | None,
        what: str,
        implementation: Implementation,
        guard: ValueGuard | None,
    ) -> None:
        after = code if what == "variant" and code is not None else max((node, *_nodes(call)), key=self._place)
        made = self._call(call, code, node, after, f"{node.name}_{implementation.name}")
        if layouts(made.meta["val"]) != layouts(node.meta["val"]):
            self.graph.erase_node(made)
            self._refuse(implementation, node, f"it makes {_result(made)}, where {_result(node)} is to be made")
            return
        made.meta |= {"fxmem_offers": what, "fxmem_stands_for": node, "fxmem_storages": node.meta["fxmem_storages"]}
        made.meta["fxmem_implementation"] = implementation.name
        if guard:
            made.meta["fxmem_guard"] = guard

    def _call(self, call: Call, code: fx.Node | None, beside: fx.Node, after: fx.Node, name: str) -> fx.Node:
        """A node right after another one, of the module and region of `beside`."""
        args, kwargs = pytree.tree_map(lambda a: code if a is CODE else a, (call.args, dict(call.kwargs)))
        self.added = True
        with self.graph.inserting_after(_last_item(after)):
            node = self.graph.create_node("call_function", call.target, args, kwargs, name)
        value = fake_result(call.target, args, kwargs)
        node.meta = {k: v for k, v in _maker(beside).meta.items() if k not in ("val", "fxmem_writes")} | {"val": value}
        return node


def _result(node: fx.Node) -> str:
    """What a node makes: "float32[8, 64] with strides (64, 1)"."""
    return ", ".join(told(t, strides=True) for t in tensors_in(node.meta["val"])) or "no tensor"


def _nodes(call: Call) -> list[fx.Node]:
    """The nodes among a call's arguments."""
    return [leaf for leaf in pytree.tree_leaves((call.args, call.kwargs)) if isinstance(leaf, fx.Node)]


def _maker(node: fx.Node) -> fx.Node:
    """The operator behind a view, or that a result is taken from: it has a region."""
    while "fxmem_region" not in node.meta and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node


def _last_item(node: fx.Node) -> fx.Node:
    """Behind the results that are taken out of an operator's tuple."""
    while node.target is operator.getitem and node.next.target is operator.getitem and node.next.args[0] is node.args[0]:
        node = node.next
    return node
