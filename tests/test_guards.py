"""Norms that go backward from their output, and what is watched of their weights meanwhile."""

import copy
import logging
import pickle

import pytest
import torch
from helpers.steps import step, transform
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import fxmem
from benchmarks.implementation_cases import Between, OfPixels, images, with_fixed_weight
from fxmem.errors import ImplementationError, InfeasibleBudgetError, PlanError
from fxmem.fake_kernels import FakeTensorMode
from fxmem.guards import broken_guards
from fxmem.implementations import IMPLEMENTATIONS, Call, Choice, Guard
from fxmem.implementations.norm_output import LARGEST_BIAS

NORMS = {
    "layer_norm_output": lambda: OfPixels(nn.LayerNorm(4)),
    "group_norm_output": lambda: with_fixed_weight(nn.GroupNorm(2, 4)),
    "batch_norm_output": lambda: with_fixed_weight(nn.BatchNorm2d(4)),
}
FREE = {"recompute": False, "exactness": "accurate"}
X = torch.randn(256, 32, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    """Its norm's input is a sum, which nothing but the norm reads in the backward."""

    def __init__(self, norm=nn.LayerNorm):
        super().__init__()
        self.norm, self.wide, self.narrow = norm(32), nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x):
        return x + self.narrow(torch.tanh(self.wide(self.norm(x))))


def _fixed_batch_norm(channels: int) -> nn.Module:
    return with_fixed_weight(nn.BatchNorm1d(channels))


def blocks(norm=nn.LayerNorm, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(32, 32), Block(norm), Block(norm), Block(norm), nn.Linear(32, 1))


def set_to(value: float, *modules: nn.Module, of: str = "weight", block: int = 2) -> None:
    with torch.no_grad():
        for module in modules:
            getattr(module[block].norm, of)[3] = value


def assert_close(planned: nn.Module, plain: nn.Module, x: torch.Tensor = X) -> None:
    """Outputs bit for bit, gradients up to their last digits."""
    found, expected = step(planned, (x,)), step(plain, (x,))
    torch.testing.assert_close(found["outputs"], expected["outputs"], rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(found["grads"], expected["grads"], rtol=1e-5, atol=1e-5, equal_nan=True)


def watched(planned: fxmem.PlannedModule) -> set[str]:
    return {name for guard in planned._guards for name in guard.names}


def weights_of(*numbers: int) -> set[str]:
    return {f"{n}.norm.{of}" for n in numbers for of in ("weight", "bias")}


SHAPE = 16, 4, 10, 12
INPUTS = {
    "normal": lambda: torch.randn(SHAPE),
    "signs": lambda: torch.randint(0, 2, SHAPE) * 2.0 - 1.0,
    "mostly zeros": lambda: torch.randn(SHAPE) * (torch.rand(SHAPE) < 0.02),
    "constant channels": lambda: torch.where(torch.arange(4).view(4, 1, 1) < 2, torch.full(SHAPE, 0.37), torch.randn(SHAPE)),
}


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("name", NORMS)
def test_at_the_limit_it_is_still_accurate(name, inputs, monkeypatch):
    """With gradients of one sign, so that what is rounded alike in all of a channel adds up."""
    monkeypatch.setattr("fxmem.guards.OFFERED_UP_TO", 1.0)
    torch.manual_seed(0)
    module, x = nn.Sequential(NORMS[name](), nn.Softplus()), INPUTS[inputs]().requires_grad_()
    weight, bias = module[0].parameters()
    limit = LARGEST_BIAS[IMPLEMENTATIONS[name].serves[0]]
    with torch.no_grad():
        weight.uniform_(0.5, 1.5).mul_(torch.tensor([1.0, -1.0, 1.0, -1.0]))
        bias.copy_(limit * weight.abs() * torch.tensor([0.999, -0.999, 0.999, 0.5]))
    assert fxmem.check_implementation(name, module, (x,)).places == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NORMS)
def test_weights_that_get_a_gradient(name, dtype):
    """There, what is rounded alike adds up to more than is allowed, but for layer norms in float32."""
    module = nn.Sequential(NORMS[name]().requires_grad_(True), nn.Softplus()).to(dtype)
    x = torch.randn(SHAPE).to(dtype).requires_grad_()
    if (name, dtype) == ("layer_norm_output", torch.float32):
        assert fxmem.check_implementation(name, module, (x,)).places == 1
        return
    with pytest.raises(ImplementationError, match="applies nowhere"):
        fxmem.check_implementation(name, module, (x,))
    next(module.parameters()).requires_grad_(False)
    assert fxmem.check_implementation(name, module, (x,)).places == 1


@pytest.mark.parametrize("shape", [(1, 4, 10, 12), (3, 4, 10, 1), (3, 4, 1, 1)])
def test_what_would_read_the_input_all_the_same(shape):
    """Where the formats of input and gradient cannot be told from strides, PyTorch's step looks at the input."""
    module = nn.Sequential(
        *(layer for _ in range(3) for layer in (nn.Conv2d(4, 4, 1), NORMS["group_norm_output"](), nn.SiLU()))
    )
    planned = transform(module, (torch.randn(shape),), cost="measured", **FREE)
    assert fxmem.measure(planned, (torch.randn(shape),)).peak_bytes <= planned.plan.predicted_peak_bytes


@pytest.mark.parametrize(
    ("name", "which", "value"),
    [
        *((name, "weight", 0.0) for name in NORMS),
        ("layer_norm_output", "weight", 1e-20),
        ("layer_norm_output", "weight", 1e20),
        ("layer_norm_output", "weight", torch.nan),
        ("layer_norm_output", "bias", 8.0),
    ],
)
def test_where_it_would_not_be_it_is_not_offered(name, which, value):
    module = Between(nn.Tanh(), NORMS[name](), nn.SiLU())
    with torch.no_grad():
        next(p for n, p in module.layers[1].named_parameters() if n.endswith(which))[2] = value
    with pytest.raises(ImplementationError, match=r"its guard does not hold of .*weight' and 'layers.1.*bias'"):
        fxmem.check_implementation(name, module, (images(),))


def test_the_weights_of_an_rms_norm():
    module = Between(OfPixels(nn.RMSNorm(4)), nn.SiLU())
    places = fxmem.check_implementation("rms_norm_output", module, (images(),)).places
    with torch.no_grad():
        module.layers[0].norm.weight[2] = 0.0
    assert fxmem.check_implementation("rms_norm_output", module, (images(),)).places == places - 1


@pytest.mark.parametrize("norm", [nn.LayerNorm, lambda n: nn.LayerNorm(n, bias=False), nn.RMSNorm, _fixed_batch_norm])
def test_less_is_kept_and_nothing_runs_twice(norm):
    module = blocks(norm)
    left_out = [f"-{name}" for name in (*NORMS, "rms_norm_output")]
    without = fxmem.plan(module, (X,), budget="min", **FREE, implementations=left_out)
    planned = transform(copy.deepcopy(module), (X,), **FREE)
    assert planned.plan.predicted_peak_bytes < without.predicted_peak_bytes
    assert fxmem.measure(planned, (X,)).peak_bytes <= planned.plan.predicted_peak_bytes
    assert_close(planned, module)


def test_a_weight_that_becomes_zero(caplog):
    plain = blocks()
    planned = transform(copy.deepcopy(plain), (X,), **FREE)
    assert watched(planned) == weights_of(1, 2, 3)
    with caplog.at_level(logging.WARNING, "fxmem"):
        for value in (0.2, 0.0, 0.0, -0.2, 0.0):
            set_to(value, planned.source, plain)
            assert_close(planned, plain)
    assert [r.getMessage() for r in caplog.records] == [
        "Sequential is called with values of '2.norm.weight' and '2.norm.bias' for which layer_norm_output is not accurate: "
        "planning anew, without that"
    ]
    (other,) = planned._others
    assert watched(other) == weights_of(1, 3)
    assert other.plan.origin.withheld == (("layer_norm_output", "2.norm.weight", "2.norm.bias"),)
    set_to(torch.nan, planned.source, plain, of="bias", block=2)
    assert_close(planned, plain)


def test_there_are_never_more_plans_than_guards():
    plain = blocks()
    planned = transform(copy.deepcopy(plain), (X,), **FREE)
    for zero in ((1,), (2,), (1, 2), (2, 3), (2,)):
        for block in (1, 2, 3):
            set_to(0.0 if block in zero else 1.0, planned.source, plain, block=block)
        assert_close(planned, plain)
    assert len(planned._others) == 3 and not any(other._others for other in planned._others)
    assert [len(other._guards) for other in planned._others] == [2, 1, 0]


def test_names_that_are_no_identifiers():
    class Languages(nn.Module):
        def __init__(self):
            super().__init__()
            self.before = nn.Linear(32, 32)
            self.norms = nn.ModuleDict({"en": nn.LayerNorm(32), "en-de": nn.LayerNorm(32)})

        def forward(self, x):
            return torch.tanh(self.norms["en-de"](torch.tanh(self.before(x))) ** 2).sum()

    planned = transform(Languages(), (X,), **FREE)
    assert watched(planned) == {"norms.en-de.weight", "norms.en-de.bias"} and not broken_guards(planned._guards, planned)
    with torch.no_grad():
        planned.norms["en-de"].weight[3] = 0.0
    assert broken_guards(planned._guards, planned)


def test_of_tensors_that_are_not_there_nothing_holds():
    planned = transform(blocks(), (X,), **FREE)
    assert len(broken_guards(planned._guards, nn.Linear(2, 2))) == 3


def test_a_call_on_fake_tensors():
    planned = transform(blocks(), (X,), **FREE)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert planned(torch.empty(256, 32)).shape == (256, 1)


def test_float16():
    """What a layer norm's gradient is before it is scaled by the deviation is beyond its range."""
    module = nn.Sequential(nn.Tanh(), OfPixels(nn.LayerNorm(4)), nn.Softplus()).half()
    module[1].norm.requires_grad_(False)
    with pytest.raises(ImplementationError, match="applies nowhere"):
        fxmem.check_implementation("layer_norm_output", module, (images(torch.float16)[:, [0, 1, 2, 0]],))


def test_a_plan_lasts_for_a_while():
    """It is made up to half of the limit, and holds up to all of it."""
    plain = blocks()
    planned = transform(copy.deepcopy(plain), (X,), **FREE)
    set_to(3.9, planned.source, plain, of="bias")
    assert_close(planned, plain)
    assert not planned._others
    assert ("layer_norm_output", "2.norm.weight", "2.norm.bias") in transform(plain, (X,), **FREE).plan.origin.withheld


def test_a_budget_that_cannot_be_kept_without_it():
    planned = transform(blocks(), (X,), **FREE)
    planned = transform(blocks(), (X,), **FREE, budget=planned.plan.predicted_peak_bytes)
    set_to(0.0, planned.source)
    with pytest.raises(InfeasibleBudgetError, match="Ask for at least"):
        step(planned, (X,))


def test_other_shapes_are_watched_too():
    plain = blocks()
    planned = transform(copy.deepcopy(plain), (X,), **FREE)
    planned(X[:128])
    set_to(0.0, planned.source, plain)
    assert_close(planned, plain, X[:128])


def test_copies_watch_their_own_weights():
    planned = transform(blocks(), (X,), **FREE)
    for copied in (copy.deepcopy(planned), pickle.loads(pickle.dumps(planned))):
        set_to(0.0, copied.source)
        assert broken_guards(copied._guards, copied.source) and not broken_guards(planned._guards, planned.source)


def test_saved_plans(tmp_path):
    module = blocks()
    plan = transform(module, (X,), **FREE).plan
    plan.save(tmp_path / "plan.json")
    set_to(3.0, module, of="bias")  # no plan would be made so, but this one holds
    assert watched(transform(module, (X,), plan=tmp_path / "plan.json", budget=None)) >= {"2.norm.bias"}
    set_to(0.0, module)
    with pytest.raises(
        PlanError, match="'layer_norm_output' is not accurate for the values of '2.norm.weight' and '2.norm.bias'"
    ):
        transform(module, (X,), plan=plan, budget=None)
    other = transform(module, (X,), **FREE).plan
    set_to(1.0, module)  # a plan without it holds for all values
    assert watched(transform(module, (X,), plan=other, budget=None)) == weights_of(1, 3)


def test_plans_in_a_cache_are_of_the_same_values(tmp_path):
    module = blocks()
    for value, count in ((1.0, 1), (0.0, 2), (1.0, 2), (0.5, 2)):
        set_to(value, module)
        planned = transform(module, (X,), **FREE, cache_dir=tmp_path)
        assert len(list(tmp_path.glob("*.json"))) == count
        assert ("2.norm.weight" in watched(planned)) == (value != 0)


def test_weights_without_values_hold():
    with torch.device("meta"):
        plan = fxmem.plan(blocks(), (torch.randn(256, 32),), budget="min", **FREE)
    assert not plan.origin.withheld and any(o.implementation == "layer_norm_output" for o in plan.problem.operators)


def test_bitwise_plans_watch_nothing():
    assert not watched(transform(blocks(), (X,), recompute=False))


def test_weights_that_are_computed_are_not_watched():
    module = blocks()
    weight_norm(module[2].norm, "weight", dim=0)
    planned = transform(copy.deepcopy(module), (X,), **FREE)
    assert watched(planned) == weights_of(1, 3)
    assert_close(planned, module)


def test_weights_of_two_norms_and_frozen_ones():
    plain = blocks()
    plain[3].norm.weight = plain[1].norm.weight
    plain[2].norm.weight.requires_grad_(False)
    planned = transform(copy.deepcopy(plain), (X,), **FREE)
    assert_close(planned, plain)
    set_to(0.0, planned.source, plain, block=3)
    assert_close(planned, plain)
    assert planned._others


def test_guards_of_ones_own(registered):
    @registered("halves", torch.ops.aten.tanh_backward.default, exactness="accurate")
    def halves(node):
        weight = node.args[1].args[0].args[-1].args[0]  # of the linear layer before it, transposed
        return Choice(backward=Call(node.target, node.args), guard=Guard(torch.max, (weight,)))

    module = blocks()
    planned = transform(copy.deepcopy(module), (X,), exactness="accurate", implementations=("halves",))
    assert_close(planned, module)
    assert fxmem.check_implementation("halves", module, (X,)).places == 3
    with torch.no_grad():
        module[1].wide.weight[0, 0] = 0.7
    assert fxmem.check_implementation("halves", module, (X,)).places == 2


def test_a_guard_of_what_is_no_parameter(registered):
    @registered("odd", torch.ops.aten.tanh_backward.default)
    def odd(node):
        return Choice(backward=Call(node.target, node.args), guard=Guard(torch.max, (node.args[1],)))

    with pytest.raises(ImplementationError, match="its guard is of what is neither parameter nor buffer"):
        fxmem.check_implementation("odd", blocks(), (X,))


@pytest.mark.parametrize("share", [lambda weight: 1 / 0, lambda weight: None, lambda weight: weight])
def test_a_guard_that_fails_is_named(share, registered):
    holds = [True]

    @registered("odd", torch.ops.aten.tanh_backward.default, exactness="accurate")
    def odd(node):
        weight = next(n for n in node.graph.nodes if n.meta.get("fxmem_role") and n.meta["fxmem_role"].key == "1.wide.weight")
        guard = Guard(lambda weight: 0.5 if holds else share(weight), (weight,))
        return Choice(backward=Call(node.target, node.args), guard=guard)

    module = blocks()
    assert fxmem.check_implementation("odd", module, (X,)).places == 3
    holds.clear()
    with pytest.raises(
        ImplementationError, match="'odd' fails on .*the guard of implementation 'odd' fails on '1.wide.weight'"
    ):
        fxmem.check_implementation("odd", module, (X,))


def test_what_is_no_guard(registered):
    @registered("odd", torch.ops.aten.tanh_backward.default)
    def odd(node):
        return Choice(backward=Call(node.target, node.args), guard="weight above zero")

    with pytest.raises(ImplementationError, match=r"'odd' fails on .*guard='weight above zero' is no Guard: give Guard\("):
        transform(blocks(), (X,))
