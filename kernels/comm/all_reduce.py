"""All-reduce on peer memory: every rank reads the others' buffers itself, no copies by a library in between.

    y = x_0 + x_1 + ... + x_{R-1}, added in that order in fp32 and rounded once: the same bits on all ranks

one-shot  every rank sums everything: one exchange of signals, R reads of the whole. Wins where latency decides.
two-shot  rank r sums the r-th slice, then all copy the slices: two exchanges, 2 (R-1)/R reads. Wins where bytes decide.

Concurrency. A rank's memory of a call is one of two halves, taken in turn. Program p of a rank exchanges signals with
programs p of its peers only, and a program never waits for a later one of its grid, so the programs need not run at the
same time (Triton's interpreter runs them one after the other). Signals are words [program, source rank] in the waiting
rank's memory and only grow: 2 * sequence + 1 "my input is there", 2 * sequence + 2 "my sums are there". A half is
written again two calls later: by then every peer has signalled the call between, which it starts after its reads of
this half have ended.

x of any shape, dense; fp32, bf16, fp16. Reference: tpweave/reference/comm/all_reduce.py.
Proven under TRITON_INTERPRET=1 by several processes on one arena, and compiled for sm_80, sm_90, sm_100 and gfx942. It
has not run on a GPU yet.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tpweave.distributed.peer_memory import MAX_SIGNALS, PeerMemory
from tpweave.errors import PeerFailureError
from tpweave.kernels.cross_compile import CompileSpec

# Up to this many bytes one-shot: where vLLM's custom all-reduce changes over for eight ranks on H100 over NVLink. Not
# measured here.
ONE_SHOT_BYTES = 256 * 1024
# Elements a program handles at once: 16 bytes of bf16 a thread with 4 warps, 4 times.
BLOCK = 4096
MAX_PROGRAMS = 64
# Polls a second, to turn a timeout into a count: a poll of a peer's word takes about 1 us on a GPU, and more than 20 us
# in the interpreter. It ends a wait, it is not a clock.
POLLS_PER_SECOND = {"cuda": 1_000_000, "cpu": 20_000}


@triton.jit
def _publish(signal_ptrs, program, rank, value, WORLD_SIZE: tl.constexpr):
    # The barrier orders all threads' stores before the release, whose partner is the acquire in _await.
    tl.debug_barrier()
    for peer in tl.static_range(WORLD_SIZE):
        words = tl.load(signal_ptrs + peer).to(tl.pointer_type(tl.int64))
        tl.atomic_xchg(words + program * WORLD_SIZE + rank, value, sem="release", scope="sys")


@triton.jit
def _await(signal_ptrs, failed_ptr, program, rank, value, max_polls, WORLD_SIZE: tl.constexpr):
    words = tl.load(signal_ptrs + rank).to(tl.pointer_type(tl.int64)) + program * WORLD_SIZE
    for peer in tl.static_range(WORLD_SIZE):
        polls = max_polls
        # Partner: the release in the peer's _publish.
        seen = tl.atomic_add(words + peer, 0, sem="acquire", scope="sys")
        while (seen < value) & (polls > 0):
            seen = tl.atomic_add(words + peer, 0, sem="acquire", scope="sys")
            polls -= 1
        if seen < value:
            tl.atomic_max(failed_ptr, peer + 1, sem="relaxed", scope="sys")
    # Nothing may be read before this program's one polling thread has seen all signals.
    tl.debug_barrier()


@triton.jit
def _sum_over_ranks(data_ptrs, half_offset, offs, mask, dtype: tl.constexpr, WORLD_SIZE: tl.constexpr):
    total = tl.zeros(offs.shape, dtype=tl.float32)
    for source in tl.static_range(WORLD_SIZE):
        data = (tl.load(data_ptrs + source) + half_offset).to(tl.pointer_type(dtype))
        total += tl.load(data + offs, mask=mask, other=0.0).to(tl.float32)
    return total


@triton.jit
def _all_reduce_one_shot_kernel(
    x_ptr, out_ptr, data_ptrs, signal_ptrs, failed_ptr, numel, half_offset, sequence, rank, max_polls,
    WORLD_SIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    mine = (tl.load(data_ptrs + rank) + half_offset).to(tl.pointer_type(dtype))
    step = tl.num_programs(0).to(tl.int64) * BLOCK
    first = pid.to(tl.int64) * BLOCK
    for start in range(first, numel, step):
        offs = start + tl.arange(0, BLOCK)
        tl.store(mine + offs, tl.load(x_ptr + offs, mask=offs < numel), mask=offs < numel)
    _publish(signal_ptrs, pid, rank, 2 * sequence + 1, WORLD_SIZE)
    _await(signal_ptrs, failed_ptr, pid, rank, 2 * sequence + 1, max_polls, WORLD_SIZE)
    for start in range(first, numel, step):
        offs = start + tl.arange(0, BLOCK)
        total = _sum_over_ranks(data_ptrs, half_offset, offs, offs < numel, dtype, WORLD_SIZE)
        tl.store(out_ptr + offs, total.to(dtype), mask=offs < numel)


@triton.jit
def _all_reduce_two_shot_kernel(
    x_ptr, out_ptr, data_ptrs, signal_ptrs, failed_ptr, numel, slice_numel, half_offset, sequence, rank, max_polls,
    WORLD_SIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # Slice r is [r * slice_numel, (r + 1) * slice_numel); program p handles the same blocks of every slice.
    pid = tl.program_id(0)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    mine = (tl.load(data_ptrs + rank) + half_offset).to(tl.pointer_type(dtype))
    step = tl.num_programs(0).to(tl.int64) * BLOCK
    first = pid.to(tl.int64) * BLOCK
    for source in range(WORLD_SIZE):
        for start in range(first, slice_numel, step):
            offs = start + tl.arange(0, BLOCK)
            mask = (offs < slice_numel) & (source * slice_numel + offs < numel)
            offs += source * slice_numel
            tl.store(mine + offs, tl.load(x_ptr + offs, mask=mask), mask=mask)
    _publish(signal_ptrs, pid, rank, 2 * sequence + 1, WORLD_SIZE)
    _await(signal_ptrs, failed_ptr, pid, rank, 2 * sequence + 1, max_polls, WORLD_SIZE)
    # Nobody else reads this rank's own slice of its own input: the sums replace it.
    for start in range(first, slice_numel, step):
        offs = start + tl.arange(0, BLOCK)
        mask = (offs < slice_numel) & (rank * slice_numel + offs < numel)
        offs += rank * slice_numel
        total = _sum_over_ranks(data_ptrs, half_offset, offs, mask, dtype, WORLD_SIZE).to(dtype)
        tl.store(mine + offs, total, mask=mask)
    _publish(signal_ptrs, pid, rank, 2 * sequence + 2, WORLD_SIZE)
    _await(signal_ptrs, failed_ptr, pid, rank, 2 * sequence + 2, max_polls, WORLD_SIZE)
    for source in range(WORLD_SIZE):
        sums = (tl.load(data_ptrs + source) + half_offset).to(tl.pointer_type(dtype))
        for start in range(first, slice_numel, step):
            offs = start + tl.arange(0, BLOCK)
            mask = (offs < slice_numel) & (source * slice_numel + offs < numel)
            offs += source * slice_numel
            tl.store(out_ptr + offs, tl.load(sums + offs, mask=mask), mask=mask)


def all_reduce_fwd(x: torch.Tensor, memory: PeerMemory, *, two_shot: bool | None = None) -> torch.Tensor:
    """The sum over the ranks that share `memory`, which holds at least `x.nbytes` a half. x is dense.

    Args:
        two_shot: which of the two kernels; None chooses by size. The same on all ranks.

    Raises:
        PeerFailureError: a peer did not signal in time. On a GPU the call after the failed one raises it: looking at
            once would wait for the kernel.
    """
    _raise_if_failed(memory)
    out = torch.empty_like(x)
    numel = x.numel()
    if numel == 0:
        return out
    sequence = memory.next_sequence()
    half_offset = memory.half_bytes * (sequence % 2)
    max_polls = int(memory.timeout * POLLS_PER_SECOND[x.device.type])
    max_programs = min(MAX_PROGRAMS, MAX_SIGNALS // memory.size)
    if two_shot if two_shot is not None else x.nbytes > ONE_SHOT_BYTES:
        slice_numel = triton.cdiv(numel, memory.size)
        _all_reduce_two_shot_kernel[(min(max_programs, triton.cdiv(slice_numel, BLOCK)),)](
            x, out, memory.data_ptrs, memory.signal_ptrs, memory.failed, numel, slice_numel, half_offset, sequence,
            memory.rank, max_polls, WORLD_SIZE=memory.size, BLOCK=BLOCK,
        )  # fmt: skip
    else:
        _all_reduce_one_shot_kernel[(min(max_programs, triton.cdiv(numel, BLOCK)),)](
            x, out, memory.data_ptrs, memory.signal_ptrs, memory.failed, numel, half_offset, sequence, memory.rank,
            max_polls, WORLD_SIZE=memory.size, BLOCK=BLOCK,
        )  # fmt: skip
    if not x.is_cuda:
        _raise_if_failed(memory)
    return out


def _raise_if_failed(memory: PeerMemory) -> None:
    # Memory of the host that a GPU writes to: reading it waits for nothing.
    late = int(memory.failed[0])
    if late > 0:
        raise PeerFailureError("all_reduce", memory.sequence, [late - 1], memory.timeout, "did not signal its kernel")


_TYPES = {
    "x_ptr": "*bf16", "out_ptr": "*bf16", "data_ptrs": "*i64", "signal_ptrs": "*i64", "failed_ptr": "*i32",
    "numel": "i64", "half_offset": "i64", "sequence": "i64", "rank": "i32", "max_polls": "i64",
}  # fmt: skip
_CONSTANTS = {"WORLD_SIZE": 8, "BLOCK": BLOCK}
COMPILE_SPECS = [
    # A block of 4096 elements keeps 32 of the 64-bit offsets in each thread: some are spilled.
    CompileSpec(_all_reduce_one_shot_kernel, _TYPES, _CONSTANTS, max_spills=256),
    CompileSpec(_all_reduce_two_shot_kernel, {**_TYPES, "slice_numel": "i64"}, _CONSTANTS, max_spills=1024),
]
