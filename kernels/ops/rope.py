"""Rotary position embedding: y_i = x_i cos + x_partner(i) sin, with the sign of sin negative for the first of a pair.

x [B, S, H, D] with any strides and a dense last dim; cos, sin [B, S, HALF]. Partner and angle of element i < 2 HALF are
(i + HALF) mod 2 HALF and i mod HALF, or interleaved i xor 1 and i div 2. One program takes all heads of a position in
blocks, so an angle is read once; the partner's read hits the first-level cache. Reference:
tpweave/reference/ops/rope.py.
"""

import torch
import triton
import triton.language as tl

from tpweave.kernels.cross_compile import CompileSpec

# Elements of a program's tile: heads times head dim, 16 to each of 128 threads.
BLOCK_ELEMENTS = 2048


@triton.jit
def _rope_kernel(
    x_ptr, y_ptr, cos_ptr, sin_ptr, stride_xb, stride_xs, stride_xh, stride_cb, stride_cs, S, H, D, HALF,
    INTERLEAVED: tl.constexpr, INVERSE: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    position = tl.program_id(0).to(tl.int64)
    b = position // S
    s = position % S
    offs_d = tl.arange(0, BLOCK_D)
    turned = offs_d < 2 * HALF
    if INTERLEAVED:
        angle = offs_d // 2
        partner = offs_d ^ 1
        first = offs_d % 2 == 0
    else:
        first = offs_d < HALF
        angle = tl.where(first, offs_d, offs_d - HALF)
        partner = tl.where(first, offs_d + HALF, offs_d - HALF)
    # [BLOCK_D]; beyond the pairs cos is 1 and sin 0
    angles = b * stride_cb + s * stride_cs + angle
    cos = tl.load(cos_ptr + angles, mask=turned, other=1.0).to(tl.float32)
    sin = tl.load(sin_ptr + angles, mask=turned, other=0.0).to(tl.float32)
    sin = tl.where(first, -sin, sin)
    if INVERSE:
        sin = -sin
    x_ptr += b * stride_xb + s * stride_xs
    y_ptr += position * H * D
    for start in range(0, H, BLOCK_H):
        offs_h = start + tl.arange(0, BLOCK_H)[:, None].to(tl.int64)
        mask_h = offs_h < H
        # [BLOCK_H, BLOCK_D]
        x = tl.load(x_ptr + offs_h * stride_xh + offs_d[None, :], mask=mask_h & (offs_d < D)[None, :], other=0.0)
        other = tl.load(x_ptr + offs_h * stride_xh + partner[None, :], mask=mask_h & turned[None, :], other=0.0)
        y = x.to(tl.float32) * cos[None, :] + other.to(tl.float32) * sin[None, :]
        y_ptrs = y_ptr + offs_h * D + offs_d[None, :]
        tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=mask_h & (offs_d < D)[None, :])


def rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool, inverse: bool) -> torch.Tensor:
    """x turned, contiguous. x: [B, S, H, D]; cos, sin: [B or 1, S, HALF] of the same strides; last dims dense."""
    B, S, H, D = x.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    block_d = triton.next_power_of_2(D)
    block_h = min(triton.next_power_of_2(H), max(1, BLOCK_ELEMENTS // block_d))
    with torch.cuda.device_of(x):
        _rope_kernel[(B * S,)](
            x, y, cos, sin, *x.stride()[:3], 0 if cos.shape[0] == 1 else cos.stride(0), cos.stride(1), S, H, D,
            cos.shape[-1], INTERLEAVED=interleaved, INVERSE=inverse, BLOCK_H=block_h, BLOCK_D=block_d,
        )  # fmt: skip
    return y


_TYPES = {
    "x_ptr": "*bf16", "y_ptr": "*bf16", "cos_ptr": "*bf16", "sin_ptr": "*bf16", "stride_xb": "i32", "stride_xs": "i32",
    "stride_xh": "i32", "stride_cb": "i32", "stride_cs": "i32", "S": "i32", "H": "i32", "D": "i32", "HALF": "i32",
}  # fmt: skip
COMPILE_SPECS = [
    CompileSpec(_rope_kernel, _TYPES, {"INTERLEAVED": interleaved, "INVERSE": False, "BLOCK_H": 16, "BLOCK_D": 128})
    for interleaved in (False, True)
]
