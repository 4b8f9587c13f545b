"""attention, attention_varlen and attention_decode on cases sampled from their whole space, against float64.

`TPWEAVE_GRID_CASES` sets how many cases run and `TPWEAVE_GRID_SEED` the first one's number; with a seed of `fresh` it
is drawn by the clock and printed (`make test-long`). A failure names its case's number: rerun it alone with
`TPWEAVE_GRID_SEED=<number> TPWEAVE_GRID_CASES=1`.
"""

import os
import time

import pytest
from attention_cases import check_cases

pytestmark = pytest.mark.usefixtures("one_thread")

BLOCKS = 20
CASES = int(os.environ.get("TPWEAVE_GRID_CASES", "2000"))
SEED = os.environ.get("TPWEAVE_GRID_SEED", "0")
FIRST = time.time_ns() // 1000 % 10**9 if SEED == "fresh" else int(SEED)


@pytest.mark.parametrize("block", range(BLOCKS))
def test_sampled_cases(block, capsys):
    if SEED == "fresh" and block == 0:
        with capsys.disabled():
            print(f"\nTPWEAVE_GRID_SEED={FIRST}")
    failures = check_cases(range(FIRST + block, FIRST + CASES, BLOCKS))
    assert not failures, f"{len(failures)} of {CASES // BLOCKS}:\n" + "\n".join(failures[:5])
