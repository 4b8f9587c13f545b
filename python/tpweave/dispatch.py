"""One table per operation, best backend first; the first row without an objection runs.

    RMS_NORM = Op("rms_norm", [
        Backend("triton", rms_norm_triton, Needs(device="cuda", module="triton")),
        Backend("cpu", rms_norm_cpu, Needs(device="cpu", dtypes=FLOATS)),
        Backend("reference", rms_norm_reference, Needs()),
    ])
    RMS_NORM.supported(Inputs([x, weight]))  # [("triton", "needs cuda tensors, these are on cpu"), ("cpu", None), ...]

`Needs.why_not` is pure. For a collective it reads only what every rank has in common (what the group agreed on at its
start, dtype, full shape): ranks that chose different rows would wait for each other for ever.
"""

from __future__ import annotations

import functools
import importlib.util
import operator
import pkgutil
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from tpweave import env
from tpweave.errors import BackendUnavailableError

HALF = frozenset({torch.bfloat16, torch.float16})
FLOATS = frozenset({torch.float32, torch.bfloat16, torch.float16})


class Inputs:
    """What a row's needs are checked against: the tensors of a call and any other facts by name."""

    __slots__ = ("group", "tensors", "values")

    def __init__(self, tensors: Sequence[torch.Tensor | None], group: Any = None, **values: Any) -> None:
        self.tensors = [t for t in tensors if t is not None]
        self.group = group
        self.values = values


Rule = Callable[[Inputs], "str | None"]


def last_dim_up_to(limit: int) -> Rule:
    """A rule: the first tensor's last dim is at most `limit`."""

    def rule(inputs: Inputs) -> str | None:
        size = inputs.tensors[0].shape[-1]
        return None if size <= limit else f"takes a last dim of up to {limit}, not {size}"

    return rule


# A fifth of the time of comparing `tensor.device.type`.
_IS_ON = {"cpu": operator.attrgetter("is_cpu"), "cuda": operator.attrgetter("is_cuda")}


@functools.cache
def _module_missing(name: str) -> bool:
    return importlib.util.find_spec(name) is None


@dataclass(frozen=True)
class Needs:
    """Conditions of a backend. Every one left at its default is no condition.

    Attributes:
        device: device type of all tensors. A Triton row also takes CPU tensors under TRITON_INTERPRET=1.
        dtypes: allowed dtypes of the tensors (floating-point tensors only are looked at).
        sm: least CUDA compute capability, e.g. 90.
        module: Python module that must be installed.
        transport: transport that the group must have agreed on, e.g. "shm".
        rules: further pure functions `Inputs -> reason or None`.
        advice: more of them: why the row, which takes the inputs, is only chosen where it is named.
    """

    device: str | None = None
    dtypes: frozenset[torch.dtype] | None = None
    sm: int | None = None
    module: str | None = None
    transport: str | None = None
    rules: tuple[Rule, ...] = field(default=())
    advice: tuple[Rule, ...] = field(default=())

    def why_not(self, inputs: Inputs) -> str | None:
        """None when this backend takes `inputs`, else the reason in words."""
        if self.module is not None and _module_missing(self.module):
            return f"needs the Python package {self.module}, which is not installed"
        if self.device is not None:
            interpreted = self.module == "triton" and env.triton_interpreted()
            is_there = _IS_ON[self.device]
            for tensor in inputs.tensors:
                if not is_there(tensor) and not (interpreted and tensor.is_cpu):
                    hint = " (TRITON_INTERPRET=1 takes cpu tensors too)" if self.module == "triton" else ""
                    return f"needs {self.device} tensors, these are on {tensor.device.type}{hint}"
        if self.dtypes is not None:
            for tensor in inputs.tensors:
                if tensor.dtype not in self.dtypes and tensor.is_floating_point():
                    takes = ", ".join(sorted(str(d).removeprefix("torch.") for d in self.dtypes))
                    return f"takes {takes}, not {str(tensor.dtype).removeprefix('torch.')}"
        if self.sm is not None:
            for tensor in inputs.tensors:
                if tensor.device.type == "cuda":
                    major, minor = torch.cuda.get_device_capability(tensor.device)
                    if major * 10 + minor < self.sm:
                        return f"needs compute capability {self.sm / 10}, this GPU has {major}.{minor}"
        if self.transport is not None:
            has = inputs.group.transport if inputs.group is not None else "none"
            if has != self.transport:
                return f"needs the {self.transport} transport, this group has {has}"
        for rule in self.rules:
            reason = rule(inputs)
            if reason is not None:
                return reason
        return None

    def only_if_named(self, inputs: Inputs) -> str | None:
        """Why a backend that takes `inputs` is not chosen by itself: Triton's interpreter is for tests, and a row may
        advise against itself."""
        if self.module == "triton" and any(t.device.type == "cpu" for t in inputs.tensors):
            return "runs in Triton's interpreter, only where it is named"
        return next((reason for rule in self.advice if (reason := rule(inputs)) is not None), None)


@dataclass(frozen=True)
class Backend:
    """One row: a name, the function that runs, what it needs, and what `explain` says of it where it can run."""

    name: str
    run: Callable[..., Any]
    needs: Needs
    note: str = ""


class Op:
    """An operation's table of backends, best first.

    Args:
        name: the stem.
        backends: rows; the last one should have no needs.
    """

    def __init__(self, name: str, backends: Sequence[Backend]) -> None:
        self.name = name
        self.backends = tuple(backends)
        OPS[name] = self

    def supported(self, inputs: Inputs) -> list[tuple[str, str | None]]:
        """Every row's name with None if it takes `inputs`, else its reason."""
        return [(row.name, row.needs.why_not(inputs)) for row in self.backends]

    def named(self, name: str | None) -> str | None:
        """`name` if there is a row of that name: what a backward is asked for after a forward that ran as `name`."""
        return next((row.name for row in self.backends if row.name == name), None)

    def choose(self, inputs: Inputs, backend: str | None = None) -> Backend:
        """The row that runs: the one named (by argument or TPWEAVE_BACKEND), else the first without an objection.

        Raises:
            BackendUnavailableError: the named row does not exist or objects, or every row objects.
        """
        named = backend or env.forced_backend(self.name)
        if named is not None:
            return self._named(named, inputs)
        reasons: list[str] = []
        for row in self.backends:
            reason = row.needs.why_not(inputs) or row.needs.only_if_named(inputs)
            if reason is None:
                if row.name == "reference" and any(t.device.type == "cuda" for t in inputs.tensors):
                    warn_once(f"{self.name} runs its reference on a GPU: {'; '.join(reasons)}")
                return row
            reasons.append(f"{row.name}: {reason}")
        raise BackendUnavailableError(f"no backend of {self.name} takes this call: {'; '.join(reasons)}")

    def _named(self, name: str, inputs: Inputs) -> Backend:
        for row in self.backends:
            if row.name == name:
                reason = row.needs.why_not(inputs)
                if reason is not None:
                    raise BackendUnavailableError(f"{self.name} cannot run on backend '{name}': {reason}")
                return row
        rows = ", ".join(row.name for row in self.backends)
        raise BackendUnavailableError(f"{self.name} has no backend '{name}'; it has {rows}")


OPS: dict[str, Op] = {}


def load_ops() -> dict[str, Op]:
    """Every table by its op's name, with all modules that define one imported."""
    for area in ("tpweave.ops", "tpweave.comm"):
        for module in pkgutil.iter_modules(importlib.import_module(area).__path__):
            importlib.import_module(f"{area}.{module.name}")
    return OPS


@functools.cache
def warn_once(message: str) -> None:
    """Warn, once per process and message, that something slower than asked for runs."""
    warnings.warn(message, stacklevel=3)


@dataclass(frozen=True)
class Explanation:
    """What `tpweave.explain` found: rows as (backend, reason or None), the row that would run, the rows' notes."""

    op: str
    rows: list[tuple[str, str | None]]
    chosen: str | None
    notes: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{self.op}:"]
        for name, reason in self.rows:
            mark = "->" if name == self.chosen else "  "
            lines.append(f" {mark} {name:<10} {reason or self.notes[name] or 'ok'}")
        return "\n".join(lines)


def explain(op: str, *tensors: torch.Tensor | None, group: Any = None, **values: Any) -> Explanation:
    """Which backend of `op` would run for these tensors, and why the others would not.

    Args:
        op: a stem, e.g. `"rms_norm"`.
        tensors: example inputs; only device, dtype and shape are read.
        group: the group of a collective.
        values: further facts that the op's rows ask about, e.g. `causal=True`.

    Returns:
        an `Explanation`; print it for a table.

    Raises:
        ValueError: there is no such op.

    Example:
        >>> print(tpweave.explain("rms_norm", torch.randn(4, 64), torch.ones(64)))
    """
    ops = load_ops()
    if op not in ops:
        raise ValueError(f"no operation '{op}'; there are: {', '.join(sorted(ops))}")
    inputs = Inputs(tensors, group=group, **values)
    rows = [(row.name, row.needs.why_not(inputs) or row.needs.only_if_named(inputs)) for row in ops[op].backends]
    notes = {row.name: row.note for row in ops[op].backends}
    return Explanation(op, rows, next((name for name, reason in rows if reason is None), None), notes)
