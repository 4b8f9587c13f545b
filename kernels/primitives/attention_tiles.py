"""Tile sizes of the attention kernels, by GPU and head dim, apart from the kernels that take them.

None of them was measured: no GPU was at hand. They follow from the registers and the shared memory that a tile needs,
and are held to no spills and to the shared memory of each GPU by tests/test_cross_compile.py.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton


class Tiles(NamedTuple):
    """What a kernel is launched with: queries and keys of a tile, warps, stages of the loads' pipeline."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def gpu_name(device: torch.device) -> str:
    """sm_80, sm_90, sm_100 or gfx942, the nearest that tiles are stated for; "interpreter" for the CPU."""
    if device.type != "cuda":
        return "interpreter"
    if torch.version.hip is not None:
        return "gfx942"
    major, _ = torch.cuda.get_device_capability(device)
    return "sm_80" if major < 9 else "sm_90" if major == 9 else "sm_100"


def block_dim(length: int) -> int:
    """A head dim padded for tl.dot: a power of two of at least 16."""
    return max(16, triton.next_power_of_2(length))


def precision(gpu: str, dtype: torch.dtype) -> str:
    """How tl.dot multiplies: 16-bit operands as they are, fp32 so that it keeps its accuracy.

    tf32x3 multiplies fp32 on NVIDIA's tensor cores in three parts; elsewhere there is only plain fp32. Triton's
    interpreter multiplies bf16 as the integers that hold it, so there all is widened first.
    """
    if gpu == "interpreter":
        return "ieee"
    if dtype != torch.float32:
        return "half"
    return "ieee" if gpu == "gfx942" else "tf32x3"


def forward_tiles(gpu: str, dtype: torch.dtype, depth: int, depth_v: int, *, features: bool = False) -> Tiles:
    """Tiles of the forward for padded head dims; `features`: a bias, a mask, ALiBi, a softcap or dropout.

    A program keeps its queries and fp32 sums [block_m, depth_v], 128 x 128 of them in 128 registers of 128 threads, so
    eight warps where both are 128; wider heads take fewer queries, and fp32, whose operands are twice as wide, half.
    What features need besides, Philox's four words above all, leaves room for half the scores.
    """
    if gpu == "interpreter":
        return Tiles(32, 64, 4, 1)
    widest = max(depth, depth_v)
    wide = dtype == torch.float32
    if gpu == "gfx942":
        # 64 KB of shared memory hold one tile of keys or values at a time: no pipeline.
        return Tiles(64, 32, 4, 1) if wide or features or widest > 128 else Tiles(128, 64, 4, 1)
    if wide:
        return Tiles(32, 32, 8, 2 if widest <= 128 else 1)
    if features:
        return Tiles(64, 32, 8, 2)
    if widest <= 64:
        return Tiles(128, 64, 4, 3)
    if widest <= 128:
        return Tiles(128, 64, 8, 3)
    return Tiles(64, 32 if gpu == "sm_80" else 64, 8, 2)


def key_gradient_tiles(gpu: str, dtype: torch.dtype, depth: int, depth_v: int, *, features: bool = False) -> Tiles:
    """Tiles of the kernel of dk and dv, which keeps four tiles [block_n, head dim], two of them in fp32.

    sm_80 keeps fewer queries at 64, and sm_100 loads without a pipeline at 128: else they spill.
    """
    if gpu == "interpreter":
        return Tiles(32, 64, 4, 1)
    widest = max(depth, depth_v)
    if gpu == "gfx942":
        return Tiles(32, 64 if widest <= 64 else 32, 4, 1)
    if dtype == torch.float32:
        return Tiles(16, 32, 8, 1)
    if features or widest > 128:
        return Tiles(32, 32, 8, 1)
    if widest <= 64:
        return Tiles(32, 128, 8, 2) if gpu == "sm_80" else Tiles(64, 64, 8, 2)
    return Tiles(32, 64, 8, 1 if gpu == "sm_100" else 2)


def query_gradient_tiles(gpu: str, dtype: torch.dtype, depth: int, depth_v: int, *, features: bool = False) -> Tiles:
    """Tiles of the kernels of dq and dbias, which keep three tiles [block_m, head dim], one of them in fp32."""
    if gpu == "interpreter":
        return Tiles(32, 64, 4, 1)
    widest = max(depth, depth_v)
    if gpu == "gfx942":
        return Tiles(64 if widest <= 64 else 32, 32, 4, 1)
    if dtype == torch.float32:
        return Tiles(16, 32, 8, 1)
    if widest > 128:
        return Tiles(32, 32, 4, 1)
    return Tiles(64, 32, 8, 2) if features or widest > 64 else Tiles(128, 64, 8, 2)


def decode_tiles(gpu: str, dtype: torch.dtype, rows: int, depth_v: int) -> Tiles:
    """Tiles of the decode kernel for `rows` queries and heads to a KV head: block_m is at least tl.dot's 16.

    A tile of keys and values of 128 is 32 KB of bf16, and two are on their way; wider values, of which the sums
    [block_m, depth_v] are kept too, take fewer keys and queries.
    """
    block_m = min(block_dim(rows), 64 if depth_v <= 128 else 32 if depth_v <= 256 else 16)
    if gpu == "interpreter":
        return Tiles(block_m, 64, 4, 1)
    narrow = dtype == torch.float32 or depth_v > 128
    return Tiles(block_m, 32 if narrow else 64, 8 if dtype == torch.float32 else 4, 1 if gpu == "gfx942" else 2)
