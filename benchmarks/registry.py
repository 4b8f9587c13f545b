"""One declarative entry per op: its cases, what ours and the rivals run, and the reference that is checked first.

A `bench_<stem>.py` defines `BENCH = Bench(...)`; `benchmarks/run.py` and `tpweave bench` find it by its stem.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Case:
    """One row of the report. `make(case)` builds inputs from `values`."""

    name: str
    values: dict[str, Any]


@dataclass(frozen=True)
class Bench:
    """A benchmark.

    Attributes:
        stem: the op's stem.
        cases: what is measured.
        make: case values -> inputs, the same on all ranks but for the data.
        ours: inputs -> result; rivals: name -> the same for an alternative (the first is the headline ratio's).
        check: inputs, our result -> None, raises when wrong; runs before any timing.
        flops, bytes: inputs -> work of one call, for rates; None where it says nothing.
        world_size: ranks; 1 runs in this process.
    """

    stem: str
    cases: tuple[Case, ...]
    make: Callable[..., Any]
    ours: Callable[[Any], Any]
    rivals: dict[str, Callable[[Any], Any]]
    check: Callable[[Any, Any], None]
    flops: Callable[[Any], float] | None = None
    bytes: Callable[[Any], float] | None = None
    world_size: int = 1


def dtype_named(name: str) -> torch.dtype:
    """`"bf16"` -> torch.bfloat16."""
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]
