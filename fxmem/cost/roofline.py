"""Roofline costs (Williams, Waterman and Patterson, 2009): an operator takes as long as its arithmetic at the device's
peak or its memory traffic at the device's bandwidth, whichever is longer, plus a launch. Nothing is executed, so any device
of the table can be planned for from any machine."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from torch import fx
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from .base import OpCall, OpCost, call_of
from .devices import Device, device_table
from .workspace import workspace_bytes

aten = torch.ops.aten
ALLOCATIONS = {aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided}
LOOKUPS = {aten.embedding, aten.index, aten.index_select, aten.gather}  # read as much of their table as they return
CONVOLUTIONS = {aten.convolution, aten.convolution_backward, aten._convolution, aten.cudnn_convolution}
READ_TWICE: dict[object, int] = {  # how many operands are reduced first, over more than a cache holds, and then read again
    aten._native_batch_norm_legit_functional: 1,
    aten._native_batch_norm_legit: 1,
    aten.native_batch_norm_backward: 2,
    aten.native_group_norm: 1,
    aten.native_group_norm_backward: 2,
}
TRAINING = {aten._native_batch_norm_legit_functional: 5, aten._native_batch_norm_legit: 5, aten.native_batch_norm_backward: 7}
PARTS: dict[object, Callable[[OpCall], Iterable[OpCall]]] = {}  # for operators made of others: those, whose times add up


class RooflineCost:
    """Cost model from operation counts, bytes moved and the device table.

    device: a row's name ("P100", "V100", "A100", "H100", "H200", "cpu"). on_gpu: whose workspaces count, a GPU's or a CPU's;
        None: those of the device that the tensors are on.
    """

    def __init__(self, device: str, on_gpu: bool | None = None):
        self._device: Device = device_table(device)
        self.name, self.on_gpu = device, on_gpu

    def cost(self, node: fx.Node) -> OpCost:
        """Roofline cost of a call_function node; CostError where its values are missing."""
        return self.cost_of_call(call_of(node))

    def cost_of_call(self, call: OpCall) -> OpCost:
        """Roofline cost of one operator call on fake tensors."""
        if call.is_alias or call.packet in ALLOCATIONS or not call.outputs:
            return OpCost(0.0, 0)
        inside_bytes = workspace_bytes(replace(call, on_gpu=self.on_gpu))
        if call.packet in PARTS:
            return OpCost(sum(self.cost_of_call(part).time_s for part in PARTS[call.packet](call)), inside_bytes)
        device = self._device
        dtype = next((t.dtype for t in call.inputs if t.is_floating_point()), torch.float32)
        arithmetic_s = flops(call) / device.flops_per_s(dtype, convolution=call.packet in CONVOLUTIONS)
        traffic_s = moved_bytes(call) / device.bytes_per_s
        return OpCost(max(arithmetic_s, traffic_s) + device.launch_s, inside_bytes)


def flops(call: OpCall) -> int:
    """Floating point operations of `call`: PyTorch's own formulas, else one for each element read or written."""
    if call.packet is aten._scaled_dot_product_flash_attention_for_cpu:
        query, key, value = call.inputs[:3]
        return sdpa_flop_count(query.shape, key.shape, value.shape)
    if call.packet is aten._scaled_dot_product_flash_attention_for_cpu_backward:
        grad, query, key, value = call.inputs[:4]
        return sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape)
    formula = flop_registry.get(call.packet)
    if formula is not None:
        return int(formula(*call.args, **call.kwargs, out_val=call.out))
    return max((t.numel() for t in (*call.inputs, *call.outputs)), default=0)


def moved_bytes(call: OpCall) -> int:
    """Bytes that `call` reads and writes, each operand once (of a norm with its statistics: twice); an expanded dimension is
    read once."""
    read = [*call.inputs[1:], *call.outputs] if call.packet in LOOKUPS else call.inputs
    again = call.inputs[: READ_TWICE.get(call.packet, 0)] if _makes_statistics(call) else []
    return sum(_touched(t) for t in (*read, *again, *call.outputs))


def _makes_statistics(call: OpCall) -> bool:
    """False for a batch norm that is given them."""
    place = TRAINING.get(call.packet, len(call.args))
    return place >= len(call.args) or call.args[place] is not False


def _touched(tensor: torch.Tensor) -> int:
    elements = math.prod(n for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride != 0)
    return elements * tensor.element_size() if tensor.numel() else 0
