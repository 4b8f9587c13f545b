"""Entry point of the command `tpweave`.

Exit codes: 0 all well, 1 something failed, 2 a mistake of the user (one line on stderr), 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from tpweave.cli import bench, demo, explain, info, trace, verify
from tpweave.cli.output import UsageError
from tpweave.version import __version__

COMMANDS = (info, verify, explain, bench, trace, demo)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tpweave", description="Tensor-parallel kernels for PyTorch, on CPUs and GPUs."
    )
    parser.add_argument("--version", action="version", version=f"tpweave {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        sub = command.add_parser(subparsers)
        sub.set_defaults(run=command.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one sub-command and return its exit code."""
    args = build_parser().parse_args(argv)
    try:
        return args.run(args)
    except UsageError as error:
        print(f"tpweave {args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\ntpweave {args.command}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output is gone (`tpweave info | head`); keep Python's exit from writing to it again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


if __name__ == "__main__":
    sys.exit(main())
