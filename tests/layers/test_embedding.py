"""The vocabulary-parallel embedding against nn.Embedding."""

import pytest
import torch
from torch import nn

from tpweave.layers import VocabParallelEmbedding
from tpweave.testing import run_ranks


def check(rank, size):
    for splits in (None, [0] * (size - 1) + [17]):
        torch.manual_seed(0)
        stock = nn.Embedding(17, 6, padding_idx=3)
        ids = torch.tensor([[0, 3, 16, 5], [8, 8, 3, 11]])
        factor = torch.randn(2, 4, 6)
        torch.manual_seed(0)
        layer = VocabParallelEmbedding(17, 6, padding_idx=3, splits=splits)
        assert torch.equal(layer(ids), stock(ids)), "one term of each sum is not zero: the same bits"
        (stock(ids) * factor).sum().backward()
        (layer(ids) * factor).sum().backward()
        start, stop = layer.shard.ranges[rank]
        torch.testing.assert_close(layer.weight.grad, stock.weight.grad[start:stop])
        assert torch.equal(layer.full_parameter("weight"), stock.weight)
        assert layer(ids[:, :0]).shape == (2, 0, 6)
    for bad in (-1, 17):
        with pytest.raises(ValueError, match=rf"{bad}.*\[0, 17\)"):
            layer(torch.tensor([4, bad]))


@pytest.mark.parametrize("size", [2, 3])
def test_equals_nn_embedding(size):
    run_ranks(size, check)


@pytest.mark.parametrize("option", [{"max_norm": 1.0}, {"sparse": True}, {"scale_grad_by_freq": True}])
def test_refuses_what_it_does_not_do(option):
    with pytest.raises(ValueError, match="max_norm"):
        VocabParallelEmbedding.from_embedding(nn.Embedding(4, 2, **option))
