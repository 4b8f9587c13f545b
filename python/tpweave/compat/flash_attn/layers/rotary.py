"""flash-attn's `layers.rotary`: rotary embedding of queries, keys and packed tensors, some of it in place.

Dims: B batch, S sequence, T tokens of all sequences, H heads, D head dim, A angles a position (2A elements are turned).
"""

from __future__ import annotations

from typing import Any

import torch

from tpweave.compat.flash_attn.ops.triton.rotary import apply_rotary

Tensor = torch.Tensor
Tables = tuple[Tensor, Tensor, Tensor | None, Tensor | None]  # cos, sin, and the keys' own


def rotate_half(x: Tensor, interleaved: bool = False) -> Tensor:
    """(a, b) -> (-b, a) for the pairs (i, i + half), or with `interleaved` (2i, 2i + 1)."""
    if interleaved:
        return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
    a, b = x.chunk(2, -1)
    return torch.cat((-b, a), -1)


def apply_rotary_emb_torch(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Rotary embedding in plain torch, in the dtype of the products: what the kernels are compared with.

    x: [B, S, H, D]; cos, sin: [S, A] or [B, S, A].
    """
    width = 2 * cos.shape[-1]
    # Every angle stands for the two elements of its pair: [..., S, 1, 2A]
    cos, sin = (
        (t.repeat_interleave(2, -1) if interleaved else torch.cat((t, t), -1)).unsqueeze(-2) for t in (cos, sin)
    )
    head, rest = x[..., :width], x[..., width:]
    return torch.cat((head * cos + rotate_half(head, interleaved) * sin, rest), -1)


class ApplyRotaryEmb(torch.autograd.Function):
    """`apply_rotary`, whose gradient is turned backwards."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False, inplace: bool = False,
        seqlen_offsets: int | Tensor = 0, cu_seqlens: Tensor | None = None, max_seqlen: int | None = None,
    ) -> Tensor:  # fmt: skip
        packed = isinstance(seqlen_offsets, Tensor)
        ctx.save_for_backward(cos, sin, cu_seqlens, seqlen_offsets if packed else None)
        ctx.offset, ctx.interleaved, ctx.max_seqlen = None if packed else seqlen_offsets, interleaved, max_seqlen
        # In place x is not marked dirty: flash-attn turns leaves that require a gradient, too.
        return apply_rotary(x, cos, sin, seqlen_offsets, cu_seqlens, max_seqlen, interleaved, inplace)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin, cu_seqlens, offsets = ctx.saved_tensors
        offsets = ctx.offset if offsets is None else offsets
        dx = apply_rotary(dout, cos, sin, offsets, cu_seqlens, ctx.max_seqlen, ctx.interleaved, conjugate=True)
        return dx, *(None,) * 7


def apply_rotary_emb(
    x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False, inplace: bool = False,
    seqlen_offsets: int | Tensor = 0, cu_seqlens: Tensor | None = None, max_seqlen: int | None = None,
) -> Tensor:  # fmt: skip
    """Rotary embedding of x, differentiable in x.

    Args:
        x: [B, S, H, D]; with `cu_seqlens` [T, H, D].
        cos, sin: [positions, A].
        interleaved: pairs are (2i, 2i + 1), as in GPT-J, else (i, i + A), as in GPT-NeoX.
        inplace: write into x.
        seqlen_offsets: position of each sequence's first token: int, or [B] integers.
        cu_seqlens: [B + 1] int32, offsets of packed sequences.
        max_seqlen: the longest of them.

    Returns:
        x turned; x itself with `inplace`.
    """
    return ApplyRotaryEmb.apply(x, cos, sin, interleaved, inplace, seqlen_offsets, cu_seqlens, max_seqlen)


# flash-attn's older name.
apply_rotary_emb_func = apply_rotary_emb


def _queries_and_keys(qkv: Tensor, num_heads_q: int | None) -> tuple[Tensor, Tensor]:
    """Views of the queries and the keys of [B, S, 3, H, D], or of [B, S, Hq + 2 Hkv, D]."""
    if qkv.dim() == 5 and qkv.shape[2] == 3:
        return qkv[:, :, 0], qkv[:, :, 1]
    if qkv.dim() != 4 or num_heads_q is None or (qkv.shape[2] - num_heads_q) % 2:
        raise ValueError(
            f"apply_rotary_emb_qkv_: qkv has shape {tuple(qkv.shape)} with num_heads_q={num_heads_q}; it takes "
            "[batch, sequence, 3, heads, head dim], or [batch, sequence, num_heads_q + 2 * num_heads_k, head dim]"
        )
    end = num_heads_q + (qkv.shape[2] - num_heads_q) // 2
    return qkv[:, :, :num_heads_q], qkv[:, :, num_heads_q:end]


def _turn_queries_and_keys(
    qkv: Tensor, num_heads_q: int | None, tables: Tables, offsets: int | Tensor, interleaved: bool,
    conjugate: bool,
) -> None:  # fmt: skip
    cos, sin, cos_k, sin_k = tables
    q, k = _queries_and_keys(qkv, num_heads_q)
    for part, c, s in ((q, cos, sin), (k, cos if cos_k is None else cos_k, sin if sin_k is None else sin_k)):
        apply_rotary(part, c, s, offsets, interleaved=interleaved, inplace=True, conjugate=conjugate)


class ApplyRotaryEmbQKV_(torch.autograd.Function):
    """Queries and keys of a packed tensor turned in place."""

    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor, cos_k: Tensor | None = None, sin_k: Tensor | None = None,
        interleaved: bool = False, seqlen_offsets: int | Tensor = 0, num_heads_q: int | None = None,
    ) -> Tensor:  # fmt: skip
        packed = isinstance(seqlen_offsets, Tensor)
        ctx.save_for_backward(cos, sin, cos_k, sin_k, seqlen_offsets if packed else None)
        ctx.offset, ctx.interleaved, ctx.num_heads_q = None if packed else seqlen_offsets, interleaved, num_heads_q
        _turn_queries_and_keys(qkv, num_heads_q, (cos, sin, cos_k, sin_k), seqlen_offsets, interleaved, False)
        return qkv

    @staticmethod
    def backward(ctx: Any, dqkv: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin, cos_k, sin_k, offsets = ctx.saved_tensors
        offsets = ctx.offset if offsets is None else offsets
        dqkv = dqkv.clone()
        _turn_queries_and_keys(dqkv, ctx.num_heads_q, (cos, sin, cos_k, sin_k), offsets, ctx.interleaved, True)
        return dqkv, *(None,) * 7


def apply_rotary_emb_qkv_(
    qkv: Tensor, cos: Tensor, sin: Tensor, cos_k: Tensor | None = None, sin_k: Tensor | None = None,
    interleaved: bool = False, seqlen_offsets: int | Tensor = 0, num_heads_q: int | None = None,
) -> Tensor:  # fmt: skip
    """Rotary embedding of the queries and keys in qkv, in place; differentiable in qkv.

    Args:
        qkv: [B, S, 3, H, D], or [B, S, Hq + 2 Hkv, D] with `num_heads_q` = Hq.
        cos, sin: [positions, A].
        cos_k, sin_k: the keys' own table, if they have one.
        interleaved, seqlen_offsets: as for `apply_rotary_emb`.

    Returns:
        qkv itself.
    """
    return ApplyRotaryEmbQKV_.apply(qkv, cos, sin, cos_k, sin_k, interleaved, seqlen_offsets, num_heads_q)


class ApplyRotaryEmbKV_(torch.autograd.Function):
    """Keys of a packed tensor turned in place."""

    @staticmethod
    def forward(
        ctx: Any, kv: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False, seqlen_offsets: int | Tensor = 0
    ) -> Tensor:
        packed = isinstance(seqlen_offsets, Tensor)
        ctx.save_for_backward(cos, sin, seqlen_offsets if packed else None)
        ctx.offset, ctx.interleaved = None if packed else seqlen_offsets, interleaved
        apply_rotary(kv[:, :, 0], cos, sin, seqlen_offsets, interleaved=interleaved, inplace=True)
        return kv

    @staticmethod
    def backward(ctx: Any, dkv: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin, offsets = ctx.saved_tensors
        offsets = ctx.offset if offsets is None else offsets
        dkv = dkv.clone()
        apply_rotary(dkv[:, :, 0], cos, sin, offsets, interleaved=ctx.interleaved, inplace=True, conjugate=True)
        return dkv, *(None,) * 4


def apply_rotary_emb_kv_(
    kv: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False, seqlen_offsets: int | Tensor = 0
) -> Tensor:
    """Rotary embedding of the keys in kv [B, S, 2, H, D], in place; differentiable in kv. Returns kv itself."""
    return ApplyRotaryEmbKV_.apply(kv, cos, sin, interleaved, seqlen_offsets)


class RotaryEmbedding(torch.nn.Module):
    """Rotary embedding with its table: grown on demand, kept in the inputs' dtype.

    With `scale_base` (512 is usual) it is XPos: queries are scaled by a power of their position, keys by its inverse.
    Source: Su et al., "RoFormer", 2021; Sun et al., "A Length-Extrapolatable Transformer", 2022 (XPos).

    Args:
        dim: elements of a head that are turned, 2A.
        base: of the angles' frequencies.
        interleaved: pairs are (2i, 2i + 1), else (i, i + A).
        scale_base: of XPos; None for none.
        device: of the frequencies.
    """

    inv_freq: Tensor
    scale: Tensor | None

    def __init__(
        self, dim: int, base: float = 10000.0, interleaved: bool = False, scale_base: float | None = None,
        device: torch.device | str | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.dim = dim
        self.base = float(base)
        self.interleaved = interleaved
        self.scale_base = scale_base
        self.register_buffer("inv_freq", self._compute_inv_freq(device), persistent=False)
        even = torch.arange(0, dim, 2, device=device, dtype=torch.float32)
        self.register_buffer(
            "scale", None if scale_base is None else (even + 0.4 * dim) / (1.4 * dim), persistent=False
        )
        self._seq_len_cached = 0
        self._cos_cached: Tensor | None = None
        self._sin_cached: Tensor | None = None
        self._cos_k_cached: Tensor | None = None
        self._sin_k_cached: Tensor | None = None

    def _compute_inv_freq(self, device: torch.device | str | None = None) -> Tensor:
        return self.base ** -(torch.arange(0, self.dim, 2, device=device, dtype=torch.float32) / self.dim)

    def _update_cos_sin_cache(
        self, seqlen: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> None:
        cached = self._cos_cached
        if (
            cached is not None
            and seqlen <= self._seq_len_cached
            and cached.device == device
            and cached.dtype == dtype
            and not (self.training and cached.is_inference())
        ):
            return
        self._seq_len_cached = seqlen
        # A model loaded in bf16 has a bf16 buffer: its angles would be off by whole turns.
        inv_freq = self.inv_freq if self.inv_freq.dtype == torch.float32 else self._compute_inv_freq(device)
        position = torch.arange(seqlen, device=device, dtype=torch.float32)
        angles = torch.outer(position, inv_freq.to(device))
        if self.scale is None or self.scale_base is None:
            self._cos_cached, self._sin_cached = angles.cos().to(dtype), angles.sin().to(dtype)
            return
        scale = self.scale.to(device).float() ** ((position - seqlen // 2) / self.scale_base)[:, None]
        self._cos_cached, self._sin_cached = (angles.cos() * scale).to(dtype), (angles.sin() * scale).to(dtype)
        self._cos_k_cached, self._sin_k_cached = (angles.cos() / scale).to(dtype), (angles.sin() / scale).to(dtype)

    def forward(
        self, qkv: Tensor, kv: Tensor | None = None, seqlen_offset: int | Tensor = 0, max_seqlen: int | None = None,
        num_heads_q: int | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
        """Turn queries and keys in place.

        Args:
            qkv: [B, S, 3, H, D], or [B, S, Hq + 2 Hkv, D] with `num_heads_q` = Hq; with `kv` only the queries
                [B, S, H, D].
            kv: [B, S, 2, Hkv, D].
            seqlen_offset: position of each sequence's first token: int, or [B] integers.
            max_seqlen: positions that the table must hold; needed where `seqlen_offset` is a tensor.

        Returns:
            qkv, or (q, kv).
        """
        if max_seqlen is None and isinstance(seqlen_offset, int):
            max_seqlen = qkv.shape[1] + seqlen_offset
        if max_seqlen is not None:
            self._update_cos_sin_cache(max_seqlen, device=qkv.device, dtype=qkv.dtype)
        cos, sin = self._cos_cached, self._sin_cached
        if cos is None or sin is None:
            raise ValueError("RotaryEmbedding: seqlen_offset is a tensor and there is no table yet; pass max_seqlen")
        if kv is None:
            return apply_rotary_emb_qkv_(
                qkv, cos, sin, self._cos_k_cached, self._sin_k_cached, interleaved=self.interleaved,
                seqlen_offsets=seqlen_offset, num_heads_q=num_heads_q,
            )  # fmt: skip
        q = apply_rotary_emb(qkv, cos, sin, interleaved=self.interleaved, inplace=True, seqlen_offsets=seqlen_offset)
        cos_k, sin_k = (
            ours if keys is None else keys for ours, keys in ((cos, self._cos_k_cached), (sin, self._sin_k_cached))
        )
        return q, apply_rotary_emb_kv_(kv, cos_k, sin_k, interleaved=self.interleaved, seqlen_offsets=seqlen_offset)
