"""The one harness: correctness first, then interleaved repeats of ours and each rival; medians of the slowest rank.

Every repeat runs a block of calls of each candidate in turn, so that all see the same mood of the machine. A block of a
collective starts at a barrier and one untimed call. The time of a repeat is the slowest rank's; the skew is what the
slowest lost to the fastest. `tpweave bench` draws what this returns.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist

from tpweave import info
from tpweave.benchmarks import launch
from tpweave.benchmarks.registry import Bench, BenchRequestError, Case, find
from tpweave.dispatch import load_ops
from tpweave.native import _C

Row = dict[str, Any]
Rivals = dict[str, Callable[[Any], Any]]
MAX_CALLS_PER_BLOCK = 2000


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: median over repeats of the slowest rank, and of slowest minus fastest."""

    seconds: float
    skew: float


@dataclass(frozen=True)
class Options:
    """How to measure.

    Attributes:
        repeats: blocks of each candidate; the median is of these.
        block_seconds: least length of a block.
        threads: torch threads of each rank.
        backend: force this row of the op's table; None lets the table choose.
        only: substring that a case's name must hold; None measures all.
    """

    repeats: int = 15
    block_seconds: float = 0.01
    threads: int = 1
    backend: str | None = None
    only: str | None = None


def _world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _barrier() -> None:
    if _world() > 1:
        dist.barrier()


def _over_ranks(values: list[float]) -> torch.Tensor:
    """[R, len(values)]: the values of every rank, on every rank."""
    mine = torch.tensor(values, dtype=torch.float64)
    if _world() == 1:
        return mine[None]
    gathered = [torch.empty_like(mine) for _ in range(_world())]
    dist.all_gather(gathered, mine)
    return torch.stack(gathered)


def _block(call: Callable[[], Any], count: int) -> float:
    _barrier()
    call()
    start = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - start) / count


def time_interleaved(
    candidates: dict[str, Callable[[], Any]], *, repeats: int = 15, block_seconds: float = 0.01
) -> dict[str, Timing]:
    """Time each candidate; with several ranks, all must call this with the same candidates."""
    counts = {}
    for name, call in candidates.items():
        _block(call, 1)
        # All ranks take the slowest's count: a collective must be called equally often on each.
        once = _over_ranks([min(_block(call, 2), _block(call, 2))]).max().item()
        counts[name] = max(1, min(MAX_CALLS_PER_BLOCK, round(block_seconds / max(once, 1e-9))))
    times: dict[str, list[float]] = {name: [] for name in candidates}
    collecting = gc.isenabled()
    gc.disable()
    try:
        for _ in range(repeats):
            for name, call in candidates.items():
                times[name].append(_block(call, counts[name]))
    finally:
        if collecting:
            gc.enable()
    timings = {}
    for name, measured in times.items():
        ranks = _over_ranks(measured)
        slowest, fastest = ranks.max(0).values, ranks.min(0).values
        timings[name] = Timing(statistics.median(slowest.tolist()), statistics.median((slowest - fastest).tolist()))
    return timings


def measure_limits() -> dict[str, float]:
    """What this machine can do at best, with all ranks at once: GB/s of copying memory (read plus written), one rank's
    share; GFLOP/s of torch's fp32 matmul of 1024^3.
    """
    source, target = torch.ones(16 << 20), torch.empty(16 << 20)
    a, b, c = (torch.ones(1024, 1024) for _ in range(3))
    timings = time_interleaved(
        {"copy": lambda: target.copy_(source), "matmul": lambda: torch.mm(a, b, out=c)}, repeats=7, block_seconds=0.02
    )
    return {
        "copy_gb_s": 2 * source.nbytes / timings["copy"].seconds / 1e9,
        "matmul_fp32_gflop_s": 2 * 1024**3 / timings["matmul"].seconds / 1e9,
    }


def _failure(bench: Bench, inputs: Any, result: Any) -> str | None:
    """What is wrong with our result, on this rank or another; None when all is well."""
    message = None
    try:
        bench.check(inputs, result)
    except AssertionError as error:
        message = " ".join(str(error).split()) or "the check failed"
    if _world() > 1:
        messages: list[str | None] = [None] * _world()
        dist.all_gather_object(messages, message)
        return next((f"rank {rank}: {text}" for rank, text in enumerate(messages) if text is not None), None)
    return message


def _measure_case(bench: Bench, case: Case, options: Options, rivals: Rivals) -> Row:
    rank = dist.get_rank() if dist.is_initialized() else 0
    torch.manual_seed(rank)
    inputs = bench.make(**case.values)
    error = _failure(bench, inputs, bench.ours(inputs))
    row: Row = {"case": case.name, "values": case.values, "error": error}
    if error is not None:
        return row
    candidates = {"ours": lambda: bench.ours(inputs)}
    candidates |= {name: (lambda run=run: run(inputs)) for name, run in rivals.items()}
    timings = time_interleaved(candidates, repeats=options.repeats, block_seconds=options.block_seconds)
    ours = timings.pop("ours")
    row["ours"] = asdict(ours)
    row["rivals"] = {name: {**asdict(t), "ratio": t.seconds / ours.seconds} for name, t in timings.items()}
    row["bytes"] = None if bench.bytes is None else bench.bytes(inputs)
    row["gb_s"] = None if row["bytes"] is None else row["bytes"] / ours.seconds / 1e9
    row["extra_bytes"] = None if bench.extra_bytes is None else bench.extra_bytes(inputs)
    row["gflop_s"] = None if bench.flops is None else bench.flops(inputs) / ours.seconds / 1e9
    known = bench.flops is not None and bench.peak is not None
    row["of_peak"] = bench.flops(inputs) / ours.seconds / bench.peak(inputs) if known else None
    return row


def measure(bench: Bench, options: Options, *, mpi: bool = False) -> Iterator[Row]:
    """Measure `bench` on this process's ranks: first yields the limits, then one row per case."""
    torch.set_num_threads(options.threads)
    rivals = {name: run for name, run in bench.rivals.items() if mpi or name not in bench.mpi_rivals}
    yield {"limits": measure_limits()}
    for case in selected_cases(bench, options):
        with _forced_backend(bench.stem, options.backend), torch.no_grad():
            yield _measure_case(bench, case, options, rivals)


@contextlib.contextmanager
def _forced_backend(stem: str, backend: str | None) -> Iterator[None]:
    before = os.environ.get("TPWEAVE_BACKEND")
    if backend is not None:
        os.environ["TPWEAVE_BACKEND"] = f"{stem}:{backend}"
    try:
        yield
    finally:
        if backend is not None:
            os.environ.pop("TPWEAVE_BACKEND")
            if before is not None:
                os.environ["TPWEAVE_BACKEND"] = before


def selected_cases(bench: Bench, options: Options) -> list[Case]:
    """The cases that `options.only` leaves; BenchRequestError when it leaves none."""
    if options.only is None:
        return list(bench.cases)
    cases = [case for case in (*bench.cases, *bench.sweep) if options.only in case.name]
    if not cases:
        names = ", ".join(f"'{case.name}'" for case in bench.cases)
        raise BenchRequestError(f"no case of {bench.stem} holds '{options.only}'; there are: {names}")
    return cases


class BenchError(RuntimeError):
    """The ranks of a benchmark failed; the message ends with their output."""


def _measure_on_ranks(stem: str, ranks: int, options: Options, *, mpi: bool) -> Iterator[Row]:
    with tempfile.TemporaryDirectory(prefix="tpweave-bench-") as directory, open(f"{directory}/log", "w+") as log:
        setting = {"stem": stem, "store": f"{directory}/store", "mpi": mpi, "options": asdict(options)}
        process = launch.start_ranks(
            ranks, "tpweave.benchmarks.run", [json.dumps(setting)], threads=options.threads, mpi=mpi,
            stdout=subprocess.PIPE, stderr=log, text=True,
        )  # fmt: skip
        try:
            for line in process.stdout:
                if line.startswith('{"tpweave":'):
                    yield json.loads(line)["tpweave"]
                else:
                    log.write(line)
            code = process.wait()
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
        if code != 0:
            log.seek(0)
            raise BenchError(f"the ranks of {stem} failed with exit code {code}:\n{log.read()[-4000:]}")


def run_bench(
    stem: str, options: Options, *, ranks: int | None = None, progress: Callable[[Row], None] | None = None
) -> Row:
    """Measure one benchmark on this machine, on as many ranks as it asks for or `ranks` of them.

    Args:
        stem: the op.
        options: how to measure.
        ranks: number of ranks of a collective; None for the benchmark's own.
        progress: called with every row as it comes.

    Returns:
        `stem`, `ranks`, `threads`, `backend`, `machine`, `isa`, `versions`, `limits`, `left_out` (rival -> reason) and
        `rows`: per case `ours` and `rivals` in seconds, ratios, rates, or `error` and no times.

    Raises:
        BenchRequestError: no such benchmark, backend or case, or ranks that make no sense for it.
        BackendUnavailableError: the backend asked for does not take a case's inputs.
        BenchError: a rank died.

    Example:
        >>> run_bench("rms_norm", Options(repeats=5))["rows"][0]["rivals"]["torch"]["ratio"]
    """
    bench = find(stem)
    world_size = bench.world_size if ranks is None else ranks
    if (bench.world_size == 1) != (world_size == 1):
        need = "runs on 1 rank" if bench.world_size == 1 else "is a collective and needs at least 2 ranks"
        raise BenchRequestError(f"{stem} {need}, not {world_size}")
    selected_cases(bench, options)
    if options.backend is not None:
        ops = load_ops()
        rows = [row.name for row in ops[stem].backends] if stem in ops else []
        if options.backend not in rows:
            raise BenchRequestError(f"{stem} has no backend '{options.backend}'; it has {', '.join(rows) or 'none'}")
    mpi_off = launch.mpi_objection() if bench.mpi_rivals else "no rival needs it"
    if world_size == 1:
        threads = torch.get_num_threads()
        try:
            entries = list(_reported(measure(bench, options), progress))
        finally:
            torch.set_num_threads(threads)
    else:
        entries = list(_reported(_measure_on_ranks(stem, world_size, options, mpi=mpi_off is None), progress))
    return {
        "stem": stem,
        "ranks": world_size,
        "threads": options.threads,
        "backend": options.backend,
        "machine": info.machine(),
        "isa": _C.active_isa(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "limits": entries[0]["limits"],
        "left_out": {name: mpi_off for name in bench.mpi_rivals if mpi_off is not None},
        "rows": entries[1:],
    }


def _reported(entries: Iterator[Row], progress: Callable[[Row], None] | None) -> Iterator[Row]:
    for entry in entries:
        if progress is not None and "case" in entry:
            progress(entry)
        yield entry


def _rank_main(setting: dict[str, Any]) -> None:
    """One rank, as started by `_measure_on_ranks`."""
    mpi = setting["mpi"]
    rank = int(os.environ["OMPI_COMM_WORLD_RANK" if mpi else "RANK"])
    ranks = int(os.environ["OMPI_COMM_WORLD_SIZE" if mpi else "WORLD_SIZE"])
    launch.pin_rank(rank, ranks)
    dist.init_process_group("gloo", init_method=f"file://{setting['store']}", rank=rank, world_size=ranks)
    for entry in measure(find(setting["stem"]), Options(**setting["options"]), mpi=mpi):
        if rank == 0:
            print(json.dumps({"tpweave": entry}), flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    _rank_main(json.loads(sys.argv[1]))
