"""Start one module on several ranks of this machine: by torchrun, or by mpirun where a rank also speaks MPI."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence


def mpi_objection() -> str | None:
    """None where ranks can be started by mpirun with mpi4py, else what is missing."""
    if shutil.which("mpirun") is None:
        return "needs mpirun, which is not installed"
    if importlib.util.find_spec("mpi4py") is None:
        return "needs the Python package mpi4py, which is not installed"
    return None


def rank_command(ranks: int, module: str, args: Sequence[str], *, mpi: bool = False) -> list[str]:
    """The command that runs `python -m module args` on `ranks` ranks."""
    if not mpi:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        return [*launcher, "-m", module, *args]
    # The ranks pin themselves; mpirun's own binding refuses more ranks than cores.
    launcher = ["mpirun", "-n", str(ranks), "--oversubscribe", "--bind-to", "none"]
    if os.geteuid() == 0:
        launcher.append("--allow-run-as-root")
    return [*launcher, sys.executable, "-m", module, *args]


def rank_environment(threads: int) -> dict[str, str]:
    """The environment of the ranks: OpenMP threads, and gloo on the loopback interface, which needs no network."""
    return {"GLOO_SOCKET_IFNAME": "lo", **os.environ, "OMP_NUM_THREADS": str(threads)}


def start_ranks(
    ranks: int, module: str, args: Sequence[str], *, threads: int = 1, mpi: bool = False, **popen_options: object
) -> subprocess.Popen:
    """`rank_command` as a running process, in a session of its own: Ctrl-C reaches the caller, who terminates it."""
    command, environment = rank_command(ranks, module, args, mpi=mpi), rank_environment(threads)
    return subprocess.Popen(command, env=environment, start_new_session=True, **popen_options)  # type: ignore[call-overload]


def pin_rank(local_rank: int, local_ranks: int) -> None:
    """Give this rank one core of its own when there are enough, so that two ranks never share one."""
    cores = sorted(os.sched_getaffinity(0))
    if local_ranks <= len(cores):
        os.sched_setaffinity(0, {cores[local_rank]})
