"""What is refused, in which words, and that the user's module is then as it was."""

import contextlib
import copy
import math
import random

import pytest
import torch
from helpers.models import ConvNet, Recurrent, Transformer, TwoHeads
from helpers.steps import assert_same, transform
from torch import nn

import fxmem
from fxmem.cost import CostModel, OpCost

X = (torch.randn(4, 8),)


class Linear(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(8, 8)
        self.register_buffer("seen", torch.zeros(8))
        self.count = 0


class GraphBreak(Linear):
    def forward(self, x):
        h = self.lin(x)
        print("a graph break")
        return h.relu()


class DataDependent(Linear):
    def forward(self, x):
        h = self.lin(x)
        return h if h.sum() > 0 else -h


class DataDependentSize(Linear):
    def forward(self, x):
        h = self.lin(x)
        return h[h.sum(1) > 0].sum(int(h.sum()))


class ChangesInput(Linear):
    def forward(self, x):
        x.add_(1)
        return self.lin(x)


class ChangesParameter(Linear):
    def forward(self, x):
        with torch.no_grad():
            self.lin.weight.mul_(0.9)
        return self.lin(x)


class ReplacesBuffer(Linear):
    def forward(self, x):
        self.seen = 0.9 * self.seen + x.mean(0)
        return self.lin(x)


class Counts(Linear):
    def forward(self, x):
        self.count += 1
        return self.lin(x) * self.count


class Detached(Linear):
    def forward(self, x):
        return self.lin(x).detach()


class Opaque:
    def __init__(self, value):
        self.value = value


class ReturnsObject(Linear):
    def forward(self, x):
        return Opaque(self.lin(x))


class Scale(torch.autograd.Function):
    """A gradient that capture by symbolic tracing would lose."""

    @staticmethod
    def forward(ctx, x):
        return x * 1

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 100


class OwnFunction(Linear):
    def forward(self, x):
        return Scale.apply(self.lin(x))


class Fused(Linear):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(8, 8)

    def forward(self, x):
        return self.lstm(self.lin(x))[0]


class NamedPlan(nn.Module):
    def __init__(self):
        super().__init__()
        self.plan = nn.Linear(8, 8)

    def forward(self, x):
        return self.plan(x)


class Broken(CostModel):
    """A cost that is none."""

    name = "broken"

    def __init__(self, cost):
        self._cost = cost

    def cost(self, node):
        return self._cost


def snapshot(module):
    """All of a module that a user could see change."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_state_dict_hooks")
    return {
        "state": {n: t.clone() for n, t in module.state_dict().items()},
        "ids": {n: id(t) for n, t in (*module.named_parameters(), *module.named_buffers())},
        "grads": {n: None if p.grad is None else p.grad.clone() for n, p in module.named_parameters()},
        "requires_grad": {n: p.requires_grad for n, p in module.named_parameters()},
        "training": [m.training for m in module.modules()],
        "hooks": [len(getattr(m, h)) for m in module.modules() for h in hooks],
        "attributes": [sorted(vars(m)) for m in module.modules()],
        "count": getattr(module, "count", None),
    }


@contextlib.contextmanager
def refused(module, error, *says):
    """Expect an FxmemError whose message has all of `says`, with nothing of `module` nor any random generator changed."""
    parameter = next(iter(module.parameters()), None)
    if parameter is not None and not parameter.is_meta:
        parameter.grad = torch.ones_like(parameter)
    before, torch_state, python_state = snapshot(module), torch.get_rng_state(), random.getstate()
    with pytest.raises(error) as caught:
        yield
    assert isinstance(caught.value, fxmem.FxmemError)
    missing = [text for text in says if text not in str(caught.value)]
    assert not missing, f"{missing} not in: {caught.value}"
    assert_same(before, snapshot(module))
    assert torch.equal(torch_state, torch.get_rng_state()) and python_state == random.getstate()


BUDGETS = [
    "9" * 400 + "GB",
    "4 gigs",
    "",
    "12",
    "-3GB",
    "4 parsecs",
    "0MB",
    0,
    -1,
    1.5,
    0.0,
    -0.5,
    math.nan,
    math.inf,
    True,
    False,
    [1],
    b"4GB",
    2 + 1j,
]


@pytest.mark.parametrize("budget", BUDGETS, ids=repr)
def test_budgets_that_cannot_be_read(budget):
    module = TwoHeads()
    for call in (fxmem.transform, fxmem.plan):
        with refused(module, fxmem.BudgetError, f"budget={budget!r}", '"900MiB"', "fraction", '"min"', "max_overhead"):
            call(module, X, budget=budget)


@pytest.mark.parametrize("overhead", [-0.1, math.nan, math.inf, "10%", True])
def test_overheads_that_cannot_be_read(overhead):
    with refused(module := TwoHeads(), fxmem.BudgetError, f"max_overhead={overhead!r}"):
        fxmem.plan(module, X, max_overhead=overhead)


@pytest.mark.parametrize("asked", [{"budget": "min"}, {"max_overhead": 0.1}], ids=str)
def test_solvers_that_do_not_serve_such_a_budget(asked):
    with refused(module := TwoHeads(), fxmem.BudgetError, "solver='milp'", "leave solver='auto'"):
        fxmem.plan(module, X, solver="milp", **asked)


def test_both_a_budget_and_an_overhead():
    with refused(module := TwoHeads(), fxmem.BudgetError, "both", "'4GB'", "0.1"):
        fxmem.transform(module, X, budget="4GB", max_overhead=0.1)


@pytest.mark.parametrize("budget", ["1KB", 1, 0.01])
def test_budgets_that_cannot_be_met(budget):
    module, args = ConvNet(), (torch.randn(2, 3, 16, 16),)
    with refused(module, fxmem.InfeasibleBudgetError, "at least", "activation", "gradient", "parameter"):
        transform(module, args, budget=budget)


def test_the_least_budget_is_what_min_reaches():
    module, args = TwoHeads(), X
    with pytest.raises(fxmem.InfeasibleBudgetError) as caught:
        fxmem.plan(module, args, budget=100)
    least = caught.value.min_budget_bytes
    assert caught.value.budget_bytes == 100 and f"{least:,}" in str(caught.value)
    assert fxmem.plan(module, args, budget="min").predicted_peak_bytes == least
    assert fxmem.plan(module, args, budget=least).predicted_peak_bytes == least


class BackToSignals(nn.Module):
    """`istft` looks at values: whether windows add up to nothing anywhere."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(17, 1))
        self.register_buffer("window", torch.hann_window(32))

    def forward(self, x):
        spectrum = torch.stft(x, 32, 8, window=self.window, return_complex=True)
        return torch.istft(spectrum * self.scale, 32, 8, window=self.window)


MODULES = [
    (GraphBreak, X, ("GraphBreak", __file__, "in forward", "print")),
    (DataDependent, X, ("DataDependent", __file__, "in forward")),
    (DataDependentSize, X, ("DataDependentSize",)),
    (ChangesInput, X, ("input", "'x'", "changed in place", __file__)),
    (ChangesParameter, X, ("parameter 'lin.weight'", "changed in place", __file__)),
    (ReplacesBuffer, X, ("buffer 'seen'", __file__, "copy_")),
    (Counts, X, ("attribute 'count'", __file__)),
    (Detached, X, ("no output needs gradients", "requires_grad")),
    (ReturnsObject, X, ("Opaque", "register")),
    (Fused, X, ("LSTM",)),
    (BackToSignals, (torch.randn(2, 256),), ("BackToSignals", "aten.equal")),
]


@pytest.mark.parametrize(("make", "args", "says"), MODULES, ids=lambda v: getattr(v, "__name__", ""))
def test_modules_that_cannot_be_planned(make, args, says):
    for call in (fxmem.transform, fxmem.plan):
        with refused(module := make(), fxmem.CaptureError, *says):
            call(module, args, cost="roofline")


def test_a_function_of_ones_own_keeps_its_gradient_or_is_refused():
    module = OwnFunction()
    plain = copy.deepcopy(module)
    planned = transform(module, X, budget=None)
    for each in (plain, planned):
        each(*X).sum().backward()
    assert_same([p.grad for p in plain.parameters()], [p.grad for p in planned.parameters()])


class Inverse(Linear):
    def forward(self, x):
        return torch.linalg.inv(self.lin(x)).sum()


def test_checked_linear_algebra_names_the_unchecked_form():
    with pytest.raises(fxmem.CaptureError, match=r"node 'linalg_inv' \(at .*test_bad_input.py:\d+.*torch.linalg.inv_ex"):
        transform(Inverse(), (torch.randn(8, 8),))


def test_a_refusal_is_said_once(caplog):
    with pytest.raises(fxmem.CaptureError, match="same reduction dim"):
        transform(nn.Linear(4, 4), (torch.randn(2, 5),))
    assert not caplog.records


def test_recurrent_layers_in_a_traced_graph():
    with refused(module := torch.fx.symbolic_trace(Fused()), fxmem.CaptureError, "'lstm'", "LSTMCell"):
        transform(module, X)


def test_names_that_a_planned_module_needs():
    with refused(module := NamedPlan(), fxmem.CaptureError, "NamedPlan", "'plan'"):
        transform(module, X)
    assert transform(nn.Sequential(module), X)(*X).shape == (4, 8)


def test_a_planned_module_inside():
    planned = transform(TwoHeads(), X, budget=None)
    with pytest.raises(fxmem.CaptureError, match="submodule '1' is a planned module"):
        transform(nn.Sequential(nn.Linear(8, 8), planned), X)


def test_a_plan_that_is_none():
    with pytest.raises(fxmem.PlanError, match="plan=5 was given; it is a Plan"):
        fxmem.transform(nn.Linear(2, 2), (torch.randn(1, 2),), plan=5)


def test_layers_that_do_not_know_their_shape_yet():
    module = nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(2))
    with pytest.raises(fxmem.CaptureError, match="'1.weight' is not initialized yet: call the module once"):
        fxmem.transform(module, (torch.randn(1, 2),))


def test_sparse_gradients():
    module = nn.Sequential(nn.Embedding(10, 4, sparse=True), nn.Linear(4, 4))
    with refused(module, fxmem.CaptureError, "torch.sparse_coo", "module '0'"):
        transform(module, (torch.tensor([1, 2]),))


def test_no_inputs():
    for module in (TwoHeads(), torch.fx.symbolic_trace(TwoHeads())):
        with refused(module, fxmem.CaptureError, "no example inputs", "tensor_meta"):
            transform(module)


INPUTS = [
    (X[0], {}, ("is a tensor", "(x,)")),
    ((), {}, ("'x'",)),
    ((X[0], X[0]), {}, ("too many positional",)),
    (X, {"y": 1}, ("'y'",)),
    ((torch.randn(4, 9),), {}, ("TwoHeads", "[4, 9]", "linear")),
    (("text",), {}, ("TwoHeads",)),
]


@pytest.mark.parametrize(("args", "kwargs", "says"), INPUTS, ids=range(len(INPUTS)))
def test_inputs_that_do_not_fit(args, kwargs, says):
    with refused(module := TwoHeads(), fxmem.CaptureError, *says):
        fxmem.plan(module, args, kwargs)


KINDS = [torch.eye(4, 8).to_sparse(), torch.nested.nested_tensor([torch.ones(2, 8), torch.ones(3, 8)])]


@pytest.mark.parametrize("given", [torch.float64, torch.device("cpu"), torch.channels_last, 1j])
def test_inputs_that_no_graph_takes(given):
    for call in (fxmem.transform, fxmem.plan):
        with pytest.raises(fxmem.CaptureError, match=rf"input \[1\]\['how'\] is .*{type(given).__name__}.*attribute"):
            call(Linear(), X, {"how": given}, budget=None)


@pytest.mark.parametrize("given", KINDS, ids=["sparse", "nested"])
def test_inputs_that_are_not_dense(given):
    with refused(module := TwoHeads(), fxmem.CaptureError, "dense"):
        transform(module, (given,))


@pytest.mark.parametrize("given", [X[0], [X[0]], 3])
def test_keyword_inputs_that_are_no_dict(given):
    with refused(module := TwoHeads(), fxmem.CaptureError, "example_kwargs", "dict"):
        transform(module, None, given)


@pytest.mark.parametrize("make", [torch.jit.script, lambda module: torch.jit.trace(module, X)])
def test_torchscript(make):
    with pytest.raises(fxmem.CaptureError, match="the module that this one was made from"):
        transform(make(nn.Linear(8, 8)), X)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"budgets": 0.5}, "budgets=0.5"),
        ({"budgets": "min"}, "budgets='min'"),
        ({"budgets": ()}, "budgets=()"),
        ({"budgets": (0.9,), "costs": "H100"}, "costs='H100'"),
    ],
)
def test_one_budget_where_several_are_asked_for(options, error):
    with refused(module := TwoHeads(), fxmem.FxmemError, error, "several"):
        fxmem.plans(module, X, **options)


@pytest.mark.parametrize(("module", "args"), [(None, X), (TwoHeads(), X[0])])
def test_measuring_what_is_no_call(module, args):
    with pytest.raises(fxmem.MeasureError, match="torch.nn.Module|example_inputs=\\(x,\\)"):
        fxmem.measure(module, args)


@pytest.mark.parametrize("given", [None, 3, TwoHeads, lambda x: x])
def test_no_module(given):
    with pytest.raises(fxmem.CaptureError, match="torch.nn.Module"):
        fxmem.plan(given, X)


def test_devices_that_differ():
    with torch._subclasses.FakeTensorMode():
        elsewhere = torch.empty(4, 8, device="cuda")
    module = TwoHeads()
    with refused(module, fxmem.CaptureError, "several devices", "cpu", "cuda", "body.weight"):
        fxmem.plan(module, (elsewhere,))


@pytest.mark.skipif(torch.cuda.is_available(), reason="the device is there")
def test_a_device_that_is_not_there():
    with torch._subclasses.FakeTensorMode():
        module, x = nn.ReLU(), torch.empty(4, 8, device="cuda", requires_grad=True)
    with refused(module, fxmem.CaptureError, "cuda", "meta"):
        fxmem.plan(module, (x,))


def test_nothing_needs_gradients():
    with refused(module := TwoHeads().requires_grad_(False), fxmem.CaptureError, "no output needs gradients"):
        transform(module, X)


@pytest.mark.parametrize(
    "cost",
    [OpCost(math.nan, 0), OpCost(-1.0, 0), OpCost(math.inf, 0), OpCost(0.0, -1)],
    ids=["nan", "negative", "infinite", "bytes"],
)
def test_costs_that_are_none(cost):
    with refused(module := TwoHeads(), fxmem.CostError, "broken", "node"):
        fxmem.plan(module, X, cost=Broken(cost))


NAMES = [
    ({"cost": "abacus"}, fxmem.CostError, ("'abacus'", "measured", "roofline", "A100")),
    ({"solver": "oracle"}, fxmem.FxmemError, ("'oracle'", "auto")),
    ({"output_gradients": "some"}, fxmem.CaptureError, ("'some'", '"all"')),
    ({"output_gradients": [7]}, fxmem.CaptureError, ("7",)),
    ({"output_gradients": []}, fxmem.CaptureError, ("[]",)),
    ({"output_gradients": 3}, fxmem.CaptureError, ("=3", '"all"')),
    ({"solver": ["auto"]}, fxmem.FxmemError, ("['auto']", "auto")),
    ({"time_limit_s": "5"}, fxmem.BudgetError, ("time_limit_s='5'", "seconds")),
    ({"time_limit_s": None}, fxmem.BudgetError, ("time_limit_s=None", "seconds")),
    ({"time_limit_s": math.nan}, fxmem.BudgetError, ("time_limit_s=nan", "seconds")),
    ({"time_limit_s": -1}, fxmem.BudgetError, ("time_limit_s=-1", "seconds")),
    ({"time_limit_s": math.inf}, fxmem.BudgetError, ("time_limit_s=inf", "finite")),
    ({"recompute": "no"}, fxmem.FxmemError, ("recompute='no'", "True or False")),
    ({"inplace": 0}, fxmem.FxmemError, ("inplace=0", "True or False")),
    ({"cache_dir": 3}, fxmem.PlanError, ("cache_dir=3", "folder")),
]


@pytest.mark.parametrize(("options", "error", "says"), NAMES, ids=lambda v: str(v)[:20])
def test_names_that_do_not_exist(options, error, says):
    with refused(module := TwoHeads(), error, *says):
        fxmem.plan(module, X, **{"budget": 0.99} | options)


def test_an_arena_by_another_name():
    with refused(module := TwoHeads(), fxmem.FxmemError, "arena='cuda:0'", "True or False"):
        fxmem.transform(module, X, arena="cuda:0")


@pytest.mark.parametrize("points", [0, -1, "3", 2.5, None])
def test_frontiers_without_points(points):
    with refused(module := TwoHeads(), fxmem.FxmemError, str(points)):
        fxmem.frontier(module, X, points=points)


@pytest.mark.parametrize("make", [ConvNet, Transformer, Recurrent])
@pytest.mark.parametrize("traced", [False, True])
def test_planning_leaves_everything_alone(make, traced):
    args = {
        ConvNet: (torch.randn(2, 3, 8, 8),),
        Transformer: (torch.arange(12).view(2, 6),),
        Recurrent: (torch.randn(2, 2, 4),),
    }[make]
    module = torch.export.export(make(), args).module() if traced else make()
    before, state = snapshot(module), torch.get_rng_state()
    for call in (fxmem.plan, fxmem.transform):
        call(module, args, cost="roofline", budget=None)
        assert_same(before, snapshot(module))
        assert torch.equal(state, torch.get_rng_state())


def test_a_failed_measurement_of_costs_leaves_everything_alone():
    module = ConvNet()
    before = snapshot(module)
    fxmem.transform(module, (torch.randn(2, 3, 8, 8),), cost="measured", budget=None)
    assert_same(before, snapshot(module))
