"""Fixtures shared by all tests."""

import pytest
import torch

import ras_fast
from ras_fast.backends import forced_backend


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def backend(request):
    """Forces the backend named by an indirect parameter for one test."""
    name, before = request.param, forced_backend()
    if not ras_fast.backends()[name].available:
        pytest.fail(f"the test set-up must provide backend {ras_fast.backends()[name]}")
    ras_fast.set_backend(name)
    yield name
    ras_fast.set_backend(before)
