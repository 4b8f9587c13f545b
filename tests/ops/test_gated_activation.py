"""gated_activation: every row of its table against float64, forward and backward, and the mathematics below it."""

import pytest
import torch

import tpweave
from tpweave.errors import BackendUnavailableError
from tpweave.ops.gated_activation import GATED_ACTIVATION, KIND_CODES
from tpweave.reference.ops.gated_activation import ACTIVATIONS
from tpweave.verification import DTYPES, Check, outputs_and_gradients, run_check

SHAPES = [(1,), (3, 77), (5, 2, 384), (0, 16), (16, 0), (1311, 33)]
# The reference is what the others are held against.
BACKENDS = [row.name for row in GATED_ACTIVATION.backends if row.name not in ("triton", "reference")]


def call_on(kind):
    return lambda inputs, backend, group: tpweave.gated_activation(*inputs, kind, backend=backend)


def assert_ok(result):
    if result.status == "unavailable":
        pytest.skip(result.reason)
    assert result.status == "ok", f"{result.case}: {result.reason}"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("kind", KIND_CODES)
def test_matches_float64(isa, backend, dtype, kind):
    for shape in SHAPES:
        check = Check("gated_activation", str(shape), lambda d, s=shape: (d.normal(*s), d.normal(*s)), call_on(kind))
        assert_ok(run_check(check, backend, "cpu", dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("kind", KIND_CODES)
def test_triton_in_the_interpreter(dtype, kind):
    pytest.importorskip("triton")
    for shape in [(1,), (3, 77), (2, 3, 40), (0, 16), (16, 0), (2, 1100)]:
        check = Check("gated_activation", str(shape), lambda d, s=shape: (d.normal(*s), d.normal(*s)), call_on(kind))
        assert_ok(run_check(check, "triton", "cpu", dtype))


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
def test_triton_slope_does_not_overflow():
    pytest.importorskip("triton")
    gate = torch.tensor([1e30, -1e30, 90.0, -90.0], requires_grad=True)
    for kind in ("silu", "gelu", "gelu_tanh", "relu"):
        y = tpweave.gated_activation(gate, torch.ones(4), kind, backend="triton")
        (slope,) = torch.autograd.grad(y.sum(), gate)
        torch.testing.assert_close(slope, torch.tensor([1.0, 0, 1, 0]))


@pytest.mark.parametrize(
    "halves",
    [
        lambda d: d.normal(9, 2 * 37).chunk(2, -1),
        lambda d: d.normal(2, 3, 2, 37).unbind(-2),
        lambda d: d.normal(37, 2, 9).transpose(0, 2).unbind(1),
        lambda d: (d.normal(4, 1, 37).expand(4, 3, 37), d.normal(4, 3, 37)),
        lambda d: d.normal(9, 37, 2).unbind(-1),
    ],
    ids=["merged", "stacked", "transposed", "expanded", "strided last dim"],
)
def test_any_strides(isa, halves):
    case = Check("gated_activation", "strides", halves, call_on("silu"))
    assert_ok(run_check(case, "cpu", "cpu", torch.bfloat16))
    if isa == "portable":
        assert_ok(run_check(case, "triton", "cpu", torch.float32))


@pytest.mark.parametrize("kind", KIND_CODES)
def test_activation_is_accurate_over_its_whole_range(isa, kind):
    x = torch.cat((torch.linspace(-16, 16, 40001), torch.logspace(-30, 30, 4001), -torch.logspace(-30, 1.1, 2001)))
    got = tpweave.gated_activation(x, torch.ones_like(x), kind)
    want = ACTIVATIONS[kind](x.double())
    # 1 + erf and 1 + tanh cancel in float64 too.
    if kind == "gelu":
        want = x.double() * 0.5 * torch.special.erfc(-x.double() / 2**0.5)
    if kind == "gelu_tanh":
        want = x.double() * torch.sigmoid((8 / torch.pi) ** 0.5 * (x.double() + 0.044715 * x.double() ** 3))
    # The tanh form rounds an exponent of up to 80, of which the exponential makes 80 times the relative error.
    tolerance = 2e-5 if kind == "gelu_tanh" else 1e-6
    # Below 1e-36 a product of the exponential and a small factor may go through a subnormal.
    error = (got.double() - want).abs() / want.abs().clamp(min=1e-36)
    assert error.max().item() < tolerance


@pytest.mark.parametrize("kind", KIND_CODES)
def test_extreme_inputs(isa, kind):
    gate = torch.tensor([float("inf"), 1e38, -1e38, 90.0, -90.0, -104.0, 0.0, float("nan")], requires_grad=True)
    y = tpweave.gated_activation(gate, torch.ones(8), kind)
    (slope,) = torch.autograd.grad(y.sum(), gate)
    saturates = kind == "sigmoid"
    torch.testing.assert_close(y[:2], torch.ones(2) if saturates else gate[:2].detach())
    assert torch.equal(y[[2, 4, 5]].abs() < 1e-30, torch.ones(3, dtype=torch.bool))
    assert y[6] == (0.5 if saturates else 0)
    assert y[7].isnan()
    torch.testing.assert_close(slope[1:5], torch.tensor([0.0, 0, 0, 0] if saturates else [1.0, 0, 1, 0]))


def test_reference_gradients_in_float64():
    gate, up = (torch.randn(3, 7, dtype=torch.float64, requires_grad=True) for _ in range(2))
    for kind in KIND_CODES:
        torch.autograd.gradcheck(lambda g, u, kind=kind: tpweave.gated_activation(g, u, kind), (gate, up))


def test_opcheck_and_compile():
    gate, up = torch.randn(4, 48, requires_grad=True), torch.randn(4, 48, requires_grad=True)
    torch.library.opcheck(torch.ops.tpweave.gated_activation.default, (gate, up, "gelu", None))
    compiled = torch.compile(tpweave.gated_activation, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(gate, up, "silu"), tpweave.gated_activation(gate, up, "silu"))


def test_repeats_are_bit_equal():
    inputs = [torch.randn(513, 129).bfloat16() for _ in range(2)]
    check = Check("gated_activation", "repeats", lambda d: inputs, call_on("gelu"))
    first = outputs_and_gradients(check, inputs, None)
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for a, b in zip(first, outputs_and_gradients(check, inputs, None), strict=True):
            assert torch.equal(a, b)
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("call", "seen"),
    [
        (lambda: tpweave.gated_activation(torch.randn(2, 8), torch.randn(2, 8), "swish"), "swish.*silu, gelu"),
        (lambda: tpweave.gated_activation(torch.randn(2, 8), torch.randn(2, 7)), r"\(2, 8\).*\(2, 7\)"),
        (lambda: tpweave.gated_activation(torch.randn(2, 8), torch.randn(2, 8).half()), "float16"),
        (lambda: tpweave.gated_activation(torch.randn(2, 8), torch.randn(2, 8, device="meta")), "meta"),
        (lambda: tpweave.gated_activation(*torch.ones(2, 8, dtype=torch.int64).chunk(2, -1)), "int64"),
    ],
)
def test_bad_input_names_the_values(call, seen):
    with pytest.raises(ValueError, match=seen):
        call()


def test_named_backend_runs_or_says_why():
    gate, up = torch.randn(2, 2, 8, dtype=torch.float64)
    with pytest.raises(BackendUnavailableError, match="float64"):
        tpweave.gated_activation(gate, up, backend="cpu")
