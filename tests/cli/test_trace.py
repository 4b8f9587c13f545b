"""tpweave trace: the steps of a real call on all ranks, and what it refuses."""

import json

import pytest

from tpweave.benchmarks.trace import chrome_trace, local_work
from tpweave.cli.main import main


def test_gaps_between_steps_are_local_work():
    events = [("all_reduce", -1, 0, 1000, 9000), ("wait", 1, 2, 2000, 4000), ("publish", -1, 1, 4100, 4200)]
    assert local_work(events, 0, 10000) == [("local work", -1, 0, 0, 2000), ("local work", -1, 0, 4200, 10000)]
    # A step inside another leaves no gap of its own.
    nested = [("read", -1, 0, 0, 9900), ("wait", 1, 1, 3000, 5000)]
    assert local_work(nested, 0, 10000) == []


def test_chrome_trace_has_one_process_for_each_rank_and_microseconds():
    trace = chrome_trace([[("wait", 1, 3, 5000, 7500)], [("publish", -1, 3, 6000, 6100)]], "title")
    waits = [event for event in trace["traceEvents"] if event["name"] == "wait"]
    assert waits == [
        {"ph": "X", "name": "wait", "pid": 0, "tid": 0, "ts": 0.0, "dur": 2.5, "args": {"peer": 1, "step": 3}}
    ]
    assert {event["pid"] for event in trace["traceEvents"]} == {0, 1}
    assert chrome_trace([[], []], "title")["traceEvents"][0]["args"] == {"name": "rank 0"}


def test_traces_a_fused_collective_on_its_ranks(tmp_path, capsys):
    path = tmp_path / "trace.json"
    code = main(["trace", "matmul_all_reduce", "--ranks", "3", "--case", "fp32 M128", "--repeats", "2", "--json",
                 "--out", str(path)])  # fmt: skip
    result = json.loads(capsys.readouterr().out)
    assert code == 0 and result["ranks"] == 3 and result["transport"] == "shm"
    assert result["exposed"] == pytest.approx(result["total"] - result["alone"])
    events = json.loads(path.read_text())["traceEvents"]
    for rank in range(3):
        mine = {event["name"] for event in events if event["pid"] == rank}
        assert {"call", "local work", "publish arrival", "wait for arrivals"} <= mine
        (call,) = (event for event in events if event["pid"] == rank and event["name"] == "call")
        inside = [event for event in events if event["pid"] == rank and event["ph"] == "X"]
        assert all(call["ts"] <= event["ts"] + 1 and event["dur"] <= call["dur"] + 1 for event in inside)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["rms_norm"], "no communication"), (["nonsense"], "no benchmark 'nonsense'"),
     (["all_gather", "--ranks", "1"], "at least 2 ranks"), (["all_gather", "--case", "none such"], "none such")],
)  # fmt: skip
def test_refuses_what_cannot_be_traced(arguments, words, capsys):
    assert main(["trace", *arguments]) == 2
    assert words in capsys.readouterr().err
