"""The Triton rows of attention and attention_varlen in the interpreter: outputs and gradients against float64."""

import pytest
import torch

import tpweave
from tpweave.reference.ops.attention import dropout_keep
from tpweave.verification import Check, outputs_and_gradients, run_check

pytest.importorskip("triton")

# name: (B, Sq, Sk, Hq, Hkv, D, Dv), options; numbers in place of tensors are made by `draw_options`
CASES = {
    "full": ((2, 37, 70, 1, 1, 16, 16), {}),
    "one query": ((2, 1, 130, 4, 2, 24, 16), {"causal": True}),
    "one key": ((1, 3, 1, 1, 1, 1, 1), {}),
    "causal": ((1, 70, 130, 4, 2, 24, 40), {"causal": True}),
    "more queries than keys": ((1, 100, 70, 1, 1, 16, 16), {"causal": True}),
    "window": ((1, 70, 200, 1, 1, 16, 16), {"window": (70, 3)}),
    "window of one": ((1, 70, 70, 1, 1, 16, 16), {"window": (0, 0)}),
    "chunk": ((1, 130, 90, 1, 1, 16, 16), {"chunk": 48}),
    "softcap": ((1, 33, 70, 2, 1, 16, 16), {"softcap": 2.0, "causal": True}),
    "alibi": ((2, 33, 70, 2, 1, 16, 16), {"alibi_slopes": (2, 2)}),
    "sinks": ((1, 70, 40, 2, 2, 16, 16), {"sinks": (2,), "causal": True}),
    "bias": ((2, 33, 70, 2, 1, 16, 16), {"bias": (2, 2, 33, 70), "causal": True}),
    "bias of keys": ((2, 40, 70, 2, 1, 16, 16), {"bias": (1, 2, 1, 70)}),
    "bias of queries": ((2, 40, 70, 2, 1, 16, 16), {"bias": (2, 1, 40, 1), "causal": True}),
    "mask": ((2, 33, 70, 2, 1, 16, 16), {"mask": (2, 1, 33, 70)}),
    "padding": ((2, 33, 70, 2, 1, 16, 16), {"mask": (2, 70)}),
    "dropout": ((2, 33, 140, 2, 1, 16, 16), {"dropout_p": 0.3, "seed": 2**45 + 77, "head_offset": 3}),
    "all dropped": ((1, 3, 9, 1, 1, 16, 16), {"dropout_p": 1.0, "seed": -1}),
    "most": (
        (1, 40, 70, 2, 1, 20, 33),
        {
            "causal": True, "window": (60, -1), "softcap": 5.0, "alibi_slopes": (2,), "sinks": (2,),
            "bias": (1, 2, 40, 70), "mask": (1, 1, 1, 70), "dropout_p": 0.2, "seed": 11,
        },
    ),
}  # fmt: skip
HALF_CASES = ("causal", "most")
# queries and keys of each sequence
LENGTHS = ((1, 33, 0, 5), (9, 70, 4, 0))
VARLEN_CASES = {
    "causal": {"causal": True},
    "most": {
        "window": (40, 5), "softcap": 4.0, "alibi_slopes": (4, 2), "sinks": (2,), "bias": (4, 2, 33, 70),
        "mask": (4, 1, 1, 70), "dropout_p": 0.2, "seed": 11,
    },
    "pages": {"causal": True, "page_size": 7},
    "used keys of pages": {"causal": True, "page_size": 16, "seqused_k": (9, 50, 0, 0), "sinks": (2,)},
}  # fmt: skip
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def draw_options(draw, settings):
    """The tensors of `settings` by name, random, and what is no tensor."""
    tensors, rest = {}, {}
    for name, value in settings.items():
        if name == "mask":
            tensors[name] = draw.integers(4, *value) > 0
        elif name == "alibi_slopes":
            tensors[name] = draw.normal(*value).abs().float()
        elif name in ("sinks", "bias"):
            tensors[name] = draw.normal(*value)
        else:
            rest[name] = value
    return tensors, rest


def dense_check(name):
    (batch, queries, keys, heads, kv_heads, depth, depth_v), settings = CASES[name]

    def make(draw):
        q, k, v = (
            draw.normal(batch, s, h, d)
            for s, h, d in ((queries, heads, depth), (keys, kv_heads, depth), (keys, kv_heads, depth_v))
        )
        tensors, _ = draw_options(draw, settings)
        return q, k, v, *tensors.values()

    def call(inputs, backend, group):
        names = [n for n in settings if n in ("mask", "alibi_slopes", "sinks", "bias")]
        given = {**settings, **dict(zip(names, inputs[3:], strict=True))}
        if "alibi_slopes" in given:
            given["alibi_slopes"] = given["alibi_slopes"].detach()
        return tpweave.attention(*inputs[:3], return_lse=True, backend=backend, **given)

    return Check("attention", name, make, call)


def varlen_check(name):
    settings = dict(VARLEN_CASES[name])
    page_size = settings.pop("page_size", None)
    cu_q, cu_k = (torch.tensor((first, *n)).cumsum(0).to(torch.int32) for first, n in zip((2, 1), LENGTHS, strict=True))

    def make(draw):
        q = draw.normal(43, 2, 24)
        if page_size is None:
            k, v = draw.normal(86, 1, 24), draw.normal(86, 1, 16)
        else:
            k, v = draw.normal(24, page_size, 1, 24), draw.normal(24, page_size, 1, 16)
        return q, k, v, *draw_options(draw, settings)[0].values()

    def call(inputs, backend, group):
        names = [n for n in settings if n in ("mask", "alibi_slopes", "sinks", "bias")]
        given = {**settings, **dict(zip(names, inputs[3:], strict=True))}
        if "alibi_slopes" in given:
            given["alibi_slopes"] = given["alibi_slopes"].detach()
        if "seqused_k" in given:
            given["seqused_k"] = torch.tensor(given["seqused_k"], dtype=torch.int32)
        if page_size is not None:
            # The first two sequences share a page.
            table = torch.arange(44, dtype=torch.int32).view(4, 11).remainder(23)
            table[1, 0] = table[0, 0]
            given["block_table"] = table.t().contiguous().t()
        return tpweave.attention_varlen(
            *inputs[:3], cu_q, cu_k, 33, 70, return_lse=True, backend=backend, **given
        )  # fmt: skip

    return Check("attention_varlen", name, make, call)


def assert_ok(result):
    assert result.status == "ok", f"{result.case}: {result.reason}"


@pytest.mark.parametrize("name", CASES)
def test_fp32_matches_float64(name):
    assert_ok(run_check(dense_check(name), "triton", "cpu", torch.float32))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("name", HALF_CASES)
def test_half_matches_float64(name, dtype):
    assert_ok(run_check(dense_check(name), "triton", "cpu", dtype))


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("name", VARLEN_CASES)
def test_packed_sequences_match_float64(name, dtype):
    assert_ok(run_check(varlen_check(name), "triton", "cpu", dtype))


@pytest.mark.parametrize("block_n", [32, 64, 128])
def test_dropout_does_not_depend_on_tiles(monkeypatch, block_n):
    from tpweave.kernels.ops import attention
    from tpweave.kernels.primitives.attention_tiles import Tiles

    monkeypatch.setattr(attention, "forward_tiles", lambda *_, **__: Tiles(16, block_n, 4, 1))
    # With one-hot values, what was dropped can be read from the result.
    q, k, v = torch.zeros(1, 17, 2, 4), torch.zeros(1, 150, 2, 4), torch.eye(150)[None, :, None].repeat(1, 1, 2, 1)
    out = tpweave.attention(q, k, v, dropout_p=0.5, seed=-7, backend="triton")
    assert torch.equal(out.transpose(1, 2) > 0, dropout_keep(-7, 0.5, (1, 2, 17, 150)))


def test_hidden_tiles_are_not_read():
    # Keys that no query sees, and queries that see no key, may hold anything.
    q, k, v = torch.randn(1, 70, 1, 16), torch.randn(1, 200, 1, 16), torch.randn(1, 200, 1, 16)
    clean = tpweave.attention(q, k, v, causal=True, window=(5, -1), backend="triton")
    for x in (k, v):
        x[:, :64] = float("nan")
    assert torch.equal(tpweave.attention(q, k, v, causal=True, window=(5, -1), backend="triton"), clean)


@pytest.mark.parametrize("shape", [(0, 5, 5), (2, 0, 5), (2, 5, 0)])
def test_empty(shape):
    batch, queries, keys = shape
    leaves = [torch.randn(batch, s, 2, 16, requires_grad=True) for s in (queries, keys, keys)]
    sinks = torch.randn(2, requires_grad=True)
    out, lse = tpweave.attention(*leaves, sinks=sinks, return_lse=True, backend="triton")
    assert torch.equal(out, torch.zeros(batch, queries, 2, 16))
    if keys == 0:
        torch.testing.assert_close(lse, sinks.detach()[:, None].expand_as(lse))
        (dsinks,) = torch.autograd.grad(lse.sum(), sinks)
        torch.testing.assert_close(dsinks, torch.full((2,), float(batch * queries)))
    for grad in torch.autograd.grad(tpweave.attention(*leaves, backend="triton").sum(), leaves):
        assert torch.count_nonzero(grad) == 0


def test_any_strides_and_repeats_are_bit_equal():
    check = dense_check("causal")
    inputs = [torch.randn(1, s, h, d) for s, h, d in ((70, 4, 24), (130, 2, 24), (130, 2, 40))]
    first = outputs_and_gradients(check, inputs, "triton")
    strided = [
        inputs[0].transpose(1, 2).contiguous().transpose(1, 2),
        torch.cat((inputs[1], inputs[1]), -1)[..., :24],
        torch.stack((inputs[2], inputs[2]), -1).flatten(-2)[..., ::2],
    ]
    for again in (inputs, strided):
        for a, b in zip(first, outputs_and_gradients(check, again, "triton"), strict=True):
            assert torch.equal(a, b)


def test_extreme_scores():
    q, k, v = (torch.randn(1, 40, 1, 16) * 100 for _ in range(3))
    bias = torch.zeros(1, 1, 40, 40)
    bias[..., 7:, :5], bias[..., 3, :] = -1e4, float("-inf")
    out, lse = tpweave.attention(q, k, v, bias=bias, return_lse=True, backend="triton")
    want, want_lse = tpweave.attention(*(x.double() for x in (q, k, v)), bias=bias.double(), return_lse=True)
    torch.testing.assert_close(out.double(), want, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-5, atol=1e-3)
    assert torch.equal(out[:, 3], torch.zeros_like(out[:, 3])) and torch.isneginf(lse[..., 3]).all()
