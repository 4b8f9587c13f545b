"""Helpers for tests of tpweave and of code that uses it: the accuracy rule, and functions run on several ranks."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import wait
from typing import Any

import torch

# Slack of the accuracy rule, relative to the largest value of the reference.
SLACK = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1e-3, torch.float16: 2e-4, torch.int8: 0.0}


def accuracy(
    out: torch.Tensor,
    reference64: torch.Tensor,
    same_dtype: torch.Tensor,
    *,
    factor: float = 2.0,
    eps: float | None = None,
) -> tuple[float, float, str]:
    """flash-attn's rule: `max|out - ref64| <= factor * max|same_dtype - ref64| + eps`.

    Args:
        out: what the kernel returned.
        reference64: the same in float64.
        same_dtype: plain torch in out's dtype: how far an honest implementation is off.
        eps: slack relative to the largest reference value; by dtype when None.

    Returns:
        (error, bound, "" or what is wrong in words).
    """
    if out.shape != reference64.shape:
        return 0.0, 0.0, f"shape {tuple(out.shape)}, expected {tuple(reference64.shape)}"
    finite = torch.isfinite(reference64)
    if not torch.equal(torch.isfinite(out), finite):
        return 0.0, 0.0, "infinities or NaNs where the reference has none, or the reverse"
    if not finite.any():
        return 0.0, 0.0, ""
    error = (out.double() - reference64)[finite].abs().max().item()
    allowed = (same_dtype.double() - reference64)[finite].abs().max().item()
    scale = max(1.0, reference64[finite].abs().max().item())
    bound = factor * allowed + (SLACK[out.dtype] if eps is None else eps) * scale
    return error, bound, "" if error <= bound else f"error {error:.3e} exceeds {bound:.3e}"


def assert_accurate(
    out: torch.Tensor,
    reference64: torch.Tensor,
    same_dtype: torch.Tensor,
    *,
    factor: float = 2.0,
    eps: float | None = None,
) -> None:
    """Raises AssertionError where `accuracy` finds something wrong."""
    _, _, wrong = accuracy(out, reference64, same_dtype, factor=factor, eps=eps)
    assert not wrong, wrong


class RankFailure(AssertionError):
    """A function of `run_ranks` raised or died on a rank; the message holds its traceback."""


def _rank_main(
    rank: int, world_size: int, store: str, threads: int, pipe: Any, function: Callable[..., Any], args: tuple
) -> None:
    import torch.distributed as dist

    torch.set_num_threads(threads)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size)
    )
    try:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
        result = function(rank, world_size, *args)
        pipe.send(("ok", result))
    except BaseException:
        pipe.send(("error", traceback.format_exc()))
    finally:
        pipe.close()
        # A rank that failed must not wait for the others in gloo's destructor.
        os._exit(0)


def run_ranks(
    world_size: int, function: Callable[..., Any], *args: Any, timeout: float = 120.0, threads: int = 1,
    may_die: tuple[int, ...] = (),
) -> list[Any]:  # fmt: skip
    """Run `function(rank, world_size, *args)` in `world_size` processes joined by a gloo group.

    The function, its arguments and results must be picklable (the function at a module's top level; tensors are
    returned as numpy arrays or plain numbers). Processes are forked from a server that has imported torch and tpweave
    once, so starting one costs tens of milliseconds.

    Args:
        timeout: seconds for everything; past it all ranks are killed.
        threads: `torch.set_num_threads` of each rank.
        may_die: ranks that the test kills; their result is None.

    Returns:
        each rank's result, in rank order.

    Raises:
        RankFailure: a rank raised, died or was too late.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed", "tpweave.native"])
    directory = tempfile.mkdtemp(prefix="tpweave-test-")
    store = os.path.join(directory, "store")
    processes = []
    pipes: dict[Any, int] = {}
    for rank in range(world_size):
        parent, child = context.Pipe(duplex=False)
        process = context.Process(
            target=_rank_main, args=(rank, world_size, store, threads, child, function, args), daemon=True
        )
        process.start()
        child.close()
        processes.append(process)
        pipes[parent] = rank
    results: list[Any] = [None] * world_size
    failures: list[str] = []
    deadline = time.monotonic() + timeout
    try:
        while pipes and not failures:
            ready: list[Any] = wait(list(pipes), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                late = ", ".join(str(rank) for rank in sorted(pipes.values()))
                failures.append(f"rank(s) {late} had not finished after {timeout:.0f} s")
            for pipe in ready:
                rank = pipes.pop(pipe)
                try:
                    status, value = pipe.recv()
                except EOFError:
                    if rank not in may_die:
                        failures.append(f"rank {rank} died without a result")
                    continue
                if status == "ok":
                    results[rank] = value
                else:
                    failures.append(f"rank {rank} raised:\n{value}")
        # Let ranks that are failing too say why: the first report is often only the echo of another's.
        failing: list[Any] = wait(list(pipes), timeout=1.0) if failures else []
        for pipe in failing:
            rank = pipes.pop(pipe)
            try:
                status, value = pipe.recv()
            except EOFError:
                continue
            if status != "ok":
                failures.append(f"rank {rank} raised:\n{value}")
    finally:
        for process in processes:
            if failures or process.exitcode is None:
                process.join(0 if failures else 5)
            if process.exitcode is None:
                process.kill()
            process.join()
        if os.path.exists(store):
            os.unlink(store)
        os.rmdir(directory)
    if failures:
        raise RankFailure("\n".join(failures))
    return results
