"""What only a GPU can show of the collectives between GPUs that have a `cuda` row: their rows timed, captured into a
CUDA graph, and left waiting for a rank. `gpu_check` runs it on every rank of a group, after the shared checks.

Ranks that share one GPU take turns on it: their times are upper bounds, and no figure of a link.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

import tpweave
from tpweave.dispatch import OPS, Inputs
from tpweave.distributed.group import TPGroup
from tpweave.errors import PeerFailureError

Record = dict[str, Any]

# Bytes of each rank's tensor: one-shot, about where it changes over, two-shot.
SIZES = (16 << 10, 512 << 10, 16 << 20)
REPEATS = 20
REPLAYS = 50


def _sum_beside_norm(x: torch.Tensor, group: TPGroup, backend: str) -> torch.Tensor:
    return tpweave.all_reduce_rms_norm(x, None, None, 1e-6, group, backend=backend)[1]


# Each on [rows, columns]: the ranks' sum, or their rows one after the other.
_CALLS: dict[str, Callable[..., torch.Tensor]] = {
    "all_reduce": tpweave.all_reduce,
    "all_gather": tpweave.all_gather,
    "all_reduce_rms_norm": _sum_beside_norm,
}


def measure(op: str, group: TPGroup, device: torch.device) -> Iterator[Record]:
    """Each row that takes the call, at each size: the slowest rank's median seconds."""
    if op not in _CALLS:
        return
    for nbytes in SIZES:
        x = torch.ones(nbytes // 2048, 1024, dtype=torch.bfloat16, device=device)
        for backend, reason in OPS[op].supported(Inputs([x], group=group)):
            if reason is not None or backend == "reference":
                continue
            seconds = []
            for _ in range(REPEATS + 3):
                torch.cuda.synchronize(device)
                group.all_gather_object(None)
                begin = time.perf_counter()
                _CALLS[op](x, group=group, backend=backend)
                torch.cuda.synchronize(device)
                seconds.append(time.perf_counter() - begin)
            slowest = max(group.all_gather_object(sorted(seconds[3:])[REPEATS // 2]))
            yield {
                "kind": "timing", "op": op, "backend": backend, "case": f"{nbytes >> 10} KiB on {group.size} ranks",
                "status": "ok", "seconds": slowest, "rivals": {}, "gb_s": nbytes / slowest / 1e9, "gflop_s": None,
            }  # fmt: skip


def _check(op: str, case: str, wrong: str, seconds: float) -> Record:
    return {
        "kind": "check", "op": op, "case": case, "dtype": "bfloat16", "backend": "cuda", "reason": wrong,
        "status": "wrong" if wrong else "ok", "error": 0.0, "bound": 0.0, "seconds": seconds,
    }  # fmt: skip


def check_graph(op: str, group: TPGroup, device: torch.device) -> Iterator[Record]:
    """A captured call, replayed on changing inputs, against float64."""
    begin = time.perf_counter()
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(group.size, 40, 1000, generator=generator, dtype=torch.float64).to(device)
    x = torch.empty(40, 1000, dtype=torch.bfloat16, device=device)
    # What is captured may not exchange memory: the first call does.
    _CALLS[op](x, group=group, backend="cuda")
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = _CALLS[op](x, group=group, backend="cuda")
    wrong = ""
    for replay in range(REPLAYS):
        x.copy_(draws[group.rank] * (replay + 1))
        graph.replay()
        parts = (draws * (replay + 1)).to(torch.bfloat16).double()
        want = parts.flatten(0, 1) if op == "all_gather" else parts.sum(0)
        # One rounding to bf16, of a sum in fp32.
        excess = ((y.double() - want).abs() - want.abs() / 256 - 1e-3).max().item()
        if not excess <= 0 and not wrong:
            wrong = f"replay {replay} is off by {excess} more than a rounding"
    yield _check(op, f"{REPLAYS} replays of a graph", wrong, time.perf_counter() - begin)


def check_late_rank(op: str, group: TPGroup, device: torch.device) -> Iterator[Record]:
    """The last rank does not come. The group's channel cannot be used after it."""
    begin = time.perf_counter()
    x = torch.ones(1, 64, dtype=torch.bfloat16, device=device)
    late = group.size - 1
    wrong = ""
    if group.rank != late:
        before, group.timeout = group.timeout, 0.5
        _CALLS[op](x, group=group, backend="cuda")
        torch.cuda.synchronize(device)
        try:
            _CALLS[op](x, group=group, backend="cuda")
            wrong = "no error"
        except PeerFailureError as error:
            wrong = "" if late in error.ranks else f"names {error.ranks}"
        group.timeout = before
    group.all_gather_object(None)
    yield _check(op, "a late rank is named", wrong, time.perf_counter() - begin)


def examine(op: str, group: TPGroup, device: torch.device) -> Iterator[Record]:
    """All of it, where the group has the `cuda` row; the timings alone where it has not."""
    yield from measure(op, group, device)
    x = torch.ones(1, 64, dtype=torch.bfloat16, device=device)
    if op in _CALLS and dict(OPS[op].supported(Inputs([x], group=group))).get("cuda", "") is None:
        yield from check_graph(op, group, device)
        yield from check_late_rank(op, group, device)
