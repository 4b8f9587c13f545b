"""ParallelAttention against torch on one rank: any number of heads over any number of ranks."""

import pytest
import torch
from torch import nn

from tpweave.layers import ParallelAttention
from tpweave.layers.heads import HeadSplit
from tpweave.ops.attention import attention
from tpweave.ops.rope import rope
from tpweave.testing import run_ranks

SEQUENCE, HIDDEN, HEAD_DIM = 7, 20, 6


def stock_attention(linears, x, causal, angles, mask):
    q, k, v, o = linears
    shape = (*x.shape[:2], -1, HEAD_DIM)
    queries, keys, values = q(x).view(shape), k(x).view(shape), v(x).view(shape)
    if angles is not None:
        queries, keys = rope(queries, keys, angles.cos(), angles.sin())
    allowed = mask[:, None, None, :]
    if causal:
        allowed = allowed & torch.ones(SEQUENCE, SEQUENCE, dtype=torch.bool).tril()
    out = nn.functional.scaled_dot_product_attention(
        *(t.transpose(1, 2) for t in (queries, keys, values)), attn_mask=allowed, enable_gqa=True
    )
    return o(out.transpose(1, 2).flatten(2))


def check(rank, size, cases):
    for num_q, num_kv, causal, rotary, splits in cases:
        torch.manual_seed(0)
        sizes = [(HIDDEN, num_q * HEAD_DIM), *[(HIDDEN, num_kv * HEAD_DIM)] * 2, (num_q * HEAD_DIM, HIDDEN)]
        linears = [nn.Linear(*shape) for shape in sizes]
        x = torch.randn(2, SEQUENCE, HIDDEN, requires_grad=True)
        mask = torch.ones(2, SEQUENCE, dtype=torch.bool)
        mask[1, -2:] = False
        angles = torch.outer(torch.arange(SEQUENCE), 10.0 ** -torch.arange(HEAD_DIM // 2)) if rotary else None
        want = stock_attention(linears, x, causal, angles, mask)
        want.square().sum().backward()
        layer = ParallelAttention.from_linears(*linears, HEAD_DIM, causal=causal, splits=splits)
        own = x.detach().clone().requires_grad_()
        cos, sin = (None, None) if angles is None else (angles.cos(), angles.sin())
        got = layer(own, cos=cos, sin=sin, mask=mask)
        got.square().sum().backward()
        pairs = [(got, want), (own.grad, x.grad)]
        for linear, part in zip(linears, (layer.q_proj, layer.k_proj, layer.v_proj, layer.o_proj), strict=True):
            for name, parameter in linear.named_parameters():
                grad = parameter.grad
                if name in part.shards:
                    dim, shard = part.shards[name]
                    start, stop = shard.ranges[rank]
                    grad = grad.narrow(dim, start, stop - start)
                pairs.append((getattr(part, name).grad, grad))
        for have, expected in pairs:
            torch.testing.assert_close(have, expected, rtol=1e-4, atol=1e-5, msg=f"{num_q} over {num_kv} on {size}")
        with torch.no_grad():
            torch.testing.assert_close(layer(x, cos=cos, sin=sin, mask=mask), want, rtol=1e-5, atol=1e-5)


# By ranks: (query heads, KV heads, causal, rotary, splits), with replicas, irregular maps, and ranks without heads.
CASES = {
    2: [(4, 2, True, True, None), (5, 5, False, False, None), (6, 1, True, False, [5, 1]), (4, 2, True, False, [4, 0])],
    3: [(8, 4, True, True, None), (6, 2, True, True, None), (5, 5, True, True, [3, 1, 1]), (2, 2, True, True, None)],
    5: [(12, 12, False, False, None), (6, 2, True, True, None), (3, 1, True, False, None)],
}


@pytest.mark.parametrize("size", CASES)
def test_equals_one_rank(size):
    run_ranks(size, check, CASES[size])


def test_same_weights_as_linears_from_the_same_seed():
    torch.manual_seed(0)
    linears = [nn.Linear(24, rows, bias=False) for rows in (24, 12, 12)]
    torch.manual_seed(0)
    layer = ParallelAttention(24, 4, 2)
    for linear, part in zip(linears, (layer.q_proj, layer.k_proj, layer.v_proj), strict=True):
        assert torch.equal(linear.weight, part.weight)


@pytest.mark.parametrize(
    ("num_q", "num_kv", "ranks", "q", "kv", "index"),
    [
        (12, 12, 5, [3, 3, 2, 2, 2], [3, 3, 2, 2, 2], [None] * 5),
        (8, 2, 4, [2, 2, 2, 2], [1, 1, 1, 1], [None] * 4),
        (8, 4, 3, [3, 3, 2], [2, 2, 1], [(0, 0, 1), (0, 1, 1), None]),
        (2, 2, 4, [1, 1, 0, 0], [1, 1, 1, 1], [None] * 4),
    ],
)
def test_heads_are_divided_evenly_and_replicated_where_needed(num_q, num_kv, ranks, q, kv, index):
    split = HeadSplit.make(num_q, num_kv, 8, ranks)
    assert split.q.sizes == q and split.kv.sizes == kv
    assert [split.local(rank).kv_index for rank in range(ranks)] == index


@pytest.mark.parametrize(
    ("make", "seen"),
    [
        (lambda: ParallelAttention(24, 5), "24 is not a multiple of num_heads 5"),
        (lambda: ParallelAttention(24, 6, 4), "6 query heads are not a multiple of 4 KV heads"),
        (lambda: ParallelAttention(24, 4, splits=[3]), "cover 3; 1 rank"),
    ],
)
def test_bad_input_names_the_values(make, seen):
    with pytest.raises(ValueError, match=seen):
        make()


def check_features(rank, size, num_q, num_kv, splits):
    """Sinks, slopes, bias, masks and dropout of each head, with the gradients that sinks and bias get on all ranks."""
    torch.manual_seed(0)
    sizes = [(HIDDEN, num_q * HEAD_DIM), *[(HIDDEN, num_kv * HEAD_DIM)] * 2, (num_q * HEAD_DIM, HIDDEN)]
    linears = [nn.Linear(*shape) for shape in sizes]
    x = torch.randn(2, SEQUENCE, HIDDEN)
    options = {
        "alibi_slopes": torch.rand(num_q), "softcap": 2.0, "window": (4, -1), "dropout_p": 0.3, "seed": 5,
        "mask": torch.rand(2, num_q, SEQUENCE, SEQUENCE) < 0.9,
    }  # fmt: skip
    learned = {"sinks": torch.randn(num_q), "bias": torch.randn(1, num_q, SEQUENCE, SEQUENCE)}
    stock = {name: value.clone().requires_grad_() for name, value in learned.items()}
    own = {name: value.clone().requires_grad_() for name, value in learned.items()}
    q, k, v = (linear(x).view(2, SEQUENCE, -1, HEAD_DIM) for linear in linears[:3])
    want = linears[3](attention(q, k, v, causal=True, **options, **stock).flatten(2))
    want.square().sum().backward()
    layer = ParallelAttention.from_linears(*linears, HEAD_DIM, causal=True, splits=splits)
    got = layer(x, **options, **own)
    got.square().sum().backward()
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    for name, value in own.items():
        torch.testing.assert_close(value.grad, stock[name].grad, rtol=1e-4, atol=1e-5, msg=f"{name} on rank {rank}")


@pytest.mark.parametrize(("size", "splits"), [(2, None), (3, [4, 0, 2])])
def test_features_of_each_head(size, splits):
    run_ranks(size, check_features, 6, 2, splits)
