"""rope: every row of its table against float64, forward and backward."""

import pytest
import torch

import tpweave
from tpweave.errors import BackendUnavailableError
from tpweave.ops.rope import MAX_ANGLES, ROPE
from tpweave.verification import DTYPES, Check, run_check

# The reference is what the others are held against.
BACKENDS = [row.name for row in ROPE.backends if row.name not in ("triton", "reference")]
# batch, sequence, query heads, key heads, head dim, angles, angle tables a batch
CASES = [
    (2, 9, 4, 2, 64, 32, None), (1, 5, 3, 1, 80, 13, 1), (3, 4, 1, 1, 66, 33, 3), (2, 3, 2, 2, 8, 0, None),
    (0, 4, 2, 1, 16, 8, None), (2, 0, 2, 1, 16, 8, 2), (1, 2, 0, 1, 16, 8, None), (1, 130, 2, 1, 2, 1, None),
]  # fmt: skip


def check(case, interleaved, angle_dtype=None):
    batch, sequence, q_heads, k_heads, head_dim, count, tables = case

    def make(draw):
        angles = draw.normal(*(() if tables is None else (tables,)), sequence, count) * 3
        cos, sin = (t.to(angle_dtype or draw.dtype) for t in (angles.cos(), angles.sin()))
        return (
            draw.normal(batch, sequence, q_heads, head_dim),
            draw.normal(batch, sequence, k_heads, head_dim),
            cos,
            sin,
        )

    return Check(
        "rope", str(case), make, lambda i, backend, _: tpweave.rope(*i, interleaved=interleaved, backend=backend)
    )


def assert_ok(result):
    if result.status == "unavailable":
        pytest.skip(result.reason)
    assert result.status == "ok", f"{result.case}: {result.reason}"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("angle_dtype", [None, torch.float32, torch.float64], ids=["same", "fp32", "fp64"])
def test_matches_float64(isa, backend, dtype, interleaved, angle_dtype):
    for case in CASES:
        assert_ok(run_check(check(case, interleaved, angle_dtype), backend, "cpu", dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("interleaved", [False, True])
def test_triton_in_the_interpreter(dtype, interleaved):
    pytest.importorskip("triton")
    for case in [*CASES[:-1], (1, 3, 130, 2, 18, 9, None)]:
        assert_ok(run_check(check(case, interleaved), "triton", "cpu", dtype))


def test_agrees_with_the_textbook_form():
    q, k = torch.randn(2, 6, 4, 32), torch.randn(2, 6, 2, 32)
    angles = torch.outer(torch.arange(6.0), 10000.0 ** (-torch.arange(0, 32, 2) / 32))
    turned = torch.view_as_complex(q.unflatten(-1, (16, 2))) * torch.polar(torch.ones(6, 16), angles)[:, None]
    got, _ = tpweave.rope(q, k, angles.cos(), angles.sin(), interleaved=True)
    torch.testing.assert_close(got, torch.view_as_real(turned).flatten(-2))
    full_cos, full_sin = (torch.cat((t, t), -1)[:, None] for t in (angles.cos(), angles.sin()))
    want = k * full_cos + torch.cat((-k[..., 16:], k[..., :16]), -1) * full_sin
    _, got = tpweave.rope(q, k, full_cos[:, 0, :16], full_sin[:, 0, :16])
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("interleaved", [False, True])
def test_any_strides(isa, interleaved):
    merged = torch.randn(2, 5, 8 * 24)
    q, k = merged[..., : 4 * 24].unflatten(-1, (4, 24)), merged[..., 4 * 24 : 6 * 24].unflatten(-1, (2, 24))
    headed = torch.randn(2, 4, 5, 24).transpose(1, 2)
    angles = torch.randn(5, 24)
    cos, sin = angles.cos()[:, ::2], angles.sin()[:, :12]
    for a, b in ((q, k), (headed, k), (torch.randn(2, 5, 24, 4).transpose(2, 3), k)):
        dense = [t.contiguous() for t in (a, b, cos, sin)]
        for backend in ("cpu", "triton") if isa == "portable" else ("cpu",):
            got = tpweave.rope(a, b, cos, sin, interleaved=interleaved, backend=backend)
            for x, y in zip(got, tpweave.rope(*dense, interleaved=interleaved, backend=backend), strict=True):
                assert torch.equal(x, y) and x.is_contiguous()


def test_gradient_of_one_output_only():
    q, k, angles = (
        torch.randn(1, 3, 2, 8, requires_grad=True),
        torch.randn(1, 3, 2, 8, requires_grad=True),
        torch.randn(3, 4),
    )
    turned, _ = tpweave.rope(q, k, angles.cos(), angles.sin())
    dq, dk = torch.autograd.grad(turned.pow(2).sum() / 2, (q, k))
    torch.testing.assert_close(dq, q.detach())
    assert not dk.any()


def test_reference_gradients_in_float64():
    q, k = (torch.randn(1, 3, 2, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    cos, sin = torch.randn(2, 3, 3, dtype=torch.float64)
    torch.autograd.gradcheck(lambda q, k: tpweave.rope(q, k, cos, sin, interleaved=True), (q, k))


def test_opcheck_and_compile():
    q, k = torch.randn(1, 3, 2, 8, requires_grad=True), torch.randn(1, 3, 1, 8, requires_grad=True)
    cos, sin = torch.randn(2, 3, 4)
    torch.library.opcheck(torch.ops.tpweave.rope.default, (q, k, cos, sin, False, False, None))
    compiled = torch.compile(tpweave.rope, fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(q, k, cos, sin), tpweave.rope(q, k, cos, sin), strict=True):
        assert torch.equal(got, want)


def test_repeats_are_bit_equal():
    q, k, angles = torch.randn(2, 130, 4, 64), torch.randn(2, 130, 4, 64), torch.randn(130, 32)
    first = tpweave.rope(q, k, angles.cos(), angles.sin())
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for a, b in zip(first, tpweave.rope(q, k, angles.cos(), angles.sin()), strict=True):
            assert torch.equal(a, b)
    torch.set_num_threads(before)


Q, K, C = torch.randn(2, 3, 4, 8), torch.randn(2, 3, 1, 8), torch.randn(3, 4)


@pytest.mark.parametrize(
    ("call", "seen"),
    [
        (lambda: tpweave.rope(Q[0], K, C, C), r"\(3, 4, 8\)"),
        (lambda: tpweave.rope(Q, K[:, :2], C, C), r"\(2, 2, 1, 8\)"),
        (lambda: tpweave.rope(Q, K.half(), C, C), "float16"),
        (lambda: tpweave.rope(Q.long(), K.long(), C, C), "int64"),
        (lambda: tpweave.rope(Q, K, C[:2], C[:2]), r"\(2, 4\).*\[3, D_rot / 2\]"),
        (lambda: tpweave.rope(Q, K, C, C[:, :2]), r"\(3, 2\)"),
        (lambda: tpweave.rope(Q, K, torch.randn(3, 8), torch.randn(3, 8)), r"8 angles.*cos\[\.\.\., :"),
        (lambda: tpweave.rope(Q, K, C.to("meta"), C), "meta"),
    ],
)
def test_bad_input_names_the_values(call, seen):
    with pytest.raises(ValueError, match=seen):
        call()


def test_named_backend_runs_or_says_why():
    with pytest.raises(BackendUnavailableError, match="float64"):
        tpweave.rope(Q.double(), K.double(), C, C, backend="cpu")
    many = torch.randn(1, 1, 1, 2 * MAX_ANGLES + 2)
    cos = torch.randn(1, MAX_ANGLES + 1)
    with pytest.raises(BackendUnavailableError, match=f"{MAX_ANGLES} angles"):
        tpweave.rope(many, many, cos, cos, backend="cpu")
    assert tpweave.rope(many, many, cos, cos)[0].shape == many.shape
