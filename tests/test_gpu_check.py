"""The GPU check, on CPU tensors and Triton's interpreter: the same path but for the device."""

import json
import pathlib
import subprocess
import sys

import pytest

from tpweave.benchmarks.gpu_check import Report, run_process

SCRIPT = pathlib.Path(__file__).parent.parent / "benchmarks" / "gpu_check.py"


def run_check(directory, *arguments):
    command = [
        sys.executable,
        str(SCRIPT),
        "--dir",
        str(directory),
        "--device",
        "cpu",
        "--quick",
        "--no-build",
        *arguments,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    return done, json.loads((directory / "gpu_check.json").read_text())


def test_checks_measures_and_reports(tmp_path):
    pytest.importorskip("triton")
    done, found = run_check(tmp_path, "--op", "rms_norm", "--op", "all_reduce")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [step["name"] for step in found["steps"]] == ["machine", "list", "op:rms_norm", "comm:all_reduce"]
    assert found["machine"]["versions"]["torch"]
    statuses = {(c["op"], c["backend"]): c["status"] for c in found["checks"]}
    assert statuses["rms_norm", "triton"] == statuses["rms_norm", "cpu"] == "ok"
    assert statuses["all_reduce", "local"] == "unavailable"
    assert {t["backend"] for t in found["timings"]} == {"cpu", "triton"}
    assert all(t["seconds"] > 0 and t["rivals"]["torch"] > 0 and t["gb_s"] > 0 for t in found["timings"])
    assert "rms_norm fp32 1x4096" in done.stdout


def test_a_machine_without_what_it_needs_fails(tmp_path):
    done, found = run_check(tmp_path, "--op", "no_such_operation")
    assert done.returncode == 1
    assert found["checks"] == [] and "0 checks passed" in done.stdout


@pytest.mark.parametrize(
    ("body", "limit", "status", "reason"),
    [
        ("import time; time.sleep(60)", 6.0, "timeout", "not finished after 6 s"),
        ("import os; os.abort()", 60.0, "died", "exit code -6"),
        ("raise SystemExit('no GPU')", 60.0, "died", "exit code 1: no GPU"),
        ("", 1.0, "skipped", "no time left"),
    ],
)
def test_a_step_that_ends_badly_keeps_what_it_had(tmp_path, body, limit, status, reason):
    check = {"kind": "check", "op": "x", "case": "", "backend": "b", "status": "ok", "reason": ""}
    line = json.dumps({"gpu_check": check})
    program = f"print({line!r}, flush=True)\n{body}"
    report = Report(tmp_path, budget=100.0)
    run_process(report, "step", [sys.executable, "-c", program], {}, limit)
    found = json.loads(report.path.read_text())
    assert found["steps"][0]["status"] == status and found["steps"][0]["reason"].startswith(reason)
    assert len(found["checks"]) == (0 if status == "skipped" else 1)
    assert report.bad() == [f"step: {status}: {found['steps'][0]['reason']}"]
