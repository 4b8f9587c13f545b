"""attention: every row of its table against float64, forward and backward, over shapes, windows and masks."""

import functools

import pytest
import torch
from attention_shapes import PLAIN_CASES

import tpweave
from tpweave.dispatch import Inputs
from tpweave.errors import BackendUnavailableError
from tpweave.ops.attention import ATTENTION
from tpweave.reference.ops.attention import AttentionOptions, attention_backward_reference, attention_reference
from tpweave.testing import assert_accurate

pytestmark = pytest.mark.usefixtures("one_thread")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Triton's interpreter is slow: test_attention_triton.py has cases of its own.
BACKENDS = [row.name for row in ATTENTION.backends if row.name != "triton"]

# name: (B, Sq, Sk, Hq, Hkv, D, Dv), settings
CASES = {
    **PLAIN_CASES,
    "window": ((1, 333, 333, 2, 1, 96, 96), {"window": (37, 20)}),
    "narrow values": ((1, 130, 130, 1, 1, 256, 40), {"softmax_scale": 0.3}),
    "negative scale": ((1, 100, 100, 2, 2, 48, 48), {"causal": True, "softmax_scale": -0.2}),
}
MASKS = ["none", "padding", "scattered", "one sequence hidden"]


def make(shape, dtype, seed=0):
    batch, queries, keys, heads, kv_heads, depth, depth_v = shape
    generator = torch.Generator().manual_seed(seed)
    sizes = ((batch, queries, heads, depth), (batch, keys, kv_heads, depth), (batch, keys, kv_heads, depth_v))
    return [torch.randn(size, generator=generator).to(dtype) for size in sizes]


def make_mask(kind, batch, keys):
    if kind == "none":
        return None
    mask = torch.ones(batch, keys, dtype=torch.bool)
    if kind == "padding":
        mask[-1, keys - keys // 3 :] = False
        mask[0, : keys // 2] = False
    elif kind == "scattered":
        mask[:, ::3] = False
    else:
        mask[0] = False
    return mask


def doubles(*tensors):
    return [t.double() for t in tensors]


def plain(q, k, v, mask=None, **settings):
    """Attention in the inputs' dtype throughout, as written by hand: how far an honest implementation is off."""
    group = q.shape[2] // k.shape[2]
    scale = settings.pop("softmax_scale", q.shape[-1] ** -0.5)
    visible = attention_visible(q, k, mask, **settings)
    q, k, v = q.transpose(1, 2), *(x.transpose(1, 2).repeat_interleave(group, 1) for x in (k, v))
    scores = (q @ k.transpose(-1, -2) * scale).masked_fill(~visible, float("-inf"))
    weights = torch.softmax(scores, -1).masked_fill(~visible.any(-1, keepdim=True), 0.0)
    return (weights @ v).transpose(1, 2)


def attention_visible(q, k, mask, causal=False, window=(-1, -1)):
    offset = torch.arange(k.shape[1]) - (torch.arange(q.shape[1])[:, None] + k.shape[1] - q.shape[1])
    left, right = window[0], 0 if causal else window[1]
    everywhere = torch.ones_like(offset, dtype=torch.bool)
    visible = (offset >= -left if left >= 0 else everywhere) & (offset <= right if right >= 0 else everywhere)
    return visible[None, None] if mask is None else visible & mask[:, None, None]


@functools.cache
def case_oracle(case, kind, dtype):
    """Inputs, mask, float64 results and the same-dtype result of a case, once for all rows and instruction sets."""
    shape, settings = CASES[case]
    q, k, v = make(shape, dtype)
    mask = make_mask(kind, shape[0], shape[2])
    settings = {**settings, "mask": mask}
    want = reference(*doubles(q, k, v), **settings)
    return (q, k, v), mask, want, plain(q, k, v, **settings)


def reference(q, k, v, **settings):
    settings.setdefault("softmax_scale", q.shape[-1] ** -0.5)
    return attention_reference(q, k, v, AttentionOptions(**key_mask_4d(settings)))


def check(q, k, v, **settings):
    want = reference(*doubles(q, k, v), **settings)
    # In fp16 the scores of large inputs overflow; elsewhere the whole computation is in the dtype.
    same = reference(q, k, v, **settings)[0] if q.dtype == torch.float16 else plain(q, k, v, **settings)
    check_results(q, tpweave.attention(q, k, v, return_lse=True, **settings), want, same)


def check_results(q, got, want, same):
    (out, lse), (want, want_lse) = got, want
    assert out.dtype == q.dtype and out.is_contiguous() and lse.dtype == torch.float32
    assert_accurate(out, want, same.to(q.dtype))
    assert torch.equal(torch.isneginf(lse), torch.isneginf(want_lse))
    seen = ~torch.isneginf(want_lse)
    tolerance = 1e-5 if q.dtype == torch.float32 else 2e-4
    torch.testing.assert_close(lse[seen].double(), want_lse[seen], rtol=1e-5, atol=tolerance)


def key_mask_4d(settings):
    mask = settings.get("mask")
    return settings if mask is None or mask.dim() == 4 else {**settings, "mask": mask[:, None, None]}


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES)
def test_matches_float64(isa, case, backend, dtype):
    for kind in MASKS:
        inputs, mask, want, same = case_oracle(case, kind, dtype)
        reason = dict(ATTENTION.supported(Inputs(inputs, mask=mask)))[backend]
        if reason is not None:
            pytest.skip(f"{backend}: {reason}")
        got = tpweave.attention(*inputs, mask=mask, return_lse=True, backend=backend, **CASES[case][1])
        check_results(inputs[0], got, want, same)
        if kind == "one sequence hidden":
            assert torch.equal(got[0][0], torch.zeros_like(got[0][0])) and torch.isneginf(got[1][0]).all()


@pytest.mark.parametrize("shape", [(0, 5, 5, 2, 1, 8, 8), (2, 0, 5, 2, 1, 8, 8), (2, 5, 0, 2, 1, 8, 4)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_empty(shape, backend):
    q, k, v = (x.requires_grad_() for x in make(shape, torch.float32))
    out, lse = tpweave.attention(q, k, v, causal=True, return_lse=True, backend=backend)
    assert torch.equal(out, torch.zeros(*q.shape[:3], shape[-1])) and torch.isneginf(lse).all()
    for grad, x in zip(torch.autograd.grad(out.sum(), (q, k, v)), (q, k, v), strict=True):
        assert torch.equal(grad, torch.zeros_like(x))


def test_any_strides(isa):
    base = torch.randn(2, 3, 90, 3, 40)
    q, k, v = base[:, :, :, 0].transpose(1, 2), base[:, :1, :, 1].transpose(1, 2), base[:1, :1, :, 2].transpose(1, 2)
    v = v.expand(2, 90, 1, 40)
    want = tpweave.attention(q.contiguous(), k.contiguous(), v.contiguous(), causal=True)
    assert torch.equal(tpweave.attention(q, k, v, causal=True), want)
    sparse = torch.randn(2, 90, 3, 80)[..., ::2]
    assert torch.equal(tpweave.attention(sparse, k, v), tpweave.attention(sparse.contiguous(), k, v))
    mask = torch.rand(90, 2).t() > 0.3
    assert torch.equal(tpweave.attention(q, k, v, mask=mask), tpweave.attention(q, k, v, mask=mask.contiguous()))
    one = mask[:1, None, None]
    assert torch.equal(tpweave.attention(q, k, v, mask=one), tpweave.attention(q, k, v, mask=mask[:1].expand(2, 90)))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_extreme_inputs(isa, dtype):
    q, k, v = make((1, 130, 200, 2, 1, 64, 64), torch.float32)
    check((q * 1e4).to(dtype), (k * 1e4).to(dtype), v.to(dtype), causal=True, softmax_scale=1e-8)
    out = tpweave.attention((q * 1e4).to(dtype), (k * 1e4).to(dtype), (v * 1e4).to(dtype), causal=True)
    assert torch.isfinite(out).all()
    # Rising scores: the running maximum grows at every key tile.
    rising = torch.arange(1000.0).view(1, 1000, 1, 1).expand(1, 1000, 1, 8)
    ones, values = torch.ones(1, 5, 1, 8).to(dtype), torch.randn(1, 1000, 1, 8).to(dtype)
    for sign in (1, -1):
        check(ones, sign * rising.to(dtype) / 10, values, softmax_scale=1.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_nan_stays_where_it_belongs(isa, dtype):
    q, k, v = make((2, 100, 130, 2, 1, 59, 33), dtype)
    mask = make_mask("padding", 2, 130)
    clean, lse = tpweave.attention(q, k, v, mask=mask, return_lse=True)
    poisoned_k, poisoned_v, poisoned_q = k.clone(), v.clone(), q.clone()
    poisoned_k[~mask] = poisoned_v[~mask] = float("nan")
    assert torch.equal(tpweave.attention(q, poisoned_k, poisoned_v, mask=mask), clean)
    poisoned_q[0, 7, 1] = float("nan")
    out, poisoned_lse = tpweave.attention(poisoned_q, k, v, mask=mask, return_lse=True)
    hit = torch.zeros(2, 100, 2, dtype=torch.bool)
    hit[0, 7, 1] = True
    assert torch.isnan(out[hit]).all() and torch.equal(out[~hit], clean[~hit])
    assert torch.equal(torch.isnan(poisoned_lse), hit.transpose(1, 2))
    # Working memory that held NaNs is taken again, and so are outputs that torch filled with NaNs.
    tpweave.attention(*(torch.full_like(x, float("nan")) for x in (q, k, v)))
    torch.use_deterministic_algorithms(True)
    try:
        again, lse_again = tpweave.attention(q, k, v, mask=mask, return_lse=True)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(again, clean) and torch.equal(lse_again, lse)


@pytest.mark.parametrize(
    "shape", [(1, 700, 700, 1, 1, 64, 64), (3, 40, 1100, 6, 3, 64, 64), (2, 300, 300, 5, 5, 24, 24)], ids=str
)
def test_bits_do_not_depend_on_threads(isa, shape):
    q, k, v = make(shape, torch.bfloat16)
    first = tpweave.attention(q, k, v, causal=True, return_lse=True)
    for threads in (1, 2, 3, 5, 5, 5):
        torch.set_num_threads(threads)
        for a, b in zip(first, tpweave.attention(q, k, v, causal=True, return_lse=True), strict=True):
            assert torch.equal(a, b)


def gradients(function, q, k, v, grad_out, grad_lse):
    leaves = [t.detach().clone().requires_grad_() for t in (q, k, v)]
    out, lse = function(*leaves)
    loss = (out * grad_out).sum()
    if grad_lse is not None:
        loss = loss + lse.masked_fill(torch.isneginf(lse), 0.0).mul(grad_lse).sum()
    return torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize(
    "case", ["grouped", "multi-query", "more queries than keys", "window", "wide values", "negative scale"]
)
@pytest.mark.parametrize("with_lse", [False, True])
def test_gradients_match_float64(case, dtype, with_lse):
    shape, settings = CASES[case]
    q, k, v = make(shape, dtype)
    grad_out = torch.randn(*q.shape[:3], shape[-1]).to(dtype)
    grad_lse = torch.randn(shape[0], shape[3], shape[1]) if with_lse else None
    for kind in ("none", "padding"):
        mask = make_mask(kind, shape[0], shape[2])

        def plain_torch(q, k, v, mask=mask):
            return reference(q, k, v, **settings, mask=mask)

        def ours(q, k, v, mask=mask):
            return tpweave.attention(q, k, v, return_lse=True, mask=mask, **settings)

        wide_lse = None if grad_lse is None else grad_lse.double()
        wants = gradients(plain_torch, *doubles(q, k, v, grad_out), wide_lse)
        sames = gradients(plain_torch, q, k, v, grad_out, grad_lse)
        for got, want, same in zip(gradients(ours, q, k, v, grad_out, grad_lse), wants, sames, strict=True):
            # The saved out is rounded to the dtype, once more than in autograd's own graph.
            assert_accurate(got, want, same, factor=3.0)


@pytest.mark.parametrize("masked", [False, True])
def test_gradcheck_in_float64(masked):
    q, k, v = (x.requires_grad_() for x in make((1, 4, 5, 4, 2, 3, 2), torch.float64))
    mask = torch.rand(1, 4, 4, 5) > 0.4 if masked else None
    if masked:
        mask[0, 1, 2] = False

    def function(q, k, v):
        out, lse = tpweave.attention(q, k, v, causal=not masked, window=(3, -1), mask=mask, return_lse=True)
        return out, lse.masked_fill(torch.isneginf(lse), 0.0)

    torch.autograd.gradcheck(function, (q, k, v))


def test_backward_in_chunks_of_heads(monkeypatch):
    q, k, v = make((2, 30, 40, 6, 3, 16, 8), torch.float32)
    mask = torch.rand(2, 6, 30, 40) > 0.2
    settings = {"causal": True, "window": (9, 0), "softmax_scale": 0.2, "mask": mask}
    options = AttentionOptions(**settings)
    out, lse = attention_reference(q, k, v, options)
    args = (torch.randn_like(out), torch.randn_like(lse), q, k, v, out, lse, options)
    whole = attention_backward_reference(*args)
    monkeypatch.setattr("tpweave.reference.ops.attention._CHUNK_ELEMENTS", 1)
    for a, b in zip(whole[:3], attention_backward_reference(*args)[:3], strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("with_mask", [False, True])
def test_opcheck_and_compile(with_mask):
    q, k, v = (x.requires_grad_() for x in make((2, 20, 24, 4, 2, 16, 8), torch.float32))
    mask = make_mask("padding", 2, 24) if with_mask else None
    four = None if mask is None else mask[:, None, None]
    torch.library.opcheck(
        torch.ops.tpweave.attention.default,
        (q, k, v, four, None, None, None, None, True, -1, -1, 0, 0.25, 0.0, 0.0, 0, None),
    )

    def function(q, k, v):
        return tpweave.attention(q, k, v, causal=True, mask=mask, return_lse=True)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    got, want = compiled(q, k, v), function(q, k, v)
    got_grads, want_grads = (torch.autograd.grad(out.sum(), (q, k, v)) for out, _ in (got, want))
    for a, b in zip((*got, *got_grads), (*want, *want_grads), strict=True):
        assert torch.equal(a, b)


def test_head_dims_beyond_the_kernel_run_the_reference():
    wide = [torch.randn(1, 4, 1, 513) for _ in range(3)]
    assert tpweave.explain("attention", *wide).chosen == "reference"
    with pytest.raises(BackendUnavailableError, match="513"):
        tpweave.attention(*wide, backend="cpu")


Q, K, V = (torch.zeros(2, 8, 4, 16), torch.zeros(2, 9, 2, 16), torch.zeros(2, 9, 2, 16))


@pytest.mark.parametrize(
    ("call", "seen"),
    [
        (lambda: tpweave.attention(Q[0], K, V), r"q has shape \(8, 4, 16\).*4 dims"),
        (lambda: tpweave.attention(Q, K.half(), V), r"k is torch.float16, q is torch.float32"),
        (lambda: tpweave.attention(Q.long(), K.long(), V.long()), "int64"),
        (lambda: tpweave.attention(Q, K.to("meta"), V), "k is on meta, q on cpu"),
        (lambda: tpweave.attention(Q, K[:1], V[:1]), "batch 2"),
        (lambda: tpweave.attention(Q, K[..., :8], V), "head dim 16"),
        (lambda: tpweave.attention(Q, K, V[:, :8]), r"must begin \(2, 9, 2\)"),
        (lambda: tpweave.attention(Q[:, :, :3], K, V), "3 query heads on 2 KV heads"),
        (lambda: tpweave.attention(Q, K[:, :, :0], V[:, :, :0]), "4 query heads on 0 KV heads"),
        (lambda: tpweave.attention(Q[..., :0], K[..., :0], V), "head dim must be at least 1"),
        (lambda: tpweave.attention(Q, K, V, window=(-2, 0)), r"window is \(-2, 0\)"),
        (lambda: tpweave.attention(Q, K, V, mask=torch.zeros(2, 9)), "mask is torch.float32"),
        (lambda: tpweave.attention(Q, K, V, mask=torch.zeros(2, 8) > 0), r"\(2, 8\).*\(2, 9\).*\(2, 4, 8, 9\)"),
        (lambda: tpweave.attention(Q, K, V, mask=torch.zeros(2, 3, 8, 9) > 0), r"\(2, 3, 8, 9\)"),
        (lambda: tpweave.attention(Q, K, V, backend="nope"), "no backend 'nope'"),
    ],
)
def test_bad_input_names_the_values(call, seen):
    with pytest.raises(ValueError, match=seen):
        call()
