"""Column- and row-parallel linear layers against nn.Linear: even, uneven, empty and replicated parts."""

import pytest
import torch
from torch import nn

import tpweave
from tpweave.layers import ColumnParallelLinear, RowParallelLinear
from tpweave.layers.sharding import Shard
from tpweave.testing import run_ranks


def splits_of(length, size):
    """Even, all on the last rank, and something uneven with an empty part in front."""
    return [None, [0] * (size - 1) + [length], [0, length - (size - 2) * 2, *[2] * (size - 2)]]


def part_of(full, layer, name):
    dim, shard = layer.shards[name]
    start, stop = shard.ranges[layer.group.rank]
    return full.narrow(dim, start, stop - start)


def close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def check_pair(rank, size):
    """up (columns) -> tanh -> down (rows), as in an MLP, and a gathered head."""
    for index, splits in enumerate(splits_of(13, size)):
        torch.manual_seed(index)
        up, down, head = nn.Linear(6, 13), nn.Linear(13, 6), nn.Linear(6, 13, bias=False)
        x = torch.randn(2, 3, 6, requires_grad=True)
        y = down(torch.tanh(up(x)))
        logits = head(y)
        (logits * logits).sum().backward()
        # Made on their own from the same seed, the parallel layers hold slices of the same weights.
        torch.manual_seed(index)
        layers = [
            ColumnParallelLinear(6, 13, splits=splits), RowParallelLinear(13, 6, splits=splits),
            ColumnParallelLinear(6, 13, bias=False, splits=splits, gather_output=True),
        ]  # fmt: skip
        assert torch.equal(torch.randn(2, 3, 6), x.detach()), "the generator is as far as nn.Linear's"
        own = x.detach().clone().requires_grad_()
        got = layers[2](layers[1](torch.tanh(layers[0](own))))
        close(got, logits)
        (got * got).sum().backward()
        close(own.grad, x.grad)
        for layer, linear in zip(layers, (up, down, head), strict=True):
            for name, parameter in linear.named_parameters():
                local = getattr(layer, name)
                sliced = name in layer.shards
                assert torch.equal(local.detach(), part_of(parameter.detach(), layer, name) if sliced else parameter)
                close(local.grad, part_of(parameter.grad, layer, name) if sliced else parameter.grad)
                assert torch.equal(layer.full_parameter(name), parameter)
        with torch.no_grad():
            close(layers[2](layers[1](torch.tanh(layers[0](x)))), logits)


def check_replicas(rank, size):
    """Rows on several ranks: each rank uses its copies, every copy gets the sum of what all of them see."""
    shard = Shard(tuple((min(r, 2), min(r, 2) + 2) for r in range(size)))
    linear = nn.Linear(5, 4 if size > 2 else 3)
    shard = Shard.of(linear.out_features, size, shard, "test")
    for parameter in linear.parameters():
        torch.distributed.broadcast(parameter.data, 0)
    layer = ColumnParallelLinear.from_linear(linear, splits=shard)
    x = torch.arange(10.0).view(2, 5)
    scale = torch.arange(1.0, size + 1)
    (layer(x).sum() * scale[rank]).backward()
    # What the whole layer's gradient is when every rank adds its scale to the rows that it holds.
    weights = torch.zeros(linear.out_features)
    for (start, stop), factor in zip(shard.ranges, scale, strict=True):
        weights[start:stop] += factor
    (linear(x) * weights).sum().backward()
    close(layer.weight.grad, part_of(linear.weight.grad, layer, "weight"))
    close(layer.bias.grad, part_of(linear.bias.grad, layer, "bias"))
    assert torch.equal(layer.full_parameter("weight"), linear.weight)
    with pytest.raises(ValueError, match="overlap"):
        RowParallelLinear.from_linear(nn.Linear(linear.out_features, 2), splits=shard)
    with pytest.raises(ValueError, match="overlap"):
        ColumnParallelLinear.from_linear(linear, splits=shard, gather_output=True)


def check_all(rank, size):
    check_pair(rank, size)
    check_replicas(rank, size)
    with pytest.raises(ValueError, match=rf"cover 9; {size} rank.* cover 13"):
        ColumnParallelLinear(6, 13, splits=[9] + [0] * (size - 1))
    with pytest.raises(ValueError, match="1 parts"):
        RowParallelLinear(13, 6, splits=[13])


@pytest.mark.parametrize("size", [2, 3, 5])
def test_equals_nn_linear(size):
    run_ranks(size, check_all)


def test_one_rank_is_nn_linear():
    linear = nn.Linear(6, 4)
    layer = tpweave.layers.ColumnParallelLinear.from_linear(linear)
    x = torch.randn(3, 6)
    assert torch.equal(layer(x), linear(x))
