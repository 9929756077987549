"""Results have the strides on fake tensors that the CPU's kernels give them, however operands lie in memory."""

import copy
import itertools

import pytest
import torch
from helpers.steps import assert_drop_in, transform
from torch import nn

import fxmem
from fxmem.capture import capture
from fxmem.fake_kernels import FakeTensorMode
from fxmem.torch_internals import pytree

aten = torch.ops.aten
SHAPES = tuple(itertools.product((3, 1), (4, 1), (6, 1), (8, 1)))  # of size one in any of their dimensions
TRANSPOSED = {"rows and columns": (2, 3), "channels and rows": (1, 2), "batch and channels": (0, 1)}
LAYOUTS = ("contiguous", "channels last", *TRANSPOSED)


def laid_out(shape: tuple[int, ...], how: str) -> torch.Tensor:
    """A tensor of that shape: transposed from a contiguous one, or with the very strides of a new channels-last one."""
    if how in TRANSPOSED:
        there = list(shape)
        a, b = TRANSPOSED[how]
        there[a], there[b] = there[b], there[a]
        return torch.rand(there).transpose(a, b)
    memory_format = torch.channels_last if how == "channels last" else torch.contiguous_format
    return torch.empty(shape, memory_format=memory_format).uniform_()


def of_channels(x, *means):
    """For each mean, a vector with an entry for each channel of x."""
    return tuple(torch.full((x.shape[1],), float(mean)) for mean in means)


EVERY = [True, True, True]
ONE_PIXEL = [1, 1], [0, 0], [1, 1], False, [0, 0], 1
PATCH = [1, 1], [1, 1], [1, 1], False, [0, 0], 1
ALONE = {
    aten._native_batch_norm_legit_functional.default: lambda x: (x, *of_channels(x, 1, 0, 0, 1), True, 0.1, 1e-5),
    aten._native_batch_norm_legit.no_stats: lambda x: (x, *of_channels(x, 1, 0), True, 0.1, 1e-5),
    aten._native_batch_norm_legit_no_training.default: lambda x: (x, *of_channels(x, 1, 0, 0, 1), 0.1, 1e-5),
    aten.native_layer_norm.default: lambda x: (x, x.shape[3:], torch.rand(x.shape[3]), torch.rand(x.shape[3]), 1e-5),
    aten.convolution.default: lambda x: (x, torch.rand(5, x.shape[1], 3, 3), None, *PATCH),
    aten._unsafe_view.default: lambda x: (x, [*x.shape[:2], 1, *x.shape[2:]]),
    aten.view.default: lambda x: (x, x.shape),
    aten.upsample_nearest2d.default: lambda x: (x, [7, 9]),
    aten.upsample_bilinear2d.default: lambda x: (x, [7, 9], False),
    aten.max_pool2d_with_indices.default: lambda x: (x, [3, 3], [1, 1], [1, 1]),
    aten.avg_pool2d.default: lambda x: (x, [3, 3], [1, 1], [1, 1]),
    aten._adaptive_avg_pool2d.default: lambda x: (x, [2, 2]),
    aten.native_dropout.default: lambda x: (x, 0.5, True),
    aten.roll.default: lambda x: (x, [1], [1]),
    aten.glu.default: lambda x: (torch.cat([x, x], 1), 1),
    aten._prelu_kernel.default: lambda x: (x, torch.rand(1, x.shape[1], 1, 1)),
    aten.masked_fill.Scalar: lambda x: (x, x > 0.5, 0.0),
    aten.where.self: lambda x: (x > 0.5, x, torch.tensor(0.0)),
    aten.mul.Tensor: lambda x: (torch.rand(1, x.shape[1], 1, 1), x),
    aten.add.Scalar: lambda x: (x, 2.0),
    aten.gt.Scalar: lambda x: (x, 0.5),
    aten.pow.Tensor_Scalar: lambda x: (x, 2.0),
    aten.clamp.default: lambda x: (x, 0.2, 0.4),
    aten.lerp.Scalar: lambda x: (x, x * 2, 0.5),
    aten.sum.dim_IntList: lambda x: (x, [2, 3], True),
    aten.linalg_vector_norm.default: lambda x: (x, 2, [1], True),
    aten.cumsum.default: lambda x: (x, 1),
    aten.sort.default: lambda x: (x, 1),
    aten.flip.default: lambda x: (x, [2]),
    aten.im2col.default: lambda x: (x, [3, 3], [1, 1], [1, 1], [1, 1]),
    aten.constant_pad_nd.default: lambda x: (x, [1, 1, 1, 1]),
    aten._softmax.default: lambda x: (x, 1, False),
    aten._log_softmax.default: lambda x: (x, 1, False),
    **dict.fromkeys(
        (
            aten.relu.default, aten.gelu.default, aten.silu.default, aten.hardtanh.default, aten.hardswish.default,
            aten.tanh.default, aten.exp.default, aten.neg.default, aten.tril.default, aten.clone.default,
            aten.zeros_like.default, aten.log_sigmoid_forward.default,
        ),
        lambda x: (x,),
    ),
}  # fmt: skip
BESIDE = {
    aten.native_batch_norm_backward.default: lambda g, x: (
        g, x, *of_channels(x, 1, 0), None, *of_channels(x, 0, 1), True, 1e-5, EVERY,
    ),
    aten.native_group_norm_backward.default: lambda g, x: (
        g, x, torch.rand(x.shape[0], 1), torch.rand(x.shape[0], 1), *of_channels(x, 1), *x.shape[:2],
        x.shape[2] * x.shape[3], 1, EVERY,
    ),
    aten.native_layer_norm_backward.default: lambda g, x: (
        g, x, x.shape[3:], torch.rand(*x.shape[:3], 1), torch.rand(*x.shape[:3], 1), torch.rand(x.shape[3]),
        torch.rand(x.shape[3]), EVERY,
    ),
    aten.convolution_backward.default: lambda g, x: (
        g, x, torch.rand(x.shape[1], x.shape[1], 1, 1), [x.shape[1]], *ONE_PIXEL, EVERY,
    ),
    aten._log_softmax_backward_data.default: lambda g, x: (g, x, 1, torch.float32),
    aten._softmax_backward_data.default: lambda g, x: (g, x, 1, torch.float32),
    aten.threshold_backward.default: lambda g, x: (g, x, 0),
    aten.leaky_relu_backward.default: lambda g, x: (g, x, 0.1, False),
    aten.hardtanh_backward.default: lambda g, x: (g, x, -1, 1),
    aten.silu_backward.default: lambda g, x: (g, x),
    aten.native_dropout_backward.default: lambda g, x: (g, x > 0.5, 2.0),
    aten.mse_loss.default: lambda g, x: (g, x, 0),
    aten.mse_loss_backward.default: lambda g, x: (g, x, g, 0),
    aten.smooth_l1_loss_backward.default: lambda g, x: (torch.tensor(1.0), g, x, 1, 1.0),
    aten.huber_loss_backward.default: lambda g, x: (torch.tensor(1.0), g, x, 1, 1.0),
    aten.binary_cross_entropy_backward.default: lambda g, x: (torch.tensor(1.0), g, x, None, 1),
    aten.masked_fill.Tensor: lambda g, x: (g, x > 0.5, torch.tensor(0.0)),
    aten.masked_scatter.default: lambda g, x: (g, x > 0.5, x),
    aten.index_add.default: lambda g, x: (g, 1, torch.arange(x.shape[1]), x),
    aten.scatter_add.default: lambda g, x: (g, 1, torch.zeros(x.shape, dtype=torch.int64), x),
    aten.add.Tensor: lambda g, x: (g, x),
    aten.cat.default: lambda g, x: ([g, x], 1),
}  # fmt: skip
CALLS = {
    **{f"{op} of {a}": (op, make, (a,)) for op, make in ALONE.items() for a in LAYOUTS},
    **{f"{op} of {a}, {b}": (op, make, (a, b)) for op, make in BESIDE.items() for a in LAYOUTS[:3] for b in LAYOUTS[:4]},
}


@pytest.mark.parametrize("call", CALLS)
def test_fake_strides_are_the_kernels(call):
    operator, make, layouts = CALLS[call]
    mode = FakeTensorMode()
    for shape in SHAPES:
        if operator is aten._native_batch_norm_legit_functional.default and shape[0] * shape[2] * shape[3] == 1:
            continue  # of one value there is no variance
        args = make(*(laid_out(shape, how) for how in layouts))
        with mode:
            fake = operator(*pytree.tree_map_only(torch.Tensor, mode.from_tensor, args))
        for expected, found in zip(pytree.tree_leaves(operator(*args)), pytree.tree_leaves(fake), strict=True):
            assert expected.shape == found.shape and expected.dtype == found.dtype
            assert expected.stride() == found.stride(), shape


class Squeezed(nn.Module):
    """Squeeze and excitation, a decoder's resampling, attention over pixels: one pixel, one image, one head."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8)
        self.squeeze, self.excite = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.qkv, self.mix, self.last = nn.Linear(8, 24), nn.Linear(8, 8), nn.Conv2d(8, 1, 3, padding=1)

    def forward(self, x):
        h = self.norm(self.first(x))
        h = h * torch.sigmoid(self.excite(torch.relu(self.squeeze(nn.functional.adaptive_avg_pool2d(h, 1)))))
        q, k, v = self.qkv(h.flatten(2).transpose(1, 2)).unsqueeze(1).chunk(3, -1)
        mixed = self.mix(nn.functional.scaled_dot_product_attention(q, k, v).squeeze(1))
        h = h + mixed.transpose(1, 2).reshape(h.shape)
        return torch.tanh(self.last(nn.functional.interpolate(h, scale_factor=2.0)))


@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize("shape", [(1, 3, 8, 6), (2, 3, 1, 6), (1, 3, 1, 1)])
@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
def test_one_image_channels_last(layout, shape, inplace):
    torch.manual_seed(0)
    x, plain = laid_out(shape, layout), Squeezed()
    if layout == "channels last":
        plain.to(memory_format=torch.channels_last)
    planned = transform(copy.deepcopy(plain), (x,), cost="measured", inplace=inplace)
    outputs = plain(x), planned(x)
    assert outputs[0].stride() == outputs[1].stride()
    assert torch.equal(*outputs)
    for y in outputs:
        y.backward(torch.empty_like(y).copy_(torch.linspace(0.5, 1.5, y.numel()).view(y.shape)))
    for expected, found in zip(plain.parameters(), planned.parameters(), strict=True):
        assert torch.equal(expected.grad, found.grad)
    assert fxmem.measure(planned, (x,)).peak_bytes == planned.plan.predicted_peak_bytes


@pytest.mark.parametrize("mode", ["nearest", "nearest-exact"])
@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_nearest_resampling_runs_its_kernel(mode, dimensions):
    x = torch.rand(1, 2, *[4] * dimensions, requires_grad=True)
    joint = capture(nn.Upsample(scale_factor=2.0, mode=mode), (x,), {}).joint
    assert any(f"nearest{mode[7:].replace('-', '_')}{dimensions}d.default" in str(n.target) for n in joint.graph.nodes)


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


@pytest.mark.parametrize("include_last", [False, True])
@pytest.mark.parametrize("mode", [0, 1, 2])
def test_the_results_of_an_embedding_bag_keep_their_room(mode, include_last):
    args = torch.rand(20, 8), torch.randint(0, 20, (12,)), torch.tensor([0, 4, 9]), False, mode, False, None, include_last
    fake_mode = FakeTensorMode()
    with fake_mode:
        fake = aten._embedding_bag.default(*pytree.tree_map_only(torch.Tensor, fake_mode.from_tensor, args))
    for expected, found in zip(aten._embedding_bag.default(*args), fake, strict=True):
        assert (expected.shape, expected.untyped_storage().nbytes()) == (found.shape, found.untyped_storage().nbytes())


NORMS = {"batch": lambda: nn.BatchNorm2d(4), "group": lambda: nn.GroupNorm(2, 4), "layer": lambda: nn.LayerNorm(12)}


@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize("norm", NORMS)
def test_norms_of_what_is_transposed(norm, inplace):
    torch.manual_seed(0)
    x = torch.randn(3, 4, 12, 10, requires_grad=True)
    planned = assert_drop_in(AcrossTransposes(NORMS[norm]()), (x,), inplace=inplace, cost="measured")
    assert fxmem.measure(planned, (x,)).peak_bytes == planned.plan.predicted_peak_bytes


class Between(nn.Module):
    """A function between two convolutions, whose result is an output too."""

    def __init__(self, function, sideways: bool = False):
        super().__init__()
        self.first, self.norm, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3)
        self.function, self.sideways = function, sideways

    def forward(self, x):
        h = self.first(x) * 1.5
        h = self.function(h.transpose(2, 3)).transpose(2, 3) if self.sideways else self.function(h)
        return self.last(self.norm(h)), h


LAYERS_OF_CHANNELS = torch.tensor([0, 2])
IN_PLACE = {
    "masked_fill_": lambda h: h.masked_fill_(h > 0.5, 0.0),
    "masked_fill_ of a part": lambda h: (h[:, ::2].masked_fill_(h[:, ::2] > 0.5, 0.0), h)[1],
    "cumsum_": lambda h: h.cumsum_(1),
    "index_add_": lambda h: h.index_add_(1, LAYERS_OF_CHANNELS, torch.ones(len(h), 2, *h.shape[2:])),
    "scatter_": lambda h: h.scatter_(1, torch.zeros(h.shape, dtype=torch.int64), 2.0),
    "masked_scatter_": lambda h: h.masked_scatter_(h > 0.5, torch.ones(h.shape)),
}
DRAWING = {
    "dropout in place": nn.Dropout(0.3, inplace=True),
    "alpha dropout": nn.AlphaDropout(0.3),
    "bernoulli_": lambda h: h * torch.empty_like(h).bernoulli_(0.4),
    "bernoulli_ of a part": lambda h: h * torch.cat([torch.empty_like(h[:, ::2]).bernoulli_(0.4)] * 2, 1),
    "bernoulli": lambda h: h * torch.bernoulli(h.detach(), p=0.4),
}


@pytest.mark.parametrize(
    ("what", "layout"),
    [*((what, "channels last") for what in IN_PLACE | DRAWING), ("masked_fill_", "sideways"), ("bernoulli_", "sideways")],
)
def test_what_is_computed_or_drawn_in_place_stays_as_it_lies(what, layout):
    """Masks are drawn in the order in which values lie; traced, they are new tensors, which kernels lay out by other rules."""
    torch.manual_seed(0)
    memory_format = torch.channels_last if layout == "channels last" else torch.contiguous_format
    plain = Between((IN_PLACE | DRAWING)[what], layout == "sideways").to(memory_format=memory_format)
    x = torch.randn(2, 3, 8, 8).to(memory_format=memory_format)
    planned = assert_drop_in(plain, (x,), cost="measured", output_gradients="all")
    torch.manual_seed(0)
    expected = [y.stride() for y in plain(x)]
    assert [y.stride() for y in planned(x)] == expected
    assert fxmem.measure(planned, (x,)).peak_bytes <= planned.plan.predicted_peak_bytes


@pytest.mark.parametrize("loss", [nn.functional.mse_loss, nn.functional.smooth_l1_loss, nn.functional.huber_loss])
def test_a_loss_of_what_is_transposed(loss):
    class Forecast(nn.Linear):
        def forward(self, x):
            return loss(super().forward(x).transpose(1, 2), x.transpose(1, 2))

    assert_drop_in(Forecast(8, 8), (torch.randn(4, 6, 8),), budget=None)
