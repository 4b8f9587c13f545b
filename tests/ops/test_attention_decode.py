"""attention_decode: every row of its table against float64, over contiguous and paged caches, appended to or not."""

import pytest
import torch

import tpweave
from tpweave.ops.attention_decode import ATTENTION_DECODE
from tpweave.testing import assert_accurate
from tpweave.verification import DTYPES

pytestmark = pytest.mark.usefixtures("one_thread")

BACKENDS = [row.name for row in ATTENTION_DECODE.backends if row.name != "triton"]


def make(
    dtype=torch.float32, batch=2, queries=1, heads=4, kv_heads=2, depth=16, depth_v=None, capacity=150, new=0,
    lengths=None, cache_dtype=None, seed=0,
):  # fmt: skip
    """q, caches and keywords of a call on a contiguous cache with room for `new` keys."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    depth_v = depth if depth_v is None else depth_v
    q = normal(batch, queries, heads, depth)
    caches = [normal(batch, capacity, kv_heads, d) for d in (depth, depth_v)]
    if lengths is None:
        lengths = torch.randint(0, capacity - new + 1, (batch,), generator=generator)
    keywords = {"cache_seqlens": torch.as_tensor(lengths, dtype=torch.int32)}
    if new:
        keywords |= {"k_new": normal(batch, new, kv_heads, depth), "v_new": normal(batch, new, kv_heads, depth_v)}
    if cache_dtype is not None:
        for i, name in enumerate(("k_scale", "v_scale")):
            scale = torch.rand(batch, kv_heads, generator=generator) * 0.01 + 0.02
            codes = caches[i].float() / scale[:, None, :, None]
            caches[i] = (codes.round().clamp(-128, 127) if cache_dtype == torch.int8 else codes).to(cache_dtype)
            keywords[name] = scale
    return q, *caches, keywords


def paged(k_cache, v_cache, page_size, spare=3):
    """The same keys in pages that lie about in another order, and their block table."""
    batch, capacity = k_cache.shape[:2]
    pages = -(-capacity // page_size)
    order = torch.randperm(batch * pages + spare)[: batch * pages].view(batch, pages)
    stores = []
    for x in (k_cache, v_cache):
        # What lies in no sequence is never read.
        store = torch.full((batch * pages + spare, page_size, *x.shape[2:]), float("nan")).to(x.dtype)
        for b in range(batch):
            for i in range(pages):
                part = x[b, i * page_size : (i + 1) * page_size]
                store[order[b, i], : part.shape[0]] = part
        stores.append(store)
    return *stores, order.int()


def turned(x, angles, positions, interleaved):
    """x [S, H, D] with its first pairs turned as complex numbers."""
    half = angles.shape[1]
    rotary, rest = x[..., : 2 * half].double(), x[..., 2 * half :].double()
    pairs = rotary.unflatten(-1, (half, 2)) if interleaved else torch.stack(rotary.chunk(2, -1), -1)
    spun = torch.view_as_complex(pairs.contiguous()) * torch.polar(torch.ones_like(angles), angles)[positions, None].to(
        torch.complex128
    )
    spun = torch.view_as_real(spun)
    rotary = spun.flatten(-2) if interleaved else torch.cat((spun[..., 0], spun[..., 1]), -1)
    return torch.cat((rotary, rest), -1)


def plain(
    q, k_cache, v_cache, *, cache_seqlens, k_new=None, v_new=None, angles=None, rotary_interleaved=False,
    cache_batch_idx=None, cache_leftpad=None, k_scale=None, v_scale=None, causal=False, window=(-1, -1), chunk=0,
    softmax_scale=None, softcap=0.0, alibi_slopes=None, sinks=None, dtype=torch.float64, **_,
):  # fmt: skip
    """Written by hand for a contiguous cache, in `dtype`: out and lse. The cache is not touched."""
    outs, lses = [], []
    for b in range(q.shape[0]):
        entry = b if cache_batch_idx is None else int(cache_batch_idx[b])
        length, first = int(cache_seqlens[b]), 0 if cache_leftpad is None else int(cache_leftpad[b])
        k, v, row_q = k_cache[entry, :length].double(), v_cache[entry, :length].double(), q[b].double()
        if k_scale is not None:
            k, v = k * k_scale[b, :, None], v * v_scale[b, :, None]
        if k_new is not None:
            row_k = k_new[b].double()
            if angles is not None:
                at = length + torch.arange(max(len(row_q), len(row_k)))
                local = causal or max(window) >= 0
                q_at = at[: len(row_q)] if local else at[:1].expand(len(row_q))
                row_q = turned(row_q, angles, q_at, rotary_interleaved)
                row_k = turned(row_k, angles, at[: len(row_k)], rotary_interleaved)
            k, v = torch.cat((k, row_k)), torch.cat((v, v_new[b].double()))
        group = q.shape[2] // k.shape[1]
        k, v = (x[first:].repeat_interleave(group, 1).to(dtype) for x in (k, v))
        keys, queries = len(k), len(row_q)
        scale = q.shape[3] ** -0.5 if softmax_scale is None else softmax_scale
        x = torch.einsum("ihd,jhd->hij", row_q.to(dtype), k) * scale
        if softcap:
            x = softcap * torch.tanh(x / softcap)
        p, j = torch.arange(queries)[:, None] + keys - queries, torch.arange(keys)
        if alibi_slopes is not None:
            slopes = alibi_slopes if alibi_slopes.dim() == 1 else alibi_slopes[b]
            x = x - (slopes[:, None, None] * (p - j).abs()).to(dtype)
        right = 0 if causal else window[1]
        hidden = torch.zeros(queries, keys, dtype=torch.bool)
        hidden |= (j < p - window[0]) if window[0] >= 0 else False
        hidden |= (j > p + right) if right >= 0 else False
        if chunk:
            hidden |= j // chunk != torch.div(p, chunk, rounding_mode="floor")
        x = x.masked_fill(hidden, float("-inf"))
        logits = x if sinks is None else torch.cat((x, sinks.to(dtype)[:, None, None].expand(-1, queries, 1)), -1)
        lse = torch.logsumexp(logits, -1) if logits.shape[-1] else x.new_full(x.shape[:2], float("-inf"))
        weights = torch.exp(x - lse[..., None]).masked_fill(hidden, 0.0)
        outs.append(torch.einsum("hij,jhd->ihd", weights, v))
        lses.append(lse)
    return torch.stack(outs), torch.stack(lses)


def check(q, k_cache, v_cache, keywords, backend, angles=None):
    """Compares one call with the oracle. Returns the caches as the call left them."""
    if angles is not None:
        tables = {"rotary_cos": angles.cos().to(q.dtype), "rotary_sin": angles.sin().to(q.dtype)}
        # The oracle turns by the angles of the rounded tables as nearly as an angle can say it.
        angles = torch.atan2(tables["rotary_sin"].double(), tables["rotary_cos"].double())
    else:
        tables = {}
    want, want_lse = plain(q, k_cache, v_cache, angles=angles, **keywords)
    # In fp16 the scores of large inputs overflow; elsewhere the whole computation is in the dtype.
    plain_dtype = torch.float32 if q.dtype == torch.float16 else q.dtype
    same, _ = plain(q, k_cache, v_cache, angles=angles, dtype=plain_dtype, **keywords)
    same = same.to(q.dtype)
    caches = k_cache.clone(), v_cache.clone()
    out, lse = tpweave.attention_decode(q, *caches, **keywords, **tables, return_lse=True, backend=backend)
    assert out.dtype == q.dtype and out.is_contiguous() and lse.dtype == torch.float32
    # Tables in half precision are not exactly on the circle; keys are stored rounded after turning.
    loose = {} if q.dtype == torch.float32 or angles is None else {"eps": 2e-2}
    assert_accurate(out, want, same, **loose)
    assert torch.equal(torch.isneginf(lse), torch.isneginf(want_lse))
    seen = ~torch.isneginf(want_lse)
    tolerance = 1e-5 if q.dtype == torch.float32 else 3e-2 if angles is not None else 3e-3
    torch.testing.assert_close(lse[seen].double(), want_lse[seen], rtol=1e-5, atol=tolerance)
    return caches


# sizes of make(), keywords of the call
CASES = {
    "one query": ({}, {}),
    "two blocks and a bit, group 3": ({"heads": 6, "capacity": 131, "lengths": [131, 64]}, {}),
    "group 7": ({"heads": 7, "kv_heads": 1, "depth": 64}, {}),
    "group 8, wide values": ({"heads": 8, "kv_heads": 1, "depth": 40, "depth_v": 72}, {}),
    "multi-head": ({"heads": 3, "kv_heads": 3, "depth": 128, "batch": 1, "lengths": [150]}, {}),
    "odd dims": ({"depth": 33, "depth_v": 13}, {}),
    "narrow": ({"depth": 3, "depth_v": 1}, {}),
    "widest": ({"depth": 576, "depth_v": 512, "heads": 5, "kv_heads": 1, "capacity": 70}, {}),
    "empty sequence": ({"lengths": [0, 3]}, {}),
    "speculative": ({"queries": 5, "heads": 6, "lengths": [150, 3]}, {"causal": True}),
    "many queries": ({"queries": 40, "heads": 4, "lengths": [150, 17]}, {"causal": True, "softmax_scale": 0.4}),
    "window": ({"queries": 3, "lengths": [140, 9]}, {"window": (20, 1)}),
    "window far from the end": ({"queries": 2, "lengths": [150, 150]}, {"window": (5, 0), "causal": True}),
    "right window only": ({"queries": 4}, {"window": (-1, 2)}),
    "chunk": ({"queries": 4, "lengths": [101, 64]}, {"chunk": 50, "causal": True}),
    "softcap": ({}, {"softcap": 1.5}),
    "alibi": ({"queries": 2}, {"alibi_slopes": torch.tensor([0.1, 0.0, 0.5, 0.02])}),
    "alibi of each entry": ({"queries": 2}, {"alibi_slopes": torch.rand(2, 4), "causal": True}),
    "sinks": ({"lengths": [0, 90]}, {"sinks": torch.tensor([0.5, -1.0, 3.0, float("-inf")])}),
    "left padding": ({"queries": 2, "lengths": [150, 120]}, {"cache_leftpad": torch.tensor([70, 120]).int()}),
    "left padding and chunk": (
        {"queries": 2, "lengths": [150, 120]},
        {"cache_leftpad": torch.tensor([70, 3]).int(), "chunk": 32, "causal": True},
    ),
    "entries": ({"lengths": [150, 20]}, {"cache_batch_idx": torch.tensor([1, 0]).int()}),
    "negative scale": ({}, {"softmax_scale": -0.3}),
    "everything": (
        {"queries": 3, "lengths": [100, 149]},
        {"window": (90, 3), "softcap": 2.0, "alibi_slopes": torch.rand(4) * 0.1, "sinks": torch.randn(4),
         "cache_leftpad": torch.tensor([3, 77]).int(), "num_splits": 3},
    ),
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES)
def test_matches_float64(isa, case, backend, dtype):
    sizes, options = CASES[case]
    q, k, v, keywords = make(dtype, **sizes)
    check(q, k, v, keywords | options, backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("page_size", [1, 7, 16, 64, 256])
def test_pages_are_equal_to_contiguous(isa, backend, dtype, page_size):
    q, k, v, keywords = make(dtype, queries=2, heads=6, depth=40, new=3, lengths=[147, 61])
    k_pages, v_pages, table = paged(k, v, page_size)
    for splits in (0, 1, 2):
        call = keywords | {"num_splits": splits, "return_lse": True, "backend": backend, "causal": True}
        want = tpweave.attention_decode(q, k, v, **call)
        got = tpweave.attention_decode(q, k_pages, v_pages, block_table=table, **call)
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a, b)
    for b in range(2):
        length = int(keywords["cache_seqlens"][b]) + 3
        for pages, whole in ((k_pages, k), (v_pages, v)):
            assert torch.equal(pages[table[b].long()].flatten(0, 1)[:length], whole[b, :length])


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("new", [1, 4])
def test_appended_keys_are_read_back(isa, backend, dtype, new):
    q, k, v, keywords = make(dtype, queries=new, new=new, lengths=[20, 0], depth=24, depth_v=40)
    k[:, 30:] = v[:, 30:] = float("nan")
    before = k.clone(), v.clone()
    got_k, got_v = check(q, k, v, keywords | {"causal": True}, backend)
    for b, length in enumerate((20, 0)):
        for got, old, name in ((got_k, before[0], "k_new"), (got_v, before[1], "v_new")):
            old[b, length : length + new] = keywords[name][b]
            assert torch.equal(got[b].view(torch.int8), old[b].view(torch.int8))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": (30, 2)}], ids=["full", "causal", "window"])
def test_rotary(isa, backend, dtype, interleaved, options):
    angles = torch.rand(200, 7).double() * 6
    for queries, new in ((1, 1), (3, 3), (4, 2)):
        q, k, v, keywords = make(dtype, queries=queries, new=new, depth=20, lengths=[140, 5])
        got_k, got_v = check(q, k, v, keywords | options | {"rotary_interleaved": interleaved}, backend, angles)
        for b, length in enumerate((140, 5)):
            at = slice(length, length + new)
            assert torch.equal(got_v[b, at], keywords["v_new"][b])
            want = turned(keywords["k_new"][b], angles, torch.arange(length, length + new), interleaved)
            tolerance = 1e-5 if dtype == torch.float32 else 3e-2
            torch.testing.assert_close(got_k[b, at].double(), want, rtol=tolerance, atol=tolerance)
            assert torch.equal(got_k[b, at, :, 14:], keywords["k_new"][b, :, :, 14:])
            got_k[b, at] = k[b, at]
        assert torch.equal(got_k, k)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cache_dtype", [torch.int8, torch.float8_e4m3fn], ids=["int8", "fp8"])
@pytest.mark.parametrize("depth", [16, 64, 33])
def test_caches_of_codes(isa, backend, dtype, cache_dtype, depth):
    q, k, v, keywords = make(dtype, queries=3, heads=8, depth=depth, cache_dtype=cache_dtype, lengths=[150, 77])
    check(q, k, v, keywords, backend)
    q, k, v, keywords = make(dtype, new=2, depth=depth, cache_dtype=cache_dtype, lengths=[148, 7])
    keywords["v_new"][0, 0, 0, 0], keywords["v_new"][0, 0, 0, 1] = 1e3, -1e3
    got = [x.clone() for x in (k, v)]
    tpweave.attention_decode(q, *got, **keywords, backend=backend)
    for b, length in enumerate((148, 7)):
        for cache, old, new, scale in zip(got, (k, v), ("k_new", "v_new"), ("k_scale", "v_scale"), strict=True):
            codes = keywords[new][b].float() / keywords[scale][b, :, None]
            limit = 127 if cache_dtype == torch.int8 else 448
            codes = codes.clamp(-limit - (limit == 127), limit)
            want = (codes.round() if cache_dtype == torch.int8 else codes).to(cache_dtype)
            assert torch.equal(cache[b, length : length + 2].view(torch.int8), want.view(torch.int8))
            cache[b, length : length + 2] = old[b, length : length + 2]
            assert torch.equal(cache[b].view(torch.int8), old[b].view(torch.int8))


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_code_of_float8(isa, backend):
    codes = torch.arange(256, dtype=torch.int16).to(torch.uint8).view(torch.float8_e4m3fn)
    codes = codes[~torch.isnan(codes.float())]
    k = torch.zeros(1, len(codes), 1, 1).to(torch.float8_e4m3fn)
    v = codes.view(1, -1, 1, 1)
    # One key sees all of the weight.
    for key in range(len(codes)):
        out = tpweave.attention_decode(
            torch.zeros(1, 1, 1, 1), k, v, cache_seqlens=key + 1, cache_leftpad=torch.tensor([key]), backend=backend
        )
        # A weight of one may be an ulp off, which the division takes out again but for its rounding.
        assert out.item() == pytest.approx(codes[key].float().item(), rel=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_scales_of_any_shape(isa, backend):
    q, k, v, keywords = make(cache_dtype=torch.int8, lengths=[150, 77])
    del keywords["k_scale"], keywords["v_scale"]
    heads = torch.tensor([0.03, 0.05])
    for scale, wide in ((0.04, torch.full((2, 2), 0.04)), (torch.tensor([0.04]), torch.full((2, 2), 0.04)),
                        (heads, heads.expand(2, 2)), (None, torch.ones(2, 2))):  # fmt: skip
        got, want = (
            tpweave.attention_decode(q, k, v, k_scale=x, v_scale=x, backend=backend, **keywords) for x in (scale, wide)
        )
        assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("backend", BACKENDS)
def test_values_may_be_part_of_the_keys(isa, backend, dtype):
    q, k, _, keywords = make(dtype, heads=8, kv_heads=1, depth=72, new=1, lengths=[140, 66])
    keywords["v_new"] = keywords["k_new"][..., :64]
    want, _ = plain(q, k, k[..., :64], **keywords)
    same, _ = plain(q, k, k[..., :64], dtype=dtype, **keywords)
    got = tpweave.attention_decode(q, k, k[..., :64], backend=backend, **keywords)
    assert_accurate(got, want, same)
    assert torch.equal(k[0, 140], keywords["k_new"][0, 0]) and torch.equal(k[1, 66], keywords["k_new"][1, 0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_strides(isa, backend):
    q, k, v, keywords = make(queries=3, new=2, lengths=[100, 31])
    want = tpweave.attention_decode(q, k.clone(), v.clone(), backend=backend, **keywords)
    merged = torch.cat((k, v), -1).transpose(1, 2).contiguous().transpose(1, 2)
    headed = q.transpose(1, 2).contiguous().transpose(1, 2)
    spread = {name: torch.stack((keywords[name],) * 2, -1).flatten(-2)[..., ::2] for name in ("k_new", "v_new")}
    got = tpweave.attention_decode(headed, merged[..., :16], merged[..., 16:], backend=backend, **(keywords | spread))
    assert torch.equal(got, want)
    assert torch.equal(merged[0, 100:102, :, 16:], keywords["v_new"][0])
    sparse = torch.stack((q, q), -1).flatten(-2)[..., ::2]
    assert torch.equal(tpweave.attention_decode(sparse, k.clone(), v.clone(), backend=backend, **keywords), want)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sizes", [{"batch": 0}, {"queries": 0}, {"capacity": 0}, {"heads": 0}], ids=str)
def test_empty(isa, backend, sizes):
    q, k, v, keywords = make(**sizes)
    out, lse = tpweave.attention_decode(q, k, v, return_lse=True, backend=backend, **keywords)
    assert torch.equal(out, torch.zeros_like(q)) and torch.isneginf(lse).all()


def test_lengths_in_any_form():
    q, k, v, _ = make(capacity=90)
    want = tpweave.attention_decode(q, k, v, cache_seqlens=torch.tensor([90, 90], dtype=torch.int32))
    assert torch.equal(tpweave.attention_decode(q, k, v), want)
    assert torch.equal(tpweave.attention_decode(q, k, v, cache_seqlens=90), want)
    assert torch.equal(tpweave.attention_decode(q, k, v, cache_seqlens=torch.tensor([90, 90])), want)
    k_pages, v_pages, table = paged(k, v, 30)
    assert torch.equal(tpweave.attention_decode(q, k_pages, v_pages, block_table=table), want)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("splits", [1, 2, 5, 64])
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])
def test_bits_do_not_depend_on_the_batch_nor_on_threads(isa, backend, dtype, splits):
    q, k, v, keywords = make(dtype, batch=5, queries=2, heads=6, capacity=700, lengths=[700, 3, 650, 0, 129])
    together = tpweave.attention_decode(q, k, v, num_splits=splits, backend=backend, return_lse=True, **keywords)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for b in range(5):
            one = slice(b, b + 1)
            alone = tpweave.attention_decode(
                q[one], k[one], v[one], cache_seqlens=keywords["cache_seqlens"][one], num_splits=splits,
                backend=backend, return_lse=True,
            )  # fmt: skip
            for a, all_of_it in zip(alone, together, strict=True):
                assert torch.equal(a[0], all_of_it[b])


@pytest.mark.parametrize("backend", BACKENDS)
def test_repeats_are_bit_equal(isa, backend):
    q, k, v, keywords = make(torch.bfloat16, batch=3, heads=8, capacity=1100, lengths=[1100, 30, 999])
    first = tpweave.attention_decode(q, k, v, backend=backend, return_lse=True, **keywords)
    for threads in (1, 2, 3, 3):
        torch.set_num_threads(threads)
        again = tpweave.attention_decode(q, k, v, backend=backend, return_lse=True, **keywords)
        for a, b in zip(first, again, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("backend", BACKENDS)
def test_extreme_inputs(isa, backend, dtype):
    q, k, v, keywords = make(dtype, batch=1, lengths=[150], depth=64)
    large = {"softmax_scale": 1e-8}
    check((q.float() * 1e4).to(dtype), (k.float() * 1e4).to(dtype), v, keywords | large, backend)
    out = tpweave.attention_decode(q * 1e4, k * 1e4, v * 1e4, backend=backend, **keywords)
    assert torch.isfinite(out).all()
    # Rising and falling scores: the running maximum grows at every block, or never.
    for sign in (1, -1):
        rising = (sign * torch.arange(150.0) / 2).view(1, 150, 1, 1).expand(1, 150, 2, 64).to(dtype).contiguous()
        check(torch.ones(1, 1, 4, 64).to(dtype) / 64, rising, v, keywords | {"softmax_scale": 1.0}, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_stays_where_it_belongs(isa, backend):
    q, k, v, keywords = make(torch.bfloat16, lengths=[100, 60], depth=72)
    keywords["cache_leftpad"] = torch.tensor([9, 0], dtype=torch.int32)
    clean = tpweave.attention_decode(q, k, v, backend=backend, **keywords)
    for x in (k, v):
        x[0, 100:] = x[1, 60:] = x[0, :9] = float("nan")
    assert torch.equal(tpweave.attention_decode(q, k, v, backend=backend, **keywords), clean)
    q[0, 0, 1] = float("nan")
    out, lse = tpweave.attention_decode(q, k, v, backend=backend, return_lse=True, **keywords)
    assert torch.isnan(out[0, 0, 1]).all() and torch.isnan(lse[0, 1]).all()
    assert torch.equal(out[1], clean[1]) and torch.equal(out[0, 0, [0, 2, 3]], clean[0, 0, [0, 2, 3]])


@pytest.mark.parametrize("backend", BACKENDS)
def test_last_of_sequences_that_append_to_one_place_wins(backend):
    q, k, v, keywords = make(new=1, lengths=[5, 5])
    tpweave.attention_decode(q, k, v, cache_batch_idx=torch.tensor([1, 1]), backend=backend, **keywords)
    assert torch.equal(k[1, 5], keywords["k_new"][1, 0]) and torch.equal(v[1, 5], keywords["v_new"][1, 0])


TRITON_CASES = {
    "one query": ({"heads": 6}, {}),
    "speculative": ({"queries": 5, "heads": 6, "lengths": [150, 3]}, {"causal": True, "num_splits": 2}),
    "latent": ({"depth": 576, "depth_v": 512, "heads": 5, "kv_heads": 1, "capacity": 70}, {}),
    "int8": ({"cache_dtype": torch.int8}, {"num_splits": 2}),
    "float8": ({"cache_dtype": torch.float8_e4m3fn}, {}),
    "everything": CASES["everything"],
}


@pytest.mark.parametrize("case", TRITON_CASES)
def test_triton_in_the_interpreter(case):
    pytest.importorskip("triton")
    sizes, options = TRITON_CASES[case]
    q, k, v, keywords = make(**sizes)
    check(q, k, v, keywords | options, "triton")


def test_triton_appends_in_the_interpreter():
    pytest.importorskip("triton")
    angles = torch.rand(200, 7).double() * 6
    for interleaved in (False, True):
        q, k, v, keywords = make(queries=3, new=2, depth=20, lengths=[140, 5])
        options = {"causal": True, "rotary_interleaved": interleaved}
        got_k, got_v = check(q, k, v, keywords | options, "triton", angles)
        for b, length in enumerate((140, 5)):
            at = slice(length, length + 2)
            want = turned(keywords["k_new"][b], angles, torch.arange(length, length + 2), interleaved)
            torch.testing.assert_close(got_k[b, at].double(), want, rtol=1e-5, atol=1e-5)
            assert torch.equal(got_v[b, at], keywords["v_new"][b])
            got_k[b, at], got_v[b, at] = k[b, at], v[b, at]
        assert torch.equal(got_k, k) and torch.equal(got_v, v)
    test_last_of_sequences_that_append_to_one_place_wins("triton")


def test_triton_reads_pages_and_splits_by_a_sequence_alone():
    pytest.importorskip("triton")
    q, k, v, keywords = make(batch=2, queries=2, new=3, lengths=[147, 61])
    k_pages, v_pages, table = paged(k, v, 7)
    call = keywords | {"num_splits": 3, "backend": "triton", "causal": True}
    want = tpweave.attention_decode(q, k, v, **call)
    assert torch.equal(tpweave.attention_decode(q, k_pages, v_pages, block_table=table, **call), want)
    second = {name: x[1:] if torch.is_tensor(x) else x for name, x in call.items()}
    assert torch.equal(tpweave.attention_decode(q[1:], k[1:], v[1:], **second), want[1:])


def test_opcheck_and_compile():
    q, k, v, keywords = make(new=2, lengths=[40, 7])
    angles = torch.rand(60, 4)

    def arguments():
        return (
            q, k.clone(), v.clone(), keywords["k_new"], keywords["v_new"], angles.cos(), angles.sin(), False,
            keywords["cache_seqlens"], None, None, None, None, None, 0, True, -1, -1, 0, 0.25, 0.0, None, None, None,
        )  # fmt: skip

    torch.library.opcheck(torch.ops.tpweave.attention_decode.default, arguments())

    def step(q, k, v, k_new, v_new, lengths):
        out = tpweave.attention_decode(q, k, v, k_new=k_new, v_new=v_new, cache_seqlens=lengths, return_lse=True)
        return *out, k[:, 40].sum()

    call = (keywords["k_new"], keywords["v_new"], keywords["cache_seqlens"])
    caches = [(k.clone(), v.clone()) for _ in range(2)]
    got = torch.compile(step, fullgraph=True, backend="aot_eager")(q, *caches[0], *call)
    want = step(q, *caches[1], *call)
    for a, b in zip((*got, *caches[0]), (*want, *caches[1]), strict=True):
        assert torch.equal(a, b)


def test_inference_mode():
    with torch.inference_mode():
        q, k, v, keywords = make(new=1, lengths=[4, 5])
        tpweave.attention_decode(q, k, v, **keywords)
    assert torch.equal(k[0, 4], keywords["k_new"][0, 0])


def test_autograd_knows_that_the_cache_changed():
    q, k, v, keywords = make(new=1, lengths=[4, 5])
    weight = torch.ones(16, requires_grad=True)
    kept = (weight * k).sum()
    tpweave.attention_decode(q, k, v, **keywords)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kept.backward()


Q, K, V = torch.zeros(2, 1, 4, 16), torch.zeros(2, 9, 2, 16), torch.zeros(2, 9, 2, 16)
NEW = torch.ones(2, 1, 2, 16)
TABLE = torch.tensor([[0, 1], [1, 5]], dtype=torch.int32)
COS = torch.ones(9, 4)


@pytest.mark.parametrize("backend", [*BACKENDS, None])
@pytest.mark.parametrize(
    ("keywords", "seen"),
    [
        ({"cache_seqlens": 10}, r"cache_seqlens\[0\] is 10.*0 to 9"),
        ({"cache_seqlens": torch.tensor([3, -1])}, r"cache_seqlens\[1\] is -1"),
        ({"cache_seqlens": torch.tensor([3, 2**33])}, r"cache_seqlens\[1\] is 2147483647"),
        ({"cache_seqlens": 9, "k_new": NEW, "v_new": NEW}, r"cache_seqlens\[0\] is 9, and 1 new keys"),
        ({"cache_batch_idx": torch.tensor([0, 2])}, r"cache_batch_idx\[1\] is 2.*0 to 1"),
        ({"cache_batch_idx": torch.tensor([-1, 0])}, r"cache_batch_idx\[0\] is -1"),
        ({"cache_leftpad": torch.tensor([0, 10])}, r"cache_leftpad\[1\] is 10; the sequence has 9 keys"),
        ({"block_table": TABLE, "cache_seqlens": 10}, r"block_table\[1, 1\] is 5.*pages 0 to 1"),
        ({"block_table": -TABLE, "cache_seqlens": 10}, r"block_table\[0, 1\] is -1"),
        ({"block_table": TABLE, "cache_seqlens": 19}, r"0 to 18"),
        (
            {"k_new": NEW, "v_new": NEW, "cache_seqlens": 8, "rotary_cos": COS[:8], "rotary_sin": COS[:8]},
            r"cache_seqlens\[0\] is 8, and 1 positions are turned; rotary_cos has 8",
        ),
    ],
)
def test_bad_values_leave_the_cache_alone(backend, keywords, seen):
    k, v = K.clone(), V.clone()
    new = {"k_new": NEW[:, :0], "v_new": NEW[:, :0]}
    with pytest.raises(ValueError, match=seen):
        tpweave.attention_decode(Q, k, v, **({"cache_seqlens": 9} | new | keywords), backend=backend)
    assert not k.any() and not v.any()


@pytest.mark.parametrize(
    ("call", "seen"),
    [
        (lambda: tpweave.attention_decode(Q[0], K, V), r"q has shape \(1, 4, 16\)"),
        (lambda: tpweave.attention_decode(Q, K.half(), V), "k_cache is torch.float16, v_cache torch.float32"),
        (lambda: tpweave.attention_decode(Q.long(), K.long(), V.long()), "q is torch.int64"),
        (lambda: tpweave.attention_decode(Q, K.to("meta"), V), "k_cache is on meta"),
        (lambda: tpweave.attention_decode(Q, K[:1], V[:1]), "holds 1 sequences, q 2"),
        (lambda: tpweave.attention_decode(Q, K[..., :8], V), "head dim 16"),
        (lambda: tpweave.attention_decode(Q, K, V[:, :8]), r"must begin \(2, 9, 2\)"),
        (lambda: tpweave.attention_decode(Q[:, :, :3], K, V), "3 query heads on 2 KV heads"),
        (lambda: tpweave.attention_decode(Q, K[:, :, :0], V[:, :, :0]), "4 query heads on 0 KV heads"),
        (lambda: tpweave.attention_decode(Q, K.transpose(1, 3).contiguous().transpose(1, 3), V), "must be dense"),
        (lambda: tpweave.attention_decode(Q, K, V, k_new=NEW), "both or none"),
        (lambda: tpweave.attention_decode(Q, K, V, k_new=NEW.half(), v_new=NEW), "float16 and torch.float32"),
        (lambda: tpweave.attention_decode(Q, K, V, k_new=NEW, v_new=NEW[..., :8]), r"v_new has shape \(2, 1, 2, 8\)"),
        (lambda: tpweave.attention_decode(Q, K, V, rotary_cos=COS, rotary_sin=COS), "k_new .* not given"),
        (lambda: tpweave.attention_decode(Q, K, V, rotary_cos=COS), "None"),
        (
            lambda: tpweave.attention_decode(
                Q, K, V, k_new=NEW, v_new=NEW, rotary_cos=torch.ones(9, 9), rotary_sin=torch.ones(9, 9)
            ),
            r"\(9, 9\).*head dim 16",
        ),
        (lambda: tpweave.attention_decode(Q, K, V, window=(-2, 0)), r"window is \(-2, 0\)"),
        (lambda: tpweave.attention_decode(Q, K, V, num_splits=-1), "num_splits is -1"),
        (lambda: tpweave.attention_decode(Q, K, V, cache_seqlens=torch.ones(2)), "cache_seqlens is torch.float32"),
        (lambda: tpweave.attention_decode(Q, K, V, cache_seqlens=torch.ones(3).int()), r"cache_seqlens .* \(3,\)"),
        (lambda: tpweave.attention_decode(Q, K, V, block_table=torch.ones(2).int()), r"block_table .*\[2, max_pages\]"),
        (
            lambda: tpweave.attention_decode(Q, K, V, block_table=TABLE, cache_batch_idx=torch.tensor([0, 1])),
            "give one",
        ),
        (lambda: tpweave.attention_decode(Q, K, V, k_scale=1.0), "k_scale is given, but the cache is torch.float32"),
        (
            lambda: tpweave.attention_decode(Q, K.to(torch.int8), V.to(torch.int8), v_scale=torch.ones(3)),
            r"v_scale is torch.float32 \(3,\)",
        ),
        (lambda: tpweave.attention_decode(Q, K, V, sinks=torch.ones(3)), r"sinks .* \(3,\)"),
        (lambda: tpweave.attention_decode(Q, K, V, backend="nope"), "no backend 'nope'"),
    ],
)
def test_bad_input_names_the_values(call, seen):
    with pytest.raises(ValueError, match=seen):
        call()
