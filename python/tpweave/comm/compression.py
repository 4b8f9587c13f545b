"""Sums whose numbers travel as int8 blocks, by the link they travel over: `tpweave.init(compression=...)`.

Every host's part is quantised before it leaves, its own too, so that all ranks add the same numbers and hold the same
bits: y = sum over hosts h of dequantised(quantised(x_h)), added in fp32 in host order and rounded once. With more than
two hosts an all-reduce quantises the sums once more on their way back. An element is off by at most half a scale of
each: by sum over hosts of max|block| / 254, beside the roundings (a scale is rounded up to bf16, by 1/128 at most).

fp32, bf16 and fp16 are compressed, to 1.016 bytes a number. Other dtypes, and everything that is gathered rather than
added, travel as they are: a gathered weight or index has to arrive. A pipeline's chunks are quantised one by one, so
with their number the codes may change.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tpweave.dispatch import FLOATS
from tpweave.distributed.group import TPGroup
from tpweave.ops.quantize_blocks import DEFAULT_BLOCKS, dequantize, quantize
from tpweave.reference.ops.quantize_blocks import BlockFormat

Tensor = torch.Tensor


class BlockCodec:
    """Flat tensors as bytes, scales first; each tensor's length is known to both sides."""

    def __init__(self, bits: int) -> None:
        self.form = BlockFormat(bits, DEFAULT_BLOCKS[bits])

    def nbytes(self, count: int) -> int:
        """Bytes of `count` numbers: even, so that a following tensor's scales are aligned."""
        size = 2 * self.form.num_blocks(count) + self.form.code_bytes(count)
        return size + size % 2

    def pack(self, x: Tensor) -> Tensor:
        codes, scales = quantize(x, self.form)
        packed = codes.new_zeros(self.nbytes(x.numel()))
        end = 2 * scales.numel()
        packed[:end] = scales.view(torch.uint8)
        packed[end : end + codes.numel()] = codes
        return packed

    def sum(self, packed: Sequence[Tensor], count: int, dtype: torch.dtype) -> Tensor:
        """The sum of what was packed, in this order, in fp32, rounded once to dtype."""
        end = 2 * self.form.num_blocks(count)
        scales = [piece[:end].view(torch.bfloat16) for piece in packed]
        codes = [piece[end : end + self.form.code_bytes(count)] for piece in packed]
        return dequantize(codes, scales, count, self.form, dtype)


def codec_for(dtype: torch.dtype, group: TPGroup) -> BlockCodec | None:
    """What this group compresses sums of this dtype with on their way between hosts; None: nothing."""
    bits = {"int8": 8}.get(group.compression.get("inter_host", ""))
    return BlockCodec(bits) if bits is not None and dtype in FLOATS else None


def wire_bytes(dtype: torch.dtype, group: TPGroup) -> float:
    """Bytes between hosts for each number of a sum."""
    codec = codec_for(dtype, group)
    return torch.empty((), dtype=dtype).element_size() if codec is None else codec.nbytes(4096) / 4096
