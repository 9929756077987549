"""Which operators may write their result over an operand that dies in them.

The solver decides which of them do: that an operand dies depends on what is kept and recomputed.
"""

from __future__ import annotations

from torch import fx

from ..graph_meta import require
from ..inplace import INPLACE_FORMS
from ..torch_internals import pytree
from .base import Pass, layouts


class MarkInplace(Pass):
    """Annotates nodes that have a form in place with `meta["fxmem_inplace"]`, the positions of the operands that it may write
    over: same dtype and layout as the result (the first of several), the whole of their storage, shown by no other operand, and
    not read as conjugate or negative, which what is written would be, too. Needs ShapeProp."""

    def apply(self, graph_module: fx.GraphModule) -> bool:
        require(graph_module, "fxmem_storages", "ShapeProp")
        for node in graph_module.graph.nodes:
            if node.target in INPLACE_FORMS:
                node.meta["fxmem_inplace"] = _positions(node)
        return False


def _positions(node: fx.Node) -> tuple[int, ...]:
    form = INPLACE_FORMS[node.target]
    either = form.second or (form.commutes and not node.kwargs and len(node.args) == 2)
    return tuple(i for i in range(2 if either else 1) if isinstance(node.args[i], fx.Node) and _may_hold(node.args[i], node))


def _may_hold(operand: fx.Node, node: fx.Node) -> bool:
    """Whether the result may be written over the operand."""
    value, result = operand.meta["val"], pytree.tree_leaves(node.meta["val"])[0]
    whole = value.untyped_storage().nbytes() == result.untyped_storage().nbytes()
    others = [n for n in node.all_input_nodes if n is not operand]
    aliased = any(set(operand.meta["fxmem_storages"]) & set(n.meta["fxmem_storages"]) for n in others)
    lazy, once = value.is_conj() or value.is_neg(), sum(a is operand for a in node.args) == 1
    return layouts(value) == layouts(result) and whole and not aliased and not lazy and once
