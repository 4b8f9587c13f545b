"""Spin walks through every interleaving of a model of the shm protocol (signals.pml)."""

import pathlib
import shutil
import subprocess

import pytest

MODEL = pathlib.Path(__file__).with_name("signals.pml")

pytestmark = pytest.mark.skipif(shutil.which("spin") is None, reason="needs the model checker Spin (Debian: spin)")


def check(folder, *definitions):
    """Spin's report on the model with these definitions."""
    flags = [f"-D{definition}" for definition in definitions]
    subprocess.run(["spin", *flags, "-a", str(MODEL)], cwd=folder, check=True, capture_output=True)
    # Collapsed state vectors; the depth is that of the longest run.
    build = ["cc", "-O2", "-w", "-DSAFETY", "-DCOLLAPSE", "-DMEMLIM=3000", "-o", "pan", "pan.c"]
    subprocess.run(build, cwd=folder, check=True, capture_output=True)
    return subprocess.run(["./pan", "-m100000", "-n"], cwd=folder, capture_output=True, text=True, timeout=100).stdout


@pytest.mark.parametrize("definitions", [("RANKS=2", "CALLS=9"), ("RANKS=3", "CALLS=4")], ids=lambda d: " ".join(d))
def test_no_deadlock_no_lost_update_no_reuse_while_read(definitions, tmp_path):
    report = check(tmp_path, *definitions)
    assert "errors: 0" in report, report
    # A search that ran out of depth or memory would have proven nothing.
    assert "Search not completed" not in report and "max search depth too small" not in report, report


FAULTS = {
    "BUG_1": "assertion violated", "BUG_2": "assertion violated", "BUG_3": "assertion violated",
    "BUG_4": "assertion violated", "BUG_5": "assertion violated", "BUG_6": "invalid end state",
}  # fmt: skip


@pytest.mark.parametrize("bug", FAULTS)
def test_the_model_shows_what_each_precaution_prevents(bug, tmp_path):
    report = check(tmp_path, "RANKS=2", "CALLS=9", bug)
    assert FAULTS[bug] in report, report
