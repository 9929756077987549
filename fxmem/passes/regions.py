"""Where the chain of regions is cut: at the block boundaries of the user's model, into pieces of a readable size."""

from __future__ import annotations

import re

from torch import fx

from ..graph_meta import StorageInfo, is_backward, is_view, module_of, require, storages_read
from .base import Pass

LARGEST_SHARE = 1 / 6  # a module with a larger share of the forward operators is cut at its children
SMALLEST_SHARE = 1 / 24  # neighbours that together have a smaller share become one region


class MarkRegions(Pass):
    """Annotates every node of a joint graph with `meta["fxmem_region"]`, and the graph module with `meta["fxmem_regions"]`, the
    regions' names in forward order. Needs ShapeProp.

    A backward node belongs to the region of the forward node that it differentiates, as far as the order of the backward
    allows: its regions follow each other from the last to the first.
    """

    def apply(self, graph_module: fx.GraphModule) -> bool:
        require(graph_module, "fxmem_storages", "ShapeProp")
        infos = graph_module.meta["fxmem_storages"]
        made = [n for n in graph_module.graph.nodes if n.op == "call_function" and not is_view(n, infos)]
        nodes = [n for n in made if "fxmem_offers" not in n.meta]
        forward = [n for n in nodes if not is_backward(n)]
        backward = [n for n in nodes if is_backward(n)]
        first_read = next((i for i, n in enumerate(forward) if _reads_an_argument(n, infos)), 0)
        groups = _groups([module_of(n) for n in forward], first_read)
        for region, (start, stop) in enumerate(groups):
            for node in forward[start:stop]:
                node.meta["fxmem_region"] = region
        _mark_backward(forward, backward, len(groups))
        _mark_offers([n for n in made if "fxmem_offers" in n.meta], infos)
        paths = [[module_of(n) for n in forward[start:stop]] for start, stop in groups]
        graph_module.meta["fxmem_regions"] = _names(paths)
        return False


def _mark_offers(offers: list[fx.Node], infos: tuple[StorageInfo, ...]) -> None:
    """What stands beside the program is of the region of the operator that it stands for, or whose results it encodes."""
    for node in offers:
        shown = node.meta["fxmem_storages"] if "fxmem_stands_for" in node.meta else storages_read(node)
        makers = [infos[s].node for s in shown if infos[s].node.op == "call_function"]
        if makers:
            node.meta["fxmem_region"] = makers[0].meta["fxmem_region"]


def _reads_an_argument(node: fx.Node, infos: tuple[StorageInfo, ...]) -> bool:
    return any(infos[s].node.op == "placeholder" for s in storages_read(node))


def _groups(paths: list[str], first_read: int) -> list[tuple[int, int]]:
    """Half-open ranges of operators, one for each region.

    The first holds operator `first_read`, which reads an argument: from its arguments a chain learns its device.
    """
    total = len(paths)
    split = [[p for p in path.split(".") if p] for path in paths]

    def cut(start: int, stop: int, depth: int) -> list[tuple[int, int]]:
        if stop - start <= total * LARGEST_SHARE or all(len(p) <= depth for p in split[start:stop]):
            return [(start, stop)]
        edges = [start, *(i for i in range(start + 1, stop) if split[i][: depth + 1] != split[i - 1][: depth + 1]), stop]
        pieces = [piece for low, high in zip(edges, edges[1:], strict=False) for piece in cut(low, high, depth + 1)]
        return _merge(pieces, total * SMALLEST_SHARE)

    pieces = cut(0, total, 0) if total else []
    joined = sum(start <= first_read for start, _ in pieces)
    return [(0, pieces[joined - 1][1]), *pieces[joined:]] if pieces else []


def _merge(pieces: list[tuple[int, int]], most: float) -> list[tuple[int, int]]:
    """Join neighbours as long as they stay small together."""
    merged = pieces[:1]
    for start, stop in pieces[1:]:
        if stop - merged[-1][0] <= most:
            merged[-1] = (merged[-1][0], stop)
        else:
            merged.append((start, stop))
    return merged


def _mark_backward(forward: list[fx.Node], backward: list[fx.Node], count: int) -> None:
    """Cut the backward where the fewest operators end up away from the region that they differentiate."""
    region_of = {}
    for node in forward:
        region_of.setdefault(node.meta.get("seq_nr"), node.meta["fxmem_region"])
    natural, last = [], count - 1
    for node in backward:
        last = region_of.get(node.meta.get("seq_nr"), last)
        natural.append(last)
    start = 0
    for region in range(count - 1, -1, -1):
        # Ends where what lies before belongs to this region or later ones, and what lies behind to earlier ones.
        best, balance, stop = 0, 0, start
        for i in range(start, len(natural)):
            balance += 1 if natural[i] >= region else -1
            if balance > best:
                best, stop = balance, i + 1
        stop = len(natural) if region == 0 else stop
        for node in backward[start:stop]:
            node.meta["fxmem_region"] = region
        start = stop


def _names(paths: list[list[str]]) -> tuple[str, ...]:
    """A region's name: the module path that it covers, or "first_to_last" of several; unique, and a Python identifier."""
    names: list[str] = []
    for covered in paths:
        inner = [p for p in dict.fromkeys(covered) if p] or ["root"]
        prefix = _common_prefix(inner)
        name = prefix or (inner[0] if len(inner) == 1 else f"{_top(inner[0])}_to_{_top(inner[-1])}")
        name = re.sub(r"\W", "_", name)
        name = f"block_{name}" if name[0].isdigit() else name
        taken = [n for n in names if n == name or re.fullmatch(re.escape(name) + r"_part\d+", n)]
        names.append(f"{name}_part{len(taken) + 1}" if taken else name)
    return tuple(names)


def _common_prefix(paths: list[str]) -> str:
    parts = [p.split(".") for p in paths]
    shared = []
    for column in zip(*parts, strict=False):
        if len(set(column)) > 1:
            break
        shared.append(column[0])
    return ".".join(shared)


def _top(path: str) -> str:
    return path.split(".")[0]
