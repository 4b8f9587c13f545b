"""Joins parts of an attention over different keys by their log-sum-exps.

    lse = log(sum of exp(lse_p));   w_p = exp(lse_p - lse);   out = sum of w_p out_p
    dout_p = w_p dout;   dlse_p = w_p (dout . (out_p - out) + dlse)

Dims: B batch, Sq queries, H heads, D value head dim. Source: Dao et al., "Flash-Decoding", 2023.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tpweave.dispatch import FLOATS, Backend, Inputs, Needs, Op
from tpweave.library import register_op
from tpweave.native import _C, DTYPE_CODES, dense_last_dim, empty_dense
from tpweave.reference.ops.merge_attention import merge_attention_backward_reference, merge_attention_reference

Tensor = torch.Tensor


def _place(x: Tensor) -> tuple[int, int, int, int]:
    """Address and strides of batch, query and head of [B, Sq, H, D]."""
    batch, query, head = x.stride()[:3]
    return x.data_ptr(), batch, query, head


def _lse_place(x: Tensor) -> tuple[int, int, int, int]:
    """The same of [B, H, Sq]."""
    batch, head, query = x.stride()
    return x.data_ptr(), batch, query, head


def merge_attention_cpu(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    outs = [dense_last_dim(part) for part in outs]
    out, lse = empty_dense(outs[0]), empty_dense(lses[0])
    _C.merge_attention(
        [_place(part) for part in outs], [_lse_place(part) for part in lses], _place(out), _lse_place(lse),
        *out.shape, DTYPE_CODES[out.dtype],
    )  # fmt: skip
    return out, lse


def merge_attention_backward_cpu(
    dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, outs: Sequence[Tensor], lses: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    dout, out, outs = dense_last_dim(dout), dense_last_dim(out), [dense_last_dim(part) for part in outs]
    douts, dlses = [empty_dense(part) for part in outs], [empty_dense(part) for part in lses]
    _C.merge_attention_bwd(
        (_place(dout), (0, 0, 0, 0) if dlse is None else _lse_place(dlse), _place(out), _lse_place(lse)),
        ([_place(x) for x in outs], [_lse_place(x) for x in lses],
         [_place(x) for x in douts], [_lse_place(x) for x in dlses]),
        *out.shape, DTYPE_CODES[out.dtype],
    )  # fmt: skip
    return douts, dlses


MERGE_ATTENTION = Op("merge_attention", [
    Backend("cpu", merge_attention_cpu, Needs(device="cpu", dtypes=FLOATS)),
    Backend("reference", merge_attention_reference, Needs()),
])  # fmt: skip
MERGE_ATTENTION_BWD = Op("merge_attention_bwd", [
    Backend("cpu", merge_attention_backward_cpu, Needs(device="cpu", dtypes=FLOATS)),
    Backend("reference", merge_attention_backward_reference, Needs()),
])  # fmt: skip


def _impl(outs, lses, backend):
    return MERGE_ATTENTION.choose(Inputs([*outs, *lses]), backend).run(outs, lses)


def _fake(outs, lses, backend):
    return outs[0].new_empty(outs[0].shape), lses[0].new_empty(lses[0].shape)


def _setup_context(ctx, inputs, output):
    outs, lses, ctx.backend = inputs
    ctx.save_for_backward(*output, *outs, *lses)
    ctx.set_materialize_grads(False)


def _backward(ctx, dout, dlse):
    out, lse, *parts = ctx.saved_tensors
    outs, lses = parts[: len(parts) // 2], parts[len(parts) // 2 :]
    if dout is None and dlse is None:
        return [None] * len(outs), [None] * len(lses), None
    dout = torch.zeros_like(out) if dout is None else dout
    douts, dlses = _merge_attention_bwd_op(dout, dlse, out, lse, outs, lses, ctx.backend)
    return douts, dlses, None


def _bwd_impl(dout, dlse, out, lse, outs, lses, backend):
    row = MERGE_ATTENTION_BWD.choose(Inputs([dout, dlse, *outs, *lses]), backend)
    return row.run(dout, dlse, out, lse, outs, lses)


def _bwd_fake(dout, dlse, out, lse, outs, lses, backend):
    return [part.new_empty(part.shape) for part in outs], [part.new_empty(part.shape) for part in lses]


_merge_attention_bwd_op = register_op(
    "merge_attention_bwd(Tensor dout, Tensor? dlse, Tensor out, Tensor lse, Tensor[] outs, Tensor[] lses, "
    "str? backend) -> (Tensor[], Tensor[])",
    _bwd_impl, _bwd_fake,
)  # fmt: skip
_merge_attention_op = register_op(
    "merge_attention(Tensor[] outs, Tensor[] lses, str? backend) -> (Tensor, Tensor)",
    _impl, _fake, _backward, _setup_context,
)  # fmt: skip


def merge_attention(
    outs: Sequence[Tensor], lses: Sequence[Tensor], *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Attention over all keys from parts that each saw some of them, differentiable in all inputs. In fp32.

    Args:
        outs: outputs of the parts, each [B, Sq, H, Dv], fp32, bf16, fp16 (native) or fp64 (reference).
        lses: as many log-sum-exps [B, H, Sq] in fp32 (fp64 for fp64), as `return_lse` gives them. A part with lse -inf
            has no share. A sink must be in one part only.
        backend: force one row of the table, e.g. `"reference"`.

    Returns:
        out [B, Sq, H, Dv] of the outs' dtype, and lse [B, H, Sq]. Where all parts are empty, 0 and -inf.

    Raises:
        ValueError: no parts, or shapes, dtypes or devices do not fit together.

    Example:
        >>> halves = [tpweave.attention(q, k[:, s], v[:, s], return_lse=True) for s in (slice(0, 50), slice(50, 100))]
        >>> out, lse = tpweave.merge_attention(*zip(*halves))
    """
    outs, lses = list(outs), list(lses)
    if not outs or len(outs) != len(lses):
        raise ValueError(f"merge_attention: {len(outs)} outs and {len(lses)} lses; it needs as many, at least one")
    first = outs[0]
    if first.dim() != 4 or not first.is_floating_point():
        raise ValueError(
            f"merge_attention: outs[0] is {first.dtype} {tuple(first.shape)}; it needs floating-point [B, Sq, H, Dv]"
        )
    rows = (first.shape[0], first.shape[2], first.shape[1])
    wide = torch.float64 if first.dtype == torch.float64 else torch.float32
    for i, (out, lse) in enumerate(zip(outs, lses, strict=True)):
        for name, x, dtype, shape in (("outs", out, first.dtype, first.shape), ("lses", lse, wide, rows)):
            if x.shape != shape or x.dtype != dtype or x.device != first.device:
                raise ValueError(
                    f"merge_attention: {name}[{i}] is {x.dtype} {tuple(x.shape)} on {x.device}; it needs {dtype} "
                    f"{tuple(shape)} on {first.device}"
                )
    return _merge_attention_op(outs, lses, backend)
