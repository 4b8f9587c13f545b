"""Philox-4x32-10 in plain torch: random words that depend on a key and a counter alone."""

from __future__ import annotations

from torch import Tensor


def _multiply_high_low(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    product = a * b  # wraps in int64: the bits are those of the unsigned product
    return (product >> 32) & 0xFFFFFFFF, product & 0xFFFFFFFF


def philox(seed: int, counter: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox-4x32-10: four words of 32 random bits, in int64, for each counter of four. Source: Salmon et al.,
    "Parallel random numbers: as easy as 1, 2, 3", 2011."""
    key0, key1 = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    c0, c1, c2, c3 = counter
    for _ in range(10):
        high0, low0 = _multiply_high_low(0xD2511F53, c0)
        high1, low1 = _multiply_high_low(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, low1, high0 ^ c3 ^ key1, low0
        key0, key1 = (key0 + 0x9E3779B9) & 0xFFFFFFFF, (key1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3
