"""flash-attn's rotary names: values, offsets, packed sequences, what is written in place, gradients."""

import pytest
import torch

from tpweave.compat.flash_attn.layers.rotary import (
    RotaryEmbedding,
    apply_rotary_emb,
    apply_rotary_emb_func,
    apply_rotary_emb_kv_,
    apply_rotary_emb_qkv_,
    apply_rotary_emb_torch,
)
from tpweave.compat.flash_attn.ops.triton.rotary import apply_rotary

ROWS, ANGLES = 40, 6


def tables(seed=0, dtype=torch.float32):
    angles = torch.rand(ROWS, ANGLES, generator=torch.Generator().manual_seed(seed)) * 6.28
    return angles.cos().to(dtype), angles.sin().to(dtype)


def by_hand(x, cos, sin, offsets, interleaved):
    """Each pair of each token turned as a complex number; x [B, S, H, D]."""
    out = x.detach().clone()
    for b in range(x.shape[0]):
        for s in range(x.shape[1]):
            row = s + (offsets if isinstance(offsets, int) else int(offsets[b]))
            if row >= len(cos):
                continue
            for a in range(cos.shape[1]):
                i, j = (2 * a, 2 * a + 1) if interleaved else (a, a + cos.shape[1])
                first, second = x[b, s, :, i], x[b, s, :, j]
                out[b, s, :, i] = first * cos[row, a] - second * sin[row, a]
                out[b, s, :, j] = first * sin[row, a] + second * cos[row, a]
    return out.detach()


OFFSETS = [0, 7, torch.tensor([3, 31], dtype=torch.int32), torch.tensor([0, 36])]


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("offsets", OFFSETS, ids=str)
def test_values_and_gradients(offsets, interleaved):
    cos, sin = tables()
    x = torch.randn(2, 9, 3, 16, requires_grad=True)
    want = by_hand(x, cos, sin, offsets, interleaved)
    out = apply_rotary_emb(x, cos, sin, interleaved, False, offsets)
    torch.testing.assert_close(out, want)
    g = torch.randn_like(out)
    (dx,) = torch.autograd.grad(out, x, g)
    torch.testing.assert_close(dx, by_hand(g, cos, -sin, offsets, interleaved))
    # In place it takes a leaf, as flash-attn does, and gives the same gradient.
    leaf = x.detach().clone().requires_grad_()
    turned = apply_rotary_emb_func(leaf, cos, sin, interleaved=interleaved, inplace=True, seqlen_offsets=offsets)
    assert torch.equal(leaf, out) and torch.equal(turned, out) and turned.data_ptr() == leaf.data_ptr()
    assert torch.equal(torch.autograd.grad(turned, leaf, g)[0], dx)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("interleaved", [False, True])
def test_packed_sequences(interleaved, dtype):
    cos, sin = tables(dtype=dtype)
    lengths = (5, 0, 9, 3)
    cu = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    x = torch.randn(19, 2, 16).to(dtype)  # two tokens of no sequence
    for offsets in (0, 4, torch.tensor([1, 2, 35, 30])):
        out = apply_rotary_emb(x, cos, sin, interleaved, seqlen_offsets=offsets, cu_seqlens=cu, max_seqlen=9)
        for b, part in enumerate(x[:17].split(lengths)):
            offset = offsets if isinstance(offsets, int) else int(offsets[b])
            want = by_hand(part[None].float(), cos.float(), sin.float(), offset, interleaved)[0].to(dtype)
            torch.testing.assert_close(out[cu[b] : cu[b + 1]], want, rtol=1e-2 if dtype != torch.float32 else 1e-5,
                                       atol=1e-2 if dtype != torch.float32 else 1e-5)  # fmt: skip
        assert torch.equal(out[17:], x[17:])
        inplace = x.clone()
        assert apply_rotary(inplace, cos, sin, offsets, cu, 9, interleaved, inplace=True) is inplace
        assert torch.equal(inplace, out)
        back = apply_rotary(out, cos, sin, offsets, cu, 9, interleaved, conjugate=True)
        torch.testing.assert_close(back, x, rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("own_table", [False, True])
def test_queries_and_keys_in_place(grouped, own_table):
    cos, sin = tables()
    cos_k, sin_k = tables(1) if own_table else (None, None)
    shape, heads = ((2, 9, 8, 16), (4, 2, 2)) if grouped else ((2, 9, 3, 4, 16), None)
    qkv = torch.randn(shape, requires_grad=True)
    before = qkv.detach().clone()

    def split(x):
        return x.split(heads, 2) if grouped else x.unbind(2)

    out = apply_rotary_emb_qkv_(qkv, cos, sin, cos_k, sin_k, True, 3, heads[0] if grouped else None)
    assert out.data_ptr() == qkv.data_ptr() and torch.equal(out, qkv)
    key_tables = (cos, sin) if cos_k is None else (cos_k, sin_k)
    for part, old, table in zip(split(out), split(before), ((cos, sin), key_tables, None), strict=True):
        torch.testing.assert_close(part, old if table is None else by_hand(old, *table, 3, True))
    g = torch.randn_like(out)
    (grad,) = torch.autograd.grad(out, qkv, g)
    backwards = ((cos, -sin), (key_tables[0], -key_tables[1]), None)
    for part, old, table in zip(split(grad), split(g), backwards, strict=True):
        torch.testing.assert_close(part, old if table is None else by_hand(old, *table, 3, True))


def test_keys_in_place():
    cos, sin = tables()
    kv = torch.randn(2, 9, 2, 4, 16, requires_grad=True)
    before, offsets = kv.detach().clone(), torch.tensor([2, 5])
    out = apply_rotary_emb_kv_(kv, cos, sin, seqlen_offsets=offsets)
    assert out.data_ptr() == kv.data_ptr()
    torch.testing.assert_close(out[:, :, 0], by_hand(before[:, :, 0], cos, sin, offsets, False))
    assert torch.equal(out[:, :, 1], before[:, :, 1])
    g = torch.randn_like(out)
    (grad,) = torch.autograd.grad(out, kv, g)
    torch.testing.assert_close(grad[:, :, 0], by_hand(g[:, :, 0], cos, -sin, offsets, False))
    assert torch.equal(grad[:, :, 1], g[:, :, 1])


@pytest.mark.parametrize("interleaved", [False, True])
def test_plain_torch_form(interleaved):
    cos, sin = tables()
    x = torch.randn(2, 9, 3, 16)
    want = by_hand(x, cos, sin, 4, interleaved)
    torch.testing.assert_close(apply_rotary_emb_torch(x, cos[4:13], sin[4:13], interleaved), want)
    batched = [t[4:13].expand(2, -1, -1) for t in (cos, sin)]
    torch.testing.assert_close(apply_rotary_emb_torch(x, *batched, interleaved), want)


def test_module_keeps_a_table():
    rotary = RotaryEmbedding(12, base=100.0)
    assert not rotary.state_dict()
    qkv = torch.randn(2, 9, 3, 4, 16)
    angles = torch.outer(torch.arange(14.0), 100.0 ** -(torch.arange(0, 12, 2) / 12))
    want = by_hand(qkv[:, :, 0], angles.cos(), angles.sin(), 5, False)
    out = rotary(qkv.clone(), seqlen_offset=5)
    torch.testing.assert_close(out[:, :, 0], want)
    assert rotary._cos_cached.shape == (14, 6)
    rotary(qkv.clone())
    assert rotary._cos_cached.shape == (14, 6)
    assert rotary(qkv.half())[0].dtype == torch.float16 and rotary._cos_cached.dtype == torch.float16
    q, kv = rotary(qkv[:, :, 0].clone(), qkv[:, :, 1:].clone(), torch.tensor([5, 5]), max_seqlen=14)
    torch.testing.assert_close(q, want, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(kv[:, :, 0], by_hand(qkv[:, :, 1], angles.cos(), angles.sin(), 5, False))
    # A model cast to bf16 still has the angles of fp32.
    cast = RotaryEmbedding(12, base=100.0).bfloat16()
    cast(qkv.clone(), seqlen_offset=5)
    torch.testing.assert_close(cast._sin_cached, angles.sin())


def test_xpos_scales_queries_up_and_keys_down():
    rotary, plain = RotaryEmbedding(16, scale_base=512), RotaryEmbedding(16)
    qkv = torch.randn(1, 30, 3, 2, 16)
    scaled, turned = rotary(qkv.clone()), plain(qkv.clone())
    dots, want = (torch.einsum("bqhd,bkhd->bhqk", x[:, :, 0], x[:, :, 1]) for x in (scaled, turned))
    scale = rotary.scale.repeat(2) ** ((torch.arange(30.0) - 15) / 512)[:, None]
    torch.testing.assert_close(scaled[0, :, 0], turned[0, :, 0] * scale[:, None])
    torch.testing.assert_close(scaled[0, :, 1], turned[0, :, 1] / scale[:, None])
    assert not torch.allclose(dots, want)


@pytest.mark.parametrize(
    ("call", "seen"),
    [
        (lambda c, s: apply_rotary_emb(torch.zeros(1, 41, 2, 16), c, s), "sequences of 41 from position 0"),
        (lambda c, s: apply_rotary_emb(torch.zeros(1, 9, 2, 16), c, s, seqlen_offsets=32), "from position 32"),
        (lambda c, s: apply_rotary_emb(torch.zeros(9, 2, 16), c, s), r"x has shape \(9, 2, 16\)"),
        (lambda c, s: apply_rotary_emb(torch.zeros(1, 9, 2, 8), c, s), "head dim 8"),
        (lambda c, s: apply_rotary_emb(torch.zeros(1, 9, 2, 16), c[None], s[None]), r"cos is \(1, 40, 6\)"),
        (lambda c, s: apply_rotary(torch.zeros(9, 2, 16), c, s, cu_seqlens=torch.tensor([0, 9])), "max_seqlen"),
        (lambda c, s: apply_rotary_emb_qkv_(torch.zeros(1, 9, 8, 16), c, s), "num_heads_q=None"),
        (
            lambda c, s: RotaryEmbedding(8)(torch.zeros(2, 9, 3, 1, 16), seqlen_offset=torch.tensor([1, 2])),
            "max_seqlen",
        ),
    ],
)
def test_bad_input_names_the_values(call, seen):
    with pytest.raises(ValueError, match=seen):
        call(*tables())
