"""`tpweave explain OP`: which backend would run for given shapes, and why the others would not."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

from tpweave.cli import arguments, output

# Shapes of each op's tensors where none are given: a small layer of a transformer. Ops not named here take one tensor.
EXAMPLE_SHAPES: dict[str, tuple[tuple[int, ...], ...]] = {
    "attention": ((1, 512, 8, 64), (1, 512, 8, 64), (1, 512, 8, 64)),
    "matmul_all_reduce": ((16, 256), (256, 512)),
    "rms_norm": ((16, 512), (512,)),
    "layer_norm": ((16, 512), (512,), (512,)),
    "rope": ((1, 512, 8, 64), (1, 512, 8, 64), (512, 64), (512, 64)),
    "gated_activation": ((16, 512), (16, 512)),
}
DTYPES = ("fp32", "bf16", "fp16", "fp64", "int8", "int32", "int64")


@dataclass(frozen=True)
class AssumedGroup:
    """The facts of a group that a collective's rows read, for a group that does not exist yet."""

    size: int
    transport: str
    backend: str
    rank: int = 0


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    parser = subparsers.add_parser(
        "explain", help="which backend would run, and why the others would not", description=__doc__,
        epilog="example: tpweave explain attention --shape 1x2048x8x64 --shape 1x2048x2x64 --shape 1x2048x2x64",
    )  # fmt: skip
    parser.add_argument("op", metavar="OP", help="an operation, e.g. rms_norm")
    parser.add_argument(
        "--shape", action="append", type=arguments.shape, help="shape of a tensor, e.g. 16x512; once for each tensor"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="dtype of the tensors (default fp32)")
    parser.add_argument("--device", default="cpu", help="device of the tensors (default cpu); need not exist here")
    parser.add_argument(
        "--ranks",
        type=arguments.positive,
        default=2,
        help="ranks of the group that a collective is called on (default 2)",
    )
    parser.add_argument(
        "--transport", choices=("shm", "pg", "none"), help="transport of that group (default: the best one here)"
    )
    parser.add_argument(
        "--value", action="append", type=arguments.value, default=[], help="a further argument, e.g. causal=True"
    )
    arguments.add_json_flag(parser)
    return parser


def _example_tensors(op: str, shapes: list[tuple[int, ...]] | None, dtype: str, device: str) -> list[Any]:
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    types = {
        "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64,
        "int8": torch.int8, "int32": torch.int32, "int64": torch.int64,
    }  # fmt: skip
    # Fake tensors have a device and strides but no memory: a GPU that this machine lacks can be asked about.
    with FakeTensorMode():
        try:
            return [
                torch.empty(s, dtype=types[dtype], device=device)
                for s in shapes or EXAMPLE_SHAPES.get(op, ((16, 512),))
            ]
        except RuntimeError as error:
            raise output.UsageError(f"no tensors on device '{device}': {str(error).splitlines()[0]}") from None


def run(args: argparse.Namespace) -> int:
    if not args.json:
        console = output.console()
    from tpweave.dispatch import explain
    from tpweave.info import shm_objection

    best = "pg" if args.device != "cpu" or shm_objection() else "shm"
    transport = args.transport or ("none" if args.ranks == 1 else best)
    group = AssumedGroup(args.ranks, transport, "gloo" if args.device == "cpu" else "nccl")
    tensors = _example_tensors(args.op, args.shape, args.dtype, args.device)
    try:
        found = explain(args.op, *tensors, group=group, **dict(args.value))
    except ValueError as error:
        raise output.UsageError(str(error)) from None
    except KeyError as error:
        raise output.UsageError(f"{args.op} also asks about {error}; give it as --value {error.args[0]}=...") from None
    shapes = [list(tensor.shape) for tensor in tensors]
    if args.json:
        rows = [{"backend": name, "reason": reason} for name, reason in found.rows]
        asked = {"shapes": shapes, "dtype": args.dtype, "device": args.device, "values": dict(args.value)}
        output.print_json({"op": found.op, "chosen": found.chosen, "rows": rows, "asked": asked})
        return 0
    sizes = ", ".join("x".join(str(size) for size in shape) for shape in shapes)
    cells = []
    for name, reason in found.rows:
        takes = ("runs", "bold green") if name == found.chosen else ("could run", "green")
        state = takes if reason is None else ("off", "yellow")
        cells.append((name, output.styled(*state), reason or found.notes[name]))
    output.print_table(
        console, f"{found.op}: {sizes} {args.dtype} on {args.device}", ("backend", "state", "why"), cells
    )
    return 0
