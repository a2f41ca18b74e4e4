"""Fixtures shared by all tests."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when kernels are defined: before they are imported

import ras_fast
from ras_fast.backend import forced_backend


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
