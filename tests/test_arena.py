"""Steps in an arena: bitwise the plain module's, also with poison in what is dead; when arenas are made, lent and let go."""

import copy
import io
import pickle
import re

import pytest
import torch
from helpers.models import ConvNet, Transformer, UNet
from helpers.poison import poisoned_arenas
from helpers.steps import assert_same, assert_same_steps, each_device, messages, on, step, tensors, transform
from test_transform import MODELS
from torch import nn

import fxmem
from fxmem.codegen import arena as runtime
from fxmem.errors import ArenaError
from fxmem.passes import place_in_arena

IMAGES = (torch.randn(2, 3, 16, 16),)


@pytest.fixture(autouse=True)
def small_buffers_too(monkeypatch):
    """Of models that tests can afford, few buffers have a page."""
    monkeypatch.setattr(place_in_arena, "LEAST_BYTES", 1)


def planned_pair(make=ConvNet, args=IMAGES, **options):
    torch.manual_seed(0)
    module = make()
    return copy.deepcopy(module), transform(module, args, arena=True, **{"budget": None} | options)


@each_device
@pytest.mark.parametrize("budget", [None, "min"])
@pytest.mark.parametrize("name", MODELS)
def test_bitwise_though_poisoned(name, budget, device):
    torch.manual_seed(0)
    make, inputs, _ = MODELS[name]
    module, args = on(device, make()), on(device, inputs())
    plain = copy.deepcopy(module)
    planned = transform(module, args, budget=budget, output_gradients="all", arena=True)
    with poisoned_arenas() as made:
        assert_same_steps(plain, planned, args)
    assert len(made) == bool(planned.plan.arena.inside) and all(arena.poisoned for arena in made)
