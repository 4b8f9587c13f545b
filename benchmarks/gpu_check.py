"""Checks and measures every GPU row on a machine that may have no network: `python benchmarks/gpu_check.py --dir out`.

1. builds tpweave into DIR/site with the running interpreter's pip, without build isolation and without dependencies
2. every row of every operation that takes GPU tensors against the reference in float64, outputs and gradients
3. each of these rows beside its torch rival: GPU events, cold L2 cache, median of interleaved repeats, achieved GB/s
4. the collectives, on 2 and 4 ranks that share the one GPU: correctness, graphs, a late rank (`gpu_collectives.py`);
   such ranks take turns, so their times are upper bounds

Needs Python 3.10 or later, torch with CUDA, triton, setuptools, pybind11 and a C++17 compiler. Everything found goes to
DIR/gpu_check.json as it comes, a short table is printed last, and the exit code is 1 when anything was wrong, raised or
died. Each operation has a process and a time limit of its own, all of them together BUDGET seconds.

`--device cpu` does the same with the CPU rows and with Triton's interpreter, to test this file where no GPU is.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import platform
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

Record = dict[str, Any]

# The whole has 9 minutes.
BUDGET = 520.0
STEP_LIMIT = 120.0
# Between two calls more than the L2 cache of any GPU of today is written: each call finds its inputs in memory.
FLUSH_BYTES = 256 << 20
REPEATS = 25


# ---- the steps: each runs in a process of its own, with tpweave installed, and prints one record a line


def describe_machine(device: str) -> Iterator[Record]:
    """Versions and the device."""
    import torch

    from tpweave.info import package_versions

    found: Record = {"kind": "machine", "versions": package_versions(), "cuda": torch.version.cuda, "device": device}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "device": properties.name,
            "sm": properties.major * 10 + properties.minor,
            "memory_bytes": properties.total_memory,
        }
    yield found


def _time(calls: dict[str, Callable[[], Any]], device: str, repeats: int) -> dict[str, float]:
    """Median seconds of each call, interleaved."""
    import torch

    def once_on_gpu(call: Callable[[], Any]) -> float:
        flush.zero_()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    def once_on_cpu(call: Callable[[], Any]) -> float:
        begin = time.perf_counter()
        call()
        return time.perf_counter() - begin

    once = once_on_cpu if device == "cpu" else once_on_gpu
    if device != "cpu":
        flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)
    for call in calls.values():
        for _ in range(min(3, repeats)):
            once(call)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            seconds[name].append(once(call))
    return {name: statistics.median(values) for name, values in seconds.items()}


def measure_operation(op: str, backends: Sequence[str], device: str, quick: bool) -> Iterator[Record]:
    """Each case of the operation's benchmark: every row, its rivals, and whether the row's result is right."""
    import torch

    from tpweave.benchmarks.registry import find

    bench = find(op)
    cases = bench.gpu_cases if device != "cpu" and bench.gpu_cases else bench.cases
    for case in cases[:1] if quick else cases:
        for backend in backends:
            record: Record = {"kind": "timing", "op": op, "backend": backend, "case": case.name, "status": "ok"}
            os.environ["TPWEAVE_BACKEND"] = f"{op}:{backend}"
            try:
                torch.manual_seed(0)
                # Not around the calls: it slows every one of torch's.
                with torch.device(device):
                    inputs = bench.make(**case.values)
                with torch.no_grad():
                    bench.check(inputs, bench.ours(inputs))
                    calls = {"ours": lambda i=inputs: bench.ours(i)}
                    calls |= {name: (lambda run=run, i=inputs: run(i)) for name, run in bench.rivals.items()}
                    seconds = _time(calls, device, 1 if quick else REPEATS)
                record |= {"seconds": seconds["ours"]}
                record["rivals"] = {name: value for name, value in seconds.items() if name != "ours"}
                record["gb_s"] = None if bench.bytes is None else bench.bytes(inputs) / seconds["ours"] / 1e9
                record["gflop_s"] = None if bench.flops is None else bench.flops(inputs) / seconds["ours"] / 1e9
            except Exception as error:
                record |= {"status": "error", "reason": f"{type(error).__name__}: {error}"}
            finally:
                del os.environ["TPWEAVE_BACKEND"]
            yield record


def check_operation(op: str, device: str, quick: bool) -> Iterator[Record]:
    """The shared checks of one operation, then its timings on the rows that ran."""
    from dataclasses import asdict

    from tpweave.verification import run_checks

    ran = []
    for result in run_checks(device=device, ops=[op], quick=quick):
        yield {"kind": "check", "ranks": 1, **asdict(result)}
        if result.status != "unavailable" and result.backend not in ran:
            ran.append(result.backend)
    yield from measure_operation(op, ran, device, quick)


def _check_on_rank(rank: int, world_size: int, op: str, device: str, quick: bool) -> list[Record]:
    from dataclasses import asdict

    import torch

    import tpweave
    from tpweave.verification import run_checks

    group = tpweave.init(timeout=60.0)
    peers = None
    if device == "cuda":
        from tpweave.distributed.peer_memory import connect

        torch.cuda.set_device(0)
        peers = connect(group, torch.device("cuda", 0))
    found = [{"kind": "check", **asdict(r)} for r in run_checks(device=device, ops=[op], group=group, quick=quick)]
    for result in found:
        if result["status"] == "unavailable" and peers is not None:
            result["reason"] += f" (no peer memory: {peers})"
    # After an error the ranks would no longer meet.
    if device == "cuda" and all(result["status"] in ("ok", "unavailable") for result in found):
        from tpweave.benchmarks.gpu_collectives import examine

        found += examine(op, group, torch.device("cuda", 0))
    return found


def check_collective(op: str, device: str, quick: bool) -> Iterator[Record]:
    """The shared checks of one collective, on all ranks."""
    # Imported by its installed name: the ranks' processes look the function up by it.
    from tpweave.benchmarks.gpu_check import _check_on_rank as on_rank
    from tpweave.testing import run_ranks

    for ranks in (2,) if quick else (2, 4):
        for rank, results in enumerate(run_ranks(ranks, on_rank, op, device, quick, timeout=STEP_LIMIT / 2)):
            for result in results:
                # Timings are the same on all ranks.
                if result["kind"] == "check" or rank == 0:
                    yield {"ranks": ranks, "rank": rank, **result}


def list_operations() -> Iterator[Record]:
    """What there is to check."""
    from tpweave.verification import CHECKS

    for op in dict.fromkeys(check.op for check in CHECKS):
        yield {"kind": "operation", "op": op, "collective": any(c.collective for c in CHECKS if c.op == op)}


def run_step(name: str, device: str, quick: bool) -> None:
    """The body of one process."""
    kind, _, op = name.partition(":")
    records = {
        "list": list_operations,
        "machine": lambda: describe_machine(device),
        "op": lambda: check_operation(op, device, quick),
        "comm": lambda: check_collective(op, device, quick),
    }[kind]()
    for record in records:
        print(json.dumps({"gpu_check": record}), flush=True)


# ---- the parent: standard library only, for tpweave is not installed yet


class Report:
    """What was found so far, on disk after every step."""

    def __init__(self, directory: pathlib.Path, budget: float) -> None:
        self.path = directory / "gpu_check.json"
        self.deadline = time.monotonic() + budget
        self.found: Record = {"machine": None, "seconds": 0.0, "steps": [], "checks": [], "timings": []}
        self._begin = time.monotonic()

    def left(self) -> float:
        """Seconds of the budget that are left."""
        return self.deadline - time.monotonic()

    def add(self, step: Record, records: Sequence[Record]) -> None:
        """Notes a step and its records, and writes the file."""
        for record in records:
            kind = record.pop("kind")
            if kind == "machine":
                self.found["machine"] = record
            elif kind in ("check", "timing"):
                self.found[f"{kind}s"].append(record)
        self.found["steps"].append(step)
        self.found["seconds"] = time.monotonic() - self._begin
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(self.found, indent=1))
        part.replace(self.path)

    def bad(self) -> list[str]:
        """What was wrong, raised, died or was left out, in words."""
        words = [f"{s['name']}: {s['status']}: {s['reason']}" for s in self.found["steps"] if s["status"] != "ok"]
        for row in (*self.found["checks"], *self.found["timings"]):
            if row["status"] in ("wrong", "error"):
                words.append(f"{row['op']} {row['case']} on {row['backend']}: {row['status']}: {row['reason']}")
        return words


def run_process(
    report: Report, name: str, command: Sequence[str], environment: dict[str, str], limit: float
) -> list[Record]:
    """Runs one step in a session of its own, ends it at its limit, and notes what it printed up to then."""
    limit = min(limit, report.left())
    step: Record = {"name": name, "status": "ok", "reason": "", "seconds": 0.0}
    if limit < 5.0:
        report.add({**step, "status": "skipped", "reason": "no time left"}, [])
        return []
    begin = time.monotonic()
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        output, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        step |= {"status": "timeout", "reason": f"not finished after {limit:.0f} s"}
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
    lines = output.splitlines()
    records = [json.loads(line)["gpu_check"] for line in lines if line.startswith('{"gpu_check":')]
    if step["status"] == "ok" and process.returncode != 0:
        tail = "\n".join(line for line in lines if not line.startswith('{"gpu_check":'))[-3000:]
        step |= {"status": "died", "reason": f"exit code {process.returncode}: {tail}"}
    step["seconds"] = round(time.monotonic() - begin, 2)
    print(f"{name:<28} {step['status']:<8} {step['seconds']:7.1f} s", flush=True)
    report.add(step, records)
    return records


def print_table(found: Record) -> None:
    """One line per operation and row: checks passed and how near to the bound; one per timing."""
    machine = found["machine"] or {}
    versions = machine.get("versions", {})
    print(f"\n{machine.get('device')}: torch {versions.get('torch')}, triton {versions.get('triton')}")
    rows: dict[tuple[str, str], list[Record]] = {}
    for check in found["checks"]:
        rows.setdefault((check["op"], check["backend"]), []).append(check)
    print(f"\n{'operation':<20} {'row':<8} {'checks':>9} {'of bound':>9}  ranks")
    for (op, backend), checks in rows.items():
        ran = [c for c in checks if c["status"] != "unavailable"]
        if not ran:
            print(f"{op:<20} {backend:<8} {'off':>9} {'':>9}  {checks[0]['reason'][:100]}")
            continue
        passed = sum(c["status"] == "ok" for c in ran)
        nearest = max((c["error"] / c["bound"] for c in ran if c["bound"] > 0), default=0.0)
        ranks = ", ".join(sorted({str(c["ranks"]) for c in ran}))
        print(f"{op:<20} {backend:<8} {f'{passed}/{len(ran)}':>9} {nearest:>9.0%}  {ranks}")
    print(f"\n{'timing':<48} {'row':<8} {'us':>9} {'GB/s':>7}  beside")
    for timing in found["timings"]:
        name = f"{timing['op']} {timing['case']}"
        if timing["status"] != "ok":
            print(f"{name:<48} {timing['backend']:<8} {timing['status']:>9} {'':>7}  {timing['reason'][:80]}")
            continue
        rate = f"{timing['gb_s']:.0f}" if timing["gb_s"] is not None else ""
        beside = ", ".join(
            f"{rival} {seconds * 1e6:.1f} us ({seconds / timing['seconds']:.2f}x)"
            for rival, seconds in timing["rivals"].items()
        )
        print(f"{name:<48} {timing['backend']:<8} {timing['seconds'] * 1e6:>9.1f} {rate:>7}  {beside}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--dir", type=pathlib.Path, required=True, help="where the build and gpu_check.json go")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: Triton's interpreter")
    parser.add_argument("--quick", action="store_true", help="one case of each operation, in fp32, timed once")
    parser.add_argument("--no-build", action="store_true", help="use the tpweave that is installed")
    parser.add_argument("--op", action="append", metavar="OP", help="only this operation; may be given several times")
    parser.add_argument("--budget", type=float, default=BUDGET, metavar="SECONDS", help=f"for all of it ({BUDGET:.0f})")
    parser.add_argument("--step", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step is not None:
        run_step(args.step, args.device, args.quick)
        return 0

    directory = args.dir.resolve()
    directory.mkdir(parents=True, exist_ok=True)
    report = Report(directory, args.budget)
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1" if args.device == "cpu" else "0",
        # Several ranks on one GPU.
        "TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES": "1",
        "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
        "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo"),
    }
    if not args.no_build:
        site = directory / "site"
        source = str(pathlib.Path(__file__).resolve().parent.parent)
        pip = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--disable-pip-version-check",
            "--no-build-isolation",
            "--no-deps",
        ]
        run_process(report, "build", [*pip, "--upgrade", "--target", str(site), source], environment, 240.0)
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(site), os.environ.get("PYTHONPATH"))))

    def step(name: str, limit: float = STEP_LIMIT) -> list[Record]:
        command = [sys.executable, "-m", "tpweave.benchmarks.gpu_check", "--dir", str(directory), "--step", name]
        command += ["--device", args.device, *(["--quick"] if args.quick else [])]
        return run_process(report, name, command, environment, limit)

    if not report.bad():
        print(f"python {platform.python_version()}, results in {report.path}", flush=True)
        step("machine")
        operations = [r for r in step("list") if args.op is None or r["op"] in args.op]
        for operation in operations:
            step(f"{'comm' if operation['collective'] else 'op'}:{operation['op']}")
        print_table(report.found)
    bad = report.bad()
    for words in bad:
        print(f"BAD {words}")
    ran = sum(check["status"] == "ok" for check in report.found["checks"])
    print(f"{ran} checks passed, {len(bad)} things went wrong, {report.found['seconds']:.0f} s")
    return 1 if bad or ran == 0 else 0


if __name__ == "__main__":
    sys.exit(main())
