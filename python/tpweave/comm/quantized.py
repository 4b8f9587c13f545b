"""What the quantised collectives share: their arguments' checks, and codes with their scales as they travel."""

from __future__ import annotations

import torch

from tpweave.comm.call import check_tensor
from tpweave.ops.quantize_blocks import block_format, check_quantizable
from tpweave.reference.ops.quantize_blocks import BlockFormat

Tensor = torch.Tensor

# Of the shm rows, for `tpweave.explain`. quantized_all_reduce of 4K to 4096K numbers takes 1.1 to 4 times as long as
# all_reduce (2 ranks on 2 cores of Zen 3).
NO_GAIN = "same numbers, but no gain: within a host the plain collective is quicker"


def check_call(op: str, x: Tensor, bits: int, block: int | None, seed: int | None) -> BlockFormat:
    """The format of a call's codes. Raises ValueError where an argument is not what a quantised collective takes."""
    check_tensor(op, x)
    check_quantizable(op, x, seed)
    return block_format(op, bits, block)


def check_feedback(op: str, x: Tensor, error_feedback: Tensor) -> None:
    """Raises ValueError unless the buffer fits x and x takes no part in a gradient."""
    if error_feedback.dtype != torch.float32 or error_feedback.shape != x.shape or error_feedback.device != x.device:
        raise ValueError(
            f"{op}: error_feedback is {error_feedback.dtype} {tuple(error_feedback.shape)} on {error_feedback.device}; "
            f"for this x it is torch.float32 {tuple(x.shape)} on {x.device}"
        )
    if not error_feedback.is_contiguous():
        raise ValueError(f"{op}: error_feedback has strides {error_feedback.stride()}; it takes a contiguous tensor")
    if torch.is_grad_enabled() and (x.requires_grad or error_feedback.requires_grad):
        raise ValueError(f"{op} with error_feedback is not differentiable; call it under torch.no_grad()")


def packed_bytes(count: int, form: BlockFormat) -> int:
    """Bytes in which `count` numbers travel: an even number."""
    return 2 * form.num_blocks(count) + (form.code_bytes(count) + 1) // 2 * 2


def pack(codes: Tensor, scales: Tensor) -> Tensor:
    """Scales, then codes, as bytes."""
    odd = codes.new_zeros(codes.numel() % 2)
    return torch.cat((scales.view(torch.uint8), codes, odd))


def unpack(data: Tensor, count: int, form: BlockFormat) -> tuple[Tensor, Tensor]:
    """(codes, scales) of `pack`, as views."""
    scales = 2 * form.num_blocks(count)
    return data[scales : scales + form.code_bytes(count)], data[:scales].view(torch.bfloat16)
