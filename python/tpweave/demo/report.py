"""What the demo prints, on rank 0 only, and the checks that decide its exit code."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from tpweave.cli import output


@dataclass(frozen=True)
class Check:
    """One thing that had to hold: `seen` against `wanted`, in words."""

    name: str
    passed: bool
    seen: str
    wanted: str


@dataclass
class Report:
    """Collects checks and results; prints as it goes unless `quiet` or on another rank than 0."""

    rank: int
    quiet: bool
    checks: list[Check] = field(default_factory=list)
    results: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._console = None if self.quiet or self.rank != 0 else output.console()

    def title(self, text: str) -> None:
        if self._console is not None:
            self._console.print()
            self._console.rule(output.styled(text, "bold"), align="left")

    def say(self, text: str, style: str = "") -> None:
        if self._console is not None:
            self._console.print(output.styled(text, style))

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        if self._console is not None:
            output.print_table(self._console, title, columns, rows)

    def check(self, name: str, passed: bool, seen: str, wanted: str) -> None:
        """Record a check and print it."""
        self.checks.append(Check(name, passed, seen, wanted))
        self.say(
            f"{'ok' if passed else 'FAILED'}  {name}: {seen} (wanted: {wanted})", "green" if passed else "bold red"
        )

    @contextlib.contextmanager
    def progress(self, description: str, total: int) -> Iterator[output.Progress]:
        with output.Progress(description, total, quiet=self._console is None, on_stdout=True) as bar:
            yield bar

    def as_dict(self) -> dict[str, Any]:
        passed = all(check.passed for check in self.checks)
        return {"passed": passed, "checks": [asdict(check) for check in self.checks], **self.results}
