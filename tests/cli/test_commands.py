"""The sub-commands: what they print as JSON, their tables, and how they fail."""

import dataclasses
import importlib.metadata
import json
import subprocess
import sys

import pytest
import torch

import tpweave
from tpweave.cli.main import main
from tpweave.native import _C


def run_json(capsys, *args, code=0):
    assert main([*args, "--json"]) == code
    return json.loads(capsys.readouterr().out)


def run_error(capsys, *args):
    """The one line on standard error of a call that must fail."""
    try:
        code = main(list(args))
    except SystemExit as exit:
        code = exit.code
    captured = capsys.readouterr()
    assert code == 2
    assert captured.out == ""
    return captured.err.strip().splitlines()[-1]


def test_info_reports_this_machine(capsys, monkeypatch):
    monkeypatch.setenv("TPWEAVE_TIMEOUT", "17")
    found = run_json(capsys, "info")
    assert found["versions"]["torch"] == importlib.metadata.version("torch")
    assert found["versions"]["tpweave"] == tpweave.__version__
    assert found["isa"] == {"active": _C.active_isa(), "available": _C.available_isas()}
    assert found["environment"]["TPWEAVE_TIMEOUT"] == "17"
    rows = {row["backend"]: row["off"] for row in found["backends"]["rms_norm"]}
    assert rows["cpu"] is None
    assert rows["reference"] is None
    if not torch.cuda.is_available():
        assert found["transports"]["p2p"] == "needs a GPU"


def test_info_table_names_every_op(capsys):
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert "rms_norm" in out
    assert "instruction set" in out


def test_module_form_and_version():
    out = subprocess.run([sys.executable, "-m", "tpweave.info", "--json"], capture_output=True, text=True, check=True)
    assert json.loads(out.stdout)["versions"]["tpweave"] == tpweave.__version__
    out = subprocess.run([sys.executable, "-m", "tpweave.cli.main", "--version"], capture_output=True, text=True)
    assert out.stdout.split() == ["tpweave", tpweave.__version__]


def test_tables_without_rich_name_the_extra(capsys, monkeypatch):
    for name in ("rich", "rich.console"):
        monkeypatch.setitem(sys.modules, name, None)
    assert "tpweave[cli]" in run_error(capsys, "info")
    assert run_json(capsys, "info")["versions"]["python"]


def test_explain_names_the_row_and_the_reasons(capsys):
    found = run_json(capsys, "explain", "rms_norm", "--shape", "4x64", "--shape", "64", "--dtype", "bf16")
    assert found["chosen"] == "cpu"
    assert found["asked"]["shapes"] == [[4, 64], [64]]
    assert run_json(capsys, "explain", "rms_norm", "--dtype", "fp64")["chosen"] == "reference"
    on_gpu = {
        row["backend"]: row["reason"] for row in run_json(capsys, "explain", "rms_norm", "--device", "cuda")["rows"]
    }
    assert "cuda" in on_gpu["cpu"]
    assert main(["explain", "rms_norm", "--dtype", "fp64"]) == 0
    assert "takes bfloat16, float16, float32, not float64" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "seen"),
    [
        (("explain", "nope"), "rms_norm"),
        (("explain", "rms_norm", "--shape", "3xa"), "'3xa'"),
        (("explain", "rms_norm", "--shape", "3x-1"), "negative"),
        (("explain", "rms_norm", "--value", "causal"), "name=value"),
        (("explain", "rms_norm", "--device", "toaster"), "toaster"),
        (("explain", "rms_norm", "--ranks", "0"), "at least 1"),
        (("bench", "nope"), "rms_norm"),
        (("bench", "rms_norm", "--case", "nope"), "fp32 1x4096"),
        (("bench", "rms_norm", "--backend", "nope"), "it has"),
        (("bench", "rms_norm", "--ranks", "2"), "1 rank"),
        (("bench", "--ranks", "2"), "need an OP"),
        (("nope",), "invalid choice"),
        (("verify", "--op", "nope"), "rms_norm"),
        (("demo", "--plot", "chart.gif"), ".png"),
        (("demo", "--plot", "/no/such/folder/x.png"), "/no/such/folder"),
    ],
)
def test_mistakes_are_one_line_with_the_values_that_work(capsys, args, seen):
    assert seen in run_error(capsys, *args)


def test_interrupt_ends_cleanly(capsys, monkeypatch):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr("tpweave.info.collect", interrupted)
    assert main(["info"]) == 130
    assert "interrupted" in capsys.readouterr().err


@pytest.mark.parametrize(
    "op", ["all_reduce", "matmul_all_reduce", "attention", "rope", "gated_activation", "layer_norm"]
)
def test_explain_has_an_example_of_its_own(capsys, op):
    assert run_json(capsys, "explain", op)["chosen"] not in (None, "reference")


def test_explain_a_collective_by_ranks_and_transport(capsys):
    assert run_json(capsys, "explain", "all_reduce", "--ranks", "4", "--transport", "shm")["chosen"] == "shm"
    assert run_json(capsys, "explain", "all_reduce", "--ranks", "4", "--transport", "pg")["chosen"] == "pg"
    assert run_json(capsys, "explain", "all_reduce", "--ranks", "1")["chosen"] == "local"


def test_verify_passes_and_summarises(capsys):
    found = run_json(capsys, "verify", "--quick", "--op", "rms_norm", "--op", "rope")
    assert found["passed"]
    assert {(entry["op"], entry["backend"]): entry["status"] for entry in found["summary"]}["rms_norm", "cpu"] == "ok"
    assert main(["verify", "--quick", "--op", "rms_norm"]) == 0
    assert "checks passed" in capsys.readouterr().out


def test_verify_fails_on_a_wrong_kernel(capsys, monkeypatch):
    from tpweave.ops import rms_norm

    right = rms_norm.RMS_NORM.backends[0].run

    def wrong(*args):
        y, *rest = right(*args)
        return y * 1.01, *rest

    rows = tuple(
        dataclasses.replace(row, run=wrong) if row.name == "cpu" else row for row in rms_norm.RMS_NORM.backends
    )
    monkeypatch.setattr(rms_norm.RMS_NORM, "backends", rows)
    found = run_json(capsys, "verify", "--quick", "--op", "rms_norm", code=1)
    assert not found["passed"]
    assert {entry["backend"]: entry["status"] for entry in found["summary"]}["cpu"] == "wrong"
