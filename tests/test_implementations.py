"""Every implementation, forced wherever it applies, against the plain operator."""

import copy
import os
import pickle
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from helpers.steps import assert_drop_in, assert_same_steps, transform
from torch import fx, nn

import fxmem
from benchmarks.implementation_cases import CASES, Between, Dense, images
from fxmem import checking
from fxmem.checking import force
from fxmem.errors import ImplementationError
from fxmem.graph_meta import is_backward
from fxmem.implementations import (
    CODE,
    IMPLEMENTATIONS,
    Call,
    Choice,
    Result,
    Rewrite,
    bits,
    choose_implementations,
    hardtanh,
    max_pool,
    programs,
    relu,
)
from fxmem.implementations.operators import define
from fxmem.passes import OfferImplementations
from fxmem.prepared import prepare

aten = torch.ops.aten
DTYPES = (torch.float32, torch.bfloat16, torch.float64)
NOT_BITWISE = {  # and so offered nowhere
    ("batch_norm_statistics", torch.bfloat16): "the statistics are rounded to bfloat16",
    ("chain", torch.bfloat16): "a kernel of several operators rounds once",
    ("convolution_transposed", torch.float64): "the two kernels for double add in different orders",
}
NOT_OFFERED = {("convolution_slices", "channels_last"): "kernels take it as it lies, without workspace"}


class Sideways(nn.Module):
    def forward(self, x):
        return x.transpose(2, 3) if x.dim() == 4 else x


class Gaps(nn.Module):
    """The values, as a part of a larger tensor."""

    def forward(self, x):
        return torch.cat([x, x], 1)[:, : x.shape[1]]


LAID = {"sideways": Sideways, "gaps": Gaps}


def _before_first_and_norms(make, layers):
    """An activation's result is dense again; what reads the result of a norm shall read it as it comes."""
    for number, layer in enumerate(layers):
        if number == 0 or "Norm" in type(layer).__name__:
            yield make()
        yield layer


@pytest.fixture(autouse=True)
def operators_of_a_chain_one_by_one(monkeypatch):
    """A compiler takes seconds for each chain: see test_chains."""
    monkeypatch.setattr(programs, "_trusted", {})
    monkeypatch.setattr(programs, "generates_code", lambda device: False)


def test_every_implementation_has_a_case_here():
    assert set(CASES) == set(IMPLEMENTATIONS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_gradients_and_bytes_are_as_promised(name, dtype):
    torch.manual_seed(0)
    module = CASES[name]().to(dtype)
    if (name, dtype) in NOT_BITWISE:
        with pytest.raises(ImplementationError, match="applies nowhere"):
            fxmem.check_implementation(name, module, (images(dtype),))
        return
    found = fxmem.check_implementation(name, module, (images(dtype),))
    assert found.places >= 1 and found.measured_peak_bytes <= found.predicted_peak_bytes
    assert found.is_bitwise or IMPLEMENTATIONS[name].exactness == "accurate"
    if dtype is torch.float32:  # what is bitwise belongs into that class
        assert found.is_bitwise == (IMPLEMENTATIONS[name].exactness == "bitwise")


@pytest.mark.parametrize("name", [n for n in CASES if "dropout" not in n and (n, torch.float64) not in NOT_BITWISE])
def test_gradients_are_those_of_finite_differences(name):
    torch.manual_seed(0)
    x = images(torch.float64)[:2, :, :4, :6].detach().requires_grad_()
    planned, places = force(name, CASES[name]().double(), (x,), {})
    weights = torch.linspace(0.5, 1.5, planned(x).numel(), dtype=torch.float64)
    (planned(x).flatten() @ weights).backward()
    nearby, apart = x.detach(), 1e-6
    for k in range(0, x.numel(), 10):
        step = torch.zeros(x.numel(), dtype=torch.float64)
        step[k] = apart
        with torch.no_grad():
            up, down = (planned(nearby + way * step.view(x.shape)).flatten() @ weights for way in (1, -1))
        assert x.grad.flatten()[k].item() == pytest.approx(((up - down) / (2 * apart)).item(), abs=1e-4, rel=1e-4)
    assert places


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("layout", ["channels_last", "sideways", "gaps", "empty"])
def test_other_layouts(name, layout):
    """Where the layout does not suit, the implementation is not offered; where it is, nothing changes."""
    torch.manual_seed(0)
    x = images().detach()
    x = x.to(memory_format=torch.channels_last) if layout == "channels_last" else x[:0] if layout == "empty" else x
    x, case = x.requires_grad_(), CASES[name]()
    if layout in LAID:
        case.layers = nn.Sequential(*_before_first_and_norms(LAID[layout], case.layers))
    module = nn.Sequential(case, nn.Flatten(0))
    if IMPLEMENTATIONS[name].exactness == "accurate":
        try:
            fxmem.check_implementation(name, module, (x,))
        except ImplementationError as error:
            assert "applies nowhere" in str(error) and (layout != "channels_last" or (name, layout) in NOT_OFFERED)
        return
    try:
        planned, _ = force(name, copy.deepcopy(module), (x,), {})
    except fxmem.CaptureError as error:
        pytest.skip(f"cannot be captured at all: {error}")
    assert_same_steps(module, planned, (x,))


@pytest.mark.parametrize("name", CASES)
def test_infinities_and_nan(name, monkeypatch):
    """One plan serves them all: values are not looked at in planning."""
    torch.manual_seed(0)
    finite, module = images(), CASES[name]()
    planned, places = force(name, copy.deepcopy(module), (finite,), {})
    monkeypatch.setattr(checking, "force", lambda *_: (copy.deepcopy(planned), places))
    for value in (float("inf"), float("-inf"), float("nan")):
        x = finite.detach().clone()
        x[0, :, 2, 3] = value
        fxmem.check_implementation(name, module, (x.requires_grad_(),))


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 1000, bits.CHUNK + 5, 2 * bits.CHUNK])
def test_bits(count):
    x, gradient = torch.randn(count) * 4, torch.randn(count)
    above = bits.pack_above(x, [1], 0)
    assert above.numel() == -(-count // 8)
    assert torch.equal(bits.keep_where(gradient, above, [1]), aten.threshold_backward(gradient, x, 0))
    inside = hardtanh.pack_inside(x, [1], -1.0, 2.0)
    assert torch.equal(bits.keep_where(gradient, inside, [1]), aten.hardtanh_backward(gradient, x, -1.0, 2.0))
    positive = relu.pack_positive(x, [1])
    assert torch.equal(relu.scale_elsewhere(gradient, positive, [1], 0.1), aten.leaky_relu_backward(gradient, x, 0.1, False))
    assert torch.equal(bits.unpack_mask(bits.pack_mask(x > 1, [1]), [count], [1]), x > 1)


@pytest.mark.parametrize("kernel", [[3, 3], [2, 2], [1, 3], [5, 4]])
@pytest.mark.parametrize("dilation", [[1, 1], [2, 1]])
def test_pool_offsets(kernel, dilation):
    x = torch.randn(5, 2, 11, 9)
    window = kernel, [2, 1], [k // 2 for k in kernel], dilation
    y, indices = aten.max_pool2d_with_indices(x, *window, True)
    offsets = max_pool.offsets_in_window(indices, 9, *window)
    gradient = torch.randn_like(y)
    expected = aten.max_pool2d_with_indices_backward(gradient, x, *window, True, indices)
    assert torch.equal(max_pool.backward_from_offsets(gradient, offsets, list(x.shape), *window, True), expected)


def test_a_bit_saves_what_nobody_else_keeps():
    """Before a pool, neither the ReLU's output nor the pool's indices need be kept: a bit and a byte, or less, will do, where
    the ReLU's gradient is not made before the pool's."""
    torch.manual_seed(0)
    blocks = (
        nn.Sequential(nn.Conv2d(c, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(3, 1, 1))
        for c in (3, 16, 16, 16)
    )
    module, x = nn.Sequential(*blocks), torch.randn(8, 3, 32, 32)
    left = ("-relu_pooled",)
    planned = assert_drop_in(module, (x,), budget="min", implementations=left)
    options = {"time_limit_s": 3.0, "cost": "P100"}
    without = transform(module, (x,), budget="min", implementations=(), **options).plan
    plan = transform(module, (x,), budget=without.predicted_peak_bytes, implementations=left, **options).plan
    assert planned.plan.predicted_peak_bytes <= without.predicted_peak_bytes
    assert plan.predicted_overhead < without.predicted_overhead
    names = [plan.problem.operators[p].name for p in plan.solution.schedule.steps if p >= plan.problem.num_program]
    assert any("max_pool" in name for name in names) and any("_relu_" in name for name in names)


@pytest.mark.parametrize("solver", ["auto", "torch_budget"])
def test_nothing_runs_twice_without_recompute(solver, tmp_path):
    """Bits, bytes and operators in place save memory by themselves; where that is not enough, the budget is refused."""
    torch.manual_seed(0)
    blocks = (
        nn.Sequential(nn.Conv2d(c, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(3, 1, 1), nn.Dropout())
        for c in (3, 16, 16)
    )
    module, x = nn.Sequential(*blocks), torch.randn(8, 3, 32, 32)
    options = {"recompute": False, "time_limit_s": 2.0}
    least = fxmem.plan(module, (x,), budget="min", **options)
    budget_bytes = int(1.01 * least.predicted_peak_bytes)
    planned = assert_drop_in(module, (x,), budget=budget_bytes, solver=solver, **options)
    plan = planned.plan
    assert plan.predicted_peak_bytes <= budget_bytes < 0.96 * plan.baseline_peak_bytes
    assert fxmem.measure(planned, (x,), repeats=1).peak_bytes <= plan.predicted_peak_bytes
    assert all(plan.solution.schedule.steps.count(p) == 1 for p in plan.problem.forward)
    plan.save(tmp_path / "plan.json")
    assert fxmem.transform(module, (x,), plan=tmp_path / "plan.json").plan.origin.recompute is False
    with pytest.raises(fxmem.InfeasibleBudgetError, match="recompute=True may reach less") as caught:
        fxmem.plan(module, (x,), budget=0.3, **options)
    assert caught.value.min_budget_bytes > 0.9 * least.predicted_peak_bytes


def test_names_are_chosen():
    everything = {i.name for i in choose_implementations(None, "accurate")}
    assert everything == set(IMPLEMENTATIONS)
    assert {i.exactness for i in choose_implementations(None, "bitwise")} == {"bitwise"}
    assert {i.name for i in choose_implementations(("relu_bits",), "bitwise")} == {"relu_bits"}
    assert {i.name for i in choose_implementations(("-relu_bits",), "accurate")} == everything - {"relu_bits"}
    assert choose_implementations((), "bitwise") == ()


@pytest.mark.parametrize(
    ("names", "exactness", "message"),
    [
        (("relu_bitz",), "bitwise", "'relu_bitz' is not known; the implementations are: .*dropout_bits, .*relu_bits"),
        ("relu_bits", "bitwise", "give a tuple of names"),
        (5, "bitwise", "implementations=5: give a tuple of names"),
        (True, "bitwise", "implementations=True: give a tuple of names"),
        ((None,), "bitwise", "None is not known"),
        (None, "roughly", "exactness='roughly' was given; allowed: bitwise, accurate"),
    ],
)
def test_what_is_not_known_is_refused(names, exactness, message):
    with pytest.raises(ImplementationError, match=message):
        transform(nn.Linear(2, 2), (torch.randn(1, 2),), implementations=names, exactness=exactness)


@pytest.mark.parametrize(
    ("layer", "kept"),
    [
        (nn.Sigmoid(), "sigmoid"),
        (nn.Tanh(), "tanh"),
        (nn.Softmax(-1), "softmax"),
        (nn.LogSoftmax(-1), "log_softmax"),
        (nn.ReLU(), "relu"),
        (nn.GELU(), "mul"),
        (nn.GELU("tanh"), "mul"),
        (nn.SiLU(), "mul"),
        (nn.Hardswish(), "mul"),
        (nn.ELU(), "mul"),
        (nn.LeakyReLU(), "mul"),
    ],
    ids=str,
)
def test_an_activation_keeps_one_tensor(layer, kept):
    """PyTorch's own backward reads the output where that is enough, else the input ("mul" makes it here), and never both."""
    joint = prepare(Between(layer), (images(),), {}, "cpu").captured.joint
    backward = next(n for n in joint.graph.nodes if "backward" in n.name and "fxmem_offers" not in n.meta)
    read = [n.name.removeprefix("layers_0_") for n in backward.all_input_nodes if not is_backward(n)]
    assert read == [kept]


def _fails(gradient, result):
    raise RuntimeError("on purpose")


fails = define(
    "fails(Tensor gradient, Tensor result) -> Tensor",
    _fails,
    lambda gradient, result: torch.empty_like(gradient),
    lambda call: 0,
)


def test_a_wrong_gradient_is_caught_beside_one_that_is_zero(registered):
    """A bias before a batch norm: what the plain operator makes of its gradient is rounding alone, and excuses nothing."""

    @registered("sigmoid_as_tanh", aten.sigmoid_backward.default, exactness="accurate")
    def sigmoid_as_tanh(node):
        return Choice(backward=Call(aten.tanh_backward.default, node.args))

    torch.manual_seed(0)
    with pytest.raises(ImplementationError, match="'sigmoid_as_tanh' is wrong: its error against float64"):
        fxmem.check_implementation("sigmoid_as_tanh", Between(nn.BatchNorm2d(4), nn.Sigmoid()), (images(),))


def test_a_wrong_gradient_is_caught(registered):
    @registered("tanh_straight", aten.tanh_backward.default)
    def tanh_straight(node):
        return Choice(backward=Call(aten.mul.Tensor, (node.args[0], 0.5)))

    with pytest.raises(ImplementationError, match="'tanh_straight' says that it is bitwise, but outputs or gradients differ"):
        fxmem.check_implementation("tanh_straight", Between(nn.Tanh()), (images(),))


def test_an_inaccurate_gradient_is_caught(registered):
    @registered("tanh_straight", aten.tanh_backward.default, exactness="accurate")
    def tanh_straight(node):
        return Choice(backward=Call(aten.mul.Tensor, (node.args[0], 0.5)))

    with pytest.raises(ImplementationError, match="'tanh_straight' is wrong: its error against float64"):
        fxmem.check_implementation("tanh_straight", Between(nn.Tanh()), (images(),))


def test_one_that_fails_is_named(registered):
    @registered("broken", aten.tanh_backward.default)
    def broken(node):
        return Choice(encode=Call(bits.pack_mask, (node.args[1], "3")))

    with pytest.raises(ImplementationError, match="implementation 'broken' fails on node 'layers_0_tanh_backward'"):
        transform(Between(nn.Tanh()), (images(),))


def test_one_that_applies_nowhere_is_named():
    with pytest.raises(ImplementationError, match="'relu_bits' applies nowhere in Linear"):
        fxmem.check_implementation("relu_bits", nn.Linear(2, 2), (torch.randn(1, 2),))


class Biased(nn.Module):
    """A norm without weights that adds a constant: its output is not the normalized input."""

    def __init__(self, norm):
        super().__init__()
        self.norm = norm
        self.register_buffer("bias", torch.tensor([1.0, -2.0, 3.0, 0.5]))

    def forward(self, x):
        return self.norm(x, self.bias)


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("group_norm_output", Biased(lambda x, bias: nn.functional.group_norm(x, 2, None, bias))),
        ("batch_norm_output", Biased(lambda x, bias: nn.functional.batch_norm(x, None, None, None, bias, True))),
        ("layer_norm_output", Biased(lambda x, bias: nn.functional.layer_norm(x.movedim(1, -1), (4,), None, bias))),
        ("elu_output", Biased(lambda x, bias: aten.elu(x, 1.0, -1.0, 1.0))),
    ],
)
def test_outputs_that_do_not_tell_the_derivative(name, layer):
    with pytest.raises(ImplementationError, match="applies nowhere"):
        fxmem.check_implementation(name, Between(layer, nn.SiLU()), (images(),))


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        (
            lambda node: Choice(backward=Call(aten.transpose.int, (node.args[0], 0, 1))),
            "it makes .*12, 1.*, where .* is to be made",
        ),
        (lambda node: Choice(backward=Call(aten.relu.default, (node.args[1],))), "it reads other gradients than the operator"),
        (lambda node: Choice(backward=node.args[0], encode=Call(aten.relu.default, (node.args[0],))), "of the backward"),
        (lambda node: 5, "fails on node 'layers_0_tanh_backward'.*: it gave 5, which is no Choice"),
        (
            lambda node: Choice(backward=Call(aten.relu.default, (fx.Graph().placeholder("x"),))),
            "'x', .*a node of another graph",
        ),
        (lambda node: None, "applies nowhere in Between: it serves aten.tanh_backward.default, and gave no Choice"),
    ],
)
def test_why_it_is_not_offered(registered, chosen, message):
    registered("odd", aten.tanh_backward.default)(chosen)
    with pytest.raises(ImplementationError, match=message):
        fxmem.check_implementation("odd", Between(nn.Tanh()), (images(),))


def test_one_whose_kernel_fails_is_named(registered):
    @registered("late", aten.tanh_backward.default)
    def late(node):
        return Choice(backward=Call(fails, node.args))

    with pytest.raises(ImplementationError, match="implementation 'late' fails when it runs: on purpose"):
        fxmem.check_implementation("late", Between(nn.Tanh()), (images(),))


@pytest.mark.parametrize(
    ("serves", "options", "message"),
    [
        ("aten.tanh_backward.default", {}, "serves 'aten.tanh_backward.default', which no node has as its target"),
        (aten.tanh_backward, {}, "name an operator's overload"),
        (aten.tanh_backward.default, {"least_bytes": "x"}, "least_bytes='x'; give bytes"),
        (aten.tanh_backward.default, {"least_bytes": -1}, "least_bytes=-1; give bytes"),
        (aten.tanh_backward.default, {"forward": 1}, "forward=1; it is True or False"),
    ],
)
def test_what_cannot_be_registered(registered, serves, options, message):
    with pytest.raises(ImplementationError, match=message):
        registered("odd", serves, **options)(lambda node: None)
    with pytest.raises(ImplementationError, match="give a function of a node"):
        registered("odd", aten.tanh_backward.default)(3)


def test_a_tensor_is_no_call():
    with pytest.raises(ImplementationError, match="example_inputs is a tensor"):
        fxmem.check_implementation("relu_bits", nn.ReLU(), torch.randn(2, 2))


def test_a_name_is_taken_once(registered):
    with pytest.raises(ImplementationError, match="there is an implementation 'relu_bits' already"):
        registered("relu_bits", aten.tanh_backward.default)(lambda node: None)


@pytest.mark.parametrize("name", [3, "", "-relu"])
def test_names_that_nobody_could_choose_by(registered, name):
    with pytest.raises(ImplementationError, match="cannot be chosen by name"):
        registered(name, aten.tanh_backward.default)


def test_the_pass_offers_beside_the_graph():
    from fxmem.capture import capture
    from fxmem.passes import ShapeProp

    module = Between(nn.ReLU())
    joint = capture(module, (images(),), {}).joint
    ShapeProp()(joint)
    program = [n.name for n in joint.graph.nodes]
    assert OfferImplementations(("relu_bits",))(joint).modified
    offered = {n.meta["fxmem_offers"]: n for n in joint.graph.nodes if "fxmem_offers" in n.meta}
    assert set(offered) == {"encoder", "alternative"} and not offered["alternative"].users
    assert [n.name for n in joint.graph.nodes if "fxmem_offers" not in n.meta] == program
    assert CODE not in offered["alternative"].args


def test_what_is_not_worth_it_is_checked_all_the_same(monkeypatch):
    """A node that neither reads nor makes an implementation's least bytes is offered nothing, but by the check."""
    module, x = Between(nn.ReLU()), images()
    relu_bytes = module(x).nbytes

    def offered(least_bytes: int) -> bool:
        monkeypatch.setitem(IMPLEMENTATIONS, "relu_bits", replace(IMPLEMENTATIONS["relu_bits"], least_bytes=least_bytes))
        return bool(prepare(module, (x,), {}, "V100", "all", ("relu_bits",)).lowered.problem.alternatives)

    assert offered(relu_bytes) and not offered(relu_bytes + 1)
    assert fxmem.check_implementation("relu_bits", module, (x,)).places == 1


def test_bits_keep_their_order_when_a_kernel_lays_its_result_out_otherwise():
    """Fake tensors may promise another format than kernels give for operands in two formats."""
    x, gradient = (torch.randn(2, 3, 5, 4).contiguous(memory_format=torch.channels_last) for _ in range(2))
    stride, expected = list(x.stride()), aten.threshold_backward(gradient, x, 0)
    code = bits.pack_above(x.contiguous(), stride, 0)
    assert torch.equal(code, bits.pack_above(x, stride, 0))
    for values in (gradient, gradient.contiguous()):
        kept = bits.keep_where(values, code, stride)
        assert torch.equal(kept, expected) and list(kept.stride()) == stride
        assert torch.equal(torch.ops.fxmem.keep_where_(values.clone(), code, stride), expected)


@pytest.mark.parametrize("batch", [1, 2])
def test_an_input_gradient_comes_from_the_same_kernel_or_not_at_all(batch):
    """PyTorch picks kernels by sizes: a transposed convolution may run by another one than the backward of the convolution."""
    torch.manual_seed(0)
    shapes = ((16, 4, 64, 2, 1), (4, 16, 64, 2, 1), (3, 4, 9, 1, 1), (8, 8, 20, 1, 1), (32, 32, 20, 2, 4), (2, 2, 9, 1, 2))
    for channels, made, size, stride, groups in shapes:
        convolution = nn.Conv2d(channels, made, 3, stride, 1, groups=groups)
        module = nn.Sequential(convolution, nn.ReLU(), nn.Conv2d(made, channels, 3, 1, 1), nn.ReLU())
        x = torch.randn(batch, channels, size, size, requires_grad=True)
        planned, _ = force("convolution_transposed", copy.deepcopy(module), (x,), {})
        assert_same_steps(module, planned, (x,))


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("hardtanh_bits", nn.Hardtanh(-1.05, 1.05)),
        ("hardtanh_output", nn.Hardtanh(-1.05, 1.05)),
        ("relu_bits", nn.Threshold(0.1, 0.1)),
    ],
)
def test_a_threshold_that_half_precision_rounds_is_left_to_pytorch(name, layer):
    module, x = Between(layer).bfloat16(), images(torch.bfloat16)
    with pytest.raises(ImplementationError, match="applies nowhere"):
        fxmem.check_implementation(name, module, (x,))
    fxmem.check_implementation(name, Between(layer), (images(),))


@pytest.mark.parametrize("padding", ["same", "valid"])
def test_a_convolution_whose_numbers_stand_for_all_dimensions(padding):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Conv2d(3, 8, 3, padding=padding), nn.Parameter(torch.randn(4, 8, 3, 3))

        def forward(self, x):
            return nn.functional.conv2d(torch.relu(self.one(x)), self.two, stride=1, padding=padding)

    assert_drop_in(Model(), (torch.randn(2, 3, 12, 12, requires_grad=True),))


@pytest.mark.parametrize(("squared", "count"), [(lambda x: x, 1), (lambda x: 2 * x, 0)])
def test_the_gradient_of_a_root_mean_square_is_one_operator(squared, count):
    """Not of what looks like it, but is the derivative of another function."""

    class Model(nn.Module):
        def forward(self, x):
            return x * torch.rsqrt(squared(x).pow(2).mean(-1, keepdim=True) + 1e-6)

    joint = prepare(Model(), (torch.randn(3, 5, requires_grad=True),), {}, "cpu").captured.joint
    made = [n for n in joint.graph.nodes if n.target is torch.ops.fxmem.rms_norm_from_input.default]
    assert len(made) == count
    assert [n.target for n in joint.graph.nodes].count(aten.expand.default) == 1 - count


@pytest.mark.parametrize("layer", [nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(4, 6, 1), nn.ConvTranspose2d(4, 6, 5)], ids=str)
def test_slices_that_would_run_by_another_kernel_or_save_nothing(layer):
    """Of one small image PyTorch runs another kernel; single pixels lie as kernels take them."""
    with pytest.raises(ImplementationError, match="applies nowhere"):
        fxmem.check_implementation("convolution_slices", nn.Sequential(nn.Conv2d(3, 4, 1), layer), (images(),))


@pytest.mark.parametrize(
    "layer", [nn.BatchNorm2d(3), nn.BatchNorm2d(1), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(4))], ids=str
)
def test_slices_of_channels_that_would_run_by_another_kernel(layer):
    """Single channels, and single pixels, may be taken for channels-last."""
    channels = next(m.num_features for m in layer.modules() if isinstance(m, nn.BatchNorm2d))
    with pytest.raises(ImplementationError, match="applies nowhere"):
        fxmem.check_implementation("batch_norm_slices", nn.Sequential(nn.Conv2d(3, channels, 1), layer), (images(),))


@pytest.mark.parametrize("channels", [5, 33])
def test_no_channel_is_left_over(channels):
    """In twos, or in threes, it would be: it goes with those before it."""
    module = nn.Sequential(nn.Conv2d(3, channels, 1), nn.BatchNorm2d(channels), nn.ReLU())
    assert fxmem.check_implementation("batch_norm_slices", module, (images(),)).is_bitwise


@pytest.mark.parametrize("training", [True, False])
def test_a_batch_norms_gradient_in_place_of_the_outputs(training):
    """Then less than three tensors of its size are there at once."""
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(32).train(training)
    module, x = nn.Sequential(nn.Conv2d(3, 32, 1), norm, nn.ReLU()).train(training), torch.randn(8, 3, 64, 64)
    size_bytes = 32 * x.numel() // 3 * 4
    least = {}
    for names in ((), None):
        planned = transform(copy.deepcopy(module), (x,), budget="min", implementations=names)
        code = "".join(m.code for m in planned.modules() if isinstance(m, fx.GraphModule))
        assert ("batch_norm_backward_in_slices_" in code) == (names is None)
        assert_same_steps(module, planned, (x,))
        least[names] = fxmem.measure(planned, (x,)).peak_bytes
        assert least[names] == planned.plan.predicted_peak_bytes
    assert least[None] < least[()] - size_bytes // 2


@pytest.mark.parametrize("skips", [False, True])
def test_a_relu_before_a_pool_keeps_nothing_of_its_own(skips):
    """But where its output gets another gradient besides."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3)

        def forward(self, x):
            made = torch.relu(self.one(x))
            pooled = self.two(nn.functional.max_pool2d(made, 3, 2, 1))
            return pooled + made.sum() if skips else pooled

    x = images()
    joint = prepare(Model(), (x,), {}, "cpu").captured.joint
    found = joint.graph.find_nodes(op="call_function", target=aten.threshold_backward.default)
    (threshold,) = (n for n in found if "fxmem_offers" not in n.meta)
    assert threshold.meta["val"].shape[2:] == ((10, 12) if skips else (5, 6))
    assert_drop_in(Model(), (x,))


def test_a_batch_norms_gradient_in_place_of_its_input():
    """Where the gradient of the output is that of a shortcut too."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.before, self.conv, self.norm = nn.Conv2d(3, 32, 1), nn.Conv2d(32, 32, 1), nn.BatchNorm2d(32)

        def forward(self, x):
            x = torch.sin(self.before(x))
            return torch.relu(x + self.norm(self.conv(x)))

    torch.manual_seed(0)
    module, x = Block(), torch.randn(8, 3, 64, 64)
    planned, places = force("batch_norm_slices", copy.deepcopy(module), (x,), {})
    assert places == 1
    assert "batch_norm_backward_over_input_" in "".join(m.code for m in planned.modules() if isinstance(m, fx.GraphModule))
    assert_same_steps(module, planned, (x,))
    assert fxmem.measure(planned, (x,)).peak_bytes == planned.plan.predicted_peak_bytes


def test_the_default_slope():
    assert fxmem.check_implementation("leaky_relu_output", Between(nn.LeakyReLU()), (images(),)).places == 1


def test_what_nobody_can_encode_is_not_offered():
    class Straight(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, gradient):
            return aten.threshold_backward(gradient, torch.relu(gradient * 3), 0)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            return Straight.apply(self.linear(x))

    assert_drop_in(Model(), (torch.randn(3, 4),))


def test_a_gradient_of_nan_is_caught(registered):
    @registered("tanh_nan", aten.tanh_backward.default, exactness="accurate")
    def tanh_nan(node):
        return Choice(backward=Call(aten.mul.Tensor, (node.args[0], float("nan"))))

    with pytest.raises(ImplementationError, match="'tanh_nan' is wrong: its error against float64 is inf"):
        fxmem.check_implementation("tanh_nan", Between(nn.Tanh()), (images(),))


def test_keyword_arguments_reach_the_operator(registered):
    @registered("gelu_again", aten.gelu_backward.default)
    def gelu_again(node):
        return Choice(backward=Call(node.target, node.args, node.kwargs))

    assert fxmem.check_implementation("gelu_again", Between(nn.GELU(approximate="tanh")), (images(),)).is_bitwise


def test_a_name_that_is_not_bitwise_needs_leave(registered):
    registered("tanh_rough", aten.tanh_backward.default, exactness="accurate")(lambda node: None)
    with pytest.raises(ImplementationError, match="'tanh_rough' is not bitwise; ask for exactness='accurate'"):
        choose_implementations(("tanh_rough",), "bitwise")


def test_a_pickled_plan_runs_in_a_new_process(tmp_path):
    planned, _ = force("relu_bits", MODULE_FOR_PICKLE, (torch.randn(2, 4, requires_grad=True),), {})
    (tmp_path / "planned").write_bytes(pickle.dumps(planned))
    script = (
        "import pickle, sys, torch; planned = pickle.load(open(sys.argv[1], 'rb'));"
        "planned(torch.randn(2, 4).requires_grad_()).sum().backward()"
    )
    subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "planned")],
        check=True,
        env=dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)),
    )


MODULE_FOR_PICKLE = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))


def test_a_rewrite_of_ones_own(registered):
    """The forward makes the derivative itself, which the backward multiplies by."""

    @registered("sigmoid_derivative", aten.sigmoid_backward.default, exactness="accurate")
    def sigmoid_derivative(node):
        gradient, result = node.args
        forward = Call(aten.aminmax.default, (result,), {"dim": 0, "keepdim": True})
        return Rewrite({node: Call(aten.mul.Tensor, (gradient, Result(1)))}, forward, result)

    @registered("sigmoid_again", aten.sigmoid_backward.default)
    def sigmoid_again(node):
        return Rewrite({node: Call(node.target, node.args)})

    module, x = Between(nn.Sigmoid()), images()
    assert fxmem.check_implementation("sigmoid_again", module, (x,)).places == 1
    with pytest.raises(ImplementationError, match="'sigmoid_derivative' fails on node .* it reads 'layers_0_sigmoid'"):
        transform(module, (x,), exactness="accurate")  # it reads what is only made behind it


def test_a_rewrite_is_written_where_its_operands_are():
    from fxmem.capture import capture
    from fxmem.passes import RewriteParts

    joint = capture(CASES["chunked_cross_entropy"](), (images(),), {}).joint
    before = [n.target for n in joint.graph.nodes]
    assert not RewriteParts(exactness="accurate", forward=False)(joint).modified
    assert before == [n.target for n in joint.graph.nodes]
    assert RewriteParts(exactness="accurate")(joint).modified and joint.meta["fxmem_rewrites"] == 1
    assert not {aten._log_softmax.default, aten.nll_loss_backward.default} & {n.target for n in joint.graph.nodes}
    assert not RewriteParts(exactness="accurate")(joint).modified


def test_what_lies_in_a_concatenation_is_not_kept_a_second_time():
    """In a DenseNet's block each concatenation holds the one before it; others hold activations. Nothing runs twice."""
    torch.manual_seed(0)
    block = Between(Dense(16), nn.Conv2d(80, 4, 1), channels=16)
    module, x = nn.Sequential(block, nn.BatchNorm2d(4)), torch.randn(16, 3, 48, 48)
    options = {"recompute": False, "time_limit_s": 5.0}
    names = "cat_activation", "cat_parts"
    without = fxmem.plan(module, (x,), budget="min", implementations=tuple(f"-{name}" for name in names), **options)
    planned = assert_drop_in(module, (x,), budget="min", **options)
    plan = planned.plan
    assert plan.predicted_peak_bytes < 0.9 * without.predicted_peak_bytes
    assert fxmem.measure(planned, (x,), repeats=1).peak_bytes <= plan.predicted_peak_bytes
    used = {plan.problem.operators[p].implementation for p in plan.solution.schedule.steps}
    assert used.issuperset(names)
    assert all(plan.solution.schedule.steps.count(p) == 1 for p in plan.problem.forward)
