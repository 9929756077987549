"""Measuring a step: exact bytes on modules that can be counted by hand, and nothing left behind."""

from dataclasses import dataclass

import pytest
import torch
from helpers.models import LossAndLogits
from torch import nn

import fxmem
from fxmem.errors import MeasureError
from fxmem.measuring import measure, measure_pair
from fxmem.torch_internals import pytree

KB4 = 4 * 1024  # one tensor of 1024 floats


class Chain(nn.Module):
    """y = exp(exp(w * x)): the backward needs x, w and both results."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(1024))

    def forward(self, x):
        return (self.w * x).exp().exp()


@dataclass
class Result:
    loss: torch.Tensor
    hidden: torch.Tensor


pytree.register_dataclass(Result)


class WithLoss(nn.Module):
    """Returns a dataclass with a scalar: the backward starts from the scalar alone."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(1024))

    def forward(self, *, x):
        hidden = self.w * x
        return Result(hidden.sum(), hidden.detach() * 2 + self.w)


def test_bytes_of_a_chain():
    # before: w, x and the output's gradient of ones. Forward: wx (freed, mul needs x and w), e1, e2. Backward, at its peak in
    # the second exp's: e1 and e2 kept, two gradients.
    m = measure(Chain(), (torch.zeros(1024),), repeats=1)
    assert m.before_bytes == 3 * KB4
    assert m.gradient_bytes == KB4
    assert m.peak_bytes == (3 + 4) * KB4
    assert (m.device, len(m.times_s)) == ("cpu", 1)


def test_given_output_gradients_are_for_all_outputs_that_require_grad():
    args, gradients = (torch.randn(512, 64),), [torch.ones(()), torch.ones(512, 64)]
    planned = fxmem.transform(LossAndLogits(), args, output_gradients="all", cost="measured", time_limit_s=0.2)
    measured = measure(planned, args, output_gradients=gradients, repeats=1)
    assert measured.peak_bytes == planned.plan.predicted_peak_bytes
    with pytest.raises(MeasureError, match="1 output gradients .* for 2 outputs .* give one for each"):
        measure(planned, args, output_gradients=gradients[:1])


def test_given_output_gradients_are_counted_and_used():
    expanded = torch.ones(1).expand(1024)
    assert measure(Chain(), (torch.zeros(1024),), output_gradients=[expanded]).before_bytes == 2 * KB4 + 4


def test_storages_are_counted_once():
    x = torch.zeros(2, 1024)
    tied = nn.ModuleList([nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)])
    tied[1].weight = tied[0].weight
    model = Chain()
    model.tied = tied
    assert measure(model, (x[0],), repeats=1).before_bytes == KB4 + 2 * KB4 + KB4 + 64


def test_a_dataclass_with_a_scalar():
    m = measure(WithLoss(), (), {"x": torch.zeros(1024)}, repeats=1)
    assert m.before_bytes == 2 * KB4
    assert m.gradient_bytes == KB4


class Stateful(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.linear = nn.BatchNorm1d(8), nn.Linear(8, 8)

    def forward(self, x):
        return nn.functional.dropout(self.linear(self.norm(x)), 0.5, self.training)


@pytest.mark.parametrize("training", [True, False])
def test_nothing_is_left_behind(training):
    model, x = Stateful().train(training), torch.randn(4, 8, requires_grad=True)
    model.linear.weight.grad = kept = torch.full((8, 8), 3.0)
    x.grad = x_kept = torch.ones(4, 8)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    generator = torch.get_rng_state()
    measure(model, (x,), repeats=1)
    measure_pair(model, model, (x,), repeats=1)
    assert model.linear.weight.grad is kept and bool((kept == 3).all())
    assert model.linear.bias.grad is None
    assert x.grad is x_kept and bool((x_kept == 1).all())
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), generator)
    assert model.training is training and model.norm.training is training


def test_an_input_inside_a_graph_keeps_its_graph():
    leaf = torch.zeros(1024, requires_grad=True)
    measure(Chain(), (leaf * 2,), repeats=1)
    assert leaf.grad is None


def test_a_failing_step_leaves_the_module_as_it_was():
    class Failing(Stateful):
        def forward(self, x):
            super().forward(x)
            raise KeyError("on purpose")

    model = Failing()
    model.linear.weight.grad = kept = torch.ones(8, 8)
    with pytest.raises(KeyError, match="on purpose"):
        measure(model, (torch.randn(4, 8),))
    assert model.linear.weight.grad is kept
    assert model.norm.num_batches_tracked == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: measure(nn.ReLU(), (torch.zeros(2),)), "no output of ReLU requires grad"),
        (lambda: measure(Chain(), (torch.zeros(1024),), repeats=0), "at least one repeat"),
        (lambda: measure(Chain(), {"x": torch.zeros(1024)}), "example_inputs is a dict; give keyword arguments"),
        (lambda: measure_pair(Chain(), Chain(), (torch.zeros(1024),), repeats=0), "at least one repeat"),
        (lambda: measure(Chain(), (torch.zeros(1024, device="meta"),)), "several devices \\(cpu, meta\\)"),
        (
            lambda: measure(Chain(), (torch.zeros(1024),), output_gradients=torch.ones(1024)),
            "is a Tensor; give a tensor for each",
        ),
        (lambda: measure(Chain(), (torch.zeros(1024),), output_gradients="all"), "output_gradients is a str"),
        (lambda: measure(Chain(), (torch.zeros(1024),), output_gradients=[1.0]), "1.0 is among the output gradients"),
        (
            lambda: measure(Chain(), (torch.zeros(1024),), output_gradients=[torch.ones(3)]),
            "of shape \\(3,\\) .* of \\(1024,\\)",
        ),
        (lambda: measure(Chain(), (torch.zeros(1024),), output_gradients=[None]), "of shape None was given"),
        (lambda: measure(Chain(), (torch.zeros(1024),), output_gradients=[]), "0 output gradients were given for 1 output"),
    ],
)
def test_what_cannot_be_measured(call, message):
    with pytest.raises(MeasureError, match=message):
        call()


def test_pairs():
    pair = measure_pair(Chain(), Chain(), (torch.zeros(1024),), repeats=3)
    assert pair.a_time_s > 0 and pair.b_time_s > 0 and pair.ratio > 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_bytes_of_a_chain_on_cuda():
    m = measure(Chain().cuda(), (torch.zeros(1024, device="cuda"),), repeats=1)
    assert (m.before_bytes, m.peak_bytes) == (3 * KB4, 7 * KB4)
