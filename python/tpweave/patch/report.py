"""What `parallelize` did with every module of a model."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

SWAPPED, ADJUSTED, KEPT = "swapped", "adjusted", "kept"


@dataclass(frozen=True)
class SwapEntry:
    """One module.

    Attributes:
        path: its name in the model, `""` for the model itself.
        module: class of the module as it was.
        action: "swapped" (replaced by another module), "adjusted" (works on this rank's part), or "kept".
        by: class of the replacement; None unless swapped.
        note: what this rank holds of it, or why it was left alone.
    """

    path: str
    module: str
    action: str
    by: str | None
    note: str

    def to_dict(self) -> dict[str, Any]:
        """The entry as plain values."""
        return {"path": self.path, "module": self.module, "action": self.action, "by": self.by, "note": self.note}


@dataclass(frozen=True)
class SwapReport:
    """What became of every module; `print(report)` shows a table with repeated layers folded into one line.

    Attributes:
        family: the table that was used, e.g. "llama".
        rank, size: of the group; the notes are this rank's.
        entries: one per module, in the model's order.

    Example:
        >>> report = tpweave.parallelize(model)
        >>> print(report)
        >>> [entry.path for entry in report.entries if entry.action == "kept"]
    """

    family: str
    rank: int
    size: int
    entries: tuple[SwapEntry, ...]

    def count(self, action: str) -> int:
        """How many modules were "swapped", "adjusted" or "kept"."""
        return sum(entry.action == action for entry in self.entries)

    def to_dict(self) -> dict[str, Any]:
        """The whole report as plain values, for JSON."""
        return {
            "family": self.family,
            "rank": self.rank,
            "size": self.size,
            **{action: self.count(action) for action in (SWAPPED, ADJUSTED, KEPT)},
            "modules": [entry.to_dict() for entry in self.entries],
        }

    def folded(self) -> list[tuple[SwapEntry, int]]:
        """Entries that differ only in a layer's number as one, that number shown as `*`, with how many they are."""
        rows: dict[SwapEntry, int] = {}
        for entry in self.entries:
            path = re.sub(r"(?<=\.)\d+(?=\.|$)", "*", entry.path)
            row = SwapEntry(path, entry.module, entry.action, entry.by, entry.note)
            rows[row] = rows.get(row, 0) + 1
        return list(rows.items())

    def __str__(self) -> str:
        head = (
            f"{self.family} on rank {self.rank} of {self.size}: {self.count(SWAPPED)} modules swapped, "
            f"{self.count(ADJUSTED)} adjusted, {self.count(KEPT)} kept"
        )
        lines = [("module", "class", "", "what became of it")]
        for row, times in self.folded():
            path = (row.path or "(model)") + (f" (x{times})" if times > 1 else "")
            lines.append((path, row.module, row.action, f"{row.by}: {row.note}" if row.by else row.note))
        widths = [max(len(line[column]) for line in lines) for column in range(3)]
        rows = [[*(cell.ljust(width) for cell, width in zip(line, widths, strict=False)), line[3]] for line in lines]
        return "\n".join([head, *("  ".join(row) for row in rows)])
