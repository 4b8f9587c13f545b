"""The backend table: which row runs, why the others do not, and how a row is named."""

import subprocess
import sys
import warnings

import pytest
import torch

import tpweave
from tpweave import dispatch, env
from tpweave.dispatch import FLOATS, HALF, OPS, Backend, Inputs, Needs, Op
from tpweave.errors import BackendUnavailableError, TPWeaveError


def needs_even_rows(inputs):
    return (
        None
        if inputs.tensors[0].shape[0] % 2 == 0
        else f"needs an even number of rows, not {inputs.tensors[0].shape[0]}"
    )


@pytest.fixture
def op():
    """Four rows, best first; each returns its name."""
    rows = [
        Backend("gpu", lambda: "gpu", Needs(device="cuda")),
        Backend("half", lambda: "half", Needs(device="cpu", dtypes=HALF)),
        Backend("even", lambda: "even", Needs(dtypes=FLOATS, rules=(needs_even_rows,))),
        Backend("reference", lambda: "reference", Needs()),
    ]
    yield Op("example_op", rows)
    del OPS["example_op"]


def test_first_row_without_objection_runs(op):
    assert op.choose(Inputs([torch.zeros(3, dtype=torch.bfloat16)])).name == "half"
    assert op.choose(Inputs([torch.zeros(2)])).name == "even"
    assert op.choose(Inputs([torch.zeros(3)])).name == "reference"
    assert op.choose(Inputs([torch.zeros(2, dtype=torch.float64)])).name == "reference"
    assert op.choose(Inputs([torch.zeros(3), None, torch.zeros(1, dtype=torch.int64)])).run() == "reference"


def test_supported_lists_every_row_with_its_reason(op):
    assert op.supported(Inputs([torch.zeros(3)])) == [
        ("gpu", "needs cuda tensors, these are on cpu"),
        ("half", "takes bfloat16, float16, not float32"),
        ("even", "needs an even number of rows, not 3"),
        ("reference", None),
    ]


def test_named_row_runs_or_raises_its_reason(op, monkeypatch):
    x = Inputs([torch.zeros(2)])
    assert op.choose(x, "reference").name == "reference"
    with pytest.raises(BackendUnavailableError, match="cannot run on backend 'gpu': needs cuda tensors"):
        op.choose(x, "gpu")
    with pytest.raises(ValueError, match="no backend 'tpu'; it has gpu, half, even, reference"):
        op.choose(x, "tpu")
    monkeypatch.setenv("TPWEAVE_BACKEND", "rms_norm:cpu, example_op:reference")
    assert op.choose(x).name == "reference"
    assert op.choose(x, "even").name == "even", "the argument comes before the environment"
    monkeypatch.setenv("TPWEAVE_BACKEND", "example_op:half")
    with pytest.raises(BackendUnavailableError, match="not float32"):
        op.choose(x)


@pytest.mark.parametrize("setting", ["example_op", "example_op:", "rms_norm:cpu,reference"])
def test_malformed_environment_is_an_error(op, monkeypatch, setting):
    monkeypatch.setenv("TPWEAVE_BACKEND", setting)
    with pytest.raises(ValueError, match="it takes op:backend"):
        op.choose(Inputs([torch.zeros(2)]))


def test_environment_reaches_a_real_op(monkeypatch):
    x = torch.randn(2, 8, dtype=torch.float64)
    monkeypatch.setenv("TPWEAVE_BACKEND", "rms_norm:cpu")
    with pytest.raises(BackendUnavailableError, match=r"rms_norm cannot run on backend 'cpu'.*float64"):
        tpweave.rms_norm(x, None)


def test_every_row_objecting_is_an_error_with_all_reasons():
    op = Op("no_reference", [Backend("a", int, Needs(device="cuda")), Backend("b", int, Needs(dtypes=HALF))])
    del OPS["no_reference"]
    with pytest.raises(TPWeaveError, match=r"a: needs cuda tensors.*b: takes bfloat16, float16, not float32"):
        op.choose(Inputs([torch.zeros(1)]))


def test_missing_module_is_a_reason():
    reason = Needs(module="no_such_package").why_not(Inputs([torch.zeros(1)]))
    assert reason == "needs the Python package no_such_package, which is not installed"
    assert Needs(module="torch").why_not(Inputs([])) is None


def test_interpreted_triton_takes_cpu_tensors(monkeypatch):
    needs, x = Needs(device="cuda", module="triton"), Inputs([torch.zeros(1)])
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert "TRITON_INTERPRET=1" in needs.why_not(x)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert env.triton_interpreted()
    assert needs.why_not(x) is None
    assert Needs(device="cuda").why_not(x) is not None, "only for Triton"


def test_transport_is_the_groups():
    class Group:
        transport = "pg"

    needs = Needs(transport="shm")
    assert needs.why_not(Inputs([], group=Group())) == "needs the shm transport, this group has pg"
    assert needs.why_not(Inputs([])) == "needs the shm transport, this group has none"
    assert Needs(transport="pg").why_not(Inputs([], group=Group())) is None


def test_reference_on_a_gpu_warns_once(op):
    class OnGpu:
        """Stands for a CUDA tensor where there is no GPU."""

        device = torch.device("cuda")
        is_cpu, is_cuda = False, True
        dtype = torch.float64
        shape = (3,)

        def is_floating_point(self):
            return True

    table = [row for row in op.backends if row.name != "gpu"]
    small = Op("example_op", table)
    dispatch.warn_once.cache_clear()
    with pytest.warns(
        UserWarning, match="example_op runs its reference on a GPU: half: needs cpu tensors.*even: takes"
    ):
        assert small.choose(Inputs([OnGpu()])).name == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        small.choose(Inputs([OnGpu()]))


def test_explain_says_which_row_runs_and_why_not(op):
    explanation = tpweave.explain("example_op", torch.zeros(3))
    assert explanation.chosen == "reference"
    assert explanation.rows == op.supported(Inputs([torch.zeros(3)]))
    lines = str(explanation).splitlines()
    assert lines[0] == "example_op:"
    assert "even" in lines[3] and "needs an even number of rows, not 3" in lines[3]
    assert lines[4].split() == ["->", "reference", "ok"]


def test_explain_knows_an_op_before_its_first_use():
    code = "import torch, tpweave; print(tpweave.explain('rms_norm', torch.zeros(2, 8)).chosen)"
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert out.stdout.strip() == "cpu"


def test_explain_of_an_unknown_op_names_those_there_are():
    with pytest.raises(ValueError, match=r"no operation 'nope'; there are: .*rms_norm"):
        tpweave.explain("nope")


@pytest.mark.parametrize(("setting", "seconds"), [("2.5", 2.5), (None, 300.0)])
def test_timeout_setting(monkeypatch, setting, seconds):
    monkeypatch.delenv("TPWEAVE_TIMEOUT", raising=False)
    if setting is not None:
        monkeypatch.setenv("TPWEAVE_TIMEOUT", setting)
    assert env.timeout_seconds() == seconds


@pytest.mark.parametrize("setting", ["soon", "0", "-3", "nan"])
def test_bad_timeout_setting_is_an_error(monkeypatch, setting):
    monkeypatch.setenv("TPWEAVE_TIMEOUT", setting)
    with pytest.raises(ValueError, match=f"TPWEAVE_TIMEOUT is '{setting}'"):
        env.timeout_seconds()
