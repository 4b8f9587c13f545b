"""ParallelMLP against the same linear layers on one rank."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tpweave.layers import ParallelMLP
from tpweave.testing import run_ranks

ACT = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}


def close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def check(rank, size):
    for gated in (True, False):
        for activation in ACT:
            torch.manual_seed(0)
            gate = nn.Linear(6, 11) if gated else None
            up, down = nn.Linear(6, 11), nn.Linear(11, 6)
            x = torch.randn(2, 3, 6, requires_grad=True)
            hidden = ACT[activation](gate(x)) * up(x) if gated else ACT[activation](up(x))
            want = down(hidden)
            want.square().sum().backward()
            torch.manual_seed(0)
            made = ParallelMLP(6, 11, activation=activation, gated=gated, bias=True)
            split = [*[1] * (size - 1), 12 - size]
            for mlp in (made, ParallelMLP.from_linears(gate, up, down, activation=activation, splits=split)):
                own = x.detach().clone().requires_grad_()
                got = mlp(own)
                close(got, want)
                got.square().sum().backward()
                close(own.grad, x.grad)
                start, stop = mlp.up_proj.shard.ranges[rank]
                close(mlp.up_proj.weight.grad, up.weight.grad[start:stop])
                close(mlp.down_proj.weight.grad, down.weight.grad[:, start:stop])
                close(mlp.down_proj.bias.grad, down.bias.grad)
                if gated:
                    close(mlp.gate_proj.bias.grad, gate.bias.grad[start:stop])


@pytest.mark.parametrize("size", [1, 3])
def test_equals_one_rank(size):
    run_ranks(size, check)


def test_unknown_activation():
    with pytest.raises(ValueError, match=r"'tanhish'.*silu"):
        ParallelMLP(4, 8, activation="tanhish")
