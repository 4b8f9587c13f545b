"""One declarative entry per op: its cases, what ours and the rivals run, and the reference that is checked first.

`benchmarks/<area>/bench_<stem>.py` defines `BENCH = Bench(...)`; `find(stem)` imports it, `run.py` measures it.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from tpweave.native import _C, DTYPE_CODES

AREAS = ("ops", "comm", "models")


@dataclass(frozen=True)
class Case:
    """One row of the report. `make(**values)` builds the inputs."""

    name: str
    values: dict[str, Any]


@dataclass(frozen=True)
class Bench:
    """A benchmark.

    With several ranks, every function below is called on each of them, in the same order, with the default process
    group (gloo) initialised, one thread and a seed of the rank's own.

    Attributes:
        stem: the op's stem; of a model's benchmark its own name.
        cases: what is measured.
        gpu_cases: what is measured on a GPU; `cases` when empty.
        sweep: many more cases, measured only where they are asked for by name.
        make: `make(**case.values)` -> inputs, the same on all ranks but for the data.
        ours: inputs -> result; rivals: name -> the same for an alternative (the first is the headline ratio's).
        check: inputs, our result -> None, raises when wrong; runs before any timing, on every rank.
        alone: inputs -> the local work of one call of a collective without its communication; None where there is none.
        flops, bytes: inputs -> work of one call on one rank (bytes read plus written), for rates; None where it
            says nothing.
        extra_bytes: inputs -> memory that one call takes beside its inputs and outputs, as measured; None where it is
            not.
        peak: inputs -> FLOP/s that one rank's threads reach at best, measured right then; None where `flops` is not
            compared with it.
        world_size: ranks; 1 runs in this process.
        mpi_rivals: those of `rivals` that need to be started by mpirun and mpi4py; left out where these are not
            installed.
    """

    stem: str
    cases: tuple[Case, ...]
    make: Callable[..., Any]
    ours: Callable[[Any], Any]
    rivals: dict[str, Callable[[Any], Any]]
    check: Callable[[Any, Any], None]
    alone: Callable[[Any], Any] | None = None
    flops: Callable[[Any], float] | None = None
    bytes: Callable[[Any], float] | None = None
    extra_bytes: Callable[[Any], int] | None = None
    peak: Callable[[Any], float] | None = None
    world_size: int = 1
    mpi_rivals: tuple[str, ...] = ()
    gpu_cases: tuple[Case, ...] = ()
    sweep: tuple[Case, ...] = ()


class BenchRequestError(ValueError):
    """A benchmark, case, backend or number of ranks that there is not; the message names those there are."""


def multiply_add_peak(dtype: torch.dtype) -> float:
    """FLOP/s of bare multiply-adds, as the native kernels do them for `dtype`, on all of torch's threads: the best of
    several runs of about a millisecond.
    """
    return max(_C.multiply_add_peak(DTYPE_CODES[dtype], 300_000) for _ in range(9))


def dtype_named(name: str) -> torch.dtype:
    """`"bf16"` -> torch.bfloat16."""
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


def _modules() -> dict[str, str]:
    """Stem -> module of its benchmark."""
    found = {}
    for area in AREAS:
        package = importlib.import_module(f"tpweave.benchmarks.{area}")
        for module in pkgutil.iter_modules(package.__path__):
            if module.name.startswith("bench_"):
                found[module.name.removeprefix("bench_")] = f"{package.__name__}.{module.name}"
    return found


def stems() -> list[str]:
    """Every stem that has a benchmark."""
    return sorted(_modules())


def find(stem: str) -> Bench:
    """The benchmark of `stem`; BenchRequestError when it has none."""
    modules = _modules()
    if stem not in modules:
        raise BenchRequestError(f"no benchmark '{stem}'; there are: {', '.join(sorted(modules))}")
    return importlib.import_module(modules[stem]).BENCH
