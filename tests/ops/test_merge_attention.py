"""merge_attention: every row of its table against float64, forward and backward, and attention over all keys."""

import pytest
import torch

import tpweave
from tpweave.ops.merge_attention import MERGE_ATTENTION
from tpweave.verification import DTYPES, Check, run_check

BACKENDS = [row.name for row in MERGE_ATTENTION.backends if row.name != "triton"]
# parts, batch, queries, heads, head dim
CASES = [(1, 2, 3, 2, 8), (2, 1, 5, 3, 40), (5, 2, 7, 1, 13), (3, 1, 130, 2, 1), (2, 0, 3, 2, 8), (2, 1, 0, 2, 8)]


def draw_parts(draw, parts, batch, queries, heads, depth):
    """Outputs in the draw's dtype, log-sum-exps in fp32 (fp64), some of them -inf, one row in all parts."""
    outs = [draw.normal(batch, queries, heads, depth) for _ in range(parts)]
    lses = [(draw.normal(batch, heads, queries) * 3).float() for _ in range(parts)]
    for i, lse in enumerate(lses):
        lse[..., i::4] = float("-inf")
        lse[:, :1, :1] = float("-inf")
    return *outs, *lses


def call(inputs, backend, _):
    half = len(inputs) // 2
    return tpweave.merge_attention(inputs[:half], inputs[half:], backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_matches_float64(isa, backend, dtype):
    for case in CASES:
        check = Check("merge_attention", str(case), lambda draw, case=case: draw_parts(draw, *case), call)
        result = run_check(check, backend, "cpu", dtype)
        assert result.status == "ok", f"{case}: {result.reason}"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_equals_attention_over_all_keys(isa, backend, dtype):
    leaves = [torch.randn(2, n, 4, 16).to(dtype).requires_grad_() for n in (5, 60, 60)]
    q, k, v = leaves
    want = tpweave.attention(q, k, v, return_lse=True)
    pieces = (slice(0, 7), slice(7, 7), slice(7, 60))
    parts = [tpweave.attention(q, k[:, at], v[:, at], return_lse=True) for at in pieces]
    got = tpweave.merge_attention(*zip(*parts, strict=True), backend=backend)
    assert got[0].dtype == dtype and got[1].dtype == torch.float32
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    weights = [torch.randn(x.shape) for x in want]
    sums = [sum((x * w).sum() for x, w in zip(result, weights, strict=True)) for result in (got, want)]
    grads = [torch.autograd.grad(total, leaves) for total in sums]
    for a, b in zip((*got, *grads[0]), (*want, *grads[1]), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_parts_have_no_share(isa, backend):
    outs = [torch.randn(1, 3, 2, 9) for _ in range(3)]
    lses = [torch.randn(1, 2, 3) for _ in range(3)]
    want = tpweave.merge_attention(outs[::2], lses[::2], backend=backend)
    lses[1].fill_(float("-inf"))
    got = tpweave.merge_attention(outs, lses, backend=backend)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
    empty = [x.requires_grad_() for x in (*outs, *(torch.full_like(x, float("-inf")) for x in lses))]
    out, lse = tpweave.merge_attention(empty[:3], empty[3:], backend=backend)
    assert not out.any() and torch.isneginf(lse).all()
    assert not any(grad.any() for grad in torch.autograd.grad(out.sum(), empty))


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_strides_and_large_sums(isa, backend):
    transposed = torch.randn(2, 9, 3, 12).transpose(1, 3).contiguous().transpose(1, 3)
    outs = [transposed, torch.randn(2, 3, 9, 12).transpose(1, 2)]
    lses = [torch.randn(2, 9, 3).transpose(1, 2), torch.randn(2, 3, 18)[..., ::2]]
    got = tpweave.merge_attention(outs, lses, backend=backend)
    dense = [[x.contiguous() for x in parts] for parts in (outs, lses)]
    for a, b in zip(got, tpweave.merge_attention(*dense, backend=backend), strict=True):
        assert torch.equal(a, b) and a.is_contiguous()
    out, lse = tpweave.merge_attention(dense[0], [x + 1e4 for x in dense[1]], backend=backend)
    torch.testing.assert_close(out, got[0], rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(lse - 1e4, got[1], rtol=1e-2, atol=1e-2)


def test_gradcheck_in_float64():
    outs = [torch.randn(1, 2, 2, 3, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    lses = [torch.randn(1, 2, 2, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    torch.autograd.gradcheck(lambda *x: tpweave.merge_attention(x[:3], x[3:]), (*outs, *lses))


def test_opcheck_and_compile():
    outs = [torch.randn(2, 3, 2, 8, requires_grad=True) for _ in range(2)]
    lses = [torch.randn(2, 2, 3, requires_grad=True) for _ in range(2)]
    torch.library.opcheck(torch.ops.tpweave.merge_attention.default, (outs, lses, None))
    compiled = torch.compile(tpweave.merge_attention, fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(outs, lses), tpweave.merge_attention(outs, lses), strict=True):
        assert torch.equal(got, want)


def test_bits_do_not_depend_on_threads(isa):
    outs, lses = [torch.randn(2, 300, 4, 64) for _ in range(4)], [torch.randn(2, 4, 300) for _ in range(4)]
    before = torch.get_num_threads()
    first = tpweave.merge_attention(outs, lses)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for a, b in zip(first, tpweave.merge_attention(outs, lses), strict=True):
            assert torch.equal(a, b)
    torch.set_num_threads(before)


OUT, LSE = torch.zeros(2, 3, 4, 8), torch.zeros(2, 4, 3)


@pytest.mark.parametrize(
    ("call", "seen"),
    [
        (lambda: tpweave.merge_attention([], []), "0 outs and 0 lses"),
        (lambda: tpweave.merge_attention([OUT, OUT], [LSE]), "2 outs and 1 lses"),
        (lambda: tpweave.merge_attention([OUT[0]], [LSE]), r"outs\[0\] is torch.float32 \(3, 4, 8\)"),
        (lambda: tpweave.merge_attention([OUT.long()], [LSE]), "torch.int64"),
        (lambda: tpweave.merge_attention([OUT, OUT[:, :2]], [LSE, LSE]), r"outs\[1\] .*\(2, 2, 4, 8\)"),
        (lambda: tpweave.merge_attention([OUT, OUT.half()], [LSE, LSE]), r"outs\[1\] is torch.float16"),
        (lambda: tpweave.merge_attention([OUT], [LSE.transpose(1, 2)]), r"lses\[0\] .*\(2, 3, 4\).*\(2, 4, 3\)"),
        (lambda: tpweave.merge_attention([OUT], [LSE.half()]), "float16.*float32"),
        (lambda: tpweave.merge_attention([OUT], [LSE.to("meta")]), "meta"),
        (lambda: tpweave.merge_attention([OUT], [LSE], backend="nope"), "no backend 'nope'"),
    ],
)
def test_bad_input_names_the_values(call, seen):
    with pytest.raises(ValueError, match=seen):
        call()
