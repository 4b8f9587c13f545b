"""Who can get at the shared memory: the ranks of the group, no other user, and nobody by a name in a file system."""

import os
import stat
import subprocess
import sys

import pytest

import tpweave
from tpweave.distributed.symmetric_memory import Rendezvous
from tpweave.testing import run_ranks

NOBODY = 65534


def arena_descriptors():
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            if "memfd:tpweave" in os.readlink(f"/proc/self/fd/{name}"):
                found.append(int(name))
        except FileNotFoundError:
            continue  # the listing's own descriptor
    return found


def privacy(rank, world_size):
    group = tpweave.init(timeout=30)
    (descriptor,) = arena_descriptors()
    assert stat.S_IMODE(os.fstat(descriptor).st_mode) == 0o600
    with open("/proc/self/maps") as maps:
        mapped = [line for line in maps if "tpweave" in line and "memfd" in line]
    assert len(mapped) == 1 and "(deleted)" in mapped[0]
    with pytest.raises(OSError):  # sealed: nobody can cut it under the others
        os.ftruncate(descriptor, 4096)
    if rank == 0 and os.geteuid() == 0:
        path = f"/proc/{os.getpid()}/fd/{descriptor}"
        code = f"import os; os.setgid({NOBODY}); os.setuid({NOBODY}); os.open({path!r}, os.O_RDWR)"
        attempt = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert attempt.returncode != 0 and "PermissionError" in attempt.stderr, attempt.stderr
    group.shm.barrier()
    group.destroy()
    assert not arena_descriptors()


def test_the_arena_is_private_and_has_no_name():
    run_ranks(2, privacy)


def stranger(rendezvous, tokens):
    """As another user with a stolen token: 0 when both ends refuse."""
    os.setgid(NOBODY)
    os.setuid(NOBODY)
    with pytest.raises(RuntimeError, match="rank 0 runs as user 0, this rank as 65534"):
        rendezvous.connect(tokens)
    link = rendezvous.sockets[0]
    link.settimeout(10)
    try:
        link.sendall(rendezvous.token)
        return len(link.recv(1))
    except (ConnectionResetError, BrokenPipeError):
        return 0


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as another user")
def test_another_user_cannot_join_even_with_the_token():
    low, high = Rendezvous(0, 2), Rendezvous(1, 2)
    tokens = [low.token, high.token]
    low.listen()
    try:
        child = os.fork()
        if child == 0:
            code = 2
            try:
                code = stranger(high, tokens)
            finally:
                os._exit(code)
        with pytest.raises(TimeoutError):
            low.accept(tokens, timeout=1.0)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 0
    finally:
        low.close()


def other_host(rank, world_size):
    # Rank 1 publishes a name where nobody listens, as a rank on another machine would seem to.
    if rank == 0:
        Rendezvous.listen = lambda self: None
    group = tpweave.init(timeout=30)
    return group.transport, group.transport_reason


def test_ranks_that_cannot_reach_each_other_fall_back_together():
    for transport, reason in run_ranks(3, other_host):
        # Ranks 1 and 2 do reach each other.
        assert transport == "hierarchical" and reason.startswith("rank 1: cannot reach rank 0 on this host")


def forced(rank, world_size, setting):
    if rank == 1 or setting == "tcp":
        os.environ["TPWEAVE_TRANSPORT"] = setting
    if setting == "tcp":
        with pytest.raises(ValueError, match="takes shm or pg"):
            tpweave.init()
        return None
    group = tpweave.init(timeout=30)
    return group.transport, group.transport_reason


def test_the_environment_can_forbid_shared_memory():
    assert set(run_ranks(2, forced, "pg")) == {("pg", "rank 1: TPWEAVE_TRANSPORT is pg")}
    assert set(run_ranks(2, forced, "shm")) == {("shm", None)}
    run_ranks(2, forced, "tcp")
