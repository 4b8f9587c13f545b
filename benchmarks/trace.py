"""One call of a collective, seen from inside, on all ranks: what each did when, and how much of it was communication.

The work of a call is timed twice before: the whole call, and its local work without communication (`Bench.alone`). The
difference is the exposed communication time. One more call is then recorded step by step. `tpweave trace` draws what
this returns.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

import tpweave
from tpweave.benchmarks import launch
from tpweave.benchmarks.registry import Bench, BenchRequestError, find
from tpweave.benchmarks.run import BenchError, Options, selected_cases, time_interleaved
from tpweave.native import COLLECTIVE_CODES

# (name, peer, step, begin, end), nanoseconds of one clock.
Event = tuple[str, int, int, int, int]

# The name of the event that is the whole call, from Python.
CALL = "call"

# Time inside a call that no recorded step covers, from this length on.
_SHORTEST_GAP_NS = 300


def local_work(events: Sequence[Event], begin: int, end: int) -> list[Event]:
    """The gaps between a rank's steps from `begin` to `end`: what it did there itself."""
    gaps: list[Event] = []
    at = begin
    for event in sorted((event for event in events if event[0] not in COLLECTIVE_CODES), key=lambda event: event[3]):
        if event[3] - at >= _SHORTEST_GAP_NS:
            gaps.append(("local work", -1, 0, at, event[3]))
        at = max(at, event[4])
    if end - at >= _SHORTEST_GAP_NS:
        gaps.append(("local work", -1, 0, at, end))
    return gaps


def chrome_trace(events_by_rank: Sequence[Sequence[Event]], title: str) -> dict[str, Any]:
    """The events in the format that chrome://tracing and Perfetto read: one process for each rank."""
    first = min((event[3] for events in events_by_rank for event in events), default=0)
    drawn: list[dict[str, Any]] = []
    for rank, events in enumerate(events_by_rank):
        drawn.append({"ph": "M", "name": "process_name", "pid": rank, "args": {"name": f"rank {rank}"}})
        for name, peer, step, begin, end in sorted(events, key=lambda event: (event[3], -event[4])):
            details = {key: value for key, value, none in (("peer", peer, -1), ("step", step, 0)) if value != none}
            drawn.append({
                "ph": "X", "name": name, "pid": rank, "tid": 0, "ts": (begin - first) / 1e3,
                "dur": (end - begin) / 1e3, "args": details,
            })  # fmt: skip
    return {"traceEvents": drawn, "displayTimeUnit": "ns", "otherData": {"title": title}}


def trace_case(bench: Bench, case_name: str, options: Options) -> dict[str, Any]:
    """On every rank: times the call and its local work, records one call. The same result on all ranks."""
    case = next(case for case in bench.cases if case.name == case_name)
    group = tpweave.init()
    torch.set_num_threads(options.threads)
    torch.manual_seed(group.rank)
    inputs = bench.make(**case.values)
    bench.check(inputs, bench.ours(inputs))
    candidates = {"total": lambda: bench.ours(inputs)}
    if bench.alone is not None:
        alone = bench.alone
        candidates["alone"] = lambda: alone(inputs)
    timings = time_interleaved(candidates, repeats=options.repeats, block_seconds=options.block_seconds)
    events: list[Event] = []
    if group.shm is not None:
        dist.barrier()
        bench.ours(inputs)
        group.shm.start_trace()
        # The clock of the recorded steps is CLOCK_MONOTONIC, and so is this.
        begin = time.monotonic_ns()
        bench.ours(inputs)
        end = time.monotonic_ns()
        events = group.shm.take_trace()
        events += [*local_work(events, begin, end), (CALL, -1, 0, begin, end)]
    total = timings["total"].seconds
    alone_seconds = timings["alone"].seconds if "alone" in timings else None
    return {
        "case": case.name,
        "transport": group.transport,
        "total": total,
        "alone": alone_seconds,
        "exposed": total - (alone_seconds or 0.0),
        "events": group.all_gather_object(events),
    }


def run_trace(stem: str, options: Options, *, ranks: int | None = None) -> dict[str, Any]:
    """Trace the first case that `options.only` leaves, on this machine.

    Args:
        stem: a collective.
        options: how to measure; `only` chooses the case.
        ranks: number of ranks; None for the benchmark's own.

    Returns:
        `stem`, `ranks`, `case`, `transport`; `total`, `alone` (None where the op is communication only) and `exposed`
        in seconds, medians of the slowest rank; `events`, by rank.

    Raises:
        BenchRequestError: no such collective or case, or one rank.
        BenchError: a rank failed.

    Example:
        >>> run_trace("matmul_all_reduce", Options(repeats=5))["exposed"]
    """
    bench = find(stem)
    if bench.world_size == 1:
        raise BenchRequestError(f"{stem} has no communication to trace; see tpweave bench {stem}")
    world_size = bench.world_size if ranks is None else ranks
    if world_size < 2:
        raise BenchRequestError(f"{stem} is a collective and needs at least 2 ranks, not {world_size}")
    case = selected_cases(bench, options)[0]
    with tempfile.TemporaryDirectory(prefix="tpweave-trace-") as directory:
        setting = {
            "stem": stem, "case": case.name, "store": f"{directory}/store", "out": f"{directory}/out.json",
            "options": {"repeats": options.repeats, "threads": options.threads},
        }  # fmt: skip
        process = launch.start_ranks(
            world_size, "tpweave.benchmarks.trace", [json.dumps(setting)], threads=options.threads,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        try:
            printed, _ = process.communicate()
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
        if process.returncode != 0:
            raise BenchError(f"the ranks of {stem} failed with exit code {process.returncode}:\n{printed[-4000:]}")
        with open(setting["out"]) as file:
            return {"stem": stem, "ranks": world_size, **json.load(file)}


def _rank_main(setting: dict[str, Any]) -> None:
    """One rank, as started by `run_trace`."""
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    launch.pin_rank(rank, ranks)
    dist.init_process_group("gloo", init_method=f"file://{setting['store']}", rank=rank, world_size=ranks)
    result = trace_case(find(setting["stem"]), setting["case"], Options(**setting["options"]))
    if rank == 0:
        with open(setting["out"], "w") as file:
            json.dump(result, file)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    _rank_main(json.loads(sys.argv[1]))
