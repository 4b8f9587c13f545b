"""Transformers' own calls of flash-attn run through `flash_attn.install()`: padded, packed, windowed and capped."""

import pytest
import torch

import tpweave
from tpweave.compat import flash_attn

utils = pytest.importorskip("transformers.modeling_flash_attention_utils")


@pytest.fixture
def installed(monkeypatch):
    """Transformers looks for flash-attn's distribution and for a GPU before it imports it, and keeps what it found."""
    flash_attn.install()
    monkeypatch.setattr(utils, "is_flash_attn_2_available", lambda *_, **__: True)
    for name in ("_loaded_implementation", "_flash_fn", "_flash_varlen_fn", "_flash_with_kvcache_fn", "_pad_fn",
                 "_unpad_fn", "_process_flash_kwargs_fn", "_process_with_kvcache_kwargs_fn"):  # fmt: skip
        monkeypatch.setattr(utils, name, None)
    yield
    flash_attn.uninstall()


def make():
    return torch.randn(2, 12, 4, 16), torch.randn(2, 12, 2, 16), torch.randn(2, 12, 2, 16)


def call(q, k, v, mask=None, **settings):
    return utils._flash_attention_forward(
        q, k, v, mask, query_length=q.shape[1], is_causal=True, attn_implementation="flash_attention_2", **settings
    )


def test_padding(installed):
    q, k, v = make()
    mask = torch.ones(2, 12, dtype=torch.int64)
    mask[0, 7:] = 0
    out = call(q, k, v, mask)
    want = tpweave.attention(q, k, v, causal=True)
    torch.testing.assert_close(out[mask.bool()], want[mask.bool()])
    assert (out[~mask.bool()] == 0).all()
    assert utils._flash_varlen_fn is flash_attn.flash_attn_varlen_func


def test_no_padding_with_window_and_softcap(installed):
    q, k, v = make()
    want = tpweave.attention(q, k, v, causal=True, window=(4, 0), softcap=5.0, softmax_scale=0.5)
    torch.testing.assert_close(call(q, k, v, sliding_window=5, softcap=5.0, softmax_scale=0.5), want)


def test_packed_positions(installed):
    q, k, v = (x[:1] for x in make())
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6]])
    out = call(q, k, v, position_ids=positions)
    for part in (slice(0, 5), slice(5, 12)):
        torch.testing.assert_close(out[:, part], tpweave.attention(q[:, part], k[:, part], v[:, part], causal=True))
