"""The norm layers against torch's, and a norm that sees only a rank's heads."""

import pytest
import torch
from torch import nn

from tpweave.distributed.group import resolve_group
from tpweave.layers import LayerNorm, RMSNorm
from tpweave.testing import run_ranks


@pytest.mark.parametrize(
    ("stock", "layer"),
    [
        (nn.LayerNorm(24), lambda norm: LayerNorm.from_layer_norm(norm)),
        (nn.LayerNorm(24, bias=False), lambda norm: LayerNorm.from_layer_norm(norm)),
        (nn.RMSNorm(24, eps=1e-5), lambda norm: RMSNorm.from_weight(norm.weight, 1e-5)),
    ],
    ids=["layer_norm", "layer_norm without bias", "rms_norm"],
)
def test_equals_torch_and_shares_the_weight(stock, layer):
    nn.init.normal_(stock.weight)
    ours = layer(stock)
    assert ours.weight is stock.weight
    x = torch.randn(2, 5, 24)
    torch.testing.assert_close(ours(x), stock(x), rtol=1e-5, atol=1e-5)


def test_made_on_its_own():
    x = torch.randn(3, 8)
    torch.testing.assert_close(LayerNorm(8)(x), nn.LayerNorm(8)(x))
    torch.testing.assert_close(RMSNorm(8, eps=1e-5)(x), nn.RMSNorm(8, eps=1e-5)(x))


def test_two_normalised_dims_are_refused():
    with pytest.raises(ValueError, match="one normalised dimension"):
        LayerNorm.from_layer_norm(nn.LayerNorm((3, 4)))


def check_head_norm(rank, size):
    torch.manual_seed(0)
    x, factor = torch.randn(4, 5, 8), torch.randn(4, 5, 8)
    stock = nn.RMSNorm(8, eps=1e-6)
    (stock(x) * factor).sum().backward()
    norm = RMSNorm(8, sum_gradients_over=resolve_group())
    heads = [slice(0, 2), slice(2, 5), slice(5, 5)][rank]
    (norm(x[:, heads]) * factor[:, heads]).sum().backward()
    torch.testing.assert_close(norm.weight.grad, stock.weight.grad, rtol=1e-5, atol=1e-5)


def test_a_head_norm_gets_the_whole_gradient():
    run_ranks(3, check_head_norm)
