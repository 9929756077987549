"""Keeps the suite light: one thread, little effort for least peaks, PyTorch's structured trace out of what pytest records,
imports out of what is garbage."""

import gc
import logging

import pytest
import torch

import fxmem
from fxmem.implementations import IMPLEMENTATIONS
from fxmem.solvers import minimum

torch.set_num_threads(1)
minimum.LEAST_EFFORT_S = 2.0  # a least peak is looked for a little, not for the ten seconds that a user is owed
logging.getLogger("torch.__trace").addFilter(lambda record: False)


@pytest.fixture
def registered():
    """`fxmem.register_implementation`; what it registers is gone again afterwards."""
    before = dict(IMPLEMENTATIONS)
    yield fxmem.register_implementation
    IMPLEMENTATIONS.clear()
    IMPLEMENTATIONS.update(before)


@pytest.fixture(autouse=True, scope="module")
def what_is_imported_is_no_garbage():
    """Each measurement collects garbage first, and to look through all of PyTorch for it takes longer than most steps."""
    gc.collect()
    gc.freeze()
