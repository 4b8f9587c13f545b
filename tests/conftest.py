"""Fixtures shared by all tests."""

import os

import pytest
import torch

from tpweave.native import _C

# Read when a kernel is decorated, so before any is imported. The tables keep "cpu" above "triton": CPU tensors go to
# the interpreter only where a test names it.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(params=_C.available_isas())
def isa(request):
    """Every CPU instruction set that this machine has, one after the other."""
    before = _C.active_isa()
    _C.set_active_isa(request.param)
    yield request.param
    _C.set_active_isa(before)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def one_thread():
    """The calls are small: waking threads takes longer than what they do."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
