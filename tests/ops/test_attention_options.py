"""attention's options in its definition: against formulas written out by hand, and their gradients in float64."""

import pytest
import torch

import tpweave
from tpweave.reference.ops.attention import dropout_keep
from tpweave.reference.philox import philox

NAMES = ["chunk", "softcap", "alibi", "alibi of batch", "sinks", "bias", "bias of keys", "mask", "dropout", "all"]


def make_options(name, batch, heads, queries, keys, dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=dtype)

    mask = torch.rand(batch, 1, queries, keys, generator=generator) > 0.3
    mask[0, :, 1] = False
    options = {
        "chunk": {"chunk": 3},
        "softcap": {"softcap": 1.5},
        "alibi": {"alibi_slopes": normal(heads).abs().to(torch.float32 if dtype != torch.float64 else dtype)},
        "alibi of batch": {"alibi_slopes": normal(batch, heads).abs().float()},
        "sinks": {"sinks": normal(heads)},
        "bias": {"bias": normal(batch, heads, queries, keys)},
        "bias of keys": {"bias": normal(1, heads, 1, keys)},
        "mask": {"mask": mask},
        "dropout": {"dropout_p": 0.4, "seed": 17},
    }
    options["all"] = {key: value for one in ("softcap", "alibi", "sinks", "bias", "mask", "dropout")
                      for key, value in options[one].items()}  # fmt: skip
    return options[name]


def make_inputs(dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    shapes = ((2, 4, 4, 3), (2, 7, 2, 3), (2, 7, 2, 2))
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]


def by_hand(q, k, v, *, chunk=0, softcap=0.0, alibi_slopes=None, sinks=None, bias=None, mask=None, dropout_p=0.0,
            seed=None):  # fmt: skip
    """One row at a time."""
    batch, queries, heads, depth = q.shape
    keys, kv_heads = k.shape[1:3]
    out, lse = torch.zeros(batch, queries, heads, v.shape[-1], dtype=q.dtype), torch.zeros(batch, heads, queries)
    slopes = None if alibi_slopes is None else alibi_slopes.expand(batch, heads)
    keep = dropout_keep(seed, dropout_p, (batch, heads, queries, keys)) if dropout_p else None
    for b in range(batch):
        for h in range(heads):
            for i in range(queries):
                position = i + keys - queries
                x = k[b, :, h * kv_heads // heads] @ q[b, i, h] / depth**0.5
                if softcap:
                    x = softcap * torch.tanh(x / softcap)
                if slopes is not None:
                    x = x - slopes[b, h] * (torch.arange(keys) - position).abs()
                if bias is not None:
                    x = x + bias.expand(batch, heads, queries, keys)[b, h, i]
                if mask is not None:
                    x[~mask.expand(batch, heads, queries, keys)[b, h, i]] = float("-inf")
                if chunk:
                    x[torch.arange(keys) // chunk != position // chunk] = float("-inf")
                terms = x.exp()
                total = terms.sum() + (0 if sinks is None else sinks[h].exp())
                lse[b, h, i] = total.log()
                if keep is not None:
                    terms = terms * keep[b, h, i] / (1 - dropout_p)
                if total > 0:
                    out[b, i, h] = (terms / total) @ v[b, :, h * kv_heads // heads]
    return out, lse


@pytest.mark.parametrize("name", NAMES)
def test_options_match_formulas(name):
    q, k, v = make_inputs()
    options = make_options(name, 2, 4, 4, 7)
    out, lse = tpweave.attention(q, k, v, return_lse=True, **options)
    want, want_lse = by_hand(q, k, v, **options)
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(lse.float(), want_lse)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_of_options(name):
    inputs = make_inputs()
    options = make_options(name, 2, 4, 4, 7)
    trained = [key for key in ("sinks", "bias") if key in options]
    leaves = [x.requires_grad_() for x in (*inputs, *(options[key] for key in trained))]

    def function(q, k, v, *values):
        given = {**options, **dict(zip(trained, values, strict=True))}
        out, lse = tpweave.attention(q, k, v, causal=name != "chunk", return_lse=True, **given)
        return out, lse.masked_fill(torch.isneginf(lse), 0.0)

    torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("name", ["bias of keys", "dropout", "all"])
def test_compiles_with_options(name):
    torch._dynamo.reset()
    q, k, v = (x.requires_grad_() for x in make_inputs(torch.float32))
    options = make_options(name, 2, 4, 4, 7, torch.float32)
    for key in ("sinks", "bias"):
        if key in options:
            options[key].requires_grad_()

    def function(q, k, v):
        return tpweave.attention(q, k, v, causal=True, return_lse=True, **options)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(q, k, v), function(q, k, v), strict=True):
        assert torch.equal(a, b)


def test_philox_has_the_published_words():
    # The known answers of Random123 (Salmon et al.) for philox4x32-10.
    for counter, key, words in (
        ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, -1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), 0x299F31D0A4093822,
         (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
    ):  # fmt: skip
        got = philox(key, tuple(torch.tensor([c]) for c in counter))
        assert tuple(int(word) for word in got) == words


def test_dropout_counts_batches_and_heads():
    whole = dropout_keep(5, 0.3, (3, 6, 9, 150))
    assert torch.equal(dropout_keep(5, 0.3, (2, 2, 9, 150), first_batch=1, first_head=3), whole[1:, 3:5])
    assert torch.equal(dropout_keep(5, 0.3, (3, 6, 4, 70)), whole[:, :, :4, :70])
    assert abs(whole.float().mean().item() - 0.7) < 0.01
    assert not torch.equal(dropout_keep(6, 0.3, (3, 6, 9, 150)), whole)
    assert dropout_keep(5, 1e-12, (1, 1, 64, 64)).all()


def test_dropout_of_parts_and_seeds():
    q, k, v = (torch.randn(2, 5, 4, 8) for _ in range(3))
    whole = tpweave.attention(q, k, v, dropout_p=0.5, seed=9)
    part = tpweave.attention(q[:, :, 2:], k[:, :, 2:], v[:, :, 2:], dropout_p=0.5, seed=9, head_offset=2)
    assert torch.equal(part, whole[:, :, 2:])
    drawn = []
    for _ in range(2):
        torch.manual_seed(4)
        drawn.append(tpweave.attention(q, k, v, dropout_p=0.5))
    assert torch.equal(*drawn) and not torch.equal(drawn[0], tpweave.attention(q, k, v, dropout_p=0.5))
    assert torch.equal(tpweave.attention(q, k, v, dropout_p=0.5, seed=torch.tensor(9)), whole)
    assert torch.equal(tpweave.attention(q, k, v, dropout_p=1.0), torch.zeros_like(q))


@pytest.mark.parametrize(
    ("options", "seen"),
    [
        ({"chunk": -1}, "chunk is -1"),
        ({"softcap": -2.0}, "softcap is -2.0"),
        ({"softcap": float("nan")}, "softcap is nan"),
        ({"dropout_p": 1.5}, "dropout_p is 1.5"),
        ({"dropout_p": 0.5, "seed": torch.zeros(2)}, r"seed is torch.float32 \(2,\)"),
        ({"alibi_slopes": torch.zeros(3)}, r"alibi_slopes has shape \(3,\); it takes \(4,\) or \(2, 4\)"),
        ({"alibi_slopes": torch.zeros(4, dtype=torch.int64)}, "alibi_slopes is torch.int64"),
        ({"sinks": torch.zeros(2)}, r"sinks is torch.float32 \(2,\); it takes floating-point \(4,\)"),
        ({"bias": torch.zeros(2, 4, 4, 6)}, r"bias has shape \(2, 4, 4, 6\).*\(2, 4, 4, 7\)"),
        ({"bias": torch.ones(2, 4, 4, 7, dtype=torch.bool)}, "bias is torch.bool"),
        ({"mask": torch.ones(2, 4, 4, 7)}, "mask is torch.float32"),
    ],
)
def test_bad_options_are_named(options, seen):
    q, k, v = make_inputs(torch.float32)
    with pytest.raises(ValueError, match=seen):
        tpweave.attention(q, k, v, **options)
