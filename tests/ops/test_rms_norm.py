"""rms_norm: every row of its table against float64, forward and backward."""

import pytest
import torch

import tpweave
from tpweave.dispatch import Inputs
from tpweave.errors import BackendUnavailableError
from tpweave.ops.rms_norm import RMS_NORM
from tpweave.testing import assert_accurate

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1), (3, 77), (5, 2, 384), (130, 64), (2, 4099), (0, 16), (1311, 33)]
BACKENDS = [row.name for row in RMS_NORM.backends]


def run(x, weight, residual, grad_y, grad_h, backend):
    leaves = [t.detach().clone().requires_grad_() if t is not None else None for t in (x, weight, residual)]
    out = tpweave.rms_norm(leaves[0], leaves[1], 1e-5, residual=leaves[2], backend=backend)
    y, h = out if residual is not None else (out, None)
    loss = (y * grad_y).sum() if h is None else (y * grad_y).sum() + (h * grad_h).sum()
    grads = torch.autograd.grad(loss, [t for t in leaves if t is not None])
    return [y.detach(), *([] if h is None else [h.detach()]), *grads]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("with_weight", [True, False])
@pytest.mark.parametrize("with_residual", [True, False])
def test_matches_float64(isa, backend, dtype, with_weight, with_residual):
    for shape in SHAPES:
        x, residual, grad_y, grad_h = (torch.randn(shape).to(dtype) for _ in range(4))
        weight = torch.randn(shape[-1]).to(dtype) if with_weight else None
        residual = residual if with_residual else None
        args = (x, weight, residual, grad_y, grad_h)
        reason = dict(RMS_NORM.supported(Inputs([x, weight, residual])))[backend]
        if reason is not None:
            pytest.skip(f"{backend}: {reason}")
        # The oracle sees the residual sum as rounded by the dtype, which is part of the definition.
        wide = [None if t is None else t.double() for t in args]
        if with_residual:
            wide[0], wide[2] = (x + residual).double(), torch.zeros(shape, dtype=torch.float64)
        expected = run(*wide, backend="reference")
        same = run(*args, backend="reference")
        for got, want, plain in zip(run(*args, backend=backend), expected, same, strict=True):
            assert_accurate(got, want, plain)


def test_reference_gradients_in_float64():
    x, weight, residual = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((3, 7), (7,), (3, 7)))
    torch.autograd.gradcheck(lambda x, w, r: tpweave.rms_norm(x, w, residual=r), (x, weight, residual))


@pytest.mark.parametrize("with_residual", [True, False])
def test_opcheck_and_compile(with_residual):
    x, weight = torch.randn(4, 48, requires_grad=True), torch.randn(48, requires_grad=True)
    residual = torch.randn(4, 48, requires_grad=True) if with_residual else None
    torch.library.opcheck(torch.ops.tpweave.rms_norm.default, (x, weight, 1e-6, residual, None))
    compiled = torch.compile(lambda x, w, r: tpweave.rms_norm(x, w, residual=r), fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(x, weight, residual), tpweave.rms_norm(x, weight, residual=residual), strict=True):
        assert torch.equal(got, want)


def test_non_contiguous_and_extreme_inputs():
    x = torch.randn(6, 40, 5).transpose(1, 2)
    weight = torch.randn(80)[::2]
    assert torch.equal(tpweave.rms_norm(x, weight), tpweave.rms_norm(x.contiguous(), weight.contiguous()))
    huge = torch.full((2, 64), 1e4)
    torch.testing.assert_close(tpweave.rms_norm(huge, None), torch.ones(2, 64))


def test_repeats_are_bit_equal():
    args = [torch.randn(513, 129).bfloat16() for _ in range(2)]
    weight = torch.randn(129).bfloat16()
    first = run(args[0], weight, None, args[1], None, None)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for a, b in zip(first, run(args[0], weight, None, args[1], None, None), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("call", "seen"),
    [
        (lambda: tpweave.rms_norm(torch.randn(2, 8), torch.randn(7)), r"\(7,\).*\(8,\)"),
        (lambda: tpweave.rms_norm(torch.ones(2, 8, dtype=torch.int64), None), "int64"),
        (lambda: tpweave.rms_norm(torch.randn(2, 8), None, residual=torch.randn(2, 7)), r"\(2, 7\)"),
        (lambda: tpweave.rms_norm(torch.randn(2, 8), None, residual=torch.randn(2, 8).half()), "float16"),
    ],
)
def test_bad_input_names_the_values(call, seen):
    with pytest.raises(ValueError, match=seen):
        call()


def test_named_backend_runs_or_says_why():
    x = torch.randn(2, 8, dtype=torch.float64)
    with pytest.raises(BackendUnavailableError, match="float64"):
        tpweave.rms_norm(x, None, backend="cpu")
    with pytest.raises(BackendUnavailableError, match="no backend 'nope'"):
        tpweave.rms_norm(x, None, backend="nope")
