"""matmul_reduce_scatter beside our own in sequence, beside torch's linear with gloo, and beside its matmul alone.

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
    x = torch.randn(rows, depth).to(dtype_named(dtype))
    return x, weight, x.new_empty(rows, columns)


def matmul_alone(inputs):
    x, weight, out = inputs
    return local_matmul(x, weight.t(), out=out)


def in_sequence(inputs):
    x, weight, _ = inputs
    return tpweave.reduce_scatter(local_matmul(x, weight.t()))


def linear_and_gloo(inputs):
    y = torch.nn.functional.linear(*inputs[:2])
    out = y.new_empty(y.shape[0] // dist.get_world_size(), y.shape[1])
    dist.reduce_scatter(out, list(y.chunk(dist.get_world_size())))
    return out


def check(inputs, y):
    x, weight, _ = inputs
    want = x.double() @ weight.double().t()
    dist.all_reduce(want)
    want = want.chunk(dist.get_world_size())[dist.get_rank()]
    tolerance = 1e-4 if x.dtype == torch.float32 else 3e-2
    torch.testing.assert_close(y.double(), want, rtol=tolerance, atol=tolerance)


BENCH = Bench(
    stem="matmul_reduce_scatter",
    cases=CASES,
    make=make,
    ours=lambda inputs: tpweave.matmul_reduce_scatter(inputs[0], inputs[1].t()),
    rivals={"linear + gloo": linear_and_gloo, "in sequence": in_sequence, "matmul alone": matmul_alone},
    check=check,
    flops=lambda inputs: 2 * inputs[0].numel() * inputs[1].shape[0],
    world_size=2,
    sweep=SWEEP,
)
