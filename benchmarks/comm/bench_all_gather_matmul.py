"""all_gather_matmul beside our own in sequence, beside torch's linear with gloo, and beside its matmul alone.

The exposed communication is the time beyond "matmul alone".
"""

import torch
import torch.distributed as dist

import tpweave
from tpweave.benchmarks.comm.woven_cases import CASES, SWEEP
from tpweave.benchmarks.registry import Bench, dtype_named
from tpweave.comm.local_matmul import local_matmul


def make(rows, depth, columns, dtype):
    weight = (torch.randn(columns, depth) / depth**0.5).to(dtype_named(dtype))
    x = torch.randn(rows // dist.get_world_size(), depth).to(dtype_named(dtype))
    return x, weight, torch.randn(rows, depth).to(x.dtype), x.new_empty(rows, columns)


def matmul_alone(inputs):
    _, weight, whole, out = inputs
    return local_matmul(whole, weight.t(), out=out)


def in_sequence(inputs):
    return local_matmul(tpweave.all_gather(inputs[0]), inputs[1].t())


def linear_and_gloo(inputs):
    x, weight = inputs[:2]
    whole = torch.empty_like(inputs[2])
    dist.all_gather(list(whole.chunk(dist.get_world_size())), x)
    return torch.nn.functional.linear(whole, weight)


def check(inputs, y):
    x, weight = inputs[:2]
    whole = torch.empty_like(inputs[2])
    dist.all_gather(list(whole.chunk(dist.get_world_size())), x)
    tolerance = 1e-4 if x.dtype == torch.float32 else 3e-2
    torch.testing.assert_close(y.double(), whole.double() @ weight.double().t(), rtol=tolerance, atol=tolerance)


BENCH = Bench(
    stem="all_gather_matmul",
    cases=CASES,
    make=make,
    ours=lambda inputs: tpweave.all_gather_matmul(inputs[0], [inputs[1].t()], return_a=False)[1][0],
    rivals={"linear + gloo": linear_and_gloo, "in sequence": in_sequence, "matmul alone": matmul_alone},
    check=check,
    flops=lambda inputs: 2 * inputs[2].numel() * inputs[1].shape[0],
    world_size=2,
    sweep=SWEEP,
)
