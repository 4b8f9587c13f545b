"""A collective of the shm transport whose work between its steps is Python's: the matmuls of torch, for instance.

The protocol is that of csrc/symm_mem/communicator.h: enter, publish the arrival, await the others', perhaps a pipeline
of published and awaited steps, leave. Everybody's arrival at call q+1 proves that everybody has left call q, so memory
that peers read until they leave call q may be written again after the arrivals of q+1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tpweave.native import COLLECTIVE_CODES

if TYPE_CHECKING:
    from tpweave.distributed.group import TPGroup


class SteppedCall:
    """One call, as a context manager. An exception inside the block fails the group: the other ranks raise.

    Between `with` and its end the thread holds the group's communicator, so that no other collective of this group
    may be called there.

    Args:
        group: a group on the "shm" transport.
        op: the collective's name, as errors call it.
        dtype: a code of `tpweave.native.DTYPE_CODES`; equal on all ranks, or all raise `CollectiveMismatchError`.
        sizes: at most 64 numbers, equal on all ranks likewise: shapes, splits.
        fact, extra: two more of them.
        own: a number of this rank's alone, e.g. the offset of its tensor (`group.shm.offset_of`).

    Example:
        >>> own = group.shm.offset_of(a.data_ptr(), a.nbytes)
        >>> with SteppedCall(group, "all_gather_matmul", DTYPE_CODES[a.dtype], splits, own=own) as call:
        ...     call.arrive()
        ...     offsets = call.await_arrivals()
    """

    __slots__ = ("_begin", "_shm")

    def __init__(
        self,
        group: TPGroup,
        op: str,
        dtype: int,
        sizes: Sequence[int],
        *,
        fact: int = 0,
        extra: int = 0,
        own: int = 0,
    ) -> None:
        self._shm: Any = group.shm
        self._begin = (COLLECTIVE_CODES[op], dtype, fact, extra, sizes, own)

    def __enter__(self) -> SteppedCall:
        self._shm.begin(*self._begin)
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if kind is None:
            self._shm.end()
        else:
            self._shm.abandon()

    def arrive(self, last_step: int = 0) -> None:
        """Publish that this rank has come, with all that it has written. Partner: `await_arrivals` of the others.

        Args:
            last_step: the number of the last step that each rank will publish, the same on all.
        """
        self._shm.arrive(last_step)

    def await_arrivals(self) -> list[int]:
        """Wait for all ranks' arrivals; returns their `own` numbers, by rank.

        Raises:
            CollectiveMismatchError: the ranks called different things.
            PeerFailureError: a rank died or did not come before the timeout.
        """
        return self._shm.await_arrivals()

    def publish(self, step: int) -> None:
        """Publish that this rank has done its steps up to `step`, from 1. Partner: `await_step` of the ranks that read
        what it wrote, or write over what it read."""
        self._shm.publish_step(step)

    def await_step(self, peer: int, step: int) -> None:
        """Wait until `peer` has published `step`. Partner: its `publish`."""
        self._shm.await_step(peer, step)
