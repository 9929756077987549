"""Where what a concatenation joins is read in the whole, or copied out of it, and where it is not."""

import pytest
import torch
from torch import nn

import fxmem
from benchmarks.implementation_cases import images
from fxmem.prepared import prepare

EMPTY = torch.empty(0)


class Joins(nn.Module):
    """What `join` makes of an activation and another tensor of its shape, between layers that need gradients."""

    def __init__(self, join):
        super().__init__()
        self.one, self.two, self.join = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), join

    def forward(self, x):
        return torch.sigmoid(self.join(torch.relu(self.one(x)), self.two(x)))


def twice(a, b):
    """Each concatenation holds the one before it."""
    whole = torch.cat([a, b], 1)
    return torch.cat([torch.sigmoid(whole), torch.cat([whole, b], 1)], 1)


def offered(module: nn.Module, name: str) -> int:
    """How often an implementation is offered."""
    problem = prepare(module, (images(),), {}, "V100", implementations=(name,), everywhere=True).lowered.problem
    return sum(o.implementation == name for o in problem.operators)


@pytest.mark.parametrize(
    "join",
    [
        lambda a, b: torch.cat([a, b], 1),
        lambda a, b: torch.cat([b, a], 0),
        lambda a, b: torch.cat([b, a, a], -1),
        lambda a, b: torch.cat([torch.cat([a, b], 1), b], 1),
        lambda a, b: torch.cat([b.new_empty(3, 0, 10, 12), a, b], 1),
    ],
)
def test_an_activation_is_read_in_what_it_was_joined_to(join):
    assert offered(Joins(join), "cat_activation") == 1
    assert fxmem.check_implementation("cat_activation", Joins(join), (images(),)).is_bitwise


@pytest.mark.parametrize(
    "join",
    [
        lambda a, b: torch.cat([a, b.double()], 1),  # it lies there in another type
        lambda a, b: torch.cat([a[:, :2], b], 1),  # and here it does not lie whole
        lambda a, b: torch.cat([a.flatten(1), b.flatten(1)], 1),  # nor in its own shape
        lambda a, b: torch.cat([EMPTY, a, b], 1),  # which counts no dimensions
        lambda a, b: a + b,
    ],
)
def test_an_activation_that_does_not_lie_in_the_whole(join):
    assert not offered(Joins(join), "cat_activation")


@pytest.mark.parametrize(
    ("join", "parts"),
    [
        (twice, ["cat", "cat", "relu", "sigmoid"]),
        (lambda a, b: torch.cat([torch.cat([a, b], 1), torch.cat([b, a], 1)], 0), ["cat", "relu"]),
        (lambda a, b: torch.cat([a, torch.sigmoid(torch.cat([a, a], 1)), b], 1), ["relu", "sigmoid"]),
    ],
)
def test_what_is_copied_out_of_a_later_whole(join, parts):
    """Each by its first whole, where it lies in one piece, if anything but concatenations reads it: another part, say."""
    problem = prepare(Joins(join), (images(),), {}, "V100", implementations=("cat_parts",), everywhere=True).lowered.problem
    made = [s for o in problem.operators if o.implementation == "cat_parts" for s in o.outputs]
    assert sorted(problem.storages[s].name.rstrip("_0123456789") for s in made) == parts
    assert fxmem.check_implementation("cat_parts", Joins(join), (images(),)).is_bitwise
