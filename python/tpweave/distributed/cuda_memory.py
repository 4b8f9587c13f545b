"""Memory of peers for the CUDA kernels: one channel for each operation of a group, on every rank's GPU.

A channel's memory is a pad of signals, then data; `csrc/symm_mem/signals.cuh` is the protocol over it. Calls of one
channel follow each other on the GPU: make them on one stream, or order the streams by events. What a call needs to know
of the calls before is read on the GPU, so calls can be captured into CUDA graphs.

The kernels have been run on the host, emulated (`tests/emulation/cuda`); they have not run on a GPU yet.
"""

from __future__ import annotations

import functools
import importlib
import weakref
from dataclasses import dataclass, field
from typing import Any

import torch

from tpweave.dispatch import Inputs
from tpweave.distributed.group import TPGroup
from tpweave.errors import CollectiveMismatchError, PeerFailureError

# What the first call of an operation makes room for: most activations of a decode step.
_FIRST_BYTES = 1 << 20
# csrc/symm_mem/signal_pad.h holds the same.
MAX_RANKS = 16

# Up to how many bytes one-shot wins, by the number of ranks: where vLLM's custom all-reduce changes over on NVLink (for
# two ranks it never does). Not measured here.
_ONE_SHOT_BYTES = {3: 512 << 10, 4: 512 << 10}
_ONE_SHOT_BYTES_OF_MORE = 256 << 10


@functools.cache
def library_objection(device: int) -> str | None:
    """Why `tpweave._cuda` cannot run on this GPU, in words; None where it can."""
    if not torch.cuda.is_available():
        return "needs a GPU"
    try:
        library = importlib.import_module("tpweave._cuda")
    except ImportError as error:
        return f"needs tpweave._cuda, which was not built or does not load ({error})"
    return library.objection(device) or None


@dataclass
class _Channels:
    """What a group has: the reason why its ranks cannot use the kernels, or their channels by operation."""

    reason: str | None
    made: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    # A captured graph may still use memory that a larger one has replaced.
    replaced: list[tuple[Any, Any]] = field(default_factory=list)


_groups: weakref.WeakKeyDictionary[TPGroup, _Channels] = weakref.WeakKeyDictionary()


def agree_on_library(group: TPGroup, device: torch.device) -> None:
    """Find out whether every rank's GPU can run the library: a collective, part of `peer_memory.connect`."""
    reasons = group.all_gather_object(library_objection(device.index))
    limit = None if group.size <= MAX_RANKS else f"takes up to {MAX_RANKS} ranks, the group has {group.size}"
    first = next((f"rank {rank}: {why}" for rank, why in enumerate(reasons) if why is not None), limit)
    _groups[group] = _Channels(first)


def cuda_objection(inputs: Inputs) -> str | None:
    """A rule of every `cuda` row of a collective."""
    group = inputs.group
    if group is None or group.size == 1:
        return "needs a group of several ranks"
    if group not in _groups:
        return "needs peer memory: call tpweave.distributed.peer_memory.connect(group, device) on all ranks first"
    return _groups[group].reason


def one_shot_objection(group: TPGroup, nbytes: int) -> str | None:
    """Why every rank should not sum everything itself, in words; None where that is quickest."""
    limit = _ONE_SHOT_BYTES.get(group.size, _ONE_SHOT_BYTES_OF_MORE)
    if group.size <= 2 or nbytes <= limit:
        return None
    return f"takes up to {limit} bytes on {group.size} ranks, not {nbytes}"


def channel(group: TPGroup, device: torch.device, op: str, data_bytes: int) -> Any:
    """The group's channel for `op`, with room for `data_bytes` on each rank.

    Enlarging it is a collective, which all ranks reach together, and cannot be captured into a graph.

    Raises:
        PeerFailureError: an earlier call of this channel waited for a rank in vain; its output was not a number.
        CollectiveMismatchError: an earlier call of this channel was another one on another rank.
        RuntimeError: a graph is being captured, and there is not enough memory: make such a call before.
    """
    channels = _groups[group]
    known = channels.made.get(op)
    if known is None or known[0].data_bytes < data_bytes:
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(f"{op}: its first call of {data_bytes} bytes cannot be captured; make one before")
        # Growing by half at least, so that slowly growing calls do not exchange memory each time.
        wanted = max(data_bytes, _FIRST_BYTES if known is None else known[0].data_bytes * 3 // 2)
        if known is not None:
            channels.replaced.append(known)
        known = channels.made[op] = _new_channel(group, device, wanted)
    raise_if_failed(known[0], op, group)
    return known[0]


def raise_if_failed(made: Any, op: str, group: TPGroup) -> None:
    """Raises what the GPU has reported about the channel's calls so far; waits for nothing."""
    failure = made.failure
    if failure is None:
        return
    sequence, late, others = failure
    if others:
        raise CollectiveMismatchError(
            f"{op} (sequence {sequence}): rank(s) {', '.join(map(str, others))} called another dtype or shape than "
            f"rank {group.rank}"
        )
    raise PeerFailureError(op, sequence, late, group.timeout, "did not signal its kernel")


def current_stream(device: torch.device) -> int:
    """The handle of the stream that kernels on `device` are launched on."""
    return torch.cuda.current_stream(device).cuda_stream


def _new_channel(group: TPGroup, device: torch.device, data_bytes: int) -> tuple[Any, Any]:
    from tpweave import _cuda

    addresses, keep = zeroed_memory(group, device, _cuda.PAD_BYTES + data_bytes)
    return _cuda.Channel(group.rank, addresses, data_bytes, device.index), keep


def zeroed_memory(group: TPGroup, device: torch.device, nbytes: int) -> tuple[list[int], Any]:
    """Memory on each rank's GPU that all ranks can address: a collective.

    Returns:
        each rank's address, valid in this process, and what owns the memory.
    """
    import torch.distributed._symmetric_memory as symm_mem

    assert group.process_group is not None
    memory = symm_mem.empty(nbytes, dtype=torch.uint8, device=device)
    memory.zero_()
    handle = symm_mem.rendezvous(memory, group=group.process_group)
    # Nobody may signal before all words are zero: the exchange below is also a barrier.
    torch.cuda.synchronize(device)
    # The handle knows allocations; the tensor may lie inside a larger one.
    offsets = group.all_gather_object(memory.data_ptr() - handle.buffer_ptrs[group.rank])
    return [base + offset for base, offset in zip(handle.buffer_ptrs, offsets, strict=True)], (memory, handle)
