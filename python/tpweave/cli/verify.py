"""`tpweave verify`: every operation on every backend that runs here, against the reference in float64.

Outputs and gradients, in fp32, bf16 and fp16; collectives on two ranks. Exits with 1 when anything is wrong.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from tpweave.cli import arguments, output

RANKS = 2
BAD = ("wrong", "error")


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    parser = subparsers.add_parser("verify", help="check every operation on this machine", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one case of each operation, in fp32")
    parser.add_argument("--op", action="append", metavar="OP", help="only this operation; may be given several times")
    arguments.add_json_flag(parser)
    return parser


def _on_rank(rank: int, world_size: int, ops: Sequence[str] | None, quick: bool) -> list[dict[str, Any]]:
    """The collectives' results on one rank, as plain values."""
    import tpweave
    from tpweave.verification import run_checks

    group = tpweave.init()
    found = [{**asdict(result), "rank": rank} for result in run_checks(group=group, ops=ops, quick=quick)]
    group.destroy()
    return found


def collect(ops: Sequence[str] | None, quick: bool, bar: output.Progress) -> list[dict[str, Any]]:
    """All results: this process's operations on each device, then the collectives of every rank."""
    import torch

    from tpweave.testing import run_ranks
    from tpweave.verification import CHECKS, run_checks

    results = []
    for device in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
        for result in run_checks(device=device, ops=ops, quick=quick):
            results.append({**asdict(result), "device": device, "ranks": 1})
            bar.advance(f"{result.op} {result.backend}")
    if any(check.collective and (ops is None or check.op in ops) for check in CHECKS):
        bar.advance(f"collectives on {RANKS} ranks")
        for found in run_ranks(RANKS, _on_rank, ops, quick, timeout=300.0):
            results += [{**result, "device": "cpu", "ranks": RANKS} for result in found]
    return results


def summary(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One entry per operation, device and backend: its status, what was checked, and how near to its bound it came."""
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for result in results:
        groups.setdefault((result["op"], result["device"], result["backend"]), []).append(result)
    entries = []
    for (op, device, backend), members in groups.items():
        ran = [member for member in members if member["status"] != "unavailable"]
        bad = [member for member in ran if member["status"] in BAD]
        closest = max((member["error"] / member["bound"] for member in ran if member["bound"] > 0), default=0.0)
        entries.append(
            {
                "op": op,
                "device": device,
                "backend": backend,
                "status": bad[0]["status"] if bad else "ok" if ran else "off",
                "checked": len(ran),
                "failed": len(bad),
                "dtypes": sorted({member["dtype"] for member in ran}),
                "closest": closest,
                "reason": "" if ran else members[0]["reason"].partition("': ")[2],
            }
        )
    return entries


def run(args: argparse.Namespace) -> int:
    console = None if args.json else output.console()
    from tpweave.testing import RankFailure
    from tpweave.verification import CHECKS

    known = sorted({check.op for check in CHECKS})
    for op in args.op or ():
        if op not in known:
            raise output.UsageError(f"no checks of '{op}'; there are: {', '.join(known)}")
    try:
        with output.Progress("checking", None, quiet=args.json) as bar:
            results = collect(args.op, args.quick, bar)
    except RankFailure as error:
        print(f"tpweave verify: the ranks of the collectives failed\n{error}", file=sys.stderr)
        return 1
    entries = summary(results)
    failed = [result for result in results if result["status"] in BAD]
    # A table on which nothing ran proves nothing.
    passed = not failed and any(entry["checked"] for entry in entries)
    if console is None:
        output.print_json({"passed": passed, "summary": entries, "results": results})
        return 0 if passed else 1
    colours = {"ok": "green", "off": "yellow"}
    rows = [
        (
            entry["op"],
            entry["backend"] + ("" if entry["device"] == "cpu" else f" ({entry['device']})"),
            output.styled(entry["status"], colours.get(entry["status"], "bold red")),
            entry["checked"],
            f"{entry['closest']:.0%}" if entry["checked"] else "",
            ", ".join(entry["dtypes"]) or entry["reason"],
        )
        for entry in entries
    ]
    columns = ("op", "backend", "state", ">checks", ">of bound", "dtypes, or why it is off")
    output.print_table(console, "outputs and gradients against the reference in float64", columns, rows)
    for result in failed:
        where = f"{result['op']} {result['case']}, {result['dtype']}, {result['backend']} on {result['device']}"
        console.print(output.styled(f"{result['status']}: {where}: {result['reason']}", "red"))
    ran = sum(entry["checked"] for entry in entries)
    verdict = (
        f"{len(failed)} of {ran} checks failed" if failed else f"all {ran} checks passed" if ran else "nothing ran"
    )
    console.print(output.styled(verdict, "bold green" if passed else "bold red"))
    return 0 if passed else 1
