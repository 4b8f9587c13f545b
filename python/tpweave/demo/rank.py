"""One rank of the demo; `tpweave demo` starts two of them with torchrun."""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import platform

import torch
import torch.distributed as dist

import tpweave
from tpweave import info
from tpweave.benchmarks.launch import pin_rank
from tpweave.demo import comparison, decoder, encoder
from tpweave.demo.report import Report
from tpweave.native import _C


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--query", required=True)
    parser.add_argument("--result", type=pathlib.Path, required=True)
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--quiet", action="store_true")
    args = parser.parse_args()

    torch.set_num_threads(1)
    group = tpweave.init()
    report = Report(group.rank, args.quiet)
    machine = info.machine()
    report.results["machine"] = {**machine, "isa": _C.active_isa()}
    report.results["versions"] = {"python": platform.python_version(), "torch": torch.__version__}
    report.results["transport"] = group.transport
    report.say(
        f"tpweave {tpweave.__version__} on {machine['cpu']}, {machine['cores']} cores, {_C.active_isa()}: "
        f"{group.size} ranks, transport {group.transport}"
    )
    encoder.run(report, args.query)
    decoder.run(report, decoder.SHORT if args.short else decoder.Recipe())
    pin_rank(int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"]))
    comparison.run(report, repeats=5 if args.short else 15)
    if group.rank == 0:
        args.result.write_text(json.dumps(report.as_dict()))
    dist.barrier()
    group.destroy()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
