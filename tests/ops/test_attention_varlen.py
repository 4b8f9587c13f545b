"""attention_varlen: every row of its table against the dense definition in float64, a sequence at a time."""

import functools
import itertools

import pytest
import torch

import tpweave
from tpweave.dispatch import Inputs
from tpweave.native import _C
from tpweave.ops.attention_varlen import ATTENTION_VARLEN, ATTENTION_VARLEN_BWD
from tpweave.reference.ops.attention import AttentionOptions, attention_reference, dropout_keep
from tpweave.reference.ops.attention_varlen import PackedSequences, attention_varlen_reference
from tpweave.testing import assert_accurate

pytestmark = pytest.mark.usefixtures("one_thread")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Triton's interpreter is slow: test_attention_triton.py has cases of its own.
BACKENDS = [row.name for row in ATTENTION_VARLEN.backends if row.name != "triton"]

# The reference knows no instruction sets: once is enough.
ROWS = [
    (backend, isa)
    for backend in BACKENDS
    for isa in (_C.available_isas() if backend == "cpu" else _C.available_isas()[-1:])
]

# queries, keys of each sequence
LENGTHS = {
    "even": ((64, 64, 64), (64, 64, 64)),
    "uneven": ((1, 70, 0, 33, 5), (9, 131, 4, 33, 0)),
    "one": ((90,), (65,)),
    "long and short": ((1, 200, 3), (200, 200, 3)),
    "more queries": ((40, 70), (7, 66)),
}
# name: what the call gets, as options or as marks that `make` resolves
CASES = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window": (20, 7)},
    "left window": {"causal": True, "window": (9, -1)},
    "chunk": {"causal": True, "chunk": 16},
    "softcap": {"softcap": 3.0, "softmax_scale": 0.3},
    "alibi": {"causal": True, "alibi_slopes": "batch"},
    "sinks": {"causal": True, "sinks": True},
    "bias": {"bias": "full"},
    "bias of keys": {"causal": True, "bias": "keys"},
    "mask": {"mask": "full"},
    "key mask": {"causal": True, "mask": "keys"},
    "dropout": {"causal": True, "dropout_p": 0.3, "seed": 5},
    "pages": {"causal": True, "page_size": 16},
    "pages of 1": {"page_size": 1},
    "pages of 7, windowed": {"window": (30, 3), "page_size": 7},
    "used keys": {"causal": True, "seqused": True},
    "used keys of pages": {"causal": True, "seqused": True, "page_size": 16, "alibi_slopes": "heads"},
    "most": {
        "causal": True, "window": (40, -1), "softcap": 4.0, "alibi_slopes": "batch", "sinks": True, "bias": "full",
        "mask": "keys", "dropout_p": 0.2, "seed": 11, "page_size": 16,
    },
}  # fmt: skip
HEADS = (4, 2, 40, 24)  # Hq, Hkv, D, Dv


def offsets(lengths, first=0):
    return torch.tensor([first, *lengths]).cumsum(0).to(torch.int32)


def make(lengths, case, dtype, heads=HEADS):
    """(q, k, v), positional and keyword arguments of a call. Packed tensors have a few tokens of no sequence."""
    generator = torch.Generator().manual_seed(2)
    queries, keys = LENGTHS[lengths]
    batch, num_heads, kv_heads, depth, depth_v = len(queries), *heads
    longest_q, longest_k = max(queries), max(keys) + 2
    settings = dict(CASES[case])

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    q = normal(3 + sum(queries) + 2, num_heads, depth).to(dtype)
    page_size = settings.pop("page_size", None)
    if page_size is None:
        k, v = (normal(1 + sum(keys) + 4, kv_heads, d).to(dtype) for d in (depth, depth_v))
    else:
        columns = -(-max(keys) // page_size)
        # More pages than needed, in no order, and the last sequence begins with the first one's page.
        table = torch.randperm(batch * columns + 3, generator=generator)[: batch * columns].view(batch, columns)
        table[-1, 0] = table[0, 0]
        needed = torch.arange(columns) < -(-torch.tensor(keys)[:, None] // page_size)
        settings["block_table"] = table.masked_fill(~needed, -1).to(torch.int32)
        k, v = (normal(batch * columns + 3, page_size, kv_heads, d).to(dtype) for d in (depth, depth_v))
    if settings.pop("seqused", False):
        used = [max(0, n - 3 * b - 2) for b, n in enumerate(keys)]
        settings["seqused_k"] = torch.tensor(used, dtype=torch.int32)
    full = {"full": (batch, num_heads, longest_q, longest_k), "keys": (batch, 1, 1, longest_k)}
    if "alibi_slopes" in settings:
        settings["alibi_slopes"] = normal(*((batch,) if settings["alibi_slopes"] == "batch" else ()), num_heads).abs()
    if "sinks" in settings:
        settings["sinks"] = normal(num_heads).to(dtype)
    if "bias" in settings:
        settings["bias"] = normal(*full[settings["bias"]]).to(dtype)
    if "mask" in settings:
        settings["mask"] = torch.rand(full[settings["mask"]], generator=generator) > 0.3
    return (q, k, v), (offsets(queries, 3), offsets(keys, 1), longest_q, longest_k), settings


def options_of(q, settings):
    names = {name: value for name, value in settings.items() if name not in ("block_table", "seqused_k")}
    names.setdefault("softmax_scale", q.shape[-1] ** -0.5)
    if "seed" in names:
        names["seed"] = torch.tensor([names["seed"]])
    return AttentionOptions(**names)


def by_hand(tensors, cu, settings, attend):
    """`attend(q, k, v, options, b)` of each sequence alone, put together; what it returns is for [1, S, H, D]."""
    q, k, v = tensors
    options = options_of(q, settings)
    cu_q, cu_k = cu[0].tolist(), cu[1].tolist()
    out = torch.zeros(q.shape[0], q.shape[1], v.shape[-1], dtype=q.dtype)
    lse = torch.full((q.shape[1], q.shape[0]), float("-inf"), dtype=q.dtype)
    for b, (begin, end) in enumerate(itertools.pairwise(cu_q)):
        keys = cu_k[b + 1] - cu_k[b]
        kb, vb = (x[cu_k[b] : cu_k[b + 1]] for x in (k, v))
        if "block_table" in settings:
            pages = settings["block_table"][b]
            kb, vb = (torch.cat([x[p] for p in pages if p >= 0] or [x[0, :0]])[:keys] for x in (k, v))
        used = int(settings["seqused_k"][b]) if "seqused_k" in settings else keys
        kb, vb = kb[:used], vb[:used]

        def corner(x, queries=end - begin, keys=used, b=b):
            if x is None:
                return None
            x = x.expand(len(cu_q) - 1, -1, -1, -1)[b : b + 1]
            return x[:, :, :queries, :keys] if x.shape[2] > 1 else x[:, :, :, :keys]

        slopes = options.alibi_slopes
        part = options._replace(
            bias=corner(options.bias), mask=corner(options.mask),
            alibi_slopes=slopes[b : b + 1] if slopes is not None and slopes.dim() == 2 else slopes,
        )  # fmt: skip
        out[begin:end], lse[:, begin:end] = (x[0] for x in attend(q[None, begin:end], kb[None], vb[None], part, b))
    return out, lse


def exact(q, k, v, options, b):
    return attention_reference(q, k, v, options, first_batch=b)


def wide(tensors, settings):
    doubles = {n: x.double() if torch.is_tensor(x) and x.is_floating_point() else x for n, x in settings.items()}
    return [t.double() for t in tensors], doubles


@functools.cache
def oracle(lengths, case, dtype):
    tensors, cu, settings = make(lengths, case, dtype)
    doubles, wide_settings = wide(tensors, settings)
    want = by_hand(doubles, cu, wide_settings, exact)
    # Weights rounded to the dtype before they meet the values, as in plain torch.
    rounded = by_hand(doubles, cu, wide_settings, functools.partial(rounding, dtype=dtype))
    return tensors, cu, settings, want, rounded[0].to(dtype)


def rounding(q, k, v, options, b, dtype):
    """`exact` with the weights and the result rounded to a dtype: how far an honest implementation is off."""
    keys = k.shape[1]
    identity = torch.eye(keys, dtype=q.dtype).view(1, keys, 1, keys).expand(1, keys, k.shape[2], keys)
    weights, lse = attention_reference(q, k, identity, options, first_batch=b)
    values = v.repeat_interleave(q.shape[2] // k.shape[2], 2)
    return torch.einsum("bqhk,bkhd->bqhd", weights.to(dtype).double(), values).to(dtype), lse


def skip_unless(backend, tensors, cu, settings):
    inputs = Inputs(tensors, **PackedSequences(*cu)._asdict(), **options_of(tensors[0], settings)._asdict())
    inputs.values.update(settings)
    reason = dict(ATTENTION_VARLEN.supported(inputs))[backend]
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize(("backend", "isa"), ROWS, indirect=["isa"])
@pytest.mark.parametrize("case", CASES)
def test_matches_float64(isa, case, backend, dtype):
    for lengths in LENGTHS:
        tensors, cu, settings, (want, want_lse), same = oracle(lengths, case, dtype)
        skip_unless(backend, tensors, cu, settings)
        out, lse = tpweave.attention_varlen(*tensors, *cu, return_lse=True, backend=backend, **settings)
        assert out.dtype == dtype and out.is_contiguous() and lse.dtype == torch.float32
        assert_accurate(out, want, same)
        assert torch.equal(torch.isneginf(lse), torch.isneginf(want_lse))
        seen = ~torch.isneginf(want_lse)
        tolerance = 1e-5 if dtype == torch.float32 else 2e-4
        torch.testing.assert_close(lse[seen].double(), want_lse[seen], rtol=1e-5, atol=tolerance)


def gradients(function, leaves, dout, dlse):
    leaves = [x.detach().clone().requires_grad_() for x in leaves]
    out, lse = function(*leaves)
    loss = (out * dout).sum() + lse.masked_fill(torch.isneginf(lse), 0.0).mul(dlse).sum()
    return torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("case", CASES)
def test_gradients_match_float64(isa, case, dtype):
    for lengths in ("uneven", "long and short"):
        tensors, cu, settings = make(lengths, case, dtype)
        trained = [name for name in ("bias", "sinks") if name in settings]
        leaves = [*tensors, *(settings[name] for name in trained)]
        dout = torch.randn(*tensors[0].shape[:2], tensors[2].shape[-1]).to(dtype)
        dlse = torch.randn(tensors[0].shape[1], tensors[0].shape[0])

        def ours(q, k, v, *rest, cu=cu, settings=settings, trained=trained):
            given = {**settings, **dict(zip(trained, rest, strict=True))}
            return tpweave.attention_varlen(q, k, v, *cu, return_lse=True, **given)

        def reference(q, k, v, *rest, cu=cu, settings=settings, trained=trained):
            given = {**settings, **dict(zip(trained, rest, strict=True))}
            sequences = PackedSequences(*cu, given.get("block_table"), given.get("seqused_k"))
            return attention_varlen_reference(q, k, v, sequences, options_of(q, given))

        wants = gradients(reference, [x.double() for x in leaves], dout.double(), dlse.double())
        sames = gradients(reference, leaves, dout, dlse)
        for got, leaf, want, same in zip(gradients(ours, leaves, dout, dlse), leaves, wants, sames, strict=True):
            assert got.shape == leaf.shape and got.dtype == leaf.dtype
            # The saved out is rounded to the dtype, once more than in autograd's own graph.
            assert_accurate(got, want, same, factor=3.0)


def test_gradcheck_in_float64():
    queries, keys = (3, 0, 2), (4, 2, 5)
    q, k, v = torch.randn(6, 4, 3), torch.randn(4, 3, 2, 3), torch.randn(4, 3, 2, 2)
    sinks, bias = torch.randn(4), torch.randn(3, 1, 3, 5)
    leaves = [x.double().requires_grad_() for x in (q, k, v, sinks, bias)]
    table = torch.tensor([[3, 0], [1, -1], [3, 2]], dtype=torch.int32)

    def function(q, k, v, sinks, bias):
        out, lse = tpweave.attention_varlen(
            q, k, v, offsets(queries), offsets(keys), 3, 5, block_table=table, causal=True, softcap=2.0, sinks=sinks,
            bias=bias, dropout_p=0.3, seed=2, return_lse=True,
        )  # fmt: skip
        return out, lse.masked_fill(torch.isneginf(lse), 0.0)

    torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty(isa, backend):
    for queries, keys in (((), ()), ((0, 0), (3, 0)), ((2, 3), (0, 0))):
        q, k, v = (torch.randn(sum(n), 2, 8, requires_grad=True) for n in (queries, keys, keys))
        out, lse = tpweave.attention_varlen(
            q, k, v, offsets(queries), offsets(keys), 3, 3, causal=True, return_lse=True, backend=backend
        )
        assert torch.equal(out, torch.zeros_like(q)) and torch.isneginf(lse).all()
        for grad, x in zip(torch.autograd.grad(out.sum(), (q, k, v)), (q, k, v), strict=True):
            assert torch.equal(grad, torch.zeros_like(x))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", ["causal", "pages"])
def test_any_strides(isa, case, backend):
    (q, k, v), cu, settings = make("uneven", case, torch.float32)
    want = tpweave.attention_varlen(q, k, v, *cu, backend=backend, **settings)
    # Heads before tokens, as slices of a wider tensor, and with elements that are not neighbours.
    strided = [q.transpose(0, 1).contiguous().transpose(0, 1), torch.cat((k, k), -1)[..., : k.shape[-1]]]
    sparse = torch.stack((v, v), -1).flatten(-2)[..., ::2]
    got = tpweave.attention_varlen(*strided, sparse, *cu, backend=backend, **settings)
    assert torch.equal(got, want)
    if "block_table" in settings:
        wide_table = torch.stack((settings["block_table"],) * 2, -1).flatten(-2)[:, ::2]
        assert torch.equal(
            tpweave.attention_varlen(q, k, v, *cu, block_table=wide_table, backend=backend, causal=True), want
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_keys_outside_of_a_sequence_are_not_read(isa, dtype):
    (q, k, v), cu, settings = make("uneven", "used keys of pages", dtype)
    clean, lse = tpweave.attention_varlen(q, k, v, *cu, return_lse=True, **settings)
    sequences = PackedSequences(*cu, settings["block_table"], settings["seqused_k"])
    used = torch.zeros(k.shape[0] * k.shape[1], dtype=torch.bool)
    used[torch.cat(sequences.key_rows(k.shape[1]))] = True
    poisoned = [x.masked_fill(~used.view(*x.shape[:2], 1, 1), float("nan")).requires_grad_() for x in (k, v)]
    again, lse_again = tpweave.attention_varlen(q, *poisoned, *cu, return_lse=True, **settings)
    assert torch.equal(again, clean) and torch.equal(lse_again, lse)
    for grad in torch.autograd.grad(again.float().square().sum(), poisoned):
        assert torch.isfinite(grad).all() and (grad[~used.view(grad.shape[:2])] == 0).all()


def test_a_batch_of_equal_sequences_is_dense_attention(isa):
    q, k, v = torch.randn(3, 20, 4, 16), torch.randn(3, 33, 2, 16), torch.randn(3, 33, 2, 16)
    settings = {"causal": True, "softcap": 5.0, "dropout_p": 0.25, "seed": 3}
    dense, dense_lse = tpweave.attention(q, k, v, return_lse=True, backend="reference", **settings)
    out, lse = tpweave.attention_varlen(
        *(x.flatten(0, 1) for x in (q, k, v)), offsets([20] * 3), offsets([33] * 3), 20, 33, return_lse=True, **settings
    )
    torch.testing.assert_close(out, dense.flatten(0, 1))
    torch.testing.assert_close(lse, dense_lse.transpose(0, 1).flatten(1))


def test_dropout_counts_sequences():
    # With values that tell the keys apart, what was dropped can be read from the result.
    q, k = torch.zeros(14, 2, 4), torch.zeros(9, 2, 4)
    v = torch.zeros(9, 2, 6)
    v[:4, :, :4] = torch.eye(4)[:, None]
    v[4:, :, :5] = torch.eye(5)[:, None]
    out = tpweave.attention_varlen(q, k, v, offsets((6, 8)), offsets((4, 5)), 8, 5, dropout_p=0.5, seed=21)
    for b, (rows, keys) in enumerate(((out[:6], 4), (out[6:], 5))):
        keep = dropout_keep(21, 0.5, (1, 2, len(rows), keys), first_batch=b)
        assert torch.equal(rows[..., :keys] > 0, keep[0].transpose(0, 1))


@pytest.mark.parametrize("threads", [2, 3])
def test_bits_repeat_and_do_not_depend_on_threads(isa, threads):
    (q, k, v), cu, settings = make("uneven", "causal", torch.bfloat16)
    leaves = [x.requires_grad_() for x in (q, k, v)]

    def run():
        out, lse = tpweave.attention_varlen(*leaves, *cu, return_lse=True, **settings)
        return out, lse, *torch.autograd.grad(out.float().square().sum(), leaves)

    first = run()
    torch.set_num_threads(threads)
    for again in (run(), run()):
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("case", ["causal", "most", "used keys of pages"])
def test_opcheck_and_compile(case):
    torch._dynamo.reset()
    (q, k, v), cu, settings = make("uneven", case, torch.float32)
    leaves = [x.requires_grad_() for x in (q, k, v, *(settings[n] for n in ("bias", "sinks") if n in settings))]
    options = options_of(q, settings)
    arguments = (
        q, k, v, *cu, settings.get("block_table"), settings.get("seqused_k"), options.mask, options.bias,
        options.alibi_slopes, options.sinks, options.seed, options.causal, *options.window, options.chunk,
        options.softmax_scale, options.softcap, options.dropout_p, 0, None,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.tpweave.attention_varlen.default, arguments)

    def function(q, k, v, cu_q, cu_k):
        return tpweave.attention_varlen(q, k, v, cu_q, cu_k, *cu[2:], return_lse=True, **settings)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    got, want = compiled(q, k, v, *cu[:2]), function(q, k, v, *cu[:2])
    got_grads, want_grads = (torch.autograd.grad(out.sum(), leaves) for out, _ in (got, want))
    for a, b in zip((*got, *got_grads), (*want, *want_grads), strict=True):
        assert torch.equal(a, b)


Q, K, V = torch.zeros(10, 4, 16), torch.zeros(12, 2, 16), torch.zeros(12, 2, 16)
PAGES = torch.zeros(5, 4, 2, 16)


def call(q=Q, k=K, v=V, cu_q=(0, 4, 10), cu_k=(0, 5, 12), max_q=6, max_k=7, **settings):
    cu_q, cu_k = (torch.tensor(x, dtype=torch.int32) if isinstance(x, tuple) else x for x in (cu_q, cu_k))
    for name in ("block_table", "seqused_k"):
        if isinstance(settings.get(name), list):
            settings[name] = torch.tensor(settings[name], dtype=torch.int32)
    return tpweave.attention_varlen(q, k, v, cu_q, cu_k, max_q, max_k, **settings)


def paged(table, **settings):
    return call(k=PAGES, v=PAGES, block_table=table, **settings)


def test_good_input_of_the_negative_cases():
    call(seqused_k=[5, 0])
    paged([[4, 0], [1, 2]])
    paged([[4, 0, -7], [1, 2, 99]])


@pytest.mark.parametrize(
    ("call", "seen"),
    [
        (lambda: call(q=Q[0]), r"q has shape \(4, 16\).*3 dims"),
        (lambda: call(k=PAGES, v=PAGES), r"k has shape \(5, 4, 2, 16\).*3 dims"),
        (lambda: call(block_table=[[0], [0]]), r"k has shape \(12, 2, 16\).*4 dims \[pages"),
        (lambda: call(k=K.half()), "k is torch.float16"),
        (lambda: call(v=V[1:]), r"must begin \(12, 2\)"),
        (lambda: call(q=Q[:, :3]), "3 query heads on 2 KV heads"),
        (lambda: call(cu_q=torch.tensor([0, 4, 10])), "cu_seqlens_q is torch.int64"),
        (lambda: call(cu_q=torch.zeros(2, 2, dtype=torch.int32)), r"cu_seqlens_q has shape \(2, 2\)"),
        (lambda: call(cu_q=torch.zeros(0, dtype=torch.int32)), r"cu_seqlens_q has shape \(0,\)"),
        (lambda: call(cu_k=(0, 12)), r"cu_seqlens_k is torch.int32 \(2,\).*\[3\]"),
        (lambda: call(cu_q=(0, 6, 4)), r"cu_seqlens_q is \[0, 6, 4\]; offsets start at 0 and never fall"),
        (lambda: call(cu_q=(-1, 4, 10)), r"cu_seqlens_q is \[-1, 4, 10\]"),
        (lambda: call(cu_q=(0, 4, 11)), "cu_seqlens_q ends at 11, q has 10 tokens"),
        (lambda: call(cu_k=(0, 5, 13)), "cu_seqlens_k ends at 13, k has 12 tokens"),
        (lambda: call(max_q=5), "max_seqlen_q is 5, the longest sequence has 6 tokens"),
        (lambda: call(max_k=6), "max_seqlen_k is 6, the longest sequence has 7 tokens"),
        (lambda: call(seqused_k=[6, 0]), r"seqused_k\[0\] is 6, sequence 0 has 5 keys"),
        (lambda: call(seqused_k=[5, -1]), r"seqused_k\[1\] is -1"),
        (lambda: call(seqused_k=[5]), r"seqused_k is torch.int32 \(1,\).*\[2\]"),
        (lambda: paged([[4, 5], [1, 2]]), r"block_table\[0, 1\] is 5, there are 5 pages"),
        (lambda: paged([[4, 0], [-1, 2]]), r"block_table\[1, 0\] is -1"),
        (lambda: paged([[4], [1]]), "1 pages of 4 keys for each sequence, one has 7 keys"),
        (lambda: paged([[4, 0]]), r"block_table is torch.int32 \(1, 2\).*\[2, pages\]"),
        (lambda: paged(torch.zeros(2, 2)), "block_table is torch.float32"),
        (lambda: call(k=PAGES[:, :0], v=PAGES[:, :0], block_table=[[0], [0]]), "pages need at least 1 key"),
        (lambda: call(window=(-2, 0)), r"attention_varlen: window is \(-2, 0\)"),
        (lambda: call(mask=torch.ones(2, 6) > 0), r"mask has shape \(2, 6\).*\(2, 7\).*\(2, 4, 6, 7\)"),
        (lambda: call(alibi_slopes=torch.ones(3)), r"alibi_slopes has shape \(3,\)"),
        (lambda: call(backend="nope"), "no backend 'nope'"),
    ],
)
def test_bad_input_names_the_values(call, seen):
    with pytest.raises(ValueError, match=seen):
        call()


def test_tables_have_a_reference():
    assert ATTENTION_VARLEN.backends[-1].name == ATTENTION_VARLEN_BWD.backends[-1].name == "reference"
