"""Fixtures shared by all tests."""

import os
from multiprocessing import forkserver

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


@pytest.fixture(scope="session", autouse=True)
def rank_server():
    """The process that `tpweave.testing.run_ranks` forks ranks from, with what many tests import in each of them."""
    forkserver.set_forkserver_preload(
        ["torch", "torch.distributed", "torch._dynamo", "torch._dynamo.backends.debugging", "transformers",
         "transformers.modeling_utils", "tpweave.native"]
    )  # fmt: skip
    forkserver.ensure_running()


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
