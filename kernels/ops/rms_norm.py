"""RMS norm with an optional fused residual add.

    h = x + residual;  y = h * rstd * weight,  rstd = 1 / sqrt(mean(h^2) + eps)
    dx = rstd * (g - xhat * mean(g * xhat)) + dh,  g = dy * weight,  xhat = h * rstd;  dweight = sum of dy * xhat

x [N, H]. Reference: tpweave/reference/ops/rms_norm.py. One program holds one row: one read, one write, no second pass.
"""

import torch
import triton
import triton.language as tl

from tpweave.kernels.cross_compile import CompileSpec

# A row lives in the registers of one program: 32768 fp32 values over 16 warps are 64 registers a thread.
MAX_HIDDEN = 32768
# Partial weight gradients: enough programs for two a multiprocessor on a GPU of 128.
NUM_PARTIALS = 256


@triton.jit
def _rms_norm_fwd_kernel(
    x_ptr, residual_ptr, weight_ptr, y_ptr, h_ptr, rstd_ptr, H, eps,
    HAS_RESIDUAL: tl.constexpr, HAS_WEIGHT: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    offs_h = tl.arange(0, BLOCK_H)
    mask_h = offs_h < H
    # [BLOCK_H]
    h = tl.load(x_ptr + row * H + offs_h, mask=mask_h, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        h += tl.load(residual_ptr + row * H + offs_h, mask=mask_h, other=0.0).to(tl.float32)
        # The norm reads the rounded sum, as the layer after it does.
        rounded = h.to(h_ptr.dtype.element_ty)
        tl.store(h_ptr + row * H + offs_h, rounded, mask=mask_h)
        h = rounded.to(tl.float32)
    rstd = 1.0 / tl.sqrt(tl.sum(h * h, axis=0) / H + eps)
    tl.store(rstd_ptr + row, rstd)
    y = h * rstd
    if HAS_WEIGHT:
        y *= tl.load(weight_ptr + offs_h, mask=mask_h, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * H + offs_h, y.to(y_ptr.dtype.element_ty), mask=mask_h)


@triton.jit
def _rms_norm_bwd_kernel(
    dy_ptr, dh_ptr, h_ptr, weight_ptr, rstd_ptr, dx_ptr, partial_dw_ptr, N, H, rows_per_program,
    HAS_RESIDUAL: tl.constexpr, HAS_WEIGHT: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    offs_h = tl.arange(0, BLOCK_H)
    mask_h = offs_h < H
    dw = tl.zeros((BLOCK_H,), dtype=tl.float32)
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + offs_h, mask=mask_h, other=0.0).to(tl.float32)
    row_end = tl.minimum((pid + 1) * rows_per_program, N)
    for row in range(pid * rows_per_program, row_end):
        # [BLOCK_H]
        rstd = tl.load(rstd_ptr + row)
        xhat = tl.load(h_ptr + row * H + offs_h, mask=mask_h, other=0.0).to(tl.float32) * rstd
        g = tl.load(dy_ptr + row * H + offs_h, mask=mask_h, other=0.0).to(tl.float32)
        if HAS_WEIGHT:
            dw += g * xhat
            g *= weight
        dx = (g - xhat * (tl.sum(g * xhat, axis=0) / H)) * rstd
        if HAS_RESIDUAL:
            dx += tl.load(dh_ptr + row * H + offs_h, mask=mask_h, other=0.0).to(tl.float32)
        tl.store(dx_ptr + row * H + offs_h, dx.to(dx_ptr.dtype.element_ty), mask=mask_h)
    if HAS_WEIGHT:
        tl.store(partial_dw_ptr + pid * H + offs_h, dw, mask=mask_h)


def _num_warps(block: int) -> int:
    return max(1, min(16, block // 256))


def rms_norm_fwd(
    x: torch.Tensor, weight: torch.Tensor | None, eps: float, residual: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """y, h (x itself without a residual) and rstd [1, N]. x, residual: [..., H] contiguous; weight: [H] contiguous."""
    H = x.shape[-1]
    y = torch.empty_like(x)
    h = x if residual is None else torch.empty_like(x)
    rstd = torch.empty((1, x.shape[:-1].numel()), dtype=torch.float32, device=x.device)
    if y.numel() > 0:
        block = triton.next_power_of_2(H)
        with torch.cuda.device_of(x):
            _rms_norm_fwd_kernel[(rstd.numel(),)](
                x, x if residual is None else residual, x if weight is None else weight, y, h, rstd, H, eps,
                HAS_RESIDUAL=residual is not None, HAS_WEIGHT=weight is not None, BLOCK_H=block,
                num_warps=_num_warps(block),
            )  # fmt: skip
    return y, h, rstd


def rms_norm_bwd(
    dy: torch.Tensor, dh: torch.Tensor | None, h: torch.Tensor, weight: torch.Tensor | None, rstd: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """dx, and dweight in fp32. dy, dh, h: [..., H] contiguous; the partial sums are added in a fixed order."""
    N, H = rstd.numel(), h.shape[-1]
    dx = torch.empty_like(h)
    rows_per_program = max(1, triton.cdiv(N, NUM_PARTIALS))
    programs = triton.cdiv(N, rows_per_program)
    partial_dw = None if weight is None else torch.empty((programs, H), dtype=torch.float32, device=h.device)
    if dx.numel() > 0:
        block = triton.next_power_of_2(H)
        with torch.cuda.device_of(h):
            _rms_norm_bwd_kernel[(programs,)](
                dy, h if dh is None else dh, h, h if weight is None else weight, rstd, dx,
                dx if partial_dw is None else partial_dw, N, H, rows_per_program,
                HAS_RESIDUAL=dh is not None, HAS_WEIGHT=weight is not None, BLOCK_H=block, num_warps=_num_warps(block),
            )  # fmt: skip
    return dx, None if partial_dw is None else partial_dw.sum(0)


_FWD_TYPES = {
    "x_ptr": "*bf16", "residual_ptr": "*bf16", "weight_ptr": "*bf16", "y_ptr": "*bf16", "h_ptr": "*bf16",
    "rstd_ptr": "*fp32", "H": "i32", "eps": "fp32",
}  # fmt: skip
_BWD_TYPES = {
    "dy_ptr": "*bf16", "dh_ptr": "*bf16", "h_ptr": "*bf16", "weight_ptr": "*bf16", "rstd_ptr": "*fp32",
    "dx_ptr": "*bf16", "partial_dw_ptr": "*fp32", "N": "i32", "H": "i32", "rows_per_program": "i32",
}  # fmt: skip
_ALL = {"HAS_RESIDUAL": True, "HAS_WEIGHT": True}
COMPILE_SPECS = [
    CompileSpec(_rms_norm_fwd_kernel, _FWD_TYPES, {**_ALL, "BLOCK_H": 4096}, num_warps=16),
    CompileSpec(_rms_norm_bwd_kernel, _BWD_TYPES, {**_ALL, "BLOCK_H": 4096}, num_warps=16),
]
