"""What an operator copies of its operands before it begins, since its kernel takes other layouts than theirs, in bytes."""

from __future__ import annotations

import torch

from ..layouts import channels_last_format
from ..torch_internals import suggested_format
from .base import OpCall

LOW_PRECISION = (torch.bfloat16, torch.float16)


def on_cpu(call: OpCall) -> bool:
    """Whether a call is costed for a CPU."""
    if call.on_gpu is not None:
        return not call.on_gpu
    return all(t.device.type in ("cpu", "meta") for t in call.inputs)


def bytes_of(tensor: torch.Tensor) -> int:
    """Bytes of a dense tensor of that shape and type."""
    return tensor.numel() * tensor.element_size()


def is_channels_last(tensor: torch.Tensor) -> bool:
    """Whether a tensor is contiguous in channels-last, and there alone."""
    return channels_last_format(tensor) is not None and not tensor.is_contiguous()


def contiguous_copies(call: OpCall) -> int:
    """For kernels that take both usual formats: a copy of each operand that lies otherwise."""
    return sum(bytes_of(t) for t in call.inputs if not (t.is_contiguous() or is_channels_last(t)))


def plain_copies(call: OpCall) -> int:
    """For kernels that take contiguous operands only: a copy of each of the others, channels-last or not."""
    return sum(bytes_of(t) for t in call.inputs if not t.is_contiguous())


def in_the_gradients_format(call: OpCall) -> int:
    """For backward kernels that run in the format that the output's gradient suggests: a copy of gradient or indices where they
    lie otherwise, and of the result, where the forward's input suggests another format."""
    gradient, x = call.inputs[:2]
    wanted = suggested_format(gradient)
    return _copied(call, wanted) + (call.new_output_bytes if suggested_format(x) is not wanted else 0)


def in_the_inputs_format(call: OpCall) -> int:
    """For backward kernels that run in the format that the forward's input suggests."""
    return _copied(call, suggested_format(call.inputs[1]))


def _copied(call: OpCall, wanted: torch.memory_format) -> int:
    """Copies in a format of what a backward kernel reads besides the forward's input, which tells it shapes alone."""
    gradient, _, *others = call.inputs
    return sum(bytes_of(t) for t in (gradient, *others) if not t.is_contiguous(memory_format=wanted))
