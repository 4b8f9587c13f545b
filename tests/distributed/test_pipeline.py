"""The number of chunks, and what carries them."""

import threading

import pytest
import torch

import tpweave
from tpweave.distributed.cost_model import best_chunks, pipeline_seconds, traffic
from tpweave.distributed.pipeline import carrier
from tpweave.distributed.topology import Topology
from tpweave.errors import GroupPoisonedError, PeerFailureError
from tpweave.testing import run_ranks


def test_one_chunk_is_the_sequence_and_many_hide_the_shorter():
    assert pipeline_seconds(1, 3.0, 0.0, 2.0, 0.0) == 5.0
    assert pipeline_seconds(10, 3.0, 0.0, 2.0, 0.0) == pytest.approx(3.2)
    assert pipeline_seconds(10, 3.0, 0.1, 2.0, 0.0) == pytest.approx(4.2)


def test_best_chunks():
    # Nothing to hide, or no price of a chunk; a latency that eats the gain; the limit.
    assert best_chunks(16, 1.0, 0.1, 0.0, 0.0) == 1
    assert best_chunks(16, 1.0, 0.0, 1.0, 0.0) == 16
    assert best_chunks(16, 0.001, 0.0, 0.001, 0.01) == 1
    assert best_chunks(0, 1.0, 0.0, 1.0, 0.0) == 1
    few, many = best_chunks(16, 0.1, 0.0, 0.1, 0.01), best_chunks(16, 0.1, 0.0, 0.1, 0.001)
    assert 1 < few < many


def test_traffic_is_what_the_busiest_rank_sends():
    flat, hosts = Topology.flat(4, 0), Topology(((0, 1), (2, 3)), 0)
    assert [traffic(op, 800, flat).elements for op in ("sum_everywhere", "sum_scattered", "gather")] == [1200, 600, 600]
    assert [traffic(op, 800, hosts).elements for op in ("sum_everywhere", "sum_scattered", "gather")] == [400, 200, 200]
    assert traffic("sum_everywhere", 800, flat).steps == 2 and traffic("sum_everywhere", 800, hosts).steps == 1


def carried(rank, world_size):
    group = tpweave.init(timeout=20)
    cpu = torch.device("cpu")
    order = []
    with torch.inference_mode(), carrier(group, cpu) as submit:
        chunks = [submit(lambda k: order.append(k) or threading.get_ident(), k) for k in range(5)]
        threads = {chunk.result() for chunk in chunks}
    assert order == list(range(5)) and len(threads) == 1 and threads != {threading.get_ident()}
    # An exception on one rank reaches the other, and later calls.
    expected = ZeroDivisionError if rank == 0 else (PeerFailureError, GroupPoisonedError)
    with pytest.raises(expected), carrier(group, cpu) as submit:
        submit(lambda: 1 // rank).result()
        while True:
            tpweave.all_reduce(torch.ones(4), group)
    with pytest.raises(GroupPoisonedError):
        tpweave.all_gather(torch.ones(4), 0, group, backend="pg")
    again = tpweave.init(group)
    assert again is not group and torch.equal(tpweave.all_reduce(torch.ones(4), again), torch.full((4,), 2.0))


@pytest.mark.parametrize("transport", ["shm", "pg"])
def test_carrier(transport, monkeypatch):
    monkeypatch.setenv("TPWEAVE_TRANSPORT", transport)
    run_ranks(2, carried)
