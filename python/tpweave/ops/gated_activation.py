"""Gated activation of an MLP: SwiGLU, GeGLU and their kin.

    y = act(gate) * up
    dgate = dy * up * act'(gate),  dup = dy * act(gate)

Source: Shazeer, "GLU Variants Improve Transformer", 2020.
"""

from __future__ import annotations

import torch
from torch.compiler import is_compiling

from tpweave.dispatch import FLOATS, Backend, Inputs, Needs, Op
from tpweave.library import register_op
from tpweave.native import _C, DTYPE_CODES, dense_last_dim, empty_dense
from tpweave.reference.ops.gated_activation import gated_activation_reference

Tensor = torch.Tensor

# csrc/cpu/ops/gated_activation.h holds the same codes.
KIND_CODES = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3, "sigmoid": 4}


def _rows(x: Tensor) -> Tensor:
    """x as [N, F] with a dense last dim: a view where the strides allow, such as half of a merged projection."""
    return x if x.dim() == 2 and x.stride(1) == 1 else dense_last_dim(x.reshape(-1, x.shape[-1]))


def gated_activation_fwd_cpu(gate: Tensor, up: Tensor, kind: str) -> Tensor:
    y = empty_dense(gate)
    if gate.numel() == 0:
        return y
    gate, up = _rows(gate), _rows(up)
    _C.gated_activation_fwd(
        gate, up, y, gate.stride(0), up.stride(0), *gate.shape, KIND_CODES[kind], DTYPE_CODES[gate.dtype]
    )  # fmt: skip
    return y


def gated_activation_bwd_cpu(dy: Tensor, gate: Tensor, up: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    dgate, dup = empty_dense(gate), empty_dense(gate)
    if gate.numel() == 0:
        return dgate, dup
    dy, gate, up = _rows(dy), _rows(gate), _rows(up)
    _C.gated_activation_bwd(
        dy, gate, up, dgate, dup, dy.stride(0), gate.stride(0), up.stride(0), *gate.shape, KIND_CODES[kind],
        DTYPE_CODES[gate.dtype],
    )  # fmt: skip
    return dgate, dup


def gated_activation_fwd_triton(gate: Tensor, up: Tensor, kind: str) -> Tensor:
    from tpweave.kernels.ops.gated_activation import gated_activation_fwd

    if gate.numel() == 0:
        return empty_dense(gate)
    return gated_activation_fwd(_rows(gate), _rows(up), kind).view(gate.shape)


def gated_activation_bwd_triton(dy: Tensor, gate: Tensor, up: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    from tpweave.kernels.ops.gated_activation import gated_activation_bwd

    if gate.numel() == 0:
        return empty_dense(gate), empty_dense(gate)
    dgate, dup = gated_activation_bwd(_rows(dy), _rows(gate), _rows(up), kind)
    return dgate.view(gate.shape), dup.view(gate.shape)


def gated_activation_bwd_reference(dy: Tensor, gate: Tensor, up: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        gate, up = gate.detach().requires_grad_(), up.detach().requires_grad_()
        y = gated_activation_reference(gate, up, kind)
    dgate, dup = torch.autograd.grad(y, (gate, up), dy)
    return dgate.contiguous(), dup.contiguous()


GATED_ACTIVATION = Op("gated_activation", [
    Backend("cpu", gated_activation_fwd_cpu, Needs(device="cpu", dtypes=FLOATS)),
    Backend("triton", gated_activation_fwd_triton, Needs(device="cuda", dtypes=FLOATS, module="triton")),
    Backend("reference", gated_activation_reference, Needs()),
])  # fmt: skip
GATED_ACTIVATION_BWD = Op("gated_activation_bwd", [
    Backend("cpu", gated_activation_bwd_cpu, Needs(device="cpu", dtypes=FLOATS)),
    Backend("triton", gated_activation_bwd_triton, Needs(device="cuda", dtypes=FLOATS, module="triton")),
    Backend("reference", gated_activation_bwd_reference, Needs()),
])  # fmt: skip


def _impl(gate, up, kind, backend):
    return GATED_ACTIVATION.choose(Inputs([gate, up]), backend).run(gate, up, kind)


def _fake(gate, up, kind, backend):
    return torch.empty_like(gate, memory_format=torch.contiguous_format)


def _setup_context(ctx, inputs, output):
    gate, up, ctx.kind, ctx.backend = inputs
    ctx.save_for_backward(gate, up)


def _backward(ctx, dy):
    return *_gated_activation_bwd_op(dy, *ctx.saved_tensors, ctx.kind, ctx.backend), None, None


def _bwd_impl(dy, gate, up, kind, backend):
    return GATED_ACTIVATION_BWD.choose(Inputs([dy, gate, up]), backend).run(dy, gate, up, kind)


def _bwd_fake(dy, gate, up, kind, backend):
    return tuple(torch.empty_like(gate, memory_format=torch.contiguous_format) for _ in range(2))


_gated_activation_bwd_op = register_op(
    "gated_activation_bwd(Tensor dy, Tensor gate, Tensor up, str kind, str? backend) -> (Tensor, Tensor)",
    _bwd_impl, _bwd_fake,
)  # fmt: skip
_gated_activation_op = register_op(
    "gated_activation(Tensor gate, Tensor up, str kind, str? backend) -> Tensor",
    _impl,
    _fake,
    _backward,
    _setup_context,
)


def gated_activation(gate: Tensor, up: Tensor, kind: str = "silu", *, backend: str | None = None) -> Tensor:
    """act(gate) * up, differentiable in both.

    Args:
        gate, up: [..., F] of one shape and dtype, fp32, bf16, fp16 (native) or fp64 (reference). The halves of one
            merged projection, `merged.chunk(2, -1)`, are read where they are.
        kind: `"silu"` (SwiGLU), `"gelu"` (GeGLU, exact), `"gelu_tanh"` (GeGLU, tanh form), `"relu"` (ReGLU) or
            `"sigmoid"` (GLU).
        backend: force one row of the table, e.g. `"reference"`.

    Returns:
        y, contiguous, of gate's shape and dtype.

    Raises:
        ValueError: an unknown kind, or shapes, dtypes or devices that differ.

    Example:
        >>> y = tpweave.gated_activation(*merged.chunk(2, -1), "silu")
    """
    if backend is None and not is_compiling():
        done = _C.gated_activation_plain(gate, up, KIND_CODES.get(kind))
        if done is not None:
            return done
    if kind not in KIND_CODES:
        raise ValueError(f"gated_activation: kind is '{kind}'; it takes {', '.join(KIND_CODES)}")
    if gate.dim() == 0 or not gate.is_floating_point():
        raise ValueError(
            "gated_activation needs a floating-point gate of at least 1 dim, "
            f"got {gate.dtype} of shape {tuple(gate.shape)}"
        )
    if gate.shape != up.shape or gate.dtype != up.dtype or gate.device != up.device:
        raise ValueError(
            f"gated_activation: gate is {gate.dtype} {tuple(gate.shape)} on {gate.device}, "
            f"up is {up.dtype} {tuple(up.shape)} on {up.device}; they must match"
        )
    return _gated_activation_op(gate, up, kind, backend)
