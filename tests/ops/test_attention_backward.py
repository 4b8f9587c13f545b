"""The gradients of attention and attention_varlen: the native rows on every instruction set against float64 autograd of
the reference, with every option; their bits; strides, empty shapes, NaNs."""

import functools
import itertools

import pytest
import torch
from attention_shapes import PLAIN_CASES

import tpweave
from tpweave.dispatch import Inputs
from tpweave.native import _C
from tpweave.ops.attention import ATTENTION_BWD
from tpweave.ops.attention_varlen import ATTENTION_VARLEN_BWD
from tpweave.reference.ops.attention import AttentionOptions, attention_reference
from tpweave.reference.ops.attention_varlen import PackedSequences, attention_varlen_reference
from tpweave.testing import assert_accurate

pytestmark = pytest.mark.usefixtures("one_thread")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAMES = ("dq", "dk", "dv", "dbias", "dsinks")

# name: (B, Sq, Sk, Hq, Hkv, D, Dv), options; what stands as a shape becomes a tensor of it
CASES = {
    **PLAIN_CASES,
    "window": ((1, 233, 233, 2, 1, 96, 96), {"window": (37, 20)}),
    "scales": ((1, 100, 100, 2, 2, 48, 48), {"causal": True, "softmax_scale": -0.2}),
    "chunk": ((1, 150, 150, 2, 1, 32, 32), {"chunk": 40, "causal": True}),
    "chunk, more queries than keys": ((1, 90, 70, 2, 2, 16, 16), {"chunk": 33}),
    "softcap": ((2, 70, 131, 4, 2, 64, 64), {"softcap": 2.0, "causal": True}),
    "alibi": ((2, 140, 200, 4, 2, 32, 32), {"alibi_slopes": (4,)}),
    "alibi of batch": ((2, 70, 60, 3, 1, 59, 20), {"alibi_slopes": (2, 3), "window": (50, 9)}),
    "sinks": ((2, 70, 70, 4, 2, 64, 64), {"sinks": (4,), "window": (20, 0)}),
    "sinks, keys hidden": ((1, 50, 20, 2, 1, 32, 32), {"sinks": (2,), "causal": True}),
    "key mask": ((2, 140, 131, 4, 2, 64, 64), {"mask": (2, 1, 1, 131), "causal": True}),
    "mask": ((2, 140, 131, 4, 2, 64, 64), {"mask": (2, 4, 140, 131)}),
    "mask of rows": ((2, 70, 70, 2, 2, 32, 32), {"mask": (2, 1, 70, 1)}),
    "dropout": ((2, 70, 131, 4, 2, 64, 64), {"dropout_p": 0.3, "seed": 1 << 40, "causal": True}),
    "dropout of all": ((1, 20, 20, 1, 1, 32, 32), {"dropout_p": 1.0, "seed": 5}),
    "everything": ((2, 100, 90, 6, 2, 40, 24), {
        "softcap": 3.0, "alibi_slopes": (6,), "sinks": (6,), "bias": (2, 6, 100, 90), "mask": (2, 1, 1, 90),
        "dropout_p": 0.2, "seed": 3, "window": (60, 30), "head_offset": 2,
    }),
}  # fmt: skip
for _sizes in itertools.product((1, 2), (1, 4), (1, 150), (1, 131)):
    CASES[f"bias {_sizes}"] = ((2, 150, 131, 4, 2, 32, 32), {"bias": _sizes, "causal": _sizes[0] == 1})


def make_options(settings, depth, dtype):
    generator = torch.Generator().manual_seed(11)
    options = {"softmax_scale": depth**-0.5, **settings}
    for name in ("alibi_slopes", "sinks", "bias", "mask"):
        if name not in settings:
            continue
        values = torch.rand(settings[name], generator=generator)
        options[name] = (
            values > 0.3 if name == "mask" else values if name == "alibi_slopes" else (values * 2 - 1).to(dtype)
        )
    if "mask" in options:
        options["mask"][0, :, : options["mask"].shape[2] // 4] = False  # rows or keys hidden
    if "seed" in options:
        options["seed"] = torch.tensor([options["seed"]])
    return AttentionOptions(**options)


def widened(options):
    return options._replace(**{
        name: value.double() for name, value in options._asdict().items()
        if isinstance(value, torch.Tensor) and value.is_floating_point()
    })  # fmt: skip


def leaf(x):
    return None if x is None else x.detach().clone().requires_grad_()


def autograd_gradients(forward, dout, dlse, tensors, options):
    """Gradients by autograd of `forward(q, k, v, options)`; None for those there are not."""
    tensors = [leaf(x) for x in tensors]
    options = options._replace(bias=leaf(options.bias), sinks=leaf(options.sinks))
    results = forward(*tensors, options)
    wanted = [*tensors, *(x for x in (options.bias, options.sinks) if x is not None)]
    seen = results[1].detach() > float("-inf")
    loss = (results[0] * dout).sum() + results[1].masked_fill(~seen, 0.0).mul(dlse).sum()
    found = iter(torch.autograd.grad(loss, wanted))
    return [next(found) if x is not None else None for x in (*tensors, options.bias, options.sinks)]


@functools.cache
def case_oracle(case, dtype):
    """Everything of a case that does not depend on the instruction set."""
    shape, settings = CASES[case]
    batch, queries, keys, heads, kv_heads, depth, depth_v = shape
    generator = torch.Generator().manual_seed(1)
    sizes = ((batch, queries, heads, depth), (batch, keys, kv_heads, depth), (batch, keys, kv_heads, depth_v))
    q, k, v, dout = (torch.randn(s, generator=generator).to(dtype) for s in (*sizes, (batch, queries, heads, depth_v)))
    dlse = torch.randn(batch, heads, queries, generator=generator)
    options = make_options(settings, depth, dtype)
    wide = [x.double() for x in (dout, dlse, q, k, v)]
    want = autograd_gradients(attention_reference, *wide[:2], wide[2:], widened(options))
    same = autograd_gradients(attention_reference, dout, dlse, (q, k, v), options)
    out, lse = attention_reference(q, k, v, options)
    return (dout, dlse, q, k, v, out, lse), options, want, same


def needing_bias(options):
    return options if options.bias is None else options._replace(bias=options.bias.detach().requires_grad_())


def check(got, want, same):
    for name, a, b, c in zip(NAMES, got, want, same, strict=True):
        if b is None:
            continue
        assert a.dtype == c.dtype and a.is_contiguous(), name
        # The saved out is rounded to the dtype, once more than in autograd's own graph; where all rows' gradients are
        # summed to one number, which is near 0, so are their errors.
        eps = 2e-2 if b.numel() == 1 and a.dtype != torch.float32 else None
        # The bf16 instructions round P and dS as well; `same` keeps them in fp32.
        factor = 4.0 if a.dtype == torch.bfloat16 and _C.active_isa() == "avx512bf16" else 3.0
        assert_accurate(a.detach(), b, c, factor=factor, eps=eps)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("case", CASES)
def test_native_row_matches_float64(isa, case, dtype):
    args, options, want, same = case_oracle(case, dtype)
    row = ATTENTION_BWD.choose(Inputs((args[0], *args[2:5]), **options._asdict()), "cpu")
    got = row.run(*args, needing_bias(options))
    check(got, want, same)
    for a, b in zip(got, row.run(*args, needing_bias(options)), strict=True):
        assert a is None or torch.equal(a, b)


@pytest.mark.parametrize("case", CASES)
def test_reference_row_matches_float64(case):
    args, options, want, same = case_oracle(case, torch.float32)
    row = ATTENTION_BWD.choose(Inputs((args[0], *args[2:5]), **options._asdict()), "reference")
    check(row.run(*args, needing_bias(options)), want, same)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_through_autograd(isa, dtype):
    (dout, dlse, q, k, v, *_), options, want, same = case_oracle("everything", dtype)

    def forward(q, k, v, options):
        return tpweave.attention(q, k, v, return_lse=True, **options._asdict())

    got = autograd_gradients(forward, dout, dlse, (q, k, v), options)
    check(got, want, same)
    without_bias = autograd_gradients(
        lambda q, k, v, o: forward(q, k, v, o._replace(bias=options.bias)), dout, dlse, (q, k, v),
        options._replace(bias=None),
    )  # fmt: skip
    for name in (0, 1, 2, 4):
        assert torch.equal(got[name], without_bias[name])


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("bias", [None, (1, 6, 300, 400), (2, 1, 300, 1), (1, 1, 1, 400)], ids=str)
@pytest.mark.parametrize("shape", [(1, 300, 400, 1, 1, 64, 64), (2, 300, 400, 6, 3, 32, 16)], ids=str)
def test_bits_do_not_depend_on_threads(isa, shape, bias, dtype):
    batch, queries, keys, heads, kv_heads, depth, depth_v = shape
    sizes = ((batch, queries, heads, depth), (batch, keys, kv_heads, depth), (batch, keys, kv_heads, depth_v))
    q, k, v, dout = (torch.randn(s).to(dtype) for s in (*sizes, (batch, queries, heads, depth_v)))
    options = AttentionOptions(0.2, causal=True, sinks=torch.randn(heads))
    if bias is not None:
        sizes = [min(n, m) for n, m in zip(bias, (batch, heads, queries, keys), strict=True)]
        options = options._replace(bias=torch.randn(sizes))
    out, lse = attention_reference(q, k, v, options)
    inputs = Inputs((dout, q, k, v), **options._asdict())
    results = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        results.append(ATTENTION_BWD.choose(inputs, "cpu").run(dout, None, q, k, v, out, lse, needing_bias(options)))
    for other in results[1:]:
        assert all(a is None or torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_any_strides(isa):
    base = torch.randn(2, 3, 90, 3, 40)
    q, k, v = base[:, :, :, 0].transpose(1, 2), base[:, :1, :, 1].transpose(1, 2), base[:1, :1, :, 2].transpose(1, 2)
    v = v.expand(2, 90, 1, 40)
    mask, bias = torch.rand(90, 90).t() > 0.3, torch.randn(90, 1, 3, 2).permute(3, 2, 1, 0)
    options = AttentionOptions(0.2, causal=True, mask=mask.expand(2, 3, 90, 90), bias=bias)
    dense = options._replace(mask=options.mask.contiguous(), bias=bias.contiguous())
    out, lse = attention_reference(q, k, v, options)
    row = ATTENTION_BWD.choose(Inputs((out, q, k, v)), "cpu")
    for dout in (
        torch.randn(2, 3, 90, 40).transpose(1, 2),
        torch.randn(2, 90, 3, 80)[..., ::2],
        torch.ones(()).expand_as(out),
    ):
        got = row.run(dout, None, q, k, v, out.transpose(0, 1).contiguous().transpose(0, 1), lse, needing_bias(options))
        contiguous = (x.contiguous() for x in (q, k, v))
        want = row.run(dout.contiguous(), None, *contiguous, out, lse, needing_bias(dense))
        assert all(a is None or torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("shape", [(0, 5, 5, 2, 1, 8, 8), (2, 0, 5, 2, 1, 8, 8), (2, 5, 0, 2, 1, 8, 4)], ids=str)
def test_empty(shape):
    batch, queries, keys, heads, kv_heads, depth, depth_v = shape
    q, k, v = (
        torch.randn(batch, queries, heads, depth),
        torch.randn(batch, keys, kv_heads, depth),
        torch.randn(batch, keys, kv_heads, depth_v),
    )
    options = AttentionOptions(1.0, sinks=torch.randn(heads), bias=torch.randn(batch, heads, queries, keys))
    out, lse = attention_reference(q, k, v, options)
    row = ATTENTION_BWD.choose(Inputs((out, q, k, v)), "cpu")
    got = row.run(torch.ones_like(out), torch.ones_like(lse), q, k, v, out, lse, needing_bias(options))
    for grad, x in zip(got[:4], (q, k, v, options.bias), strict=True):
        assert torch.equal(grad, torch.zeros_like(x))
    expected = torch.exp(options.sinks[:, None] - lse).sum((0, 2)) if lse.numel() else torch.zeros(heads)
    torch.testing.assert_close(got[4], expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_nan_stays_where_it_belongs(isa, dtype):
    (dout, dlse, q, k, v, out, lse), options, *_ = case_oracle("key mask", dtype)
    row = ATTENTION_BWD.choose(Inputs((dout, q, k, v)), "cpu")
    clean = row.run(dout, dlse, q, k, v, out, lse, options)
    hidden = ~options.mask[:, 0, 0]
    poisoned_k, poisoned_v = k.clone(), v.clone()
    poisoned_k[hidden] = poisoned_v[hidden] = float("nan")
    # Working memory that held NaNs is taken again, and so are outputs that torch fills with NaNs.
    row.run(*(torch.full_like(x, float("nan")) for x in (dout, dlse, q, k, v, out, lse)), options)
    torch.use_deterministic_algorithms(True)
    try:
        again = row.run(dout, dlse, q, poisoned_k, poisoned_v, out, lse, options)
    finally:
        torch.use_deterministic_algorithms(False)
    for a, b in zip(again[:3], clean[:3], strict=True):
        assert torch.equal(a, b)
    poisoned = dout.clone()
    poisoned[0, 100, 1] = float("nan")
    dq = row.run(poisoned, dlse, q, k, v, out, lse, options)[0]
    hit = torch.zeros(dq.shape[:3], dtype=torch.bool)
    hit[0, 100, 1] = True
    assert torch.isnan(dq[hit]).all() and torch.equal(dq[~hit], clean[0][~hit])


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_extreme_inputs(isa, dtype):
    q, k, v, dout = (torch.randn(1, 130, 2, 64) for _ in range(4))
    q, k, v = (q * 1e3).to(dtype), (k * 1e3).to(dtype), v.to(dtype)
    out, lse = tpweave.attention(q, k, v, causal=True, return_lse=True)
    options = AttentionOptions(0.125, causal=True, bias=torch.full((1, 1, 130, 130), float("-inf")).triu(1))
    row = ATTENTION_BWD.choose(Inputs((out, q, k, v)), "cpu")
    assert all(torch.isfinite(x).all() for x in row.run(dout.to(dtype), None, q, k, v, out, lse, options)[:3])


# lengths of queries and keys, what cu_seqlens leave out before and behind, seqused_k
PACKED = {
    "plain": ([70, 1, 0, 200, 33], [70, 5, 9, 130, 0], 0, None),
    "gaps": ([40, 64], [90, 64], 3, None),
    "used": ([20, 100, 7], [80, 100, 64], 2, [50, 100, 0]),
}


def packed_case(name, dtype, page_size=0):
    queries, keys, gap, used = PACKED[name]
    heads, kv_heads, depth, depth_v = 4, 2, 40, 24
    generator = torch.Generator().manual_seed(2)
    total_q, total_k = sum(queries) + 2 * gap, sum(keys) + 2 * gap
    cu_q, cu_k = (
        torch.tensor([gap, *(gap + n for n in itertools.accumulate(lengths))], dtype=torch.int32)
        for lengths in (queries, keys)
    )
    used = None if used is None else torch.tensor(used, dtype=torch.int32)
    table, key_shape = None, (total_k,)
    if page_size:
        columns = -(-max(keys) // page_size)
        table = torch.randint(0, 9, (len(keys), columns), generator=generator, dtype=torch.int32)
        key_shape = (9, page_size)
    sizes = ((total_q, heads, depth), (*key_shape, kv_heads, depth), (*key_shape, kv_heads, depth_v))
    q, k, v, dout = (torch.randn(s, generator=generator).to(dtype) for s in (*sizes, (total_q, heads, depth_v)))
    dlse = torch.randn(heads, total_q, generator=generator)
    sequences = PackedSequences(cu_q, cu_k, max(queries), max(keys), table, used)
    settings = {
        "causal": True, "bias": (1, heads, max(queries), max(keys)), "sinks": (heads,), "softcap": 4.0,
        "dropout_p": 0.1, "seed": 9,
    }  # fmt: skip
    return (dout, dlse, q, k, v), sequences, make_options(settings, depth, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("page_size", [0, 16, 100])
@pytest.mark.parametrize("name", PACKED)
def test_varlen_matches_float64(isa, name, page_size, dtype):
    (dout, dlse, *qkv), sequences, options = packed_case(name, dtype, page_size)

    def forward(q, k, v, options):
        return attention_varlen_reference(q, k, v, sequences, options)

    wide = [x.double() for x in (dout, dlse, *qkv)]
    want = autograd_gradients(forward, *wide[:2], wide[2:], widened(options))
    same = autograd_gradients(forward, dout, dlse, qkv, options)
    out, lse = forward(*qkv, options)
    row = ATTENTION_VARLEN_BWD.choose(Inputs((dout, *qkv)), "cpu")
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(row.run(dout, dlse, *qkv, out, lse, sequences, needing_bias(options)))
    check(results[0], want, same)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
