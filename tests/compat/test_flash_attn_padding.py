"""flash-attn's bert_padding names: packing and unpacking, forward and backward."""

import pytest
import torch

from tpweave.compat.flash_attn import bert_padding
from tpweave.compat.flash_attn.bert_padding import (
    index_first_axis,
    index_first_axis_residual,
    index_put_first_axis,
    pad_input,
    unpad_input,
    unpad_input_for_concatenated_sequences,
)

MASK = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [1, 0, 1, 1]])


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.int32])
@pytest.mark.parametrize("rest", [(), (5,), (2, 3)])
def test_unpad_and_pad(rest, dtype):
    x = torch.randn(3, 4, *rest)
    tokens, indices, offsets, longest, used = unpad_input(x, MASK.to(dtype))
    assert torch.equal(tokens, x[MASK.bool()])
    assert indices.tolist() == [0, 1, 8, 10, 11] and indices.dtype == torch.int64
    assert offsets.tolist() == [0, 2, 2, 5] and offsets.dtype == torch.int32
    assert longest == 3 and isinstance(longest, int)
    assert used.tolist() == [2, 0, 3] and used.dtype == torch.int32
    back = pad_input(tokens, indices, 3, 4)
    assert torch.equal(back[MASK.bool()], x[MASK.bool()]) and (back[~MASK.bool()] == 0).all()


def test_unused_tokens_are_allocated():
    x, unused = torch.randn(3, 4, 2), torch.tensor([[0, 0, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]])
    tokens, indices, offsets, longest, used = unpad_input(x, MASK, unused)
    assert torch.equal(tokens, x[(MASK + unused).bool()]) and len(indices) == 7
    assert offsets.tolist() == [0, 3, 4, 7] and longest == 3 and used.tolist() == [2, 0, 3]


def test_nothing_to_keep():
    tokens, indices, offsets, longest, used = unpad_input(torch.randn(2, 3, 4), torch.zeros(2, 3, dtype=torch.int64))
    assert tokens.shape == (0, 4) and len(indices) == 0 and longest == 0
    assert offsets.tolist() == [0, 0, 0] and used.tolist() == [0, 0]
    assert torch.equal(pad_input(tokens, indices, 2, 3), torch.zeros(2, 3, 4))


def test_several_sequences_in_a_row():
    # The example of flash-attn's documentation.
    lengths = torch.tensor([[2, 3, 0, 0, 0, 0], [3, 2, 0, 0, 0, 0], [6, 0, 0, 0, 0, 0]])
    x = torch.randn(3, 6, 2)
    tokens, indices, offsets, longest = unpad_input_for_concatenated_sequences(x, lengths)
    assert torch.equal(tokens, torch.cat((x[0, :5], x[1, :5], x[2])))
    assert offsets.tolist() == [0, 2, 5, 8, 10, 16] and offsets.dtype == torch.int32 and longest == 6
    assert torch.equal(x.flatten(0, 1)[indices], tokens)


def test_gradients():
    x = torch.randn(6, 2, 3, dtype=torch.float64, requires_grad=True)
    indices = torch.tensor([4, 0, 5])
    torch.autograd.gradcheck(lambda x: index_first_axis(x, indices), x)
    torch.autograd.gradcheck(lambda x: index_first_axis_residual(x, indices), x)
    torch.autograd.gradcheck(lambda x: index_put_first_axis(x, indices, 9), x[:3].detach().requires_grad_())
    padded = torch.randn(3, 4, 2, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda x: pad_input(*unpad_input(x, MASK)[:2], 3, 4), padded)


def test_names_are_the_functions_apply():
    for name, function in (
        ("IndexFirstAxis", index_first_axis),
        ("IndexPutFirstAxis", index_put_first_axis),
        ("IndexFirstAxisResidual", index_first_axis_residual),
    ):
        assert getattr(bert_padding, name).apply == function
