"""Collectives between two hosts at a given rate: bytes on the link, and the chunk pipeline beside its two halves.

    python -m tpweave.benchmarks.between_hosts [--rate 1gbit] [--ranks-per-host 1] [--shape 1024 2048 2048]

`pipeline` is `matmul_all_reduce`, `sequence` the same product and then the same all-reduce, each a median over repeats
of the slowest rank. `bytes` are what one host put on the link for one all-reduce, headers included.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

import tpweave
from tpweave.benchmarks.two_hosts import INTERFACE, two_hosts
from tpweave.comm.local_matmul import local_matmul
from tpweave.distributed.group import TPGroup


def _sent() -> int:
    with open(f"/sys/class/net/{INTERFACE}/statistics/tx_bytes") as counter:
        return int(counter.read())


def _seconds(group: TPGroup, call: Callable[[], Any], repeats: int = 5) -> float:
    """Median over repeats of the slowest rank."""
    call()
    times = []
    for _ in range(repeats):
        dist.barrier()
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(map(max, zip(*group.all_gather_object(times), strict=True)))


def _bytes(call: Callable[[], Any]) -> int:
    dist.barrier()
    before = _sent()
    call()
    dist.barrier()
    return _sent() - before


def measure(rows: int, depth: int, columns: int) -> dict[str, Any]:
    """All numbers of one shape, on a rank of the default group."""
    torch.set_num_threads(1)
    group = tpweave.init(timeout=60)
    a, w = torch.randn(rows, depth), torch.randn(columns, depth) / depth**0.5
    y = local_matmul(a, w.t())
    narrow = y.to(torch.bfloat16)
    found: dict[str, Any] = {"ranks": group.size, "transport": group.transport}
    seconds = {
        "matmul": _seconds(group, lambda: local_matmul(a, w.t())),
        "all_reduce": _seconds(group, lambda: tpweave.all_reduce(y, group)),
        "gloo": _seconds(group, lambda: dist.all_reduce(y)),
        "pipeline": _seconds(group, lambda: tpweave.matmul_all_reduce(a, w.t(), group)),
        "sequence": _seconds(group, lambda: tpweave.all_reduce(local_matmul(a, w.t()), group)),
        "bf16": _seconds(group, lambda: tpweave.all_reduce(narrow, group)),
    }
    sent = {
        "tensor": y.nbytes,
        "fp32": _bytes(lambda: tpweave.all_reduce(y, group)),
        "fp32 gloo": _bytes(lambda: dist.all_reduce(y)),
        "bf16": _bytes(lambda: tpweave.all_reduce(narrow, group)),
    }
    found["link"], found["matmul"] = str(group.cost_model.link), str(group.cost_model.matmul)
    found["chunks"] = group.cost_model.last
    tpweave.init(group, compression={"inter_host": "int8"})
    seconds["int8"] = _seconds(group, lambda: tpweave.all_reduce(narrow, group))
    sent["int8"] = _bytes(lambda: tpweave.all_reduce(narrow, group))
    tpweave.init(group, compression={})
    longest = max(seconds["matmul"], seconds["all_reduce"])
    found["pipeline / max(matmul, all_reduce)"] = seconds["pipeline"] / longest
    found["sequence / pipeline"] = seconds["sequence"] / seconds["pipeline"]
    found["bf16 / int8"] = {"seconds": seconds["bf16"] / seconds["int8"], "bytes": sent["bf16"] / sent["int8"]}
    return {**found, "seconds": seconds, "bytes": sent}


def main() -> None:
    """On a rank: measure. Elsewhere: make two hosts and start the ranks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", default="1gbit", help="of the link, as tc writes it")
    parser.add_argument("--ranks-per-host", type=int, default=1)
    parser.add_argument("--shape", type=int, nargs=3, default=(1024, 2048, 2048), metavar=("M", "K", "N"))
    args = parser.parse_args()
    if "RANK" not in os.environ:
        with two_hosts(args.rate) as hosts:
            module = ["-m", "tpweave.benchmarks.between_hosts", *sys.argv[1:]]
            print(hosts.torchrun(module, ranks_per_host=args.ranks_per_host))
        return
    found = measure(*args.shape)
    if dist.get_rank() == 0:
        print(json.dumps(found), flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
