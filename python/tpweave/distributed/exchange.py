"""Bytes between ranks over torch.distributed: what the references and the `pg` rows are made of.

The shm transport checks each call's header. torch.distributed has none: gloo aborts the process, or hangs, when ranks
disagree about a shape. So the facts of a call travel ahead of its data (`agree`), and ranks that differ all raise.
Data travels as bytes, which makes every dtype equal.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import AllgatherOptions, AllToAllOptions

from tpweave.distributed.supervision import carry
from tpweave.errors import CollectiveMismatchError

if TYPE_CHECKING:
    from tpweave.distributed.group import TPGroup

_TEXT_BYTES = 256
_MOST_PARTS = 16


def carrier_device(group: TPGroup, device: torch.device) -> torch.device:
    """Where tensors must lie to travel: gloo takes CPU tensors for every collective, NCCL those of the GPU."""
    return torch.device("cpu") if dist.get_backend(group.process_group) == "gloo" else device


def agree(group: TPGroup, device: torch.device, facts: str, private: Sequence[int] = ()) -> list[list[int]]:
    """Check that all ranks sent the same `facts`, and give every rank's `private` numbers.

    One small all-gather whose size depends on the group alone, so that even ranks in different operations meet in it.

    Args:
        facts: operation, dtype, shape: all that must be equal.
        private: at most 2R numbers that may differ; as many on all ranks when `facts` are equal.

    Raises:
        CollectiveMismatchError: on all ranks, naming who sent what.
    """
    if group.compression:
        facts = f"{facts} compression={group.compression}"
    text = facts.encode()
    if len(text) > _TEXT_BYTES:
        text = text[: _TEXT_BYTES - 17] + b"~" + hashlib.sha256(text).hexdigest()[:16].encode()
    header = torch.zeros(_TEXT_BYTES + 16 * group.size, dtype=torch.uint8)
    header[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    header[_TEXT_BYTES:].view(torch.int64)[: len(private)] = torch.tensor(private, dtype=torch.int64)
    header = header.to(carrier_device(group, device))
    headers = header.new_empty(group.size, header.numel())
    group.calling, group.calls = facts.partition(" ")[0], group.calls + 1
    gather_into(list(headers), header, group)
    rows = headers.cpu()
    texts = [bytes(row[:_TEXT_BYTES].tolist()).rstrip(b"\0").decode(errors="replace") for row in rows]
    if len(set(texts)) > 1:
        sent = "; ".join(f"rank {rank}: {sent}" for rank, sent in enumerate(texts))
        raise CollectiveMismatchError(f"ranks of group {group.name} disagree: {sent}")
    return rows[:, _TEXT_BYTES:].contiguous().view(torch.int64)[:, : len(private)].tolist()


def describe(op: str, dtype: torch.dtype, shape: Sequence[int], **values: object) -> str:
    """The facts of a call in words, e.g. `all_gather float32 (4, 8) dim=0 splits=[2, 2]`."""
    named = (f"{name}={value}" for name, value in values.items())
    return " ".join([op, str(dtype).removeprefix("torch."), str(tuple(shape)), *named])


def flat_bytes(x: torch.Tensor) -> torch.Tensor:
    """x's elements in order, as bytes; a view of x where it is dense."""
    return x.detach().contiguous().view(-1).view(torch.uint8)


def gather_into(received: list[torch.Tensor], x: torch.Tensor, group: TPGroup) -> None:
    """Every rank's x, as long on all ranks, into `received`, by rank."""
    process_group: Any = group.process_group
    options = AllgatherOptions()

    def start(timeout: timedelta) -> Any:
        options.timeout = timeout
        return process_group.allgather([received], [x], options)

    carry(group, start)


def exchange_all(x: torch.Tensor, group: TPGroup, numels: Sequence[int]) -> list[torch.Tensor]:
    """Every rank's flat tensor, on x's device; rank r sends `numels[r]` elements of any dtype.

    Shorter ones are padded, because gloo aborts on an uneven all-gather.
    """
    longest = max(numels) * x.element_size()
    if longest == 0:
        return [x.new_empty(0) for _ in numels]
    carrier = carrier_device(group, x.device)
    sent = torch.zeros(longest, dtype=torch.uint8, device=carrier)
    sent[: x.numel() * x.element_size()] = flat_bytes(x)
    received = sent.new_empty(group.size, longest)
    gather_into(list(received), sent, group)
    pieces = received.to(x.device)
    return [piece[: n * x.element_size()].view(x.dtype) for piece, n in zip(pieces, numels, strict=True)]


class _All:
    """Several collectives in flight at once, as one `Work`."""

    def __init__(self, works: Sequence[Any]) -> None:
        self.works = works

    def wait(self, timeout: timedelta | None = None) -> None:
        for work in self.works:
            work.wait() if timeout is None else work.wait(timeout)

    def is_completed(self) -> bool:
        """Whether all have ended, or one has failed."""
        return all(work.is_completed() for work in self.works) or self.exception() is not None

    def exception(self) -> Any:
        ended = (work.exception() for work in self.works if work.is_completed())
        return next((error for error in ended if error is not None), None)


def exchange_pieces(
    x: torch.Tensor, group: TPGroup, in_numels: Sequence[int], out_numels: Sequence[int], *, parts: int = 1
) -> list[torch.Tensor]:
    """Send consecutive pieces of x, seen flat, to ranks 0..R-1 and give the pieces received, flat and by rank.

    Args:
        parts: exchanges that this is cut into, all in flight at once; equal on all ranks. In one of gloo's both
            directions of a link often take turns, for it posts its sends before its receives (8 MB each way between
            two hosts at 1 Gbit/s: 109 to 142 ms in one part, 73 to 80 ms in 8).
    """
    size = x.element_size()
    carrier = carrier_device(group, x.device)
    pieces = flat_bytes(x).to(carrier).split([n * size for n in in_numels])
    received = [torch.empty(n * size, dtype=torch.uint8, device=carrier) for n in out_numels]
    process_group: Any = group.process_group
    options = AllToAllOptions()
    sends = list(zip(*(piece.tensor_split(parts) for piece in pieces), strict=True))
    receives = list(zip(*(piece.tensor_split(parts) for piece in received), strict=True))
    buffers = [_joined(part) for part in receives]

    def start(timeout: timedelta) -> Any:
        options.timeout = timeout
        works = [
            process_group.alltoall_base(
                buffer, _joined(sent), [piece.numel() for piece in part], [piece.numel() for piece in sent], options
            )
            for buffer, part, sent in zip(buffers, receives, sends, strict=True)
        ]
        return works[0] if parts == 1 else _All(works)

    carry(group, start)
    for buffer, part in zip(buffers, receives, strict=True):
        for piece, arrived in zip(part, buffer.split([piece.numel() for piece in part]), strict=True):
            if piece.data_ptr() != arrived.data_ptr():
                piece.copy_(arrived)
    return [piece.to(x.device).view(x.dtype) for piece in received]


def parts_of(nbytes: int) -> int:
    """In how many parts a tensor of so many bytes is exchanged."""
    return min(_MOST_PARTS, max(1, nbytes >> 20))


def _joined(pieces: Sequence[torch.Tensor]) -> torch.Tensor:
    """The pieces one after the other; no copy where at most one has elements."""
    filled = [piece for piece in pieces if piece.numel() > 0]
    return filled[0] if len(filled) == 1 else torch.cat(list(pieces))
