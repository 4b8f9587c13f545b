"""Splits and shards."""

import pytest

from tpweave.layers.sharding import Shard, split_sizes


@pytest.mark.parametrize(
    ("length", "parts", "shares", "sizes"),
    [
        (12, 5, None, [3, 3, 2, 2, 2]),
        (2, 4, None, [1, 1, 0, 0]),
        (12, 2, [3, 1], [9, 3]),
        (7, 3, [1, 1, 1], [3, 2, 2]),
        (5, 2, [0, 2], [0, 5]),
        (0, 3, [1, 2, 3], [0, 0, 0]),
        (10, 3, [0.5, 0.25, 0.25], [5, 3, 2]),
    ],
)
def test_split_sizes(length, parts, shares, sizes):
    assert split_sizes(length, parts, shares) == sizes


@pytest.mark.parametrize("shares", [[1], [1, -1], [0, 0]])
def test_bad_shares(shares):
    with pytest.raises(ValueError, match="2 rank"):
        split_sizes(8, 2, shares)


def test_shard():
    shard = Shard.from_sizes([3, 0, 2])
    assert shard.ranges == ((0, 3), (3, 3), (3, 5)) and shard.length == 5 and not shard.has_replicas
    assert shard.scaled(4).sizes == [12, 0, 8]
    assert Shard(((0, 1), (0, 2), (1, 2))).has_replicas
    for bad in (((0, 2), (3, 4)), ((1, 2),), ((0, 2), (2, 1))):
        with pytest.raises(ValueError, match="gap"):
            Shard(bad)
