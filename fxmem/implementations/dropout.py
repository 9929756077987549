"""Dropout keeps its mask, a byte for each element; a bit is enough."""

from __future__ import annotations

import torch
from torch import fx

from ..codegen.operators import dropout_apply
from ..layouts import in_usual_format
from .base import CODE, Call, Choice, register_implementation
from .bits import pack_mask, unpack_mask


@register_implementation("dropout_bits", dropout_apply, torch.ops.aten.native_dropout_backward.default)
def dropout_bits(node: fx.Node) -> Choice | None:
    """A bit for each element; the mask is made again from them."""
    mask = node.args[1]
    value = mask.meta["val"]
    if value.dtype is not torch.bool or not in_usual_format(value):
        return None
    stride = list(value.stride())
    decode = Call(unpack_mask, (CODE, list(value.shape), stride))
    return Choice(encode=Call(pack_mask, (mask, stride)), decode=decode, decoded=mask)
