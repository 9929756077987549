"""The predicted eager peak against the measured one, and against bytes counted by hand."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers.steps import assert_drop_in
from torch import nn
from torch.utils.checkpoint import checkpoint

import fxmem
from fxmem.baseline import eager_timeline
from fxmem.cost import cost_model, workspace_of
from fxmem.errors import MeasureError
from fxmem.fake_kernels import FakeTensorMode
from fxmem.measuring import measure

KB4 = 4 * 1024
CPU = torch.device("cpu")


class Exponentials(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(1024))

    def forward(self, x):
        return (self.w * x).exp().exp()


class Branches(nn.Module):
    """Shared weights, an in-place operator, a concatenation, and two outputs."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64, bias=False)
        self.b.weight = self.a.weight

    def forward(self, x):
        left = torch.relu_(self.a(x))
        right = torch.tanh(self.b(left))
        return {"joined": torch.cat([left, right], 1), "right": right * 2}


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(64, 64), nn.GELU()) for _ in range(4)])

    def forward(self, x):
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False)
        return x.sum()


class CheckpointedNorm(nn.Module):
    """What runs again moves the statistics again, with a gradient that does not mind."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.GELU(), nn.Linear(64, 64))

    def forward(self, x):
        return checkpoint(self.layer, x, use_reentrant=False).square()


def convolutional():
    layers = [
        nn.Conv2d(3, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Dropout(0.2),
    ]
    return nn.Sequential(*layers, nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(2048, 10))


X = torch.randn(32, 64)
IMAGES = torch.randn(4, 3, 32, 32)
CASES = {
    "exponentials": (Exponentials(), (torch.zeros(1024),)),
    "branches": (Branches(), (X,)),
    "input gradients": (Branches(), (X.clone().requires_grad_(),)),
    "frozen": (Branches().requires_grad_(False), (X.clone().requires_grad_(),)),
    "convolutional": (convolutional(), (IMAGES,)),
    "evaluation": (convolutional().eval(), (IMAGES,)),
    "transformer": (nn.TransformerEncoderLayer(64, 4, 128, dropout=0.1, batch_first=True), (torch.randn(2, 32, 64),)),
    "checkpointed": (Checkpointed(), (torch.randn(512, 64),)),
}


def test_bytes_of_a_chain():
    timeline = eager_timeline(Exponentials(), (torch.zeros(1024),))
    assert timeline.peak_bytes == 7 * KB4
    kinds = {"parameter": KB4, "buffer": 0, "input": 2 * KB4, "activation": 2 * KB4, "gradient": 2 * KB4, "workspace": 0}
    assert timeline.peak_by_kind == kinds
    forward = list(zip(timeline.op_names, timeline.during_bytes, strict=True))[: timeline.num_forward]
    assert [step for step in forward if step[0] != "aten.detach.default"] == [
        ("aten.mul.Tensor", 4 * KB4),
        ("aten.exp.default", 5 * KB4),
        ("aten.exp.default", 5 * KB4),
    ]


@pytest.mark.parametrize("name", CASES)
def test_agrees_with_what_is_measured(name):
    module, args = CASES[name]
    predicted = eager_timeline(module, args, workspace=workspace_of(cost_model("measured", CPU)))
    assert predicted.peak_bytes == pytest.approx(measure(module, args, repeats=1).peak_bytes, rel=0.005)
    assert sum(predicted.peak_by_kind.values()) == predicted.peak_bytes == max(predicted.during_bytes)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_measured_plan_knows_the_plain_peak(dtype):
    """Formulas are upper bounds; where operators are measured, a fraction as a budget is one of what the plain step takes."""
    module = nn.Sequential(*(layer for _ in range(4) for layer in (nn.Linear(64, 64), nn.GELU()))).to(dtype)
    args = (torch.randn(256, 64).to(dtype),)
    plan = fxmem.plan(module, args, cost="measured", time_limit_s=0.2)
    assert plan.baseline_peak_bytes == measure(module, args, repeats=1).peak_bytes


LOSSES = {
    "mse": F.mse_loss,
    "smooth l1": F.smooth_l1_loss,
    "cross entropy": lambda x, y: F.binary_cross_entropy(x, y.detach()),
    "soft margin": lambda x, y: F.soft_margin_loss(x, y.detach()),
    "huber": F.huber_loss,
    "mse, by element": lambda x, y: F.mse_loss(x, y, reduction="none").sum(),
}


class Loss(nn.Module):
    def __init__(self, name):
        super().__init__()
        self.layers, self.name = nn.Sequential(*(nn.Sequential(nn.Linear(32, 32), nn.Sigmoid()) for _ in range(3))), name

    def forward(self, x):
        x = self.layers(x)
        return LOSSES[self.name](x, x.sigmoid())


@pytest.mark.parametrize("name", LOSSES)
def test_losses_lie_in_storages_as_large_as_what_they_are_the_mean_of(name):
    module, args = Loss(name), (torch.randn(128, 32),)
    planned = fxmem.transform(module, args, budget=0.85, cost="measured", time_limit_s=0.2)
    measured, plan = measure(planned, args, repeats=1).peak_bytes, planned.plan
    assert measured <= plan.budget_bytes and measured == pytest.approx(plan.predicted_peak_bytes, rel=0.005)
    assert measure(module, args, repeats=1).peak_bytes == pytest.approx(plan.baseline_peak_bytes, rel=0.005)


CHOOSING = {
    "max": lambda x, index: x.max(1).values,
    "topk": lambda x, index: x.topk(3, 1).values,
    "cummax": lambda x, index: x.cummax(1).values,
    "gather": lambda x, index: x.gather(1, index),
    "index": lambda x, index: x[index[:, 0]],
    "index_select": lambda x, index: x.index_select(0, index[:, 0]),
    "take": lambda x, index: x.take(index),
}


class Choosing(nn.Module):
    """Elements of x by an operator whose gradient is theirs, written into zeros."""

    def __init__(self, name):
        super().__init__()
        self.layer, self.name = nn.Linear(64, 64), name
        self.register_buffer("index", torch.randint(0, 64, (512, 3)))

    def forward(self, x):
        return CHOOSING[self.name](self.layer(x), self.index)


@pytest.mark.parametrize("name", CHOOSING)
def test_gradients_of_chosen_elements_are_written_into_zeros(name):
    """Here and in the plan, as autograd does it but for fake tensors."""
    module, args = Choosing(name), (torch.randn(512, 64),)
    planned = fxmem.transform(module, args, budget=1.0, cost="measured", time_limit_s=0.2)
    plain = measure(module, args, repeats=1).peak_bytes
    assert planned.plan.baseline_peak_bytes == pytest.approx(plain, rel=0.005)
    assert measure(planned, args, repeats=1).peak_bytes <= plain * 1.005
    assert_drop_in(module, args, budget=1.0)


def test_zeros_that_somebody_else_holds_are_not_written_into():
    class Kept(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, index):
            ctx.save_for_backward(index)
            return x.gather(1, index)

        @staticmethod
        def backward(ctx, gradient):
            zeros = gradient.new_zeros(512, 64)
            return zeros.scatter_add(1, ctx.saved_tensors[0], gradient) + zeros, None

    class Model(nn.Module):
        def forward(self, x, index):
            return Kept.apply(x, index)

    args = torch.randn(512, 64, requires_grad=True), torch.randint(0, 64, (512, 3))
    assert eager_timeline(Model(), args).peak_bytes == measure(Model(), args, repeats=1).peak_bytes


def test_checkpoint_around_a_batch_norm():
    module, args = CheckpointedNorm(), (torch.randn(512, 64),)
    gradients = {}
    for each in (
        copy.deepcopy(module),
        planned := fxmem.transform(module, args, budget=0.99, cost="roofline", time_limit_s=0.2),
    ):
        each(*args).sum().backward()
        gradients[each] = [p.grad for p in each.parameters()]
    for value, expected in zip(*gradients.values(), strict=True):
        assert torch.equal(value, expected)
    assert planned.plan.baseline_peak_bytes == pytest.approx(measure(module, args, repeats=1).peak_bytes, rel=0.05)


def test_workspace_is_added_where_it_is_taken():
    def workspace(operator, args, kwargs, out):
        return 100 * KB4 if operator is torch.ops.aten.mul.Tensor and args[0].requires_grad else 0

    timeline = eager_timeline(Exponentials(), (torch.zeros(1024),), workspace=workspace)
    assert timeline.during_bytes[0] == timeline.peak_bytes == 104 * KB4
    assert timeline.peak_by_kind["workspace"] == 100 * KB4


@pytest.mark.parametrize("place", ["meta", "fake"])
def test_no_data_is_needed(place):
    real = eager_timeline(*CASES["convolutional"])
    with torch.device("meta") if place == "meta" else FakeTensorMode():
        module, x = convolutional(), torch.empty(4, 3, 32, 32)
    assert eager_timeline(module, (x,)) == real


def test_an_absurd_batch_is_predicted_without_memory():
    module, _ = CASES["convolutional"]
    timeline = eager_timeline(module, (torch.empty(1 << 20, 3, 32, 32, device="meta"),))
    assert timeline.peak_bytes > 1 << 37


def test_given_gradients_and_keyword_inputs():
    gradients = [torch.ones(1).expand(1024)]
    timeline = eager_timeline(Exponentials(), (), {"x": torch.zeros(1024)}, output_gradients=gradients)
    assert timeline.peak_by_kind["input"] == KB4 + 4


def test_the_module_is_left_alone():
    module, (x,) = CASES["convolutional"]
    calls = []
    handle = module[0].weight.register_hook(calls.append)
    state, generator = {k: v.clone() for k, v in module.state_dict().items()}, torch.get_rng_state()
    eager_timeline(module, (x,))
    handle.remove()
    assert not calls
    assert all(p.grad is None and type(p) is nn.Parameter for p in module.parameters())
    assert all(torch.equal(v, state[k]) for k, v in module.state_dict().items())
    assert torch.equal(torch.get_rng_state(), generator)


def test_no_backward():
    with pytest.raises(MeasureError, match="no output of ReLU requires grad"):
        eager_timeline(nn.ReLU(), (torch.zeros(2),))
