"""The attention and mask functions given to Transformers against its own sdpa pair, over all kinds of masks."""

import pytest
import torch
from torch import nn

from tpweave.patch import hf
from tpweave.patch.hf_masks import layout_of

HEADS, KV_HEADS, DIM, BATCH = 4, 2, 8, 2


class Core(nn.Module):
    is_causal = True
    num_key_value_groups = HEADS // KV_HEADS


def both(q_length, kv_length, q_offset, kv_offset, padding, window, **mask_options):
    """(ours, sdpa's, rows to compare) for one call; keys after the last query are garbage, as in a static cache."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask, sliding_window_causal_mask_function

    q = torch.randn(BATCH, HEADS, q_length, DIM)
    k, v = (torch.randn(BATCH, KV_HEADS, kv_length, DIM) for _ in range(2))
    options = dict(
        batch_size=BATCH, q_length=q_length, kv_length=kv_length, q_offset=q_offset, kv_offset=kv_offset,
        attention_mask=padding, local_size=window, **mask_options,
    )  # fmt: skip
    if window is not None:
        options["mask_function"] = sliding_window_causal_mask_function(window)
    core, call = Core(), {"scaling": 0.3, "dropout": 0.0}
    ours, _ = hf.attention_forward(core, q, k, v, hf.attention_mask(**options), sliding_window=window, **call)
    whole = sdpa_mask(**{**options, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})
    theirs, _ = sdpa_attention_forward(core, q, k, v, whole, **call)
    return ours, theirs, whole.any(-1)[:, 0]


def left_padding(length, amount):
    padding = torch.ones(BATCH, length, dtype=torch.bool)
    padding[1, :amount] = False
    return padding


# Prefill, decode and continued prefill, with dynamic and static caches: (queries, keys, query offset, key offset).
LENGTHS = [(7, 7, 0, 0), (1, 7, 6, 0), (1, 1, 0, 0), (3, 9, 6, 0), (5, 12, 0, 0), (1, 12, 6, 0), (3, 12, 5, 0)]
LENGTHS += [(2, 5, 9, 6)]


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("window", [None, 3, 100])
@pytest.mark.parametrize("padded", [0, 2, None])
@pytest.mark.parametrize("skip", [True, False])
def test_causal_masks(lengths, window, padded, skip):
    q_length, kv_length, q_offset, kv_offset = lengths
    seen = q_offset + q_length
    padding = None if padded is None else left_padding(seen, padded)
    offset = torch.tensor(q_offset) if kv_length == 12 else q_offset
    ours, theirs, rows = both(q_length, kv_length, offset, kv_offset, padding, window, allow_is_causal_skip=skip)
    torch.testing.assert_close(ours[rows], theirs[rows], rtol=1e-5, atol=1e-5)
    assert ours[~rows].abs().sum() == 0


@pytest.mark.parametrize("padded", [0, 3, None])
def test_bidirectional_masks(padded):
    from transformers.masking_utils import bidirectional_mask_function

    Core.is_causal = False
    try:
        ours, theirs, rows = both(
            6, 6, 0, 0, None if padded is None else left_padding(6, padded), None, allow_is_causal_skip=False,
            allow_is_bidirectional_skip=True, mask_function=bidirectional_mask_function,
        )  # fmt: skip
    finally:
        Core.is_causal = True
    assert rows.all()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_plain_masks_stay_small():
    from transformers.masking_utils import sliding_window_causal_mask_function

    assert hf.attention_mask(BATCH, 7, 7) is None
    padded = hf.attention_mask(BATCH, 7, 7, attention_mask=left_padding(7, 2))
    window = hf.attention_mask(BATCH, 7, 7, mask_function=sliding_window_causal_mask_function(3), local_size=3)
    for mask, layout in ((padded, (-1, 0)), (window, (2, 0))):
        assert mask.shape == (BATCH, 1, 1, 7) and mask.dtype == torch.int32
        for copy in (mask, mask.clone()):
            assert layout_of(copy).window == layout
    assert layout_of(window.clone()).visible is None
    assert torch.equal(layout_of(padded.clone()).visible[:, 0, 0], left_padding(7, 2))
    assert hf.attention_mask(BATCH, 3, 3, mask_function=sliding_window_causal_mask_function(3), local_size=3) is None


@pytest.mark.parametrize("padded", [None, 1, 5])
@pytest.mark.parametrize(
    "lengths", [(7, 7, 0, 0), (9, 9, 0, 0), (1, 7, 6, 0), (1, 12, 8, 0), (4, 12, 0, 0), (2, 9, 7, 0)]
)
def test_chunks_are_told_from_windows(lengths, padded):
    """The mask function alone says what `local_size` means; chunks start after the padding on the left."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import chunked_causal_mask_function, sdpa_mask

    q_length, kv_length, q_offset, kv_offset = lengths
    padding = left_padding(q_offset + q_length, padded or 0)
    q = torch.randn(BATCH, HEADS, q_length, DIM)
    k, v = (torch.randn(BATCH, KV_HEADS, kv_length, DIM) for _ in range(2))
    options = dict(
        batch_size=BATCH, q_length=q_length, kv_length=kv_length, q_offset=q_offset, kv_offset=kv_offset,
        attention_mask=None if padded is None else padding, local_size=3,
        mask_function=chunked_causal_mask_function(3, (~padding).sum(1)),
    )  # fmt: skip
    whole = sdpa_mask(**{**options, "allow_is_causal_skip": False})
    rows = whole.any(-1)[:, 0]
    theirs, _ = sdpa_attention_forward(Core(), q, k, v, whole)
    mask = hf.attention_mask(**options)
    for given in (mask, None if mask is None else mask.clone()):
        ours, _ = hf.attention_forward(Core(), q, k, v, given)
        torch.testing.assert_close(ours[rows], theirs[rows], rtol=1e-5, atol=1e-5)
        assert ours[~rows].abs().sum() == 0


@pytest.mark.parametrize("window", [0, 2, 9])
@pytest.mark.parametrize("padded", [None, 3])
def test_bidirectional_windows(window, padded):
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask, sliding_window_bidirectional_mask_function

    q, k, v = (torch.randn(BATCH, heads, 8, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS))
    options = dict(
        batch_size=BATCH, q_length=8, kv_length=8, attention_mask=None if padded is None else left_padding(8, padded),
        local_size=window, allow_is_causal_skip=False,
        mask_function=sliding_window_bidirectional_mask_function(window),
    )  # fmt: skip
    whole = sdpa_mask(**options, allow_is_bidirectional_skip=False)
    mask = hf.attention_mask(**options, allow_is_bidirectional_skip=True)
    assert mask is None or mask.shape == (BATCH, 1, 1, 8)
    core = Core()
    core.is_causal = False
    theirs, _ = sdpa_attention_forward(core, q, k, v, whole)
    rows = whole.any(-1)[:, 0]
    for given in (mask, None if mask is None else mask.clone()):
        ours, _ = hf.attention_forward(core, q, k, v, given)
        torch.testing.assert_close(ours[rows], theirs[rows], rtol=1e-5, atol=1e-5)


def test_packed_rows_are_recognised_and_whole():
    """The mask itself is what the model may compute with; the layout says the same."""
    from transformers.masking_utils import (
        and_masks,
        causal_mask_function,
        packed_sequence_mask_function,
        sdpa_mask,
        sliding_window_causal_mask_function,
    )  # fmt: skip

    sequence = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1, 2]])
    for base, size in ((causal_mask_function, None), (sliding_window_causal_mask_function(2), 2)):
        options = dict(
            batch_size=BATCH, q_length=7, kv_length=7, local_size=size, allow_is_causal_skip=False,
            mask_function=and_masks(base, packed_sequence_mask_function(sequence)),
        )  # fmt: skip
        mask = hf.attention_mask(**options)
        assert torch.equal(mask, sdpa_mask(**options))
        layout = layout_of(mask)
        assert layout.cu_seqlens.tolist() == [0, 3, 7, 8, 13, 14] and layout.max_length == 5
        assert layout.window == (-1 if size is None else 1, 0) and layout_of(mask.clone()) is None
    # A pattern of another kind, as for the tokens of an image, stays a mask.
    options["mask_function"] = lambda b, h, q, k: (k <= q) | ((q < 4) & (k < 4))
    assert layout_of(hf.attention_mask(**{**options, "local_size": None})) is None


def test_callers_own_masks():
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    q, k, v = (torch.randn(BATCH, heads, 5, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS))
    added = torch.randn(BATCH, 1, 5, 5)
    for mask in (added, added > 0, (added > 0).expand(-1, 1, -1, -1)):
        ours, _ = hf.attention_forward(Core(), q, k, v, mask)
        theirs, _ = sdpa_attention_forward(Core(), q, k, v, mask)
        rows = torch.ones(BATCH, 5, dtype=torch.bool) if mask.dtype != torch.bool else mask.any(-1)[:, 0]
        torch.testing.assert_close(ours[rows], theirs[rows], rtol=1e-5, atol=1e-5)
    for bad in ((added > 0).long(), (added > 0).int(), added[:, 0] > 0):
        with pytest.raises(ValueError, match="attention_mask is"):
            hf.attention_forward(Core(), q, k, v, bad)
