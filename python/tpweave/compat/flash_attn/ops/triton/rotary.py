"""flash-attn's rotary launcher: `tpweave.rope` on rows of a table chosen by offset or by packed position.

Dims: B batch, S sequence, T tokens of all sequences, H heads, D head dim, R rows of the table, A angles a row.
"""

from __future__ import annotations

import torch

from tpweave.ops.rope import rope

Tensor = torch.Tensor


def _packed_rows(tokens: int, cu_seqlens: Tensor, offsets: int | Tensor, behind: int) -> Tensor:
    """The row of each packed token; `behind` for tokens of no sequence."""
    token = torch.arange(tokens, device=cu_seqlens.device)
    sequence = torch.bucketize(token, cu_seqlens[1:], right=True)
    inside = sequence < cu_seqlens.shape[0] - 1
    sequence = sequence.clamp(max=cu_seqlens.shape[0] - 2)
    rows = token - cu_seqlens[sequence] + (offsets[sequence] if isinstance(offsets, Tensor) else offsets)
    return torch.where(inside, rows, behind)


def _rows_of(table: Tensor, rows: Tensor, behind: float) -> Tensor:
    """`table[rows]`, `behind` where there is no such row: such tokens are not turned."""
    chosen = table[rows.clamp(max=table.shape[0] - 1)]
    return chosen.masked_fill((rows >= table.shape[0])[..., None], behind)


def apply_rotary(
    x: Tensor, cos: Tensor, sin: Tensor, seqlen_offsets: int | Tensor = 0, cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None, interleaved: bool = False, inplace: bool = False, conjugate: bool = False,
) -> Tensor:  # fmt: skip
    """Turn the pairs of each head's first 2A elements by the angles of their position.

    Args:
        x: [B, S, H, D]; with `cu_seqlens` [T, H, D].
        cos, sin: [R, A]. Positions from R on are not turned where offsets are a tensor.
        seqlen_offsets: position of each sequence's first token: int, or [B] int32 or int64.
        cu_seqlens: [B + 1] int32, offsets of the sequences in x.
        max_seqlen: the longest sequence; needed with `cu_seqlens`.
        interleaved: pairs are (2i, 2i + 1), else (i, i + A).
        inplace: write into x.
        conjugate: turn backwards.

    Returns:
        x turned: a new tensor, or x itself with `inplace`.

    Raises:
        ValueError: shapes do not fit together, or the table is too short.
    """
    if cu_seqlens is not None and max_seqlen is None:
        raise ValueError("apply_rotary: cu_seqlens needs max_seqlen too")
    if cos.dim() != 2 or cos.shape != sin.shape:
        raise ValueError(
            f"apply_rotary: cos is {tuple(cos.shape)}, sin {tuple(sin.shape)}; both are [positions, angles]"
        )
    if x.dim() != (4 if cu_seqlens is None else 3):
        dims = "[batch, sequence, heads, head dim]" if cu_seqlens is None else "[tokens, heads, head dim]"
        raise ValueError(f"apply_rotary: x has shape {tuple(x.shape)}, it needs {dims}")
    sequence = x.shape[1] if max_seqlen is None else max_seqlen
    first = 0 if isinstance(seqlen_offsets, Tensor) else seqlen_offsets
    if first + sequence > cos.shape[0]:
        raise ValueError(
            f"apply_rotary: sequences of {sequence} from position {first} on need a table of as many rows, "
            f"cos has {cos.shape[0]}"
        )
    whole = x if cu_seqlens is None else x[None]
    if cu_seqlens is not None:
        rows = _packed_rows(x.shape[0], cu_seqlens, seqlen_offsets, cos.shape[0])[None]
        cos, sin = _rows_of(cos, rows, 1.0), _rows_of(sin, rows, 0.0)
    elif isinstance(seqlen_offsets, Tensor):
        rows = seqlen_offsets[:, None] + torch.arange(sequence, device=x.device)
        cos, sin = _rows_of(cos, rows, 1.0), _rows_of(sin, rows, 0.0)
    else:
        cos, sin = cos[first : first + sequence], sin[first : first + sequence]
    turned, _ = rope(whole, whole[:, :, :0], cos, -sin if conjugate else sin, interleaved=interleaved)
    turned = turned if cu_seqlens is None else turned[0]
    return x.copy_(turned) if inplace else turned
