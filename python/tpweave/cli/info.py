"""`tpweave info`: versions, instruction set, transports, and every backend on or off and why.

Under torchrun (`torchrun --standalone --nproc-per-node 2 -m tpweave.info`) it also shows what the ranks agreed on.
"""

from __future__ import annotations

import argparse
import os
from typing import Any

from tpweave.cli import arguments, output


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    parser = subparsers.add_parser("info", help="what tpweave finds on this machine", description=__doc__)
    arguments.add_json_flag(parser)
    return parser


def _state(reason: str | None) -> Any:
    return output.styled("on", "green") if reason is None else output.styled("off", "yellow")


def _facts(found: dict[str, Any]) -> list[tuple[str, str]]:
    machine, isa, openmp, gpu = found["machine"], found["isa"], found["openmp"], found["gpu"]
    rows = [(name, version or "not installed") for name, version in found["versions"].items()]
    rows += [
        ("system", f"{machine['system']}, {machine['architecture']}"),
        ("CPU", f"{machine['cpu']}, {machine['cores']} core(s) for this process"),
        ("instruction set", f"{isa['active']} (available: {', '.join(isa['available'])})"),
        ("OpenMP", f"{openmp['runtime']}, {openmp['threads']} thread(s)"),
        ("GPU", gpu["off"] or ", ".join(f"{d['name']} (sm_{d['sm']})" for d in gpu["devices"])),
    ]
    rows += [(name, "not set" if value is None else value) for name, value in found["environment"].items()]
    for group in found["groups"]:
        transport = group["transport"] + (f" ({group['why_not_shm']})" if group["why_not_shm"] else "")
        workspace = f"{group['workspace_bytes']} bytes of shared memory"
        rows.append((f"group {group['name']}", f"{group['size']} rank(s), transport {transport}, {workspace}"))
    if not found["groups"]:
        rows.append(("group", "none: this process is on its own; start it with torchrun to see one"))
    return rows


def run(args: argparse.Namespace) -> int:
    if not args.json:
        # Says that rich is missing before the slow part.
        console = output.console()
    from tpweave.info import collect

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        import tpweave

        if tpweave.init().rank != 0:
            return 0
    found = collect()
    if args.json:
        output.print_json(found)
        return 0
    output.print_table(console, "tpweave on this machine", ("what", "found"), _facts(found))
    transports = [(name, _state(reason), reason or "") for name, reason in found["transports"].items()]
    output.print_table(console, "transports", ("transport", "state", "why"), transports)
    rows = []
    for op, backends in found["backends"].items():
        for i, row in enumerate(backends):
            rows.append((op if i == 0 else "", row["backend"], _state(row["off"]), row["off"] or ""))
    output.print_table(console, "backends, best first", ("op", "backend", "state", "why"), rows)
    return 0
