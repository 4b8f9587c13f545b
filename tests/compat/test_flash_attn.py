"""tpweave.compat.flash_attn: flash-attn 2.8's names, order of arguments and results, on tpweave's values."""

import importlib
import inspect
import subprocess
import sys

import pytest
import torch

import tpweave
from tpweave.compat import flash_attn
from tpweave.compat.flash_attn import flash_attn_interface
from tpweave.reference.ops.attention import dropout_keep

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
OPTIONS = (
    "dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, "
    "deterministic=False, return_attn_probs=False"
)
OFFSETS = "cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k"
# Every name that code written for flash-attn 2.8 calls, with its parameters in order and their defaults.
SIGNATURES = {
    "flash_attn_func": f"q, k, v, {OPTIONS}",
    "flash_attn_kvpacked_func": f"q, kv, {OPTIONS}",
    "flash_attn_qkvpacked_func": f"qkv, {OPTIONS}",
    "flash_attn_varlen_func": f"q, k, v, {OFFSETS}, {OPTIONS}, block_table=None",
    "flash_attn_varlen_kvpacked_func": f"q, kv, {OFFSETS}, {OPTIONS}",
    "flash_attn_varlen_qkvpacked_func": f"qkv, cu_seqlens, max_seqlen, {OPTIONS}",
    "flash_attn_with_kvcache": (
        "q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None, "
        "cache_batch_idx=None, cache_leftpad=None, block_table=None, softmax_scale=None, causal=False, "
        "window_size=(-1, -1), softcap=0.0, rotary_interleaved=True, alibi_slopes=None, num_splits=0, "
        "return_softmax_lse=False"
    ),
    "flash_attn_interface._get_block_size_n": "device, head_dim, is_dropout, is_causal",
    "flash_attn_interface.round_multiple": "x, m",
    "flash_attn_interface.maybe_contiguous": "x",
    "bert_padding.unpad_input": "hidden_states, attention_mask, unused_mask=None",
    "bert_padding.unpad_input_for_concatenated_sequences": "hidden_states, attention_mask_in_length",
    "bert_padding.pad_input": "hidden_states, indices, batch, seqlen",
    "layers.rotary.rotate_half": "x, interleaved=False",
    "layers.rotary.apply_rotary_emb_torch": "x, cos, sin, interleaved=False",
    "layers.rotary.apply_rotary_emb": (
        "x, cos, sin, interleaved=False, inplace=False, seqlen_offsets=0, cu_seqlens=None, max_seqlen=None"
    ),
    "layers.rotary.apply_rotary_emb_func": (
        "x, cos, sin, interleaved=False, inplace=False, seqlen_offsets=0, cu_seqlens=None, max_seqlen=None"
    ),
    "layers.rotary.apply_rotary_emb_qkv_": (
        "qkv, cos, sin, cos_k=None, sin_k=None, interleaved=False, seqlen_offsets=0, num_heads_q=None"
    ),
    "layers.rotary.apply_rotary_emb_kv_": "kv, cos, sin, interleaved=False, seqlen_offsets=0",
    "layers.rotary.RotaryEmbedding": "dim, base=10000.0, interleaved=False, scale_base=None, device=None",
    "layers.rotary.RotaryEmbedding.forward": "self, qkv, kv=None, seqlen_offset=0, max_seqlen=None, num_heads_q=None",
    "ops.triton.rotary.apply_rotary": (
        "x, cos, sin, seqlen_offsets=0, cu_seqlens=None, max_seqlen=None, interleaved=False, inplace=False, "
        "conjugate=False"
    ),
}


def find(path):
    value = flash_attn
    for part in path.split("."):
        value = importlib.import_module(f"{value.__name__}.{part}") if inspect.ismodule(value) and (
            not hasattr(value, part)
        ) else getattr(value, part)  # fmt: skip
    return value


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature_is_flash_attns(name):
    parameters = inspect.signature(find(name)).parameters.values()
    assert all(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters)
    found = [p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in parameters]
    assert ", ".join(found) == SIGNATURES[name]


def test_version_is_of_the_interface():
    assert flash_attn.__version__.startswith("2.8.")


def make(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype).requires_grad_()


def offsets(*lengths):
    return torch.tensor((0, *lengths)).cumsum(0).to(torch.int32)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_dense_functions_are_one(dtype):
    qkv = make(2, 20, 3, 4, 16, dtype=dtype)
    slopes = torch.rand(2, 4)
    q, k, v = qkv.detach().unbind(2)
    want, want_lse = tpweave.attention(
        q, k, v, softmax_scale=0.3, causal=True, window=(5, 0), softcap=3.0, alibi_slopes=slopes, return_lse=True
    )
    # By position, from dropout_p to return_attn_probs.
    options = (0.0, 0.3, True, (5, 2), 3.0, slopes, True, True)
    for out, lse, probs in (
        flash_attn.flash_attn_qkvpacked_func(qkv, *options),
        flash_attn.flash_attn_kvpacked_func(qkv[:, :, 0], qkv[:, :, 1:], *options),
        flash_attn.flash_attn_func(*qkv.unbind(2), *options),
    ):
        assert torch.equal(out, want) and torch.equal(lse, want_lse)
        assert lse.shape == (2, 4, 20) and lse.dtype == torch.float32
        assert probs.numel() == 0 and probs.dtype == dtype
        (grad,) = torch.autograd.grad(out.float().square().sum(), qkv, retain_graph=True)
        assert grad.shape == qkv.shape and grad.dtype == dtype and grad.abs().max() > 0
    alone = flash_attn.flash_attn_func(*qkv.unbind(2), *options[:-1])
    assert torch.is_tensor(alone) and torch.equal(alone, want)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_varlen_functions_are_one(dtype):
    qkv, cu = make(33, 3, 4, 16, dtype=dtype), offsets(5, 0, 28)
    slopes = torch.rand(4)
    q, k, v = qkv.detach().unbind(1)
    want, want_lse = tpweave.attention_varlen(
        q, k, v, cu, cu, 28, 28, causal=True, softcap=3.0, alibi_slopes=slopes, return_lse=True
    )
    options = (0.0, None, True, (-1, -1), 3.0, slopes, False, True)
    for out, lse, probs in (
        flash_attn.flash_attn_varlen_qkvpacked_func(qkv, cu, 28, *options),
        flash_attn.flash_attn_varlen_kvpacked_func(qkv[:, 0], qkv[:, 1:], cu, cu, 28, 28, *options),
        flash_attn.flash_attn_varlen_func(*qkv.unbind(1), cu, cu, 28, 28, *options),
    ):
        assert torch.equal(out, want) and torch.equal(lse, want_lse)
        assert lse.shape == (4, 33) and lse.dtype == torch.float32 and probs.numel() == 0
        (grad,) = torch.autograd.grad(out.float().square().sum(), qkv, retain_graph=True)
        assert grad.shape == qkv.shape and grad.abs().max() > 0


def test_varlen_takes_pages():
    q, pages = make(9, 4, 16).detach(), make(6, 4, 2, 16, seed=1).detach()
    table = torch.tensor([[5, 0], [2, 3]], dtype=torch.int32)
    out = flash_attn.flash_attn_varlen_func(
        q, pages, pages, offsets(4, 5), offsets(6, 8), 5, 8, causal=True, block_table=table
    )
    keys = pages[table.long()].flatten(1, 2)
    for rows, b, n in ((slice(0, 4), 0, 6), (slice(4, 9), 1, 8)):
        want = flash_attn.flash_attn_func(q[None, rows], keys[b : b + 1, :n], keys[b : b + 1, :n], causal=True)
        torch.testing.assert_close(out[rows], want[0])
    torch.manual_seed(1)
    _, _, probs = flash_attn.flash_attn_varlen_func(
        q, pages, pages, offsets(4, 5), offsets(6, 8), 5, 8, 0.5, block_table=table, return_attn_probs=True
    )
    assert probs.shape == (2, 4, 128, 128) and (probs[0, :, :, 6:] == 0).all() and (probs[0, :, :4, :6] != 0).all()


def test_the_documented_masks():
    # Causal is aligned bottom right; rows without keys are 0 and -inf.
    for queries, keys, seen in (
        (2, 5, [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]),
        (5, 2, [[0, 0], [0, 0], [0, 0], [1, 0], [1, 1]]),
    ):
        q, k = torch.zeros(1, queries, 1, 8), torch.zeros(1, keys, 1, 8)
        v = torch.eye(keys, 8).view(1, keys, 1, 8)
        out, lse, _ = flash_attn.flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
        seen = torch.tensor(seen)
        assert torch.equal((out[0, :, 0, :keys] > 0).int(), seen.int())
        assert torch.equal(torch.isneginf(lse[0, 0]), seen.sum(-1) == 0)
    # Query i sees the keys [i + Sk - Sq - left, i + Sk - Sq + right]; a window may be a tensor, as in its tests.
    q, k, v = torch.zeros(1, 3, 1, 8), torch.zeros(1, 6, 1, 8), torch.eye(6, 8).view(1, 6, 1, 8)
    out = flash_attn.flash_attn_func(q, k, v, window_size=torch.tensor([2, 1]))
    assert [row.nonzero().flatten().tolist() for row in out[0, :, 0]] == [[1, 2, 3, 4], [2, 3, 4, 5], [3, 4, 5]]
    assert torch.equal(flash_attn.flash_attn_func(q, k, v, window_size=(-7, -3)), flash_attn.flash_attn_func(q, k, v))


def test_query_heads_share_kv_heads():
    q, k, v = make(1, 6, 6, 8), make(1, 7, 2, 8, seed=1), make(1, 7, 2, 8, seed=2)
    out = flash_attn.flash_attn_func(q, k, v)
    spread = [x.repeat_interleave(3, 2) for x in (k, v)]
    torch.testing.assert_close(out, flash_attn.flash_attn_func(q, *spread))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_s_dmask_holds_the_dropout(causal, packed):
    lengths, longest = ((20, 100), (70, 170)), (100, 170)
    q, k, v = make(120, 4, 16), make(240, 2, 16, seed=1), make(240, 2, 16, seed=2)
    torch.manual_seed(3)
    if packed:
        out, lse, probs = flash_attn.flash_attn_varlen_func(
            q, k, v, offsets(*lengths[0]), offsets(*lengths[1]), *longest, 0.3, causal=causal, return_attn_probs=True
        )
    else:
        out, lse, probs = flash_attn.flash_attn_func(
            q[None, :100], k[None, :170], v[None, :170], 0.3, causal=causal, return_attn_probs=True
        )
        lengths, out, lse = ((100,), (170,)), out[0], lse[0]
    assert probs.shape == (len(lengths[0]), 4, 128, 256) and probs.dtype == q.dtype
    torch.manual_seed(3)
    seed = torch.randint(2**62, (1,))
    q_begin = k_begin = 0
    for b, (queries, keys) in enumerate(zip(*lengths, strict=True)):
        rows, cols = slice(q_begin, q_begin + queries), slice(k_begin, k_begin + keys)
        q_begin, k_begin = rows.stop, cols.stop
        part = probs[b, :, :queries, :keys]
        scores = torch.einsum("qhd,khd->hqk", q[rows], k[cols].repeat_interleave(2, 1)) / 4
        hidden = torch.ones(queries, keys, dtype=torch.bool).triu(keys - queries + 1) & torch.tensor(causal)
        scores = scores.masked_fill(hidden, float("-inf"))
        assert (part[hidden.expand_as(part)] == 0).all()
        kept = dropout_keep(seed, 0.3, (1, 4, queries, keys), first_batch=b)[0]
        assert torch.equal(part > 0, kept & ~hidden) and torch.equal(part < 0, ~kept & ~hidden)
        # Blocks of keys from the last to the first, each relative to the largest score so far.
        size = flash_attn_interface._get_block_size_n("cpu", 16, True, causal)
        for begin in range(0, keys, size):
            top = scores[:, :, begin:].amax(-1, keepdim=True)
            want = torch.where(top == float("-inf"), 0.0, torch.exp(scores - top))[:, :, begin : begin + size]
            torch.testing.assert_close(part[:, :, begin : begin + size].abs(), want)
        weights = torch.exp(scores - lse[:, rows, None]).nan_to_num(0.0) * kept / 0.7
        want = torch.einsum("hqk,khd->qhd", weights, v[cols].repeat_interleave(2, 1))
        torch.testing.assert_close(out[rows], want, rtol=1e-4, atol=1e-5)


def test_dropout_follows_torchs_seed():
    q, k, v = (make(2, 40, 2, 8, seed=s) for s in range(3))
    found = []
    for _ in range(2):
        torch.manual_seed(7)
        out = flash_attn.flash_attn_func(q, k, v, 0.5)
        found.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert not torch.equal(found[0][0], flash_attn.flash_attn_func(q, k, v, 0.5))


def test_install_gives_the_names_and_takes_them_back():
    code = """
import importlib.util, sys
from tpweave.compat import flash_attn as ours
before = set(sys.modules)
ours.install()
ours.install()
import flash_attn, flash_attn.flash_attn_interface as interface
from flash_attn import flash_attn_func
from flash_attn.bert_padding import index_first_axis, pad_input, unpad_input
from flash_attn.layers.rotary import RotaryEmbedding, apply_rotary_emb
from flash_attn.ops.triton.rotary import apply_rotary
assert flash_attn is ours and flash_attn_func is interface.flash_attn_func is ours.flash_attn_func
assert importlib.util.find_spec("flash_attn") is not None
ours.uninstall()
ours.uninstall()
assert not [name for name in sys.modules if name.partition(".")[0] == "flash_attn"]
assert importlib.util.find_spec("flash_attn") is None
assert "tpweave.compat.flash_attn.bert_padding" in sys.modules
sys.modules["flash_attn"] = importlib.util.module_from_spec(importlib.machinery.ModuleSpec("flash_attn", None))
try:
    ours.install()
except RuntimeError as error:
    assert "already" in str(error)
else:
    raise SystemExit("installed over another flash_attn")
ours.uninstall()
assert "flash_attn" in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_bad_input_is_a_value_error():
    q, k = torch.zeros(1, 3, 4, 8), torch.zeros(1, 3, 3, 8)
    with pytest.raises(ValueError, match="4 query heads on 3 KV heads"):
        flash_attn.flash_attn_func(q, k, k)
    with pytest.raises(ValueError, match="ends at 9"):
        flash_attn.flash_attn_varlen_func(q[0], q[0], q[0], offsets(9), offsets(3), 9, 3)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
def test_cache_is_appended_to_turned_and_read(causal, interleaved):
    q, k, v = make(2, 3, 4, 16).detach(), make(2, 3, 2, 16, seed=1).detach(), make(2, 3, 2, 16, seed=2).detach()
    k_cache, v_cache = make(2, 30, 2, 16, seed=3).detach(), make(2, 30, 2, 16, seed=4).detach()
    lengths, angles = torch.tensor([7, 20], dtype=torch.int32), torch.outer(torch.arange(30.0), torch.rand(8))
    cos, sin = angles.cos(), angles.sin()
    slopes = torch.rand(2, 4)
    before = k_cache.clone()
    # By position, up to num_splits and return_softmax_lse.
    out, lse = flash_attn.flash_attn_with_kvcache(
        q, k_cache, v_cache, k, v, cos, sin, lengths, None, None, None, 0.3, causal, (-1, -1), 2.0, interleaved,
        slopes, 0, True,
    )  # fmt: skip
    turn = find("layers.rotary.apply_rotary_emb")
    if causal:
        q = turn(q, cos, sin, interleaved, seqlen_offsets=lengths)
    else:
        turned = [turn(q[:, i : i + 1], cos, sin, interleaved, seqlen_offsets=lengths) for i in range(3)]
        q = torch.cat(turned, 1)
    k = turn(k, cos, sin, interleaved, seqlen_offsets=lengths)
    assert lse.shape == (2, 4, 3) and lse.dtype == torch.float32
    for b, n in enumerate(lengths.tolist()):
        torch.testing.assert_close(k_cache[b, n : n + 3], k[b])
        assert torch.equal(v_cache[b, n : n + 3], v[b]) and torch.equal(k_cache[b, :n], before[b, :n])
        assert torch.equal(k_cache[b, n + 3 :], before[b, n + 3 :])
        want, want_lse, _ = flash_attn.flash_attn_func(
            q[b : b + 1], k_cache[b : b + 1, : n + 3], v_cache[b : b + 1, : n + 3], 0.0, 0.3, causal, softcap=2.0,
            alibi_slopes=slopes[b : b + 1], return_attn_probs=True,
        )  # fmt: skip
        torch.testing.assert_close(out[b : b + 1], want, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(lse[b : b + 1], want_lse, rtol=1e-4, atol=1e-5)


def test_cache_lengths_pages_and_entries():
    q = make(2, 1, 4, 16).detach()
    k_cache, v_cache = make(3, 24, 2, 16, seed=3).detach(), make(3, 24, 2, 16, seed=4).detach()
    call = flash_attn.flash_attn_with_kvcache
    want = flash_attn.flash_attn_func(q, k_cache[:2, :9], v_cache[:2, :9])
    torch.testing.assert_close(call(q, k_cache, v_cache, cache_seqlens=9), want)
    torch.testing.assert_close(call(q, k_cache[:2, :9], v_cache[:2, :9]), want)
    entries = torch.tensor([2, 0], dtype=torch.int32)
    picked = [x[entries.long()] for x in (k_cache, v_cache)]
    torch.testing.assert_close(
        call(q, k_cache, v_cache, cache_batch_idx=entries, window_size=(5, -1)),
        flash_attn.flash_attn_func(q, *picked, window_size=(5, -1)),
    )
    leftpad = torch.tensor([4, 11], dtype=torch.int32)
    out = call(q, k_cache, v_cache, cache_seqlens=20, cache_leftpad=leftpad, causal=True)
    for b, first in enumerate(leftpad.tolist()):
        part = [x[b : b + 1, first:20] for x in (k_cache, v_cache)]
        torch.testing.assert_close(out[b : b + 1], flash_attn.flash_attn_func(q[b : b + 1], *part, causal=True))
    pages = [x.view(12, 6, 2, 16) for x in (k_cache, v_cache)]
    table = torch.tensor([[0, 1, 2, 3], [4, 5, 6, 7]], dtype=torch.int32)
    torch.testing.assert_close(
        call(q, *pages, cache_seqlens=21, block_table=table),
        flash_attn.flash_attn_func(q, k_cache[:2, :21], v_cache[:2, :21]),
    )
