"""layer_norm: every row of its table against float64, forward and backward."""

import pytest
import torch

import tpweave
from tpweave.errors import BackendUnavailableError
from tpweave.ops.layer_norm import LAYER_NORM
from tpweave.testing import assert_accurate
from tpweave.verification import DTYPES, Check, outputs_and_gradients, run_check

SHAPES = [(1, 1), (3, 77), (5, 2, 384), (130, 64), (2, 4099), (0, 16), (1311, 33)]
# The reference is what the others are held against.
BACKENDS = [row.name for row in LAYER_NORM.backends if row.name not in ("triton", "reference")]


def check(shape, with_weight=True, with_bias=True, with_residual=False, parameter_dtype=None):
    def make(draw):
        x, residual = draw.normal(*shape), draw.normal(*shape)
        weight, bias = (draw.normal(shape[-1]).to(parameter_dtype or draw.dtype) for _ in range(2))
        return x, weight if with_weight else None, bias if with_bias else None, residual if with_residual else None

    def call(inputs, backend, group):
        return tpweave.layer_norm(*inputs[:3], residual=inputs[3], backend=backend)

    return Check("layer_norm", str(shape), make, call)


def assert_ok(result):
    if result.status == "unavailable":
        pytest.skip(result.reason)
    assert result.status == "ok", f"{result.case}: {result.reason}"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("with_parameters", [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("with_residual", [True, False])
def test_matches_float64(isa, backend, dtype, with_parameters, with_residual):
    for shape in SHAPES:
        assert_ok(run_check(check(shape, *with_parameters, with_residual), backend, "cpu", dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("with_residual", [True, False])
def test_triton_in_the_interpreter(monkeypatch, dtype, with_residual):
    pytest.importorskip("triton")
    from tpweave.kernels.ops import layer_norm

    # Two programs for the weight gradient, so that each takes several rows and the last has fewer.
    monkeypatch.setattr(layer_norm, "NUM_PARTIALS", 2)
    for shape in [(1, 1), (3, 77), (5, 2, 40), (0, 16)]:
        assert_ok(run_check(check(shape, with_residual=with_residual), "triton", "cpu", dtype))
    for with_weight, with_bias in ((True, False), (False, True), (False, False)):
        assert_ok(run_check(check((3, 20), with_weight, with_bias, with_residual), "triton", "cpu", dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_wide_parameters_are_not_rounded(isa, dtype):
    assert_ok(run_check(check((7, 65), parameter_dtype=torch.float32), "cpu", "cpu", dtype))


def test_agrees_with_torch():
    x, weight, bias = torch.randn(9, 200), torch.randn(200), torch.randn(200)
    want = torch.nn.functional.layer_norm(x, (200,), weight, bias, 1e-3)
    torch.testing.assert_close(tpweave.layer_norm(x, weight, bias, 1e-3), want)


def test_large_mean_keeps_its_variance(isa):
    x = torch.randn(4, 512) + 1000
    want = torch.nn.functional.layer_norm(x.double(), (512,))
    assert_accurate(tpweave.layer_norm(x, None, None), want, want.float(), eps=2e-4)


def test_reference_gradients_in_float64():
    shapes = ((3, 7), (7,), (7,), (3, 7))
    args = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    torch.autograd.gradcheck(lambda x, w, b, r: tpweave.layer_norm(x, w, b, residual=r), args)


@pytest.mark.parametrize("with_residual", [True, False])
def test_opcheck_and_compile(with_residual):
    x, weight, bias = torch.randn(4, 48, requires_grad=True), torch.randn(48, requires_grad=True), torch.randn(48)
    residual = torch.randn(4, 48, requires_grad=True) if with_residual else None
    torch.library.opcheck(torch.ops.tpweave.layer_norm.default, (x, weight, bias, 1e-5, residual, None))
    function = lambda x, w, b, r: tpweave.layer_norm(x, w, b, residual=r)  # noqa: E731
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(x, weight, bias, residual), function(x, weight, bias, residual), strict=True):
        assert torch.equal(got, want)


def test_non_contiguous_inputs():
    x, weight, bias = torch.randn(6, 40, 5).transpose(1, 2), torch.randn(80)[::2], torch.randn(40)
    assert torch.equal(
        tpweave.layer_norm(x, weight, bias), tpweave.layer_norm(x.contiguous(), weight.contiguous(), bias)
    )


def test_repeats_are_bit_equal():
    case = check((513, 129), with_residual=True)
    inputs = [torch.randn(s).bfloat16() for s in ((513, 129), (129,), (129,), (513, 129))]
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
        (lambda: tpweave.layer_norm(torch.randn(2, 8), torch.randn(7), None), r"weight.*\(7,\).*\(8,\)"),
        (lambda: tpweave.layer_norm(torch.randn(2, 8), None, torch.randn(9)), r"bias.*\(9,\).*\(8,\)"),
        (lambda: tpweave.layer_norm(torch.ones(2, 8, dtype=torch.int64), None, None), "int64"),
        (lambda: tpweave.layer_norm(torch.randn(2, 8), None, None, residual=torch.randn(2, 7)), r"\(2, 7\)"),
        (lambda: tpweave.layer_norm(torch.randn(2, 8), None, None, residual=torch.randn(2, 8).half()), "float16"),
        (lambda: tpweave.layer_norm(torch.randn(2, 8), torch.randn(8, device="meta"), None), "meta"),
    ],
)
def test_bad_input_names_the_values(call, seen):
    with pytest.raises(ValueError, match=seen):
        call()


def test_named_backend_runs_or_says_why():
    with pytest.raises(BackendUnavailableError, match="float64"):
        tpweave.layer_norm(torch.randn(2, 8, dtype=torch.float64), None, None, backend="cpu")
