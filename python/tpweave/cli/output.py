"""What the sub-commands share: tables, progress bars, JSON. rich is imported here and only when something is drawn."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from typing import Any


class UsageError(Exception):
    """A mistake of the user: `main` prints it as one line and exits with 2."""


def _rich(module: str) -> Any:
    import importlib

    try:
        return importlib.import_module(f"rich.{module}")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "rich":
            raise
        raise UsageError("tables need the package rich: pip install 'tpweave[cli]', or ask for --json") from None


def print_json(data: Any) -> None:
    print(json.dumps(data, indent=2))


def console(*, stderr: bool = False) -> Any:
    """A rich console that keeps whole lines when its output is a file or a pipe."""
    stream = sys.stderr if stderr else sys.stdout
    return _rich("console").Console(file=stream, highlight=False, width=None if stream.isatty() else 130)


def print_table(console: Any, title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Print a table under a title. A column named ">..." is aligned right. Cells hold text without markup."""
    drawn = _rich("table").Table(header_style="bold", box=_rich("box").SIMPLE_HEAD, pad_edge=False)
    text = _rich("text").Text
    for column in columns:
        right = column.startswith(">")
        drawn.add_column(column.removeprefix(">"), justify="right" if right else "left", no_wrap=right)
    for row in rows:
        drawn.add_row(*(cell if isinstance(cell, text) else text(str(cell)) for cell in row))
    console.print(text(title, style="bold"), drawn, sep="\n")


def styled(content: str, style: str) -> Any:
    """`content` as a cell or line in a rich style, e.g. `"green"`."""
    return _rich("text").Text(content, style=style)


class Progress:
    """A progress bar that leaves no trace; nothing at all where its stream is no terminal, or when `quiet`."""

    def __init__(self, description: str, total: int | None, *, quiet: bool = False, on_stdout: bool = False) -> None:
        self._bar = None
        if not quiet and (sys.stdout if on_stdout else sys.stderr).isatty():
            rich = _rich("progress")
            columns = (rich.TextColumn("{task.description}"), rich.BarColumn(), rich.MofNCompleteColumn())
            self._bar = rich.Progress(
                *columns, rich.TimeRemainingColumn(), console=console(stderr=not on_stdout), transient=True
            )
            self._task = self._bar.add_task(description, total=total)

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, description: str | None = None) -> None:
        """One step further, perhaps with a new description."""
        if self._bar is not None:
            self._bar.update(self._task, advance=1, description=description)
