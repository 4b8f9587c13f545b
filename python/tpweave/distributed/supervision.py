"""Waiting for torch.distributed: no longer than the group's timeout, and with the names of those that did not come.

gloo notices a dead peer by its connection, and reports an address; a stopped one it reports after its own timeout of
half an hour. So a rank whose collective fails says so in the process group's store, which the others look into
while they wait. All that see it answer there, and who does not answer is named.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from tpweave.errors import GroupPoisonedError, PeerFailureError

if TYPE_CHECKING:
    from tpweave.distributed.group import TPGroup

# Seconds between two looks at whether another rank gave up.
_LOOK_EVERY = 0.5
# Seconds in which a rank that waits is sure to answer: it looks every _LOOK_EVERY.
_ROLL_CALL = 1.0


def carry(group: TPGroup, start: Callable[[timedelta], Any]) -> None:
    """Run one torch.distributed collective of a tpweave op.

    Args:
        start: starts it with this timeout and returns its `Work`.

    Raises:
        PeerFailureError: a rank ended, or did not come before the group's timeout. The group is poisoned then.
        GroupPoisonedError: the group had failed before.
    """
    if group.failure is not None:
        raise GroupPoisonedError(group.failure)
    timeout = timedelta(seconds=group.timeout)
    if group.backend != "gloo":
        # NCCL has its own watchdog, and a wait with a timeout would block the host.
        start(timeout).wait()
        return
    began = time.monotonic()
    try:
        work = start(timeout)
    except RuntimeError as error:
        _fail(group, began, error)
    while True:
        left = began + group.timeout - time.monotonic()
        try:
            work.wait(timedelta(seconds=max(0.001, min(_LOOK_EVERY, left))))
            return
        except RuntimeError as error:
            if work.is_completed():
                # It failed, or it was done just after the wait had ended.
                if work.exception() is None:
                    return
                _fail(group, began, error)
            if left <= _LOOK_EVERY or _others_failed(group):
                _fail(group, began, error)


@contextlib.contextmanager
def inside_host(group: TPGroup) -> Iterator[Any]:
    """A step of a collective of the whole group that only the ranks of this host take, on the communicator given.

    What fails there has failed for the group: all ranks learn of it, and name who is missing.
    """
    if group.failure is not None:
        raise GroupPoisonedError(group.failure)
    began = time.monotonic()
    try:
        yield group.topology.shm
    except (PeerFailureError, GroupPoisonedError) as error:
        _fail(group, began, error)


def abandon(group: TPGroup, reason: str) -> None:
    """Give a group up that this rank has fallen out of step with: the others learn of it, and raise."""
    if group.failure is None:
        group.failure = f"this group failed earlier: {reason}; build a new one with tpweave.init"
        with contextlib.suppress(RuntimeError):
            _store(group).set("failed", "1")
    if group.topology.shm is not None:
        group.topology.shm.close()


def _store(group: TPGroup) -> Any:
    """The process group's store under keys of this group."""
    process_group: Any = group.process_group
    return dist.PrefixStore(f"tpweave/{group.name}", process_group.get_group_store())


def _others_failed(group: TPGroup) -> bool:
    try:
        return _store(group).check(["failed"])
    except RuntimeError:
        # The store is gone, and with it the rank that served it: the collective will fail too, or time out.
        return False


def _fail(group: TPGroup, began: float, cause: RuntimeError) -> None:
    waited = time.monotonic() - began
    where = f"{group.calling} (sequence {group.calls - 1})"
    missing = [rank for rank in range(group.size) if rank != group.rank]
    reason = "ended, or did not come,"
    try:
        store = _store(group)
        store.set("failed", "1")
        # Ranks of this host that wait for this one there do not look into the store.
        if group.topology.shm is not None:
            group.topology.shm.close()
        store.set(f"here/{group.rank}", "1")
        end = time.monotonic() + _ROLL_CALL
        while missing and time.monotonic() < end:
            missing = [rank for rank in missing if not store.check([f"here/{rank}"])]
            time.sleep(0.01)
    except RuntimeError:
        missing, reason = [], "cannot be named, the store of torch.distributed is gone too,"
    if missing:
        names = ", ".join(str(rank) for rank in missing)
        group.failure = f"this group failed earlier, in {where}: rank(s) {names} {reason} after {waited:.2f} s"
    else:
        group.failure = f"this group failed earlier, in {where}: no rank is missing, a connection broke"
    group.failure += "; build a new one with tpweave.init"
    if not missing and "store" not in reason:
        # Everybody else had given up on this rank, or the network broke between ranks that all live.
        raise GroupPoisonedError(f"{where}: the other ranks gave up on this one, or a connection broke") from cause
    raise PeerFailureError(group.calling, group.calls - 1, missing, waited, reason) from cause
