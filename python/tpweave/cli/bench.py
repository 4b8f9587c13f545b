"""`tpweave bench [OP]`: an operation beside its rivals, correctness checked first, limits measured in the same run."""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
from typing import Any

from tpweave.cli import arguments, output

GLOO_NOTE = (
    "gloo's time at small sizes is mostly the waking of idle cores, which busy cores would not have: "
    "do not read those ratios as a speed of the kernel."
)
SMALL_BYTES = 1 << 20


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    parser = subparsers.add_parser("bench", help="measure an operation beside its rivals", description=__doc__)
    parser.add_argument("op", metavar="OP", nargs="?", help="an operation, e.g. rms_norm; all of them when left out")
    parser.add_argument(
        "--ranks", type=arguments.positive, help="ranks of a collective (default: the benchmark's own, mostly 2)"
    )
    parser.add_argument("--threads", type=arguments.positive, default=1, help="threads of each rank (default 1)")
    parser.add_argument(
        "--repeats", type=arguments.positive, default=15, help="interleaved repeats that the median is of (default 15)"
    )
    parser.add_argument("--backend", help="force this backend of the op")
    parser.add_argument("--case", help="only the cases whose name holds this")
    parser.add_argument("--out", type=pathlib.Path, metavar="DIR", help="also write DIR/<op>.json for each op")
    arguments.add_json_flag(parser)
    return parser


def human_time(seconds: float) -> str:
    """`0.0000123` -> "12.3 us"."""
    for unit, scale in (("ns", 1e-9), ("us", 1e-6), ("ms", 1e-3), ("s", 1.0)):
        if seconds < 1000 * scale or unit == "s":
            return f"{seconds / scale:.3g} {unit}" if seconds < 100 * scale else f"{seconds / scale:.0f} {unit}"
    raise AssertionError("unreachable")


def _draw(console: Any, result: dict[str, Any]) -> None:
    measured = [row for row in result["rows"] if row["error"] is None]
    rivals = list(measured[0]["rivals"]) if measured else []
    several = result["ranks"] > 1
    columns = ["case", ">ours", *([">skew"] if several else []), ">GB/s", ">GF/s"]
    with_peak = any(row["of_peak"] is not None for row in measured)
    columns += [">of peak"] if with_peak else []
    for rival in rivals:
        columns += [f">{rival}", ">ratio"]
    rows = []
    for row in result["rows"]:
        if row["error"] is not None:
            rows.append([row["case"], output.styled("WRONG", "bold red"), row["error"]])
            continue
        cells = [row["case"], human_time(row["ours"]["seconds"])]
        cells += [human_time(row["ours"]["skew"])] if several else []
        cells += ["" if row[rate] is None else f"{row[rate]:.3g}" for rate in ("gb_s", "gflop_s")]
        cells += ["" if row["of_peak"] is None else f"{row['of_peak']:.0%}"] if with_peak else []
        for rival in rivals:
            ratio = row["rivals"][rival]["ratio"]
            cells.append(human_time(row["rivals"][rival]["seconds"]))
            cells.append(output.styled(f"{ratio:.2f}x", "green" if ratio >= 1 else "red"))
        rows.append(cells)
    machine = result["machine"]
    title = (
        f"{result['stem']}: {result['ranks']} rank(s), {result['threads']} thread(s) each, {machine['cpu']}, "
        f"{machine['cores']} core(s), {result['isa']}"
    )
    output.print_table(console, title, columns, rows)
    limits = result["limits"]
    console.print(
        f"limits of this run, per rank: memory copy {limits['copy_gb_s']:.1f} GB/s (read plus written), "
        f"torch fp32 matmul {limits['matmul_fp32_gflop_s']:.0f} GF/s; ratio = rival's time / ours"
    )
    for name, reason in result["left_out"].items():
        console.print(f"{name} left out: {reason}")
    small = any((row["bytes"] or 0) <= SMALL_BYTES for row in measured)
    if small and any("gloo" in rival for rival in rivals):
        console.print(GLOO_NOTE)


def run(args: argparse.Namespace) -> int:
    console = None if args.json else output.console()
    from tpweave.benchmarks.registry import BenchRequestError, find, stems
    from tpweave.benchmarks.run import BenchError, Options, run_bench
    from tpweave.errors import BackendUnavailableError

    options = Options(repeats=args.repeats, threads=args.threads, backend=args.backend, only=args.case)
    if args.op is None and (args.ranks or args.backend or args.case):
        raise output.UsageError("--ranks, --backend and --case need an OP")
    results = []
    try:
        for bench in [find(stem) for stem in ([args.op] if args.op else stems())]:
            with output.Progress(bench.stem, len(bench.cases), quiet=args.json) as bar:
                result = run_bench(bench.stem, options, ranks=args.ranks, progress=lambda _row, bar=bar: bar.advance())
            results.append(result)
            if args.out is not None:
                args.out.mkdir(parents=True, exist_ok=True)
                (args.out / f"{bench.stem}.json").write_text(json.dumps(result, indent=2) + "\n")
            if console is not None:
                _draw(console, result)
    except (BenchRequestError, BackendUnavailableError) as error:
        raise output.UsageError(str(error)) from None
    except BenchError as error:
        print(f"tpweave bench: {error}", file=sys.stderr)
        return 1
    if args.json:
        output.print_json(results[0] if args.op else results)
    return 1 if any(row["error"] is not None for result in results for row in result["rows"]) else 0
