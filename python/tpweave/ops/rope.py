"""Rotary position embedding of queries and keys.

    (a, b) -> (a cos - b sin, b cos + a sin)   for each pair of a head's first D_rot elements; the rest pass through

The backward turns the gradients by the opposite angles. Dims: B batch, S sequence, Hq and Hkv heads, D head dim.
Source: Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021.
"""

from __future__ import annotations

import torch
from torch.compiler import is_compiling

from tpweave.dispatch import FLOATS, Backend, Inputs, Needs, Op
from tpweave.library import register_op
from tpweave.native import _C, DTYPE_CODES, dense_last_dim, empty_dense
from tpweave.reference.ops.rope import rope_reference

Tensor = torch.Tensor

# kMaxRopeAngles of csrc/cpu/ops/rope.h.
MAX_ANGLES = 1024


def _angles(table: Tensor) -> tuple[Tensor, int, int]:
    """cos or sin with a dense last dim, and its strides over batch and sequence."""
    table = dense_last_dim(table)
    if table.dim() == 2:
        return table, 0, table.stride(0)
    return table, 0 if table.shape[0] == 1 else table.stride(0), table.stride(1)


def rope_cpu(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool) -> tuple[Tensor, Tensor]:
    q_out, k_out = empty_dense(q), empty_dense(k)
    q, k = dense_last_dim(q), dense_last_dim(k)
    cos, *cos_strides = _angles(cos)
    sin, *sin_strides = _angles(sin)
    _C.rope(
        q, k, q_out, k_out, cos, sin, q.stride()[:3], k.stride()[:3], [*cos_strides, *sin_strides], *q.shape[:3],
        k.shape[2], q.shape[3], cos.shape[-1], interleaved, inverse, DTYPE_CODES[q.dtype], DTYPE_CODES[cos.dtype],
    )  # fmt: skip
    return q_out, k_out


def rope_triton(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool
) -> tuple[Tensor, Tensor]:
    from tpweave.kernels.ops.rope import rope as launch

    cos, sin = (t if t.dim() == 3 else t.unsqueeze(0) for t in (cos, sin))
    if cos.stride() != sin.stride() or cos.stride(-1) != 1:
        cos, sin = cos.contiguous(), sin.contiguous()
    q_out = launch(dense_last_dim(q), cos, sin, interleaved, inverse)
    return q_out, launch(dense_last_dim(k), cos, sin, interleaved, inverse)


def rope_with_reference(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool
) -> tuple[Tensor, Tensor]:
    return rope_reference(q, k, cos, -sin if inverse else sin, interleaved=interleaved)


def _too_many_angles(inputs: Inputs) -> str | None:
    angles = inputs.tensors[2].shape[-1]
    return None if angles <= MAX_ANGLES else f"takes up to {MAX_ANGLES} angles a position, not {angles}"


ROPE = Op("rope", [
    Backend("cpu", rope_cpu, Needs(device="cpu", dtypes=FLOATS, rules=(_too_many_angles,))),
    Backend("triton", rope_triton, Needs(device="cuda", dtypes=FLOATS, module="triton")),
    Backend("reference", rope_with_reference, Needs()),
])  # fmt: skip


def _impl(q, k, cos, sin, interleaved, inverse, backend):
    return ROPE.choose(Inputs([q, k, cos, sin]), backend).run(q, k, cos, sin, interleaved, inverse)


def _fake(q, k, cos, sin, interleaved, inverse, backend):
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k))


def _setup_context(ctx, inputs, output):
    _, _, cos, sin, ctx.interleaved, ctx.inverse, ctx.backend = inputs
    ctx.save_for_backward(cos, sin)


def _backward(ctx, dq, dk):
    grads = _rope_op(dq, dk, *ctx.saved_tensors, ctx.interleaved, not ctx.inverse, ctx.backend)
    return *grads, None, None, None, None, None


_rope_op = register_op(
    "rope(Tensor q, Tensor k, Tensor cos, Tensor sin, bool interleaved, bool inverse, str? backend)"
    " -> (Tensor, Tensor)",
    _impl, _fake, _backward, _setup_context,
)  # fmt: skip


def rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Rotary position embedding, differentiable in q and k (not in cos and sin).

    Args:
        q: [B, S, Hq, D], fp32, bf16, fp16 (native) or fp64 (reference); any strides.
        k: [B, S, Hkv, D] of q's dtype.
        cos, sin: [S, D_rot / 2], [1, S, D_rot / 2] or [B, S, D_rot / 2], one column an angle. With D_rot < D (partial
            rotary) the last D - D_rot elements of each head pass through. Hugging Face models hold every angle twice:
            pass `cos[..., : cos.shape[-1] // 2]` (and the like of sin), a view that costs nothing. Of q's dtype or
            fp32; others are converted to fp32.
        interleaved: pairs are (2i, 2i + 1), as in GPT-J, instead of (i, i + D_rot / 2), as in Llama.
        backend: force one row of the table, e.g. `"reference"`.

    Returns:
        q and k turned, contiguous.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together.

    Example:
        >>> angles = torch.outer(torch.arange(S), 10000.0 ** (-torch.arange(0, D, 2) / D))
        >>> q, k = tpweave.rope(q, k, angles.cos(), angles.sin())
    """
    if backend is None and not is_compiling():
        done = _C.rope_plain(q, k, cos, sin, interleaved, False)
        if done is not None:
            return done
    if q.dim() != 4 or k.dim() != 4 or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise ValueError(f"rope needs q [B, S, Hq, D] and k [B, S, Hkv, D], got {tuple(q.shape)} and {tuple(k.shape)}")
    if q.dtype != k.dtype or not q.is_floating_point():
        raise ValueError(f"rope needs q and k of one floating-point dtype, got {q.dtype} and {k.dtype}")
    batch, sequence, _, head_dim = q.shape
    if cos.shape != sin.shape or cos.shape[:-1] not in ((sequence,), (1, sequence), (batch, sequence)):
        raise ValueError(
            f"rope: cos and sin have shapes {tuple(cos.shape)} and {tuple(sin.shape)}; q's {tuple(q.shape)} needs "
            f"[{sequence}, D_rot / 2] or [{batch}, {sequence}, D_rot / 2]"
        )
    if 2 * cos.shape[-1] > head_dim:
        raise ValueError(
            f"rope: {cos.shape[-1]} angles a position are more than half of the head dim {head_dim}; where every angle "
            "stands twice, pass cos[..., : cos.shape[-1] // 2]"
        )
    for name, other in (("k", k), ("cos", cos), ("sin", sin)):
        if other.device != q.device:
            raise ValueError(f"rope: {name} is on {other.device}, q on {q.device}")
    if cos.dtype not in (q.dtype, torch.float32) or cos.dtype != sin.dtype:
        cos, sin = cos.float(), sin.float()
    return _rope_op(q, k, cos, sin, interleaved, False, backend)
