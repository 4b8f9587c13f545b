"""The benchmark harness: what it reports, on one rank and on several, and that a wrong result gets no times."""

import json

import pytest
import torch
import torch.distributed as dist

from tpweave.benchmarks import registry
from tpweave.benchmarks.run import Options, run_bench, time_interleaved
from tpweave.cli.bench import human_time
from tpweave.cli.main import main
from tpweave.testing import run_ranks

QUICK = ("--repeats", "2")


def test_one_rank_reports_ratios_rates_and_limits(capsys, tmp_path):
    assert main(["bench", "rms_norm", "--case", "fp32 64x4096", "--json", "--out", str(tmp_path), *QUICK]) == 0
    result = json.loads(capsys.readouterr().out)
    assert json.loads((tmp_path / "rms_norm.json").read_text()) == result
    (row,) = result["rows"]
    assert row["case"] == "fp32 64x4096"
    assert row["error"] is None
    assert row["rivals"]["torch"]["ratio"] == pytest.approx(row["rivals"]["torch"]["seconds"] / row["ours"]["seconds"])
    assert row["gb_s"] == pytest.approx(row["bytes"] / row["ours"]["seconds"] / 1e9)
    assert result["limits"]["copy_gb_s"] > 0


def test_table_and_forced_backend(capsys):
    threads = torch.get_num_threads()
    assert main(["bench", "rms_norm", "--case", "bf16 1x4096", "--backend", "reference", *QUICK]) == 0
    out = capsys.readouterr().out
    assert "bf16 1x4096" in out
    assert "memory copy" in out
    assert torch.get_num_threads() == threads


def test_wrong_result_is_reported_without_times(capsys, monkeypatch):
    bench = registry.find("rms_norm")
    wrong = registry.Bench(**{**vars(bench), "ours": lambda inputs: inputs[0] + 1})
    monkeypatch.setattr("tpweave.benchmarks.run.find", lambda stem: wrong)
    assert main(["bench", "rms_norm", "--case", "fp32 1x4096", "--json", *QUICK]) == 1
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert "not close" in row["error"]
    assert "ours" not in row


def test_every_stem_has_a_sound_entry():
    for stem in registry.stems():
        bench = registry.find(stem)
        assert bench.stem == stem
        assert bench.rivals
        assert set(bench.mpi_rivals) < set(bench.rivals)
        assert len({case.name for case in bench.cases}) == len(bench.cases)


def _time_on_rank(rank, world_size):
    x = torch.ones(8)
    timings = time_interleaved(
        {"fast": lambda: x + 1, "reduce": lambda: dist.all_reduce(x)}, repeats=2, block_seconds=0.001
    )
    return {name: (timing.seconds, timing.skew) for name, timing in timings.items()}


def test_ranks_agree_on_the_slowest():
    first, second = run_ranks(2, _time_on_rank)
    assert first == second
    assert all(0 <= skew <= seconds for seconds, skew in first.values())


@pytest.mark.parametrize(
    ("seconds", "text"), [(1.23e-5, "12.3 us"), (4.56e-4, "456 us"), (0.0789, "78.9 ms"), (61.0, "61 s")]
)
def test_human_time(seconds, text):
    assert human_time(seconds) == text


def test_options_select_cases():
    with pytest.raises(registry.BenchRequestError, match="holds 'nope'"):
        run_bench("rms_norm", Options(only="nope"))
