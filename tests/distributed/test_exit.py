"""Processes that used groups end without a word, however their groups were left behind."""

import subprocess
import sys

import pytest

# The first callback registered is the last to run: it sees what tpweave's own has left.
SCRIPT = """
import atexit, os, sys
held = []
atexit.register(lambda: print("left:", [group.process_group for group in held], flush=True))
import torch, torch.distributed as dist
import tpweave

rank, world_size, store, ending = int(sys.argv[1]), 2, sys.argv[2], sys.argv[3]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
held.append(tpweave.init())
held.append(tpweave.init(dist.new_group([0, 1])))
for group in held:
    for backend in (None, "reference"):
        assert tpweave.all_reduce(torch.ones(4), group, backend=backend).sum() == 8
dist.barrier()
if ending in ("destroyed", "both"):
    held[0].destroy()
if ending in ("process group destroyed", "both"):
    dist.destroy_process_group()
"""


@pytest.mark.parametrize("ending", ["left alone", "destroyed", "process group destroyed", "both"])
def test_a_process_ends_well(tmp_path, ending):
    for run in range(2):
        command = [sys.executable, "-c", SCRIPT]
        ranks = [
            subprocess.Popen(
                [*command, str(rank), str(tmp_path / f"store{run}"), ending],
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )
            for rank in range(2)
        ]  # fmt: skip
        for rank in ranks:
            out, err = rank.communicate(timeout=60)
            assert rank.returncode == 0 and out == "left: [None, None]\n", f"{rank.returncode} {out} {err[-2000:]}"
