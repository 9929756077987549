"""Convolutions of concatenations: the weight's gradient from the parts, and each part's gradient by itself."""

import pytest
import torch
from torch import nn

import fxmem
from benchmarks.implementation_cases import Between, Upsampled, images
from fxmem.implementations import convolution_parts
from fxmem.prepared import prepare

NAME = "convolution_parts"


class Joins(nn.Module):
    """A convolution of what `join` makes of two activations, and how many channels that has."""

    def __init__(self, join, channels=16, **settings):
        super().__init__()
        self.one, self.two, self.join = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 1), join
        self.last = nn.Conv2d(channels, 8, 3, **settings)

    def forward(self, x):
        return self.last(self.join(torch.tanh(self.one(x)), torch.tanh(self.two(x))))


@pytest.fixture
def anywhere(monkeypatch):
    """As if no tensor was too small for its gradient to be made apart."""
    monkeypatch.setattr(convolution_parts, "LEAST_BYTES", 0)


def places(module: nn.Module, x: torch.Tensor) -> int:
    """Operators by which the implementation stands in, once it is forced."""
    graph = prepare(module, (x,), {}, "V100", implementations=(NAME,), exactness="accurate", everywhere=True).captured.joint
    return sum(n.meta.get("fxmem_implementation") == NAME for n in graph.graph.nodes)


@pytest.mark.parametrize(
    ("join", "channels", "settings", "expected"),
    [
        (lambda a, b: torch.cat([a, b], 1), 16, {}, 3),
        (lambda a, b: torch.cat([a, b, a], 1), 24, {"bias": False}, 4),
        (lambda a, b: torch.cat([a, b.detach()], 1), 16, {"stride": 2, "padding": (2, 1), "padding_mode": "zeros"}, 2),
        (lambda a, b: torch.cat([a, a.new_zeros(3, 2, 10, 12)], 1), 10, {}, 2),
        (lambda a, b: torch.cat([a, b[:, :3]], 1), 11, {"dilation": 2}, 1),  # a kernel makes eight channels at once
        (lambda a, b: torch.cat([a, b[:, :0]], 1), 8, {}, 0),
        (lambda a, b: torch.cat([a, b], 1), 16, {"groups": 2}, 0),
        (lambda a, b: torch.cat([a, b], 2), 8, {}, 0),
        (lambda a, b: a + b, 8, {}, 0),
    ],
)
@pytest.mark.usefixtures("anywhere")
def test_where_it_stands_in(join, channels, settings, expected):
    module, x = Joins(join, channels, **settings), images()
    assert places(module, x) == expected
    if expected:
        found = fxmem.check_implementation(NAME, module, (x,))
        assert found.measured_peak_bytes <= found.predicted_peak_bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.usefixtures("anywhere")
def test_gradients_apart_in_other_types_and_formats(dtype):
    x = images(dtype).to(memory_format=torch.channels_last)
    fxmem.check_implementation(NAME, Joins(lambda a, b: torch.cat([a, b], 1)).to(dtype), (x,))


class ReadTwice(Joins):
    """The backward reads the concatenation itself, too, which has to be there anyway."""

    def forward(self, x):
        whole = self.join(torch.tanh(self.one(x)), torch.tanh(self.two(x)))
        return self.last(whole).sum() + whole.square().sum()


def test_what_has_to_be_there_anyway():
    def join(a, b):
        return torch.cat([a, b], 1)

    assert (places(Joins(join), images()), places(ReadTwice(join), images())) == (1, 0)


@pytest.mark.usefixtures("anywhere")
def test_a_bias_alone():
    module = Joins(lambda a, b: torch.cat([a, b], 1)).requires_grad_(False)
    module.last.bias.requires_grad_()
    assert places(module, images().detach()) == 0


def test_a_small_gradient_is_not_made_apart():
    assert places(Joins(lambda a, b: torch.cat([a, b], 1)), images()) == 1


@pytest.mark.usefixtures("anywhere")
def test_the_least_peak_of_a_skip_falls():
    module, x = Between(Upsampled(16), channels=16), torch.randn(4, 3, 32, 32)
    peaks = []
    for exactness in ("bitwise", "accurate"):
        plan = fxmem.plan(module, (x,), budget="min", cost="V100", exactness=exactness, time_limit_s=1.0)
        peaks.append(plan.predicted_peak_bytes)
    assert peaks[1] < 0.95 * peaks[0]
