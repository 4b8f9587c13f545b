"""The native kernel with every option, on every instruction set, against float64; its bits; bad tables."""

import functools

import pytest
import torch

import tpweave
from tpweave.dispatch import Inputs
from tpweave.native import _C
from tpweave.ops.attention import ATTENTION
from tpweave.ops.attention_problem import native_problem
from tpweave.reference.ops.attention import AttentionOptions, attention_reference, dropout_keep, visible_keys
from tpweave.testing import assert_accurate

pytestmark = pytest.mark.usefixtures("one_thread")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]

# name: (B, Sq, Sk, Hq, Hkv, D, Dv), options; what stands as a shape becomes a tensor of it
CASES = {
    "chunk": ((1, 150, 150, 2, 1, 32, 32), {"chunk": 40, "causal": True}),
    "chunk, more queries than keys": ((1, 90, 70, 2, 2, 16, 16), {"chunk": 33}),
    "softcap": ((2, 70, 131, 4, 2, 64, 64), {"softcap": 2.0, "causal": True}),
    "small softcap": ((1, 70, 70, 1, 1, 64, 64), {"softcap": 0.3, "softmax_scale": -0.4}),
    "large softcap": ((1, 70, 70, 1, 1, 64, 64), {"softcap": 300.0}),
    "alibi": ((2, 140, 200, 4, 2, 32, 32), {"alibi_slopes": (4,)}),
    "alibi of batch": ((2, 70, 60, 3, 1, 59, 20), {"alibi_slopes": (2, 3), "window": (50, 9)}),
    "sinks": ((2, 70, 70, 4, 2, 64, 64), {"sinks": (4,), "window": (20, 0)}),
    "sinks, keys hidden": ((1, 50, 20, 2, 1, 32, 32), {"sinks": (2,), "causal": True}),
    "bias": ((2, 70, 131, 4, 2, 64, 64), {"bias": (2, 4, 70, 131)}),
    "bias of heads": ((2, 130, 70, 4, 2, 13, 13), {"bias": (1, 4, 130, 70), "causal": True}),
    "bias of keys": ((2, 70, 70, 2, 2, 32, 32), {"bias": (2, 1, 1, 70)}),
    "bias of queries": ((2, 70, 70, 2, 2, 32, 32), {"bias": (1, 2, 70, 1), "softcap": 3.0}),
    "mask": ((2, 140, 131, 4, 2, 64, 64), {"mask": (2, 4, 140, 131)}),
    "mask of queries": ((2, 140, 200, 3, 1, 32, 32), {"mask": (1, 1, 140, 200), "causal": True}),
    "mask of rows": ((2, 70, 70, 2, 2, 32, 32), {"mask": (2, 1, 70, 1)}),
    "mask of heads": ((1, 70, 70, 4, 2, 32, 32), {"mask": (1, 4, 1, 70)}),
    "dropout": ((2, 70, 131, 4, 2, 64, 64), {"dropout_p": 0.3, "seed": 1 << 40, "causal": True}),
    "dropout of all": ((1, 20, 20, 1, 1, 32, 32), {"dropout_p": 1.0, "seed": 5}),
    "head dim 512": ((1, 70, 70, 2, 1, 512, 512), {"causal": True}),
    "head dims 300 and 400": ((1, 100, 70, 1, 1, 300, 400), {"softcap": 5.0}),
    "keys in parts": ((2, 3, 2100, 4, 2, 24, 80), {"causal": True, "sinks": (4,)}),
    "keys in parts, most unseen": ((1, 9, 3100, 2, 1, 16, 96), {"window": (40, 0), "softcap": 2.0}),
    "everything": ((2, 100, 90, 6, 2, 40, 24), {
        "softcap": 3.0, "alibi_slopes": (6,), "sinks": (6,), "bias": (2, 6, 100, 90), "mask": (2, 1, 100, 90),
        "dropout_p": 0.2, "seed": 3, "window": (60, 30), "head_offset": 2,
    }),
}  # fmt: skip


def make_options(settings, dtype):
    generator = torch.Generator().manual_seed(11)
    options = dict(settings)
    for name in ("alibi_slopes", "sinks", "bias", "mask"):
        if name in options:
            values = torch.randn(options[name], generator=generator)
            options[name] = {
                "alibi_slopes": values.abs() / 8, "sinks": (values + 1).to(dtype), "bias": values.to(dtype),
                "mask": values > -0.5,
            }[name]  # fmt: skip
    if "mask" in options and options["mask"].shape[2] > 64:
        options["mask"][:, :, :70, : options["mask"].shape[3] // 2] = False  # whole tiles too
        options["mask"][0, :, 3] = False
    return options


def as_reference(q, options):
    seed = options.get("seed")
    options = {**options, "seed": None if seed is None else torch.tensor([seed])}
    return AttentionOptions(**{"softmax_scale": q.shape[-1] ** -0.5, **options})


def in_dtype(q, k, v, o):
    """Attention in the inputs' dtype throughout: how far an honest implementation is off."""
    group = q.shape[2] // k.shape[2]
    shape = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
    qh, kh, vh = q.transpose(1, 2), *(x.transpose(1, 2).repeat_interleave(group, 1) for x in (k, v))
    x = qh @ kh.transpose(-1, -2) * o.softmax_scale
    if o.softcap:
        x = o.softcap * torch.tanh(x / o.softcap)
    if o.alibi_slopes is not None:
        distance = (torch.arange(shape[2])[:, None] + shape[3] - shape[2] - torch.arange(shape[3])).abs()
        x = x - (o.alibi_slopes[..., None, None] * distance).to(q.dtype)
    if o.bias is not None:
        x = x + o.bias
    for visible in (visible_keys(shape[2], shape[3], o.causal, o.window, chunk=o.chunk), o.mask):
        if visible is not None:
            x = x.masked_fill(~visible, float("-inf"))
    if o.sinks is not None:
        x = torch.cat([x, o.sinks.view(1, -1, 1, 1).expand(*shape[:3], 1)], -1)
    weights = torch.softmax(x, -1).nan_to_num(0.0)[..., : shape[3]]
    if o.dropout_p:
        keep = dropout_keep(o.seed, o.dropout_p, shape, first_head=o.head_offset)
        weights = weights * keep / (1 - o.dropout_p) if o.dropout_p < 1 else weights * 0
    return (weights @ vh).transpose(1, 2)


def double(options):
    return options._replace(
        **{name: x.double() for name in ("alibi_slopes", "sinks", "bias") if (x := getattr(options, name)) is not None}
    )


@functools.cache
def oracle(case, dtype):
    (batch, queries, keys, heads, kv_heads, depth, depth_v), settings = CASES[case]
    generator = torch.Generator().manual_seed(7)
    sizes = ((batch, queries, heads, depth), (batch, keys, kv_heads, depth), (batch, keys, kv_heads, depth_v))
    q, k, v = (torch.randn(size, generator=generator).to(dtype) for size in sizes)
    options = make_options(settings, dtype)
    reference = as_reference(q, options)
    want, want_lse = attention_reference(q.double(), k.double(), v.double(), double(reference))
    return (q, k, v), options, want, want_lse, in_dtype(q, k, v, reference)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("case", CASES)
def test_options_match_float64(isa, case, dtype):
    inputs, options, want, want_lse, same = oracle(case, dtype)
    assert dict(ATTENTION.supported(Inputs(inputs, **options)))["cpu"] is None
    out, lse = tpweave.attention(*inputs, **options, return_lse=True, backend="cpu")
    assert_accurate(out, want, same)
    assert torch.equal(torch.isneginf(lse), torch.isneginf(want_lse))
    seen = ~torch.isneginf(want_lse)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-4
    torch.testing.assert_close(lse[seen].double(), want_lse[seen], rtol=1e-5, atol=tolerance)
    if options.get("dropout_p") == 1.0:
        assert torch.equal(out, torch.zeros_like(out))


@pytest.mark.parametrize("bias_dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_bias_of_any_dtype_and_stride(isa, bias_dtype):
    q, k, v = (torch.randn(2, 70, 2, 32) for _ in range(3))
    bias = torch.randn(2, 2, 70, 140, dtype=bias_dtype)[..., ::2].transpose(2, 3)
    mask = (torch.randn(2, 2, 70, 140) > 0)[..., 1::2]
    got = tpweave.attention(q, k, v, bias=bias, mask=mask, backend="cpu")
    want = attention_reference(q, k, v, AttentionOptions(32**-0.5, bias=bias, mask=mask))[0]
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"softcap": 4.0}, {"bias": torch.zeros(1, 1, 1, 1)}], ids=str)
def test_infinite_and_missing_scores(isa, options):
    q, k, v = (torch.randn(1, 70, 2, 32) for _ in range(3))
    bias = torch.zeros(1, 2, 70, 70)
    bias[0, 0, 5] = float("-inf")
    bias[0, 1, :, 3:50] = float("-inf")
    out, lse = tpweave.attention(q, k, v, **{**options, "bias": bias}, return_lse=True, backend="cpu")
    want = attention_reference(q, k, v, AttentionOptions(32**-0.5, bias=bias, softcap=options.get("softcap", 0.0)))
    torch.testing.assert_close((out, lse), want, rtol=1e-5, atol=1e-5)
    assert torch.isneginf(lse[0, 0, 5]) and torch.equal(out[0, 5, 0], torch.zeros(32))
    for sinks in (torch.tensor([float("-inf"), 300.0]), torch.tensor([-300.0, 0.0])):
        got = tpweave.attention(q, k, v, bias=bias, sinks=sinks, return_lse=True, backend="cpu")
        want = attention_reference(q, k, v, AttentionOptions(32**-0.5, bias=bias, sinks=sinks))
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_nan_in_a_query_stays_in_its_row(isa):
    q, k, v = (torch.randn(1, 70, 2, 32) for _ in range(3))
    options = {"softcap": 2.0, "bias": torch.randn(1, 1, 70, 70), "alibi_slopes": torch.tensor([0.1, 0.2])}
    clean = tpweave.attention(q, k, v, **options)
    q[0, 9, 1] = float("nan")
    out = tpweave.attention(q, k, v, **options)
    hit = torch.isnan(out).any(-1)
    assert hit.sum() == 1 and hit[0, 9, 1] and torch.equal(out[~hit], clean[~hit])


@pytest.mark.parametrize("case", ["everything", "softcap", "mask of queries", "keys in parts"])
def test_bits_depend_on_nothing_else(isa, case):
    (q, k, v), options, *_ = oracle(case, torch.bfloat16)
    whole = tpweave.attention(q, k, v, **options, return_lse=True)
    for threads in (2, 3, 5):
        torch.set_num_threads(threads)
        for a, b in zip(whole, tpweave.attention(q, k, v, **options, return_lse=True), strict=True):
            assert torch.equal(a, b)
    options = {name: x[:1] if name in ("bias", "mask") else x for name, x in options.items()}
    for a, b in zip(whole, tpweave.attention(q[:1], k[:1], v[:1], **options, return_lse=True), strict=True):
        assert torch.equal(a[:1], b)


def run_native(q, k, v, options, **layout):
    problem = native_problem(q, k, v, options, **layout)
    out = torch.full((*q.shape[:-1], v.shape[-1]), float("nan"), dtype=q.dtype)
    lse = torch.full((q.shape[-2], *q.shape[:-2]), float("nan"))
    _C.attention_fwd("attention_varlen", problem.integers, problem.reals, out.data_ptr(), lse.data_ptr())
    return out, lse


def make_packed(dtype):
    lengths_q, lengths_k = [70, 0, 1, 200, 33, 5], [70, 9, 40, 230, 0, 130]
    cu_q, cu_k = (torch.tensor([0, *x]).cumsum(0).int() for x in (lengths_q, lengths_k))
    q, k, v = torch.randn(309, 4, 40).to(dtype), torch.randn(479, 2, 40).to(dtype), torch.randn(479, 2, 24).to(dtype)
    return q, k, v, cu_q, cu_k, {"max_seqlen_q": 200, "max_seqlen_k": 230}


PACKED_OPTIONS = {
    "plain": {},
    "causal": {"causal": True},
    "options": {"causal": True, "softcap": 2.0, "alibi_slopes": (6, 4), "sinks": (4,), "bias": (6, 1, 200, 230),
                "mask": (1, 4, 200, 230), "dropout_p": 0.3, "seed": 5},
}  # fmt: skip


def options_of_sequence(options, b, queries, keys):
    def part(x):
        return (
            x[b : b + 1 if x.shape[0] > 1 else 1][..., :queries, :keys] if x.shape[0] > 1 else x[..., :queries, :keys]
        )

    changed = {name: part(x) for name in ("bias", "mask") if (x := getattr(options, name)) is not None}
    if options.alibi_slopes is not None:
        changed["alibi_slopes"] = options.alibi_slopes[b]
    return options._replace(**changed)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("name", PACKED_OPTIONS)
def test_packed_sequences_are_separate_calls(isa, name, dtype):
    q, k, v, cu_q, cu_k, longest = make_packed(dtype)
    options = as_reference(q, make_options(PACKED_OPTIONS[name], dtype))
    layout = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, **longest}
    out, lse = run_native(q, k, v, options, **layout)
    torch.set_num_threads(3)
    assert all(torch.equal(a, b) for a, b in zip((out, lse), run_native(q, k, v, options, **layout), strict=True))
    for b in range(6):
        rows, keys = slice(cu_q[b], cu_q[b + 1]), slice(cu_k[b], cu_k[b + 1])
        one = [x[None] for x in (q[rows], k[keys], v[keys])]
        part = options_of_sequence(options, b, one[0].shape[1], one[1].shape[1])
        if part.dropout_p:
            want, want_lse = attention_reference(*one, part._replace(dropout_p=0.0, seed=None))
            torch.testing.assert_close(lse[:, rows], want_lse[0], rtol=1e-5, atol=2e-4)
            continue
        want = run_native(*one, part)
        assert torch.equal(out[rows], want[0][0]) and torch.equal(lse[:, rows], want[1].view(4, -1))


@pytest.mark.parametrize("page_size", [1, 16, 23, 256])
def test_pages_hold_the_same_keys(isa, page_size):
    q, k, v, cu_q, cu_k, longest = make_packed(torch.bfloat16)
    options = as_reference(q, {"causal": True})
    want = run_native(q, k, v, options, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, **longest)
    lengths = cu_k.diff()
    width = -(-230 // page_size)
    table = torch.randperm(6 * width).view(6, width)
    pages = [torch.full((6 * width, page_size, 2, x.shape[-1]), float("nan")).to(x.dtype) for x in (k, v)]
    for b in range(6):
        for j in range(lengths[b]):
            for source, target in zip((k, v), pages, strict=True):
                target[table[b, j // page_size], j % page_size] = source[cu_k[b] + j]
    table[1, -(-9 // page_size) :] = -1  # never read
    layout = {"cu_seqlens_q": cu_q, "block_table": table, **longest}
    for lengths_by in ({"cu_seqlens_k": cu_k}, {"seqused_k": lengths}):
        for a, b in zip(run_native(q, *pages, options, **layout, **lengths_by), want, strict=True):
            assert torch.equal(a, b)


def test_used_keys_shorten_sequences(isa):
    q, k, v, cu_q, cu_k, longest = make_packed(torch.float32)
    used = torch.tensor([50, 0, 40, 100, 0, 7])
    options = as_reference(q, {"causal": True})
    out, lse = run_native(q, k, v, options, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, seqused_k=used, **longest)
    keep = torch.cat([torch.arange(cu_k[b], cu_k[b] + used[b]) for b in range(6)])
    cu_used = torch.cat([torch.zeros(1), used.cumsum(0)]).int()
    want = run_native(q, k[keep], v[keep], options, cu_seqlens_q=cu_q, cu_seqlens_k=cu_used, **longest)
    assert torch.equal(out, want[0]) and torch.equal(lse, want[1])


@pytest.mark.parametrize(
    ("change", "seen"),
    [
        ({"cu_seqlens_q": [0, 5, 3, 8]}, "cu_seqlens_q gives sequence 1 -2 rows"),
        ({"cu_seqlens_q": [0, 5, 6, 9]}, "cu_seqlens_q runs from 0 to 9, of 8 rows"),
        ({"cu_seqlens_q": [-1, 5, 6, 8]}, "cu_seqlens_q runs from -1 to 8"),
        ({"cu_seqlens_k": [0, 5, 6, 90]}, "cu_seqlens_k runs from 0 to 90, of 12 rows"),
        ({"max_seqlen_q": 2}, "cu_seqlens_q gives sequence 0 5 rows, of at most 2"),
        ({"max_seqlen_k": 3}, "cu_seqlens_k gives sequence 0 4 rows, of at most 3"),
        ({"seqused_k": [5, 4, 4]}, "sequence 0 uses 5 keys, of 4"),
        ({"seqused_k": [-1, 4, 4]}, "sequence 0 uses -1 keys"),
        ({"block_table": [[0], [4], [1]]}, r"block_table\[1, 0\] is page 4 of 4"),
        ({"block_table": [[0], [1], [-1]]}, r"block_table\[2, 0\] is page -1 of 4"),
        (
            {"block_table": [[0], [1], [1]], "seqused_k": [4, 2, 1], "page_size": 3},
            "needs 2 pages, block_table has room",
        ),
        ({"block_table": [[], [], []]}, "sequence 0 needs 1 pages, block_table has room for 0"),
    ],
    ids=str,
)
def test_bad_tables_are_named(change, seen):
    q, k = torch.zeros(8, 2, 16), torch.zeros(12, 2, 16)
    layout = {
        "cu_seqlens_q": [0, 5, 6, 8],
        "cu_seqlens_k": [0, 4, 8, 12],
        "max_seqlen_q": 8,
        "max_seqlen_k": 8,
        **change,
    }
    page_size = layout.pop("page_size", 3 if "block_table" not in change else 4)
    if "block_table" in layout:
        k = torch.zeros(4, page_size, 2, 16)
    layout = {name: torch.tensor(x).int() if isinstance(x, list) else x for name, x in layout.items()}
    with pytest.raises(ValueError, match=seen):
        run_native(q, k, k, AttentionOptions(0.25), **layout)
