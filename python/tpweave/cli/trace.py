"""`tpweave trace OP`: one call of a collective on all ranks, step by step, and how much of it is communication."""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
from collections import defaultdict
from typing import Any

from tpweave.cli import arguments, output
from tpweave.cli.bench import human_time


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    parser = subparsers.add_parser("trace", help="show where the time of a collective goes", description=__doc__)
    parser.add_argument("op", metavar="OP", help="a collective, e.g. matmul_reduce_scatter")
    parser.add_argument("--ranks", type=arguments.positive, help="number of ranks (default: the benchmark's own)")
    parser.add_argument("--threads", type=arguments.positive, default=1, help="threads of each rank (default 1)")
    parser.add_argument("--repeats", type=arguments.positive, default=15, help="repeats of the medians (default 15)")
    parser.add_argument("--case", help="the first of the benchmark's cases whose name holds this")
    parser.add_argument(
        "--out", type=pathlib.Path, metavar="FILE", help="the Chrome trace (default: trace_<OP>.json in this folder)"
    )
    arguments.add_json_flag(parser)
    return parser


def _seconds_by_step(events: list[list[Any]], calls: set[str]) -> dict[str, float]:
    """Seconds that one rank spent in each kind of step."""
    spent: dict[str, float] = defaultdict(float)
    for name, _peer, _step, begin, end in events:
        if name not in calls:
            spent[name] += (end - begin) * 1e-9
    return spent


def run(args: argparse.Namespace) -> int:
    console = None if args.json else output.console()
    from tpweave.benchmarks.registry import BenchRequestError
    from tpweave.benchmarks.run import BenchError, Options
    from tpweave.benchmarks.trace import CALL, chrome_trace, run_trace
    from tpweave.native import COLLECTIVE_CODES

    try:
        options = Options(repeats=args.repeats, threads=args.threads, only=args.case)
        result = run_trace(args.op, options, ranks=args.ranks)
    except BenchRequestError as error:
        raise output.UsageError(str(error)) from None
    except BenchError as error:
        print(f"tpweave trace: {error}", file=sys.stderr)
        return 1
    events = result.pop("events")
    path = args.out if args.out is not None else pathlib.Path(f"trace_{args.op}.json")
    path.write_text(json.dumps(chrome_trace(events, f"{args.op}, {result['case']}, {result['ranks']} ranks")) + "\n")
    spent = [_seconds_by_step(of_rank, {CALL, *COLLECTIVE_CODES}) for of_rank in events]
    result |= {"file": str(path), "steps": spent}
    if console is None:
        output.print_json(result)
        return 0
    kinds = sorted({kind for of_rank in spent for kind in of_rank})
    rows = [
        [f"rank {rank}", *(human_time(of_rank.get(kind, 0.0)) for kind in kinds)] for rank, of_rank in enumerate(spent)
    ]
    title = f"{args.op}, {result['case']}: one call on {result['ranks']} ranks over {result['transport']}"
    if kinds:
        output.print_table(console, title, ["", *(f">{kind}" for kind in kinds)], rows)
    else:
        console.print(f"{title}: its steps are recorded on the shm transport only")
    whole = f"a call takes {human_time(result['total'])}"
    if result["alone"] is None:
        console.print(f"{whole} (median of the slowest rank), all of it communication")
    else:
        share = result["exposed"] / result["alone"]
        console.print(
            f"{whole} (median of the slowest rank), its local work alone {human_time(result['alone'])}: exposed "
            f"communication {human_time(max(result['exposed'], 0.0))}, {100 * share:.1f}% of the local work"
        )
    console.print(f"written to {path}; open it in chrome://tracing or ui.perfetto.dev")
    return 0
