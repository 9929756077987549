"""Liveness over storages: which node makes each, which uses it last, and how many bytes are alive meanwhile."""

from __future__ import annotations

from torch import fx

from ..graph_meta import require, storages_read
from .base import Pass


class Liveness(Pass):
    """Annotates every node with `meta["fxmem_frees"]` (storages whose last use it is) and `meta["fxmem_live_bytes"]` (bytes
    alive while it runs, inputs of the graph included), and the graph module with `meta["fxmem_peak_bytes"]`.

    Placeholders' storages and those of the outputs live to the end. Needs ShapeProp.
    """

    def apply(self, graph_module: fx.GraphModule) -> bool:
        require(graph_module, "fxmem_storages", "ShapeProp")
        infos = graph_module.meta["fxmem_storages"]
        nodes = [n for n in graph_module.graph.nodes if n.op != "output"]
        kept = set(storages_read(graph_module.graph.output_node()))
        kept |= {s for s, info in enumerate(infos) if info.is_input}
        last_use = {}
        for node in nodes:
            for used in (node, *node.all_input_nodes):
                last_use.update(dict.fromkeys(used.meta["fxmem_storages"], node))
        live_bytes = sum(info.size_bytes for info in infos if info.is_input)
        peak_bytes = live_bytes
        frees: dict[fx.Node, list[int]] = {}
        for storage, node in last_use.items():
            if storage not in kept:
                frees.setdefault(node, []).append(storage)
        for node in nodes:
            live_bytes += sum(
                infos[s].size_bytes for s in node.meta["fxmem_storages"] if infos[s].node is node and not infos[s].is_input
            )
            node.meta["fxmem_live_bytes"] = live_bytes
            node.meta["fxmem_frees"] = tuple(sorted(frees.get(node, ())))
            peak_bytes = max(peak_bytes, live_bytes)
            live_bytes -= sum(infos[s].size_bytes for s in node.meta["fxmem_frees"])
        graph_module.meta["fxmem_peak_bytes"] = peak_bytes
        return False
