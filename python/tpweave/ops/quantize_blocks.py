"""Numbers as integers of 8 or 4 bits, in blocks with one scale each, and back.

    scale = max(2^-126, max|block| / top), rounded up to bf16;  top = 127 (8 bits) or 7 (4 bits)
    code  = round(x / scale) to nearest, or so that its mean over seeds is x / scale
    x'    = code * scale, exact in fp32

An element is off by at most scale / 2 rounded to nearest, by less than scale rounded stochastically (and 2^-16 of it,
for the quotient is fp32). The same numbers give the same bits on every backend; `reference/ops/quantize_blocks.py` says
which.

This is what the quantised collectives send: 1.016 bytes a number with 8 bits in blocks of 128, 0.5625 with 4 in blocks
of 32. Source: block-wise absmax codes as in Dettmers et al., "8-bit Optimizers via Block-wise Quantization", 2022.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tpweave.dispatch import FLOATS, Backend, Inputs, Needs, Op
from tpweave.library import register_op
from tpweave.native import _C, DTYPE_CODES, new_output
from tpweave.reference.ops.quantize_blocks import (
    NEAREST,
    BlockFormat,
    Rounding,
    dequantize_blocks_reference,
    quantize_blocks_reference,
)

Tensor = torch.Tensor

# Blocks of int4 codes are shorter: with 15 levels, what is small beside a block's largest number is lost.
DEFAULT_BLOCKS = {8: 128, 4: 32}
_LONGEST_BLOCK = 1024


def quantize_blocks_cpu(
    x: Tensor, form: BlockFormat, rounding: Rounding = NEAREST, first: int = 0, residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    x = x.contiguous()
    count = x.numel()
    codes = x.new_empty(form.code_bytes(count), dtype=torch.uint8)
    scales = x.new_empty(form.num_blocks(count), dtype=torch.bfloat16)
    # The empty part at a tensor's end does not begin at a whole unit.
    if count > 0:
        _C.quantize_blocks(
            x, residual, codes, scales, count, first, form.bits, form.block, rounding.seed, rounding.stream,
            DTYPE_CODES[x.dtype],
        )  # fmt: skip
    return codes, scales


def dequantize_blocks_cpu(
    codes: Sequence[Tensor | None], scales: Sequence[Tensor | None], count: int, form: BlockFormat,
    dtype: torch.dtype, own: Tensor | None = None, average: bool = False,
) -> Tensor:  # fmt: skip
    like = next(tensor for tensor in (*scales, own) if tensor is not None)
    out = new_output(like.new_empty(0, dtype=dtype), (count,))
    own = None if own is None else own.contiguous()
    own_dtype = dtype if own is None else own.dtype
    _C.dequantize_blocks(
        codes, scales, own, out, count, form.bits, form.block, average, DTYPE_CODES[own_dtype], DTYPE_CODES[dtype]
    )  # fmt: skip
    return out


def _dtype_objection(inputs: Inputs) -> str | None:
    dtype = inputs.values.get("dtype")
    return None if dtype is None or dtype in FLOATS else f"does not write {str(dtype).removeprefix('torch.')}"


# One table for both directions.
QUANTIZE_BLOCKS = Op("quantize_blocks", [
    Backend("cpu", quantize_blocks_cpu, Needs(device="cpu", dtypes=FLOATS, rules=(_dtype_objection,))),
    Backend("reference", quantize_blocks_reference, Needs()),
])  # fmt: skip
_DEQUANTIZE = {"cpu": dequantize_blocks_cpu, "reference": dequantize_blocks_reference}


def quantize(
    x: Tensor, form: BlockFormat, rounding: Rounding = NEAREST, first: int = 0, residual: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`quantize_blocks_reference` on the row that takes x: what collectives call."""
    return QUANTIZE_BLOCKS.choose(Inputs([x]), backend).run(x, form, rounding, first, residual)


def dequantize(
    codes: Sequence[Tensor | None], scales: Sequence[Tensor | None], count: int, form: BlockFormat,
    dtype: torch.dtype, own: Tensor | None = None, average: bool = False, backend: str | None = None,
) -> Tensor:  # fmt: skip
    """`dequantize_blocks_reference` on the row that takes these: what collectives call."""
    row = QUANTIZE_BLOCKS.choose(Inputs([*scales, own], dtype=dtype), backend)
    return _DEQUANTIZE[row.name](codes, scales, count, form, dtype, own, average)


def block_format(op: str, bits: int, block: int | None) -> BlockFormat:
    """The format of these arguments; `op` is named in the ValueError."""
    if bits not in DEFAULT_BLOCKS:
        raise ValueError(f"{op}: bits is {bits}; it takes 8 or 4")
    block = DEFAULT_BLOCKS[bits] if block is None else block
    if not 32 <= block <= _LONGEST_BLOCK or block & (block - 1):
        raise ValueError(f"{op}: block is {block}; it takes a power of two from 32 to {_LONGEST_BLOCK}")
    return BlockFormat(bits, block)


def check_quantizable(op: str, x: Tensor, seed: int | None) -> None:
    """Raises ValueError unless x holds floating-point numbers and `seed` is None or fits in 63 bits."""
    if not x.is_floating_point():
        raise ValueError(f"{op} takes floating-point numbers, got {x.dtype}")
    if seed is not None and not 0 <= seed < 2**63:
        raise ValueError(f"{op}: seed is {seed}; it takes None or an int from 0 to 2^63 - 1")


def _impl(x, bits, block, seed, stream, backend):
    return quantize(x, BlockFormat(bits, block), Rounding(seed, stream), backend=backend)


def _fake(x, bits, block, seed, stream, backend):
    form = BlockFormat(bits, block)
    count = x.numel()
    return (
        x.new_empty(form.code_bytes(count), dtype=torch.uint8),
        x.new_empty(form.num_blocks(count), dtype=torch.bfloat16),
    )


def _dequantize_impl(codes, scales, shape, dtype, bits, block, backend):
    count = torch.Size(shape).numel()
    return dequantize([codes], [scales], count, BlockFormat(bits, block), dtype, backend=backend).view(shape)


def _dequantize_fake(codes, scales, shape, dtype, bits, block, backend):
    return scales.new_empty(shape, dtype=dtype)


# A seed that changes with every step is a symbol to torch.compile, not a new program.
_quantize_blocks_op = register_op(
    "quantize_blocks(Tensor x, int bits, int block, SymInt? seed, int stream, str? backend) -> (Tensor, Tensor)",
    _impl, _fake,
)  # fmt: skip
_dequantize_blocks_op = register_op(
    "dequantize_blocks(Tensor codes, Tensor scales, SymInt[] shape, ScalarType dtype, int bits, int block, "
    "str? backend) -> Tensor",
    _dequantize_impl, _dequantize_fake,
)  # fmt: skip


def quantize_blocks(
    x: Tensor, bits: int = 8, block: int | None = None, *, seed: int | None = None, stream: int = 0,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """x in blocks of integer codes with one scale each. Not differentiable.

    A block that holds an infinity or a NaN comes back as NaN as a whole: nothing finite is made of it. A number within
    half a scale of the largest of its dtype may come back as an infinity.

    Args:
        x: any shape, seen flat; fp32, bf16, fp16, or fp64 (reference), which is read as fp32.
        bits: 8 or 4.
        block: elements of a block, a power of two from 32 to 1024; None is 128 for 8 bits and 32 for 4. The last block
            may be shorter.
        seed: None rounds to nearest; an int from 0 to 2^63 - 1 rounds stochastically, so that the mean over seeds is x.
        stream: of the random numbers: tensors that are rounded with the same seed take different streams.
        backend: force one row of the table, e.g. `"reference"`.

    Returns:
        (codes, scales): uint8, of a byte for each number (8 bits) or 16 bytes for each 32 numbers begun (4 bits); bf16,
        one for each block.

    Raises:
        ValueError: another number of bits, block, seed or dtype than these.

    Example:
        >>> codes, scales = tpweave.quantize_blocks(x, bits=4)
        >>> y = tpweave.dequantize_blocks(codes, scales, x.shape, bits=4)
    """
    form = block_format("quantize_blocks", bits, block)
    check_quantizable("quantize_blocks", x, seed)
    if not 0 <= stream < 2**32:
        raise ValueError(f"quantize_blocks: stream is {stream}; it takes an int from 0 to 2^32 - 1")
    return _quantize_blocks_op(x, bits, form.block, seed, stream, backend)


def dequantize_blocks(
    codes: Tensor, scales: Tensor, shape: Sequence[int], dtype: torch.dtype = torch.float32, *, bits: int = 8,
    block: int | None = None, backend: str | None = None,
) -> Tensor:  # fmt: skip
    """The numbers that `quantize_blocks` made these codes of.

    Args:
        codes, scales: what `quantize_blocks` returned.
        shape: of the result.
        dtype: of the result: fp32, bf16, fp16, or fp64 (reference).
        bits, block: as they were quantised.
        backend: force one row of the table.

    Returns:
        codes times scales, rounded once to `dtype`.

    Raises:
        ValueError: codes and scales are not those of such a shape, number of bits and block.

    Example:
        >>> y = tpweave.dequantize_blocks(codes, scales, (8, 128), torch.bfloat16)
    """
    form = block_format("dequantize_blocks", bits, block)
    count = torch.Size(shape).numel()
    want = (form.code_bytes(count),), (form.num_blocks(count),)
    if (codes.shape, scales.shape) != want or (codes.dtype, scales.dtype) != (torch.uint8, torch.bfloat16):
        raise ValueError(
            f"dequantize_blocks: codes are {codes.dtype} {tuple(codes.shape)}, scales {scales.dtype} "
            f"{tuple(scales.shape)}; {bits} bits in blocks of {form.block} for {tuple(shape)} are uint8 {want[0]} and "
            f"bfloat16 {want[1]}"
        )
    return _dequantize_blocks_op(codes, scales, list(shape), dtype, bits, form.block, backend)
