"""Types of command-line arguments: each turns text into a value or says what it should have been."""

from __future__ import annotations

import argparse
import ast
from typing import Any


def add_json_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else on standard output")


def shape(text: str) -> tuple[int, ...]:
    try:
        sizes = tuple(int(size) for size in text.replace(",", "x").split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is no shape; write it as 16x512") from None
    if any(size < 0 for size in sizes):
        raise argparse.ArgumentTypeError(f"'{text}' has a negative size")
    return sizes


def positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number of at least 1")
    return int(text)


def value(text: str) -> tuple[str, Any]:
    name, separator, written = text.partition("=")
    if not separator or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"'{text}' is not of the form name=value")
    try:
        return name, ast.literal_eval(written)
    except (ValueError, SyntaxError):
        # Anything that is no Python literal is a plain word: reduce_op=sum.
        return name, written
