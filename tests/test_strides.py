"""Results have the strides on fake tensors that the CPU's kernels give them, however operands lie in memory."""

import copy

import pytest
import torch
from helpers.steps import assert_drop_in, transform
from torch import nn

import fxmem
from fxmem.fake_kernels import FakeTensorMode
from fxmem.torch_internals import pytree

aten = torch.ops.aten
SHAPE = (3, 4, 6, 8)
TRANSPOSED = {"rows and columns": (2, 3), "channels and rows": (1, 2), "batch and channels": (0, 1)}


def laid_out(how: str) -> torch.Tensor:
    """A tensor of SHAPE."""
    if how in TRANSPOSED:
        shape = list(SHAPE)
        a, b = TRANSPOSED[how]
        shape[a], shape[b] = shape[b], shape[a]
        return torch.rand(shape).transpose(a, b)
    x = torch.rand(SHAPE)
    return x.contiguous(memory_format=torch.channels_last) if how == "channels last" else x


def one():
    return torch.rand(4)


STATISTICS = one(), one(), torch.zeros(4), torch.ones(4)
EVERY = [True, True, True]
FORWARD = {
    aten._native_batch_norm_legit_functional.default: lambda x: (x, *STATISTICS, True, 0.1, 1e-5),
    aten._native_batch_norm_legit.no_stats: lambda x: (x, one(), one(), True, 0.1, 1e-5),
    aten._native_batch_norm_legit_no_training.default: lambda x: (x, *STATISTICS, 0.1, 1e-5),
    aten.native_layer_norm.default: lambda x: (x, [8], torch.rand(8), torch.rand(8), 1e-5),
    aten.log_sigmoid_forward.default: lambda x: (x,),
    aten.roll.default: lambda x: (x, [1], [1]),
    aten.gelu.default: lambda x: (x,),
    aten.max_pool2d_with_indices.default: lambda x: (x, [2, 2], [2, 2]),
    aten.convolution.default: lambda x: (x, torch.rand(5, 4, 3, 3), None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1),
    aten._softmax.default: lambda x: (x, 1, False),
}
BACKWARD = {
    aten.native_batch_norm_backward.default: lambda g, x: (g, x, *STATISTICS[::2], None, one(), one(), True, 1e-5, EVERY),
    aten.native_group_norm_backward.default: lambda g, x: (
        g, x, torch.rand(3, 2), torch.rand(3, 2), one(), 3, 4, 48, 2, EVERY,
    ),  # fmt: skip
    aten.native_layer_norm_backward.default: lambda g, x: (
        g, x, [8], torch.rand(3, 4, 6, 1), torch.rand(3, 4, 6, 1), torch.rand(8), torch.rand(8), EVERY,
    ),  # fmt: skip
    aten._log_softmax_backward_data.default: lambda g, x: (g, x, 1, torch.float32),
    aten._softmax_backward_data.default: lambda g, x: (g, x, 1, torch.float32),
    aten.threshold_backward.default: lambda g, x: (g, x, 0),
}  # fmt: skip
LAYOUTS = ("contiguous", "channels last", *TRANSPOSED)
CALLS = {
    **{f"{op} of {a}": (op, make, (a,)) for op, make in FORWARD.items() for a in LAYOUTS},
    **{f"{op} of {a}, {b}": (op, make, (a, b)) for op, make in BACKWARD.items() for a in LAYOUTS for b in LAYOUTS},
}


@pytest.mark.parametrize("call", CALLS)
def test_fake_strides_are_the_kernels(call):
    operator, make, layouts = CALLS[call]
    args = make(*map(laid_out, layouts))
    mode = FakeTensorMode()
    with mode:
        fake = operator(*pytree.tree_map_only(torch.Tensor, mode.from_tensor, args))
    for expected, found in zip(pytree.tree_leaves(operator(*args)), pytree.tree_leaves(fake), strict=True):
        assert expected.shape == found.shape and expected.dtype == found.dtype
        assert [s for n, s in zip(expected.shape, expected.stride(), strict=True) if n > 1] == [
            s for n, s in zip(found.shape, found.stride(), strict=True) if n > 1
        ]


class AcrossTransposes(nn.Module):
    """A norm whose input and output gradient are transposed."""

    def __init__(self, norm: nn.Module):
        super().__init__()
        self.norm, self.scale = norm, nn.Parameter(torch.randn(3, 4, 12, 10))

    def forward(self, x):
        return torch.relu(self.norm((x * self.scale).transpose(2, 3)).transpose(2, 3)) * self.scale


@pytest.mark.parametrize("batch", [1, 2])
def test_group_norm_of_channels_last(batch):
    """A gradient comes contiguous; of one image, its strides do not tell in which format the input is."""
    torch.manual_seed(0)
    x = torch.randn(batch, 4, 8, 10).contiguous(memory_format=torch.channels_last).requires_grad_()
    plain = nn.GroupNorm(2, 4)
    planned = transform(copy.deepcopy(plain), (x,), budget=None)
    for module in (plain, planned):
        module(x * 1.5).add(0).backward(torch.linspace(-1, 1, x.numel()).view(batch, 4, 8, 10))
    for expected, found in zip(plain.parameters(), planned.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad)


class Folded(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.randn(4, 1, 1))

    def forward(self, x):
        patches = nn.functional.unfold(x * self.scale, 3)
        return nn.functional.fold(patches.tanh(), (12, 12), 3)


def test_a_fold_keeps_the_room_of_what_it_folded():
    torch.manual_seed(0)
    x = torch.randn(2, 4, 12, 12, requires_grad=True)
    planned = assert_drop_in(Folded(), (x,), cost="measured")
    assert fxmem.measure(planned, (x,)).peak_bytes == planned.plan.predicted_peak_bytes


NORMS = {"batch": lambda: nn.BatchNorm2d(4), "group": lambda: nn.GroupNorm(2, 4), "layer": lambda: nn.LayerNorm(12)}


@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize("norm", NORMS)
def test_norms_of_what_is_transposed(norm, inplace):
    torch.manual_seed(0)
    x = torch.randn(3, 4, 12, 10, requires_grad=True)
    planned = assert_drop_in(AcrossTransposes(NORMS[norm]()), (x,), inplace=inplace, cost="measured")
    assert fxmem.measure(planned, (x,)).peak_bytes == planned.plan.predicted_peak_bytes
