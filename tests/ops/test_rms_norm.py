"""rms_norm: every row of its table against float64, forward and backward."""

import pytest
import torch

import tpweave
from tpweave.errors import BackendUnavailableError
from tpweave.ops.rms_norm import RMS_NORM
from tpweave.verification import DTYPES, Check, outputs_and_gradients, run_check

SHAPES = [(1, 1), (3, 77), (5, 2, 384), (130, 64), (2, 4099), (0, 16), (1311, 33)]
# The reference is what the others are held against.
BACKENDS = [row.name for row in RMS_NORM.backends if row.name not in ("triton", "reference")]


def check(shape, with_weight=True, with_residual=False, weight_dtype=None):
    def make(draw):
        x, residual = draw.normal(*shape), draw.normal(*shape)
        weight = draw.normal(shape[-1]).to(weight_dtype or draw.dtype)
        return x, weight if with_weight else None, residual if with_residual else None

    def call(inputs, backend, group):
        return tpweave.rms_norm(*inputs[:2], 1e-5, residual=inputs[2], backend=backend)

    return Check("rms_norm", str(shape), make, call)


def assert_ok(result):
    if result.status == "unavailable":
        pytest.skip(result.reason)
    assert result.status == "ok", f"{result.case}: {result.reason}"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("with_weight", [True, False])
@pytest.mark.parametrize("with_residual", [True, False])
def test_matches_float64(isa, backend, dtype, with_weight, with_residual):
    for shape in SHAPES:
        assert_ok(run_check(check(shape, with_weight, with_residual), backend, "cpu", dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("with_residual", [True, False])
def test_triton_in_the_interpreter(monkeypatch, dtype, with_residual):
    pytest.importorskip("triton")
    from tpweave.kernels.ops import rms_norm

    # Two programs for the weight gradient, so that each takes several rows and the last has fewer.
    monkeypatch.setattr(rms_norm, "NUM_PARTIALS", 2)
    for shape in [(1, 1), (3, 77), (5, 2, 40), (0, 16)]:
        for with_weight in (True, False):
            assert_ok(run_check(check(shape, with_weight, with_residual), "triton", "cpu", dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_wide_weight_is_not_rounded(isa, dtype):
    assert_ok(run_check(check((7, 65), weight_dtype=torch.float32), "cpu", "cpu", dtype))


def test_agrees_with_torch():
    x, weight = torch.randn(9, 200), torch.randn(200)
    torch.testing.assert_close(tpweave.rms_norm(x, weight), torch.nn.functional.rms_norm(x, (200,), weight, 1e-6))


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
    case = check((513, 129), with_residual=True)
    inputs = [torch.randn(s).bfloat16() for s in ((513, 129), (129,), (513, 129))]
    first = outputs_and_gradients(case, inputs, None)
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for a, b in zip(first, outputs_and_gradients(case, inputs, None), strict=True):
            assert torch.equal(a, b)
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("call", "seen"),
    [
        (lambda: tpweave.rms_norm(torch.randn(2, 8), torch.randn(7)), r"\(7,\).*\(8,\)"),
        (lambda: tpweave.rms_norm(torch.ones(2, 8, dtype=torch.int64), None), "int64"),
        (lambda: tpweave.rms_norm(torch.randn(2, 8), None, residual=torch.randn(2, 7)), r"\(2, 7\)"),
        (lambda: tpweave.rms_norm(torch.randn(2, 8), None, residual=torch.randn(2, 8).half()), "float16"),
        (lambda: tpweave.rms_norm(torch.randn(2, 8), torch.randn(8, device="meta")), "meta"),
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
    with pytest.raises(BackendUnavailableError, match="up to 32768, not 40000"):
        tpweave.rms_norm(torch.randn(1, 40000), None, backend="triton")
