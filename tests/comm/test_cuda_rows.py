"""The cuda rows through the public API, on ranks that are processes: what the GPU check does on a GPU, on the host.

The ranks' memory is their shared arena, the library the emulated one, and the rows take CPU tensors.
"""

import contextlib
import importlib

import pytest
import torch

import tpweave
from tpweave.testing import run_ranks

pytest.importorskip("pybind11")

from cuda_ranks import emulated_library

OPS = ("all_reduce", "all_gather", "all_reduce_rms_norm")


class Graph:
    """Takes the place of torch.cuda.CUDAGraph: replaying makes the call again, into the same output."""

    def replay(self):
        self.out.copy_(self.call())


def use_the_host_for_a_gpu(group):
    from tpweave import dispatch
    from tpweave.benchmarks import gpu_collectives
    from tpweave.distributed import cuda_memory
    from tpweave.distributed.symmetric_memory import symmetric_buffer

    made = []

    def new_channel(group, device, data_bytes):
        library = emulated_library()
        buffer = symmetric_buffer(group, f"cuda {len(made)}", library.PAD_BYTES + data_bytes + 256)
        made.append(buffer)
        # The same padding on all ranks: the arena is mapped in whole pages.
        addresses = [address + -address % 256 for address in buffer.data_ptrs]
        return library.Channel(group.rank, addresses, data_bytes, 0), buffer

    @contextlib.contextmanager
    def captured(graph):
        calls = dict(gpu_collectives._CALLS)

        def record(op):
            def call(*args, **options):
                graph.call = lambda: calls[op](*args, **options)
                graph.out = graph.call()
                return graph.out

            return call

        gpu_collectives._CALLS.update({op: record(op) for op in calls})
        yield
        gpu_collectives._CALLS.update(calls)

    cuda_memory.library_objection = lambda device: None
    cuda_memory._new_channel = new_channel
    dispatch._IS_ON["cuda"] = lambda tensor: True
    for op in OPS:
        importlib.import_module(f"tpweave.comm.{op}").current_stream = lambda device: 0
    torch.cuda.synchronize = lambda device=None: None
    torch.cuda.is_current_stream_capturing = lambda: False
    torch.cuda.CUDAGraph, torch.cuda.graph = Graph, captured
    cuda_memory.agree_on_library(group, torch.device("cpu"))


def check_rows(rank, world_size):
    from tpweave.benchmarks import gpu_collectives
    from tpweave.verification import run_checks

    group = tpweave.init(timeout=60)
    if group.transport != "shm":
        return [("skipped", group.transport)]
    use_the_host_for_a_gpu(group)
    gpu_collectives.SIZES, gpu_collectives.REPEATS, gpu_collectives.REPLAYS = (2 << 10,), 1, 3
    found = []
    for op in OPS:
        for result in run_checks(ops=[op], group=group, backends=["cuda"]):
            found.append((op, result.case, result.dtype, result.status, result.reason))
    for op in OPS:
        for record in gpu_collectives.examine(op, group, torch.device("cpu")):
            found.append((op, record["case"], record["backend"], record["status"], record.get("reason", "")))
    return found


def test_the_gpu_check_of_collectives():
    emulated_library()
    for found in run_ranks(2, check_rows, timeout=200):
        if found[0][0] == "skipped":
            pytest.skip(f"needs the shm transport, this has {found[0][1]}")
        assert [row for row in found if row[3] != "ok"] == []
        for op in OPS:
            cases = {row[1] for row in found if row[0] == op}
            assert {"3 replays of a graph", "a late rank is named", "2 KiB on 2 ranks"} < cases
            assert {row[2] for row in found if row[0] == op} >= {"float32", "bfloat16", "float16", "cuda"}
