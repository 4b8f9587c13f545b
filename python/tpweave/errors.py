"""Errors that tpweave raises, all catchable as `TPWeaveError`.

User mistakes are `ValueError`s with the values seen and the values that would work. What goes wrong between
ranks is `PeerFailureError` (a rank died or is late) or `CollectiveMismatchError` (ranks called different things).
"""

from __future__ import annotations

from collections.abc import Sequence


class TPWeaveError(Exception):
    """Base of every error defined here."""


class BackendUnavailableError(TPWeaveError, ValueError):
    """The backend that was asked for by name cannot take these inputs; the message holds its reason."""


class CollectiveError(TPWeaveError, RuntimeError):
    """Base of the errors in which several ranks are involved."""


class PeerFailureError(CollectiveError):
    """A rank died, or did not arrive before the timeout. The group is poisoned from then on.

    Attributes:
        op: the operation that was waiting, e.g. `"all_reduce"`.
        sequence: how many collectives of this group came before it.
        ranks: group ranks that died or are late; empty where that cannot be known.
        waited: seconds waited.
    """

    def __init__(self, op: str, sequence: int, ranks: Sequence[int], waited: float, reason: str) -> None:
        names = ", ".join(str(rank) for rank in ranks) or "unknown"
        super().__init__(f"{op} (sequence {sequence}): rank(s) {names} {reason} after {waited:.2f} s")
        self.op = op
        self.sequence = sequence
        self.ranks = tuple(ranks)
        self.waited = waited


class CollectiveMismatchError(CollectiveError):
    """Ranks of one group called different operations, dtypes or shapes; the message lists who sent what."""


class GroupPoisonedError(CollectiveError):
    """An earlier failure made this group unusable; build a new one with `tpweave.init`."""


class UnsupportedModelError(TPWeaveError, ValueError):
    """A model or module that cannot be parallelised as asked, with the reason and what would work."""
