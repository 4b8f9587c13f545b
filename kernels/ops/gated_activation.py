"""Gated activation: y = act(gate) * up; dgate = dy * up * act'(gate), dup = dy * act(gate).

gate, up [N, F], each with its own row stride; one pass, fp32 inside. Reference:
tpweave/reference/ops/gated_activation.py.
"""

import torch
import triton
import triton.language as tl

from tpweave.kernels.cross_compile import CompileSpec

# Elements a program takes: eight to each of 128 threads, two 16-byte loads of bf16 would hold no more.
BLOCK_ELEMENTS = 1024


@triton.jit
def _activate(x, KIND: tl.constexpr):
    """act(x) and act'(x); what is not used is not computed."""
    if KIND == "silu":
        s = tl.sigmoid(x)
        act = x * s
        slope = s * (1.0 + x * (1.0 - s))
    elif KIND == "gelu":
        cdf = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        act = x * cdf
        slope = cdf + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    elif KIND == "gelu_tanh":
        # x * sigmoid(2u) with u = sqrt(2 / pi) * (x + 0.044715 x^3). Beyond 20 the slope is exactly 0 or 1, and x^2
        # must not overflow against a vanished factor.
        c = tl.minimum(tl.maximum(x, -20.0), 20.0)
        s = tl.sigmoid(c * (1.5957691216057308 + 0.07135481282553145 * c * c))
        act = x * s
        slope = s + c * s * (1.0 - s) * (1.5957691216057308 + 0.21406443847659436 * c * c)
    elif KIND == "relu":
        act = tl.where(x > 0, x, x * 0.0)
        slope = tl.where(x > 0, 1.0, 0.0)
    else:
        tl.static_assert(KIND == "sigmoid")
        act = tl.sigmoid(x)
        slope = act * (1.0 - act)
    return act, slope


@triton.jit
def _gated_activation_fwd_kernel(
    gate_ptr, up_ptr, y_ptr, stride_gate, stride_up, N, F,
    KIND: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    # One grid axis: the others end at 65535.
    num_f = tl.cdiv(F, BLOCK_F)
    pid_n = tl.program_id(0) // num_f
    pid_f = tl.program_id(0) % num_f
    offs_n = pid_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    offs_f = pid_f * BLOCK_F + tl.arange(0, BLOCK_F)[None, :]
    mask = (offs_n < N) & (offs_f < F)
    # [BLOCK_N, BLOCK_F]
    gate = tl.load(gate_ptr + offs_n * stride_gate + offs_f, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + offs_n * stride_up + offs_f, mask=mask, other=0.0).to(tl.float32)
    act, _ = _activate(gate, KIND)
    tl.store(y_ptr + offs_n * F + offs_f, (act * up).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _gated_activation_bwd_kernel(
    dy_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, stride_dy, stride_gate, stride_up, N, F,
    KIND: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    # One grid axis: the others end at 65535.
    num_f = tl.cdiv(F, BLOCK_F)
    pid_n = tl.program_id(0) // num_f
    pid_f = tl.program_id(0) % num_f
    offs_n = pid_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    offs_f = pid_f * BLOCK_F + tl.arange(0, BLOCK_F)[None, :]
    mask = (offs_n < N) & (offs_f < F)
    # [BLOCK_N, BLOCK_F]
    dy = tl.load(dy_ptr + offs_n * stride_dy + offs_f, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + offs_n * stride_gate + offs_f, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + offs_n * stride_up + offs_f, mask=mask, other=0.0).to(tl.float32)
    act, slope = _activate(gate, KIND)
    tl.store(dgate_ptr + offs_n * F + offs_f, (dy * up * slope).to(dgate_ptr.dtype.element_ty), mask=mask)
    tl.store(dup_ptr + offs_n * F + offs_f, (dy * act).to(dup_ptr.dtype.element_ty), mask=mask)


def _tiles(N: int, F: int) -> tuple[tuple[int], int, int]:
    block_f = min(BLOCK_ELEMENTS, triton.next_power_of_2(F))
    block_n = BLOCK_ELEMENTS // block_f
    return (triton.cdiv(N, block_n) * triton.cdiv(F, block_f),), block_n, block_f


def gated_activation_fwd(gate: torch.Tensor, up: torch.Tensor, kind: str) -> torch.Tensor:
    """y [N, F], contiguous. gate, up: [N, F], not empty, last dim dense."""
    N, F = gate.shape
    y = torch.empty((N, F), dtype=gate.dtype, device=gate.device)
    grid, block_n, block_f = _tiles(N, F)
    with torch.cuda.device_of(gate):
        _gated_activation_fwd_kernel[grid](
            gate, up, y, gate.stride(0), up.stride(0), N, F, KIND=kind, BLOCK_N=block_n, BLOCK_F=block_f
        )
    return y


def gated_activation_bwd(
    dy: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, kind: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """dgate and dup [N, F], contiguous. dy, gate, up: [N, F], not empty, last dim dense."""
    N, F = gate.shape
    dgate, dup = (torch.empty((N, F), dtype=gate.dtype, device=gate.device) for _ in range(2))
    grid, block_n, block_f = _tiles(N, F)
    with torch.cuda.device_of(gate):
        _gated_activation_bwd_kernel[grid](
            dy, gate, up, dgate, dup, dy.stride(0), gate.stride(0), up.stride(0), N, F,
            KIND=kind, BLOCK_N=block_n, BLOCK_F=block_f,
        )  # fmt: skip
    return dgate, dup


_FWD_TYPES = {
    "gate_ptr": "*bf16", "up_ptr": "*bf16", "y_ptr": "*bf16", "stride_gate": "i32", "stride_up": "i32", "N": "i32",
    "F": "i32",
}  # fmt: skip
_BWD_TYPES = {
    "dy_ptr": "*bf16", "gate_ptr": "*bf16", "up_ptr": "*bf16", "dgate_ptr": "*bf16", "dup_ptr": "*bf16",
    "stride_dy": "i32", "stride_gate": "i32", "stride_up": "i32", "N": "i32", "F": "i32",
}  # fmt: skip
_TILE = {"BLOCK_N": 1, "BLOCK_F": BLOCK_ELEMENTS}
COMPILE_SPECS = [
    CompileSpec(_gated_activation_fwd_kernel, _FWD_TYPES, {**_TILE, "KIND": "silu"}),
    *(
        CompileSpec(_gated_activation_bwd_kernel, _BWD_TYPES, {**_TILE, "KIND": kind})
        for kind in ("silu", "gelu", "gelu_tanh", "relu", "sigmoid")
    ),
]
