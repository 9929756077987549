"""Shape propagation over storages: runs the graph on fake tensors and notes who shares whose bytes.

`torch.fx.passes.shape_prop.ShapeProp` knows tensors; memory is made of storages. Aliasing is read off the fake storages
themselves, so that every view, `_unsafe_view` and `detach` counts as what it is.
"""

from __future__ import annotations

import torch
from torch import fx

from ..errors import CaptureError
from ..fake_kernels import fake_mode_of
from ..graph_meta import StorageInfo, rounded, source_of
from ..torch_internals import pytree, storage_key
from .base import Pass


class ShapeProp(Pass):
    """Annotates every node with `meta["val"]` (fake) and `meta["fxmem_storages"]`, the indices of the storages behind it,
    and the graph module with `meta["fxmem_storages"]`, a tuple of StorageInfo, and `meta["fxmem_alignment_bytes"]`.

    example_inputs: fake or real inputs; where None, the placeholders' own `meta["val"]` is used.
    alignment_bytes: what the device's allocator rounds sizes up to (CUDA: 512).
    """

    def __init__(self, example_inputs: tuple | None = None, alignment_bytes: int = 1):
        super().__init__()
        self.example_inputs = example_inputs
        self.alignment_bytes = alignment_bytes

    def apply(self, graph_module: fx.GraphModule) -> bool:
        placeholders = [n for n in graph_module.graph.nodes if n.op == "placeholder"]
        inputs = self.example_inputs if self.example_inputs is not None else tuple(n.meta["val"] for n in placeholders)
        with torch.no_grad(), fake_mode_of(inputs, allow_real=True) as mode:
            inputs = pytree.tree_map(
                lambda v: mode.from_tensor(v) if type(v) in (torch.Tensor, torch.nn.Parameter) else v, inputs
            )
            # Nothing may be freed on the way: a fake storage's identity is that of a live object.
            interpreter = fx.Interpreter(graph_module, garbage_collect_values=False)
            interpreter.run(*inputs)
        self._annotate(graph_module, interpreter.env)
        return False

    def _annotate(self, graph_module: fx.GraphModule, env: dict) -> None:
        index_of: dict[int, int] = {}
        infos: list[StorageInfo] = []
        for node in graph_module.graph.nodes:
            if node.op == "output":
                continue
            value = env[node]
            node.meta["val"] = value
            indices = []
            for leaf in pytree.tree_leaves(value):
                if not isinstance(leaf, torch.Tensor):
                    continue
                if leaf.layout is not torch.strided:
                    raise CaptureError(
                        f"{source_of(node)} makes a {leaf.layout} tensor; fxmem plans dense ones (for an "
                        "embedding: sparse=False)"
                    )
                key = storage_key(leaf)
                if key not in index_of:
                    index_of[key] = len(infos)
                    infos.append(StorageInfo(node, rounded(leaf.untyped_storage().nbytes(), self.alignment_bytes)))
                indices.append(index_of[key])
            node.meta["fxmem_storages"] = tuple(dict.fromkeys(indices))
        graph_module.meta.update(fxmem_storages=tuple(infos), fxmem_alignment_bytes=self.alignment_bytes)
