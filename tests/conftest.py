"""Fixtures shared by all tests."""

import pytest
import torch

from tpweave.native import _C


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
