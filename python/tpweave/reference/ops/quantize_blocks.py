"""Blocks of numbers as integers with one scale each, in plain torch: the definition, to the bit.

Dims: n numbers, seen flat; a block is `block` of them, the last one perhaps shorter; S sources of a sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from tpweave.distributed.splits import even_splits
from tpweave.reference.philox import philox

Tensor = torch.Tensor

# Elements that one set of random words rounds: 16 counters of four words, each of which rounds two elements.
DITHER_GROUP = 128


class BlockFormat(NamedTuple):
    """How numbers become codes.

    Attributes:
        bits: 8, one int8 code a byte; or 4: of each 32 codes, byte i holds code i in its low half and code i + 16 in
            its high half, in two's complement.
        block: elements of a block: a power of two from 32 to 1024.
    """

    bits: int
    block: int

    @property
    def top(self) -> int:
        """The largest code; the smallest is -top."""
        return 127 if self.bits == 8 else 7

    @property
    def unit(self) -> int:
        """What a part of a tensor that is quantised on its own begins at a multiple of."""
        return max(self.block, DITHER_GROUP)

    def code_bytes(self, count: int) -> int:
        """Bytes of the codes of `count` numbers."""
        return count if self.bits == 8 else -(-count // 32) * 16

    def num_blocks(self, count: int) -> int:
        """Blocks, and so scales, of `count` numbers."""
        return -(-count // self.block)

    def parts(self, count: int, ranks: int) -> list[int]:
        """The nearly equal parts of `count` numbers that the ranks add up: whole units but for the last one."""
        sizes = even_splits(-(-count // self.unit), ranks)
        ends = [min(sum(sizes[: rank + 1]) * self.unit, count) for rank in range(ranks)]
        return [end - begin for begin, end in zip([0, *ends], ends, strict=False)]


class Rounding(NamedTuple):
    """Element i is rounded to nearest (even) where `seed` is None, else by the random number of (seed, stream, i)."""

    seed: int | None = None
    stream: int = 0


NEAREST = Rounding()


def dither(rounding: Rounding, first: int, count: int, device: torch.device) -> Tensor:
    """What is added to elements first, first + 1, ... before they are rounded: fp32 [count] between -1/2 and 1/2.

    Element i takes half (i % 128) // 64 (the low one first) of word (i % 64) // 16 of Philox with the key `seed` and
    the counter (low and high half of i // 128 * 16 + i % 16, stream, 0): (half + 1/2) / 65536 - 1/2.
    """
    begin, end = first // DITHER_GROUP, -(-(first + count) // DITHER_GROUP)
    counter = torch.arange(begin * 16, end * 16, device=device)
    stream = torch.full_like(counter, rounding.stream)
    assert rounding.seed is not None
    words = philox(rounding.seed, (counter & 0xFFFFFFFF, counter >> 32, stream, torch.zeros_like(counter)))
    lanes = torch.stack([word.view(-1, 16) for word in words], 1).flatten(1)
    halves = torch.cat((lanes & 0xFFFF, lanes >> 16), 1).flatten()
    start = first - begin * DITHER_GROUP
    return (halves[start : start + count].float() + 0.5) / 65536 - 0.5


def _in_rows(x: Tensor, length: int) -> Tensor:
    """Flat x in rows of `length`, zeros after its end."""
    return torch.nn.functional.pad(x, (0, -x.numel() % length)).view(-1, length)


def quantize_blocks_reference(
    x: Tensor, form: BlockFormat, rounding: Rounding = NEAREST, first: int = 0, residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(uint8 codes, bf16 scales) of x, seen flat and in fp32, whose first element is number `first` of its stream.

        scale = max(2^-126, max|block| / top), rounded up to bf16;  code = round(x * (1 / scale) + dither)

    A block with an infinity or a NaN has the scale NaN and codes of 0. `residual`, flat fp32, is added to x before, and
    afterwards holds what the codes miss of that sum (0 in a block that is not finite).
    """
    flat = x.detach().reshape(-1).float()
    count = flat.numel()
    total = flat if residual is None else flat + residual
    blocks = _in_rows(total, form.block)
    largest = blocks.abs().amax(1) if count else total.new_empty(0)
    finite = largest.isfinite()
    bits = (torch.where(finite, largest, 0.0) / form.top).view(torch.int32)
    bits = (bits + 0xFFFF).bitwise_and(-0x10000).clamp(min=0x00800000)
    scale = bits.view(torch.float32)[:, None]
    codes = blocks * scale.reciprocal()
    if rounding.seed is not None:
        codes = codes + _in_rows(dither(rounding, first, count, x.device), form.block)
    codes = torch.where(finite[:, None], codes.round().clamp(-form.top, form.top), 0.0)
    if residual is not None:
        residual.copy_(torch.where(finite[:, None], blocks - codes * scale, 0.0).flatten()[:count])
    # As bits: torch has two NaNs, by the length of what it converts.
    scales = torch.where(finite, bits >> 16, 0x7FC0).to(torch.int16).view(torch.bfloat16)
    return pack_codes(codes.flatten()[:count].to(torch.int8), form), scales


def pack_codes(codes: Tensor, form: BlockFormat) -> Tensor:
    """int8 codes, flat, as the format's bytes."""
    if form.bits == 8:
        return codes.view(torch.uint8)
    low, high = _in_rows(codes, 32).view(torch.uint8).unflatten(1, (2, 16)).unbind(1)
    return ((low & 15) | (high << 4)).flatten()


def unpack_codes(codes: Tensor, count: int, form: BlockFormat) -> Tensor:
    """The format's bytes as `count` int8 codes."""
    if form.bits == 8:
        return codes.view(torch.int8)
    rows = codes.view(-1, 16)
    halves = torch.stack((rows & 15, rows >> 4), 1).view(torch.int8)
    return ((halves ^ 8) - 8).flatten()[:count]


def dequantize_blocks_reference(
    codes: Sequence[Tensor | None], scales: Sequence[Tensor | None], count: int, form: BlockFormat,
    dtype: torch.dtype, own: Tensor | None = None, average: bool = False,
) -> Tensor:  # fmt: skip
    """codes[0] * scales[0] + codes[1] * scales[1] + ..., flat, in that order, in fp32, rounded once to `dtype`.

    The source whose codes are None is `own`, numbers that were never quantised. `average` divides by the sources.
    """
    total = None
    for source, factors in zip(codes, scales, strict=True):
        if source is None or factors is None:
            assert own is not None
            term = own.detach().reshape(-1).float()
        else:
            wide = unpack_codes(source, count, form).float()
            term = wide * factors.float().repeat_interleave(form.block)[:count]
        total = term if total is None else total + term
    assert total is not None
    if average:
        total = total / len(codes)
    return total.to(dtype)
