"""The shared checks: they cover every operation, and they see what is wrong."""

import re

import pytest
import torch

import tpweave
from tpweave import dispatch
from tpweave.testing import run_ranks
from tpweave.verification import CHECKS, Check, run_check, run_checks


def test_every_operation_has_a_check():
    public = {name for name in dispatch.load_ops() if not name.endswith("_bwd")}
    assert public == {check.op for check in CHECKS}


def test_all_rows_pass_here():
    results = list(run_checks(dtypes=(torch.float32, torch.bfloat16)))
    ops = dispatch.load_ops()
    # The reference is what the others are checked against.
    checked = {check.op for check in CHECKS if not check.collective and len(ops[check.op].backends) > 1}
    assert {r.op for r in results} == checked
    assert [r for r in results if r.status in ("wrong", "error")] == []
    assert all(r.error <= r.bound for r in results)


def collectives(rank, world_size):
    group = tpweave.init()
    return [(r.op, r.case, r.backend, r.status, r.reason) for r in run_checks(group=group, dtypes=(torch.float32,))]


@pytest.mark.parametrize("world_size", [2, 3])
def test_collectives_pass_here(world_size):
    for results in run_ranks(world_size, collectives):
        assert {r[0] for r in results} == {check.op for check in CHECKS if check.collective}
        assert [r for r in results if r[3] in ("wrong", "error")] == []


def test_quick_takes_one_case_of_each():
    results = list(run_checks(ops=["rope", "rms_norm"], backends=["cpu"], quick=True))
    assert [(r.op, r.dtype) for r in results] == [("rms_norm", "float32"), ("rope", "float32")]


@pytest.mark.parametrize(
    ("damage", "status", "reason"),
    [
        (lambda y: y * 1.001, "wrong", "error .* exceeds"),
        (lambda y: y[:-1], "wrong", r"shape \(3,\), expected \(4,\)"),
        (lambda y: y.masked_fill(y == y.max(), float("nan")), "wrong", "infinities or NaNs"),
        (lambda y: y.detach() + (y - y.detach()) * 1.01, "wrong", "error .* exceeds"),
    ],
    ids=["value", "shape", "nan", "gradient"],
)
def test_damage_is_seen(damage, status, reason):
    def call(inputs, backend, group):
        y = inputs[0].exp()
        return y if backend == "reference" else damage(y)

    result = run_check(Check("none", "damaged", lambda d: (d.normal(4),), call), "cpu", "cpu", torch.float32)
    assert result.status == status
    assert re.search(reason, result.reason)


def test_a_row_that_raises_is_an_error(monkeypatch):
    def call(inputs, backend, group):
        raise RuntimeError("out of cheese")

    monkeypatch.setattr("tpweave.verification.CHECKS", (Check("rope", "raises", lambda d: (d.normal(4),), call),))
    results = list(run_checks(dtypes=(torch.float32,)))
    assert {(r.status, r.reason) for r in results} == {("error", "RuntimeError: out of cheese")}
