"""What the tests of collectives share: a group on some of the ranks, data that every rank can compute for all ranks."""

import functools
import hashlib
import threading
import traceback

import pytest
import torch
import torch.distributed as dist

import tpweave
from tpweave.dispatch import OPS, Inputs
from tpweave.distributed.exchange import flat_bytes
from tpweave.errors import CollectiveMismatchError
from tpweave.testing import run_ranks

# (world size, ranks of the group): whole worlds, and a subgroup whose ranks are not the world's.
WORLDS = {"1": (1, None), "2": (2, None), "3": (3, None), "4": (4, None), "1and3of4": (4, (1, 3))}
FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
NUMBERS = [*FLOATS, torch.int32, torch.int64, torch.int8, torch.uint8, torch.int16]


ALL_WORLDS = tuple(WORLDS)


def numbers(shape, dtype, rank, step=0):
    """The tensor that a rank brings: known to all ranks."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    if dtype.is_floating_point or dtype.is_complex:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    return torch.randint(0, 2 if dtype == torch.bool else 100, shape, generator=generator).to(dtype)


def rows_of(op):
    """None (as dispatched) and the table's rows; those for GPUs have tests of their own, interpreted or emulated."""
    rows = () if op is None else [row.name for row in op.backends if row.name not in ("triton", "cuda")]
    return (None, *rows)


def cases(op, checks):
    """Parameters (check, backend, world) for `assert_check`: every row (None: as dispatched) that can run there at all.

    `checks` maps functions `check(group, backend)` to the names of the worlds they run on.
    """
    return [
        pytest.param(check, backend, name, id=f"{check.__name__}-{backend}-{name}")
        for check, names in checks.items()
        for name in names
        for backend in rows_of(op)
        if not (backend == "local" and name != "1") and not (backend in ("shm", "pg") and name == "1")
    ]


def assert_check(op, checks, check, backend, name):
    """Skip or fail as the ranks of the world called `name` did in this check on this row."""
    here = tuple(other for other, names in checks.items() if name in names)
    outcome = _outcomes(op, here, name).get((check.__name__, backend))
    if outcome is None:
        pytest.fail("not run: an earlier check of this world failed")
    for rank, (status, words) in enumerate(outcome):
        if status == "skipped":
            pytest.skip(f"{backend}: {words}")
        assert status == "passed", f"rank {rank}:\n{words}"


@functools.cache
def _outcomes(op, checks, name):
    """All checks on all rows in one start of the ranks: starting them takes longer than most checks do."""
    world_size, members = WORLDS[name]
    everyone = run_ranks(world_size, _run_checks, op and op.name, checks, rows_of(op), members, timeout=240)
    by_rank = [outcomes for outcomes in everyone if outcomes is not None]
    keys = set.intersection(*(set(outcomes) for outcomes in by_rank))
    failed = {key for outcomes in by_rank for key, (status, _) in outcomes.items() if status == "failed"}
    return {key: [outcomes[key] for outcomes in by_rank if key in outcomes] for key in keys | failed}


def _run_checks(rank, world_size, stem, checks, rows, members):
    process_group = None if members is None else dist.new_group(list(members))
    outcomes = {} if members is None or rank in members else None
    for check in checks if outcomes is not None else ():
        for backend in rows:
            # A check may leave a group behind that failed as it should have: this makes a new one.
            group = tpweave.init(process_group)
            reason = dict(OPS[stem].supported(Inputs([torch.ones(1)], group=group)))[backend] if backend else None
            if reason is not None:
                outcomes[check.__name__, backend] = ("skipped", reason)
                continue
            try:
                check(group, backend)
            except BaseException:
                # The ranks are out of step now.
                outcomes[check.__name__, backend] = ("failed", traceback.format_exc())
                return outcomes
            outcomes[check.__name__, backend] = ("passed", "")
    # A rank that leaves early would break connections that others are still making.
    dist.barrier()
    return outcomes


def assert_ranks_disagree(group, *calls):
    """Assert that each `call(group)` raises the mismatch, the later ones on the group that replaces a failed one.

    Returns the messages.
    """
    messages = []
    for call in calls:
        group = tpweave.init(group)
        with pytest.raises(CollectiveMismatchError) as caught:
            call(group)
        messages.append(str(caught.value))
    return messages


def same_bits_on_all_ranks(group, tensors):
    """Assert that every rank holds these tensors."""
    digest = hashlib.sha256(b"".join(flat_bytes(tensor).numpy().tobytes() for tensor in tensors)).digest()
    assert len(set(group.all_gather_object(digest))) == 1, "ranks hold different bits"


def in_two_threads(run):
    """`run(0)` and `run(1)` at the same time; what either raises is raised here."""
    errors = []

    def guarded(index):
        try:
            run(index)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors
