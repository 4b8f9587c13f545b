"""Memory of peers for Triton kernels: tables of addresses that a kernel follows to every rank's data and signals.

The CUDA kernels' memory is in `cuda_memory.py`; `connect` prepares both.

    tensors   memory                                          reached through
    cpu       the group's arena (TRITON_INTERPRET=1, tests)   tpweave.distributed.symmetric_memory
    cuda      torch.distributed._symmetric_memory             `connect(group, device)` first: a collective

The cuda part has not run on a GPU yet.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch

from tpweave.dispatch import Inputs
from tpweave.distributed.cuda_memory import agree_on_library, zeroed_memory
from tpweave.distributed.group import TPGroup
from tpweave.distributed.symmetric_memory import SIGNAL_BYTES, symmetric_buffer

# 64-bit signal words of each rank.
MAX_SIGNALS = SIGNAL_BYTES // 8
# What `connect` tries with, enough for most activations of a decode step.
_FIRST_BYTES = 1 << 20


@dataclass
class PeerMemory:
    """One operation's memory on all ranks of a group.

    Attributes:
        rank, size: of the group.
        timeout: seconds to wait for a peer.
        half_bytes: data bytes of each rank that one call may use; the calls take two halves in turn.
        data_ptrs, signal_ptrs: int64 [R], addresses of each rank's data and signal words, valid in this process.
        failed: int32 [1] in memory of the host: 1 + the rank that a kernel gave up on, else 0.
        sequence: how many calls there have been.
        keep: what owns the memory.
    """

    rank: int
    size: int
    timeout: float
    half_bytes: int
    data_ptrs: torch.Tensor
    signal_ptrs: torch.Tensor
    failed: torch.Tensor
    sequence: int
    keep: Any

    def next_sequence(self) -> int:
        """Count a call."""
        self.sequence += 1
        return self.sequence


_memories: weakref.WeakKeyDictionary[TPGroup, dict[str, PeerMemory]] = weakref.WeakKeyDictionary()


def connect(group: TPGroup, device: torch.device) -> str | None:
    """Try peer memory between the ranks' GPUs: a collective of the group.

    Returns:
        None when all ranks have it, so that Triton and CUDA collectives run on this group from then on; else why not,
        in words.

    Example:
        >>> reason = connect(tpweave.init(), torch.device("cuda", 0))
    """
    reason, memory = None, None
    try:
        memory = _cuda_memory(group, device, _FIRST_BYTES, sequence=0)
    except (RuntimeError, ImportError) as error:
        reason = str(error)
    reasons = group.all_gather_object(reason)
    first = next((f"rank {rank}: {why}" for rank, why in enumerate(reasons) if why is not None), None)
    if first is None and memory is not None:
        _memories.setdefault(group, {})[device.type] = memory
        agree_on_library(group, device)
    return first


def peer_memory(group: TPGroup, device: torch.device, nbytes: int) -> PeerMemory:
    """The group's memory for calls of up to `nbytes`; enlarging it is a collective, which all ranks reach together."""
    known = _memories.setdefault(group, {}).get(device.type)
    if known is None or known.half_bytes < nbytes:
        # Growing by half at least, so that slowly growing calls do not exchange memory each time.
        wanted = nbytes if known is None else max(nbytes, known.half_bytes * 3 // 2)
        make = _cuda_memory if device.type == "cuda" else _cpu_memory
        known = make(group, device, wanted, sequence=0 if known is None else known.sequence)
        _memories[group][device.type] = known
    known.timeout = group.timeout
    return known


def peer_memory_objection(inputs: Inputs) -> str | None:
    """A rule of Triton rows that use peer memory."""
    group = inputs.group
    if group is None or group.size == 1:
        return "needs a group of several ranks"
    if any(tensor.is_cuda for tensor in inputs.tensors):
        if "cuda" not in _memories.get(group, {}):
            return "needs peer memory: call tpweave.distributed.peer_memory.connect(group, device) on all ranks first"
        return None
    return None if group.transport == "shm" else f"needs the shm transport, this group has {group.transport}"


def _aligned(nbytes: int) -> int:
    return (max(nbytes, 16) + 15) // 16 * 16


def _cpu_memory(group: TPGroup, device: torch.device, nbytes: int, sequence: int) -> PeerMemory:
    half = _aligned(nbytes)
    buffer = symmetric_buffer(group, "triton", 2 * half)
    return PeerMemory(
        group.rank, group.size, group.timeout, half, torch.tensor(buffer.data_ptrs), torch.tensor(buffer.signal_ptrs),
        torch.zeros(1, dtype=torch.int32), sequence, buffer,
    )  # fmt: skip


def _cuda_memory(group: TPGroup, device: torch.device, nbytes: int, sequence: int) -> PeerMemory:
    half = _aligned(nbytes)
    # Signals first, then the data.
    addresses, keep = zeroed_memory(group, device, SIGNAL_BYTES + 2 * half)
    signals = torch.tensor(addresses, dtype=torch.int64, device=device)
    return PeerMemory(
        group.rank, group.size, group.timeout, half, signals + SIGNAL_BYTES, signals,
        torch.zeros(1, dtype=torch.int32, pin_memory=True), sequence, keep,
    )  # fmt: skip
