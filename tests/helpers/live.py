"""Watches which storages live while a step runs."""

from __future__ import annotations

import weakref
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

OF_AUTOGRAD = ("aten.ones_like.", "aten.detach.")


class LiveStorages(TorchDispatchMode):
    """`events`: (operator, bytes alive when it is over) of all that makes or writes bytes; what is in `before` counts."""

    def __init__(self, before: list[torch.Tensor]):
        super().__init__()
        self.live_bytes, self._known, self.events = 0, {}, []
        for tensor in before:
            self._add(tensor)

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = function(*args, **(kwargs or {}))
        made = [self._add(t) for t in pytree.tree_leaves(out) if isinstance(t, torch.Tensor)]
        if (any(made) or function._schema.is_mutable) and not str(function).startswith(OF_AUTOGRAD):
            self.events.append((str(function), self.live_bytes))
        return out

    def _add(self, tensor: torch.Tensor) -> bool:
        storage = tensor.untyped_storage()
        key, size_bytes = storage._cdata, storage.nbytes()
        if key in self._known:
            return False

        def strike(_: Any) -> None:
            del self._known[key]
            self.live_bytes -= size_bytes

        self._known[key] = weakref.ref(storage, strike)
        self.live_bytes += size_bytes
        return size_bytes > 0  # the tokens between regions have none
