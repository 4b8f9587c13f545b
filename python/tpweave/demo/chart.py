"""The demo's result as a picture: how much faster each row of its table is, and both loss curves."""

from __future__ import annotations

import pathlib
from typing import Any

STOCK, OURS = "#9aa3ad", "#1f6f8b"


def draw(result: dict[str, Any], path: pathlib.Path) -> None:
    """Write the chart of a demo's result (`tpweave demo --json`) to `path`; its suffix chooses the format."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from tpweave.cli.bench import human_time

    rows = result["comparison"]
    figure, (bars, curves) = plt.subplots(1, 2, figsize=(11, 4.2), width_ratios=(3, 2), layout="constrained")
    places = range(len(rows))
    bars.barh(places, [row["ratio"] for row in rows], color=OURS, height=0.55)
    bars.axvline(1, color=STOCK, linewidth=1.5)
    largest = max(row["ratio"] for row in rows)
    for place, row in zip(places, rows, strict=True):
        times = f"{row['ratio']:.1f}x   {human_time(row['stock_seconds'])} to {human_time(row['seconds'])}"
        bars.text(row["ratio"] + 0.02 * largest, place, times, va="center", fontsize=9)
    bars.set_yticks(places, [row["name"].replace(", ", "\n", 1) for row in rows], fontsize=9)
    bars.invert_yaxis()
    bars.set_xlim(0, 1.55 * largest)
    bars.set_xlabel("times as fast as stock PyTorch (grey line)")
    bars.set_title("nn.Linear + gloo, SDPA, against tpweave", fontsize=10)

    decoder = result["decoder"]
    steps = range(1, len(decoder["losses"]) + 1)
    curves.plot(steps, decoder["stock_losses"], color=STOCK, linewidth=4, label="stock, one process")
    curves.plot(steps, decoder["losses"], color=OURS, linewidth=1.2, label="tpweave, two ranks")
    curves.set_xlabel("step")
    curves.set_ylabel("loss")
    curves.set_title("a decoder learns Python's source", fontsize=10)
    difference = f"largest difference {decoder['largest_difference']:.0e}"
    curves.text(0.03, 0.04, difference, transform=curves.transAxes, fontsize=9)
    curves.legend(frameon=False, fontsize=9)
    for axes in (bars, curves):
        axes.spines[["top", "right"]].set_visible(False)
    machine = result["machine"]
    figure.suptitle(
        f"two ranks, one thread each, on {machine['cpu']} ({machine['isa']}, {machine['cores']} cores)", fontsize=11
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)
