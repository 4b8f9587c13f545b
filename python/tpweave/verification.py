"""Every operation's example inputs, and their check on any row of its table, device and dtype.

    for result in run_checks(device="cpu"):
        print(result.op, result.case, result.backend, result.dtype, result.status, result.reason)

A case is drawn in float64's stead too: outputs and gradients of a row are compared with the reference in float64 by the
accuracy rule of `tpweave.testing`. `tpweave verify`, the GPU check and the tests share these cases.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import tpweave
from tpweave import env
from tpweave.dispatch import OPS
from tpweave.errors import BackendUnavailableError
from tpweave.testing import SLACK, accuracy

Tensor = torch.Tensor
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Draw:
    """Random tensors of one device and dtype: the same numbers on every device, different ones on every rank."""

    def __init__(self, device: torch.device | str, dtype: torch.dtype, rank: int = 0, ranks: int = 1) -> None:
        self.device = torch.device(device)
        self.dtype = dtype
        self.rank = rank
        self.ranks = ranks
        self._generator = torch.Generator().manual_seed(rank)
        self._shared = torch.Generator().manual_seed(ranks)

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers."""
        return torch.randn(shape, generator=self._generator).to(self.device, self.dtype)

    def shared_normal(self, *shape: int) -> Tensor:
        """Standard normal numbers, the same on all ranks."""
        return torch.randn(shape, generator=self._shared).to(self.device, self.dtype)

    def integers(self, high: int, *shape: int) -> Tensor:
        """int64 numbers in [0, high)."""
        return torch.randint(high, shape, generator=self._generator).to(self.device)


@dataclass(frozen=True)
class Check:
    """One case of one operation.

    Attributes:
        op: the stem, public as `tpweave.<op>`.
        name: the case.
        make: Draw -> inputs, tensors and anything else.
        call: (inputs, backend, group) -> a tensor or a tuple of tensors; `group` is None but for collectives.
        gradients: whether to check those of all floating-point inputs that the reference gives one.
        collective: every rank of a group makes the call, with inputs of its own.
    """

    op: str
    name: str
    make: Callable[[Draw], Sequence[Any]]
    call: Callable[[Sequence[Any], str | None, Any], Any]
    gradients: bool = True
    collective: bool = False


@dataclass(frozen=True)
class Result:
    """What one check found on one row.

    Attributes:
        op, case, dtype, backend: what ran.
        status: "ok", "wrong" (beyond the bound), "error" (it raised) or "unavailable" (the row objected).
        reason: in words, where the status is not "ok".
        error, bound: of the output or gradient nearest to, or furthest beyond, its bound.
        seconds: of the call and its gradients, first time, compilation included.
    """

    op: str
    case: str
    dtype: str
    backend: str
    status: str
    reason: str = ""
    error: float = 0.0
    bound: float = 0.0
    seconds: float = 0.0


def _angles(draw: Draw, sequence: int, count: int) -> tuple[Tensor, Tensor]:
    angles = torch.outer(torch.arange(sequence), 10000.0 ** (-torch.arange(count) / count))
    return angles.cos().to(draw.device, draw.dtype), angles.sin().to(draw.device, draw.dtype)


def _attention_inputs(draw: Draw) -> tuple[Tensor, ...]:
    """Queries, keys and values of 4 heads on 2 KV heads, and a padding mask that leaves the first key."""
    seen = draw.integers(3, 2, 45) > 0
    seen[:, 0] = True
    return draw.normal(2, 33, 4, 40), draw.normal(2, 45, 2, 40), draw.normal(2, 45, 2, 24), seen


def _gathered(result: tuple[Tensor, list[Tensor]]) -> list[Tensor]:
    return [result[0], *result[1]]


def _packed(lengths: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor((0, *lengths)).cumsum(0).to(device, torch.int32)


def _varlen_inputs(draw: Draw) -> tuple[Tensor, ...]:
    """Sequences of 5, 0, 33 and 12 queries on 9, 4, 45 and 7 keys of 4 heads on 2, and the offsets of both."""
    q, k, v = draw.normal(50, 4, 40), draw.normal(65, 2, 40), draw.normal(65, 2, 24)
    return q, k, v, _packed((5, 0, 33, 12), draw.device), _packed((9, 4, 45, 7), draw.device)


def _paged_inputs(draw: Draw) -> tuple[Tensor, ...]:
    """Those queries and offsets, with the keys in pages of 8, one of them shared."""
    q, _, _, cu_q, cu_k = _varlen_inputs(draw)
    table = torch.tensor([[3, 7, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0], [0, 2, 4, 6, 8, 5], [3, 0, 0, 0, 0, 0]])
    return q, draw.normal(9, 8, 2, 40), draw.normal(9, 8, 2, 24), cu_q, cu_k, table.to(draw.device, torch.int32)


def _decode_inputs(draw: Draw, new: int = 0) -> tuple[Tensor, ...]:
    """Queries of 6 heads on 2 KV heads, caches of 150 keys, how many are in use, and new keys and values."""
    return (
        draw.normal(2, 3, 6, 40), draw.normal(2, 150, 2, 40), draw.normal(2, 150, 2, 24), draw.integers(140, 2),
        draw.normal(2, new, 2, 40), draw.normal(2, new, 2, 24),
    )  # fmt: skip


def _decode(inputs: Sequence[Any], backend: str | None, **options: Any) -> tuple[Tensor, ...]:
    """Output, log-sum-exp, and the caches afterwards."""
    q, k_cache, v_cache, lengths, k_new, v_new = inputs[:6]
    caches = k_cache.clone(), v_cache.clone()
    out, lse = tpweave.attention_decode(
        q, *caches, k_new=k_new, v_new=v_new, cache_seqlens=lengths, causal=True, return_lse=True, backend=backend,
        **options,
    )  # fmt: skip
    # Codes are compared as the numbers they are.
    return out, lse, *(cache if cache.is_floating_point() else cache.to(out.dtype) for cache in caches)


def _there_and_back(x: Tensor, bits: int, seed: int | None, backend: str | None) -> Tensor:
    codes, scales = tpweave.quantize_blocks(x, bits, seed=seed, backend=backend)
    return tpweave.dequantize_blocks(codes, scales, x.shape, bits=bits, backend=backend)


def _uneven(draw: Draw) -> list[int]:
    return [3 + rank for rank in range(draw.ranks)]


CHECKS: tuple[Check, ...] = (
    Check(
        "rms_norm", "33x384",
        lambda d: (d.normal(33, 384), d.normal(384)),
        lambda i, backend, _: tpweave.rms_norm(*i, backend=backend),
    ),
    Check(
        "rms_norm", "residual 3x5x129",
        lambda d: (d.normal(3, 5, 129), d.normal(129), d.normal(3, 5, 129)),
        lambda i, backend, _: tpweave.rms_norm(i[0], i[1], residual=i[2], backend=backend),
    ),
    Check(
        "layer_norm", "33x384",
        lambda d: (d.normal(33, 384), d.normal(384), d.normal(384)),
        lambda i, backend, _: tpweave.layer_norm(*i, backend=backend),
    ),
    Check(
        "layer_norm", "residual 3x5x129",
        lambda d: (d.normal(3, 5, 129), d.normal(129), d.normal(129), d.normal(3, 5, 129)),
        lambda i, backend, _: tpweave.layer_norm(*i[:3], residual=i[3], backend=backend),
    ),
    *(
        Check(
            "gated_activation", f"{kind} 17x200",
            lambda d: (d.normal(17, 400),),
            lambda i, backend, _, kind=kind: tpweave.gated_activation(*i[0].chunk(2, -1), kind, backend=backend),
        )
        for kind in ("silu", "gelu", "gelu_tanh", "relu", "sigmoid")
    ),
    *(
        Check(
            "rope", f"{'interleaved ' if interleaved else ''}2x7 heads 4/2 dim 80 rotary {2 * count}",
            lambda d, count=count: (d.normal(2, 7, 4, 80), d.normal(2, 7, 2, 80), *_angles(d, 7, count)),
            lambda i, backend, _, interleaved=interleaved: tpweave.rope(*i, interleaved=interleaved, backend=backend),
        )
        for interleaved, count in ((False, 40), (True, 40), (False, 13))
    ),
    Check(
        "attention", "causal 2x33x45 heads 4/2",
        lambda d: _attention_inputs(d)[:3],
        lambda i, backend, _: tpweave.attention(*i, causal=True, return_lse=True, backend=backend),
    ),
    Check(
        "attention", "window 7, 3",
        lambda d: _attention_inputs(d)[:3],
        lambda i, backend, _: tpweave.attention(*i, window=(7, 3), backend=backend),
    ),
    Check(
        "attention", "padding mask",
        _attention_inputs,
        lambda i, backend, _: tpweave.attention(*i[:3], mask=i[3], backend=backend),
    ),
    Check(
        "attention", "every option",
        lambda d: (*_attention_inputs(d), d.normal(1, 4, 33, 45), d.normal(4)),
        lambda i, backend, _: tpweave.attention(
            *i[:3], mask=i[3], bias=i[4], sinks=i[5], causal=True, window=(30, -1), softcap=5.0,
            alibi_slopes=torch.linspace(0.1, 0.4, 4, device=i[0].device), dropout_p=0.2, seed=2**40 + 7,
            return_lse=True, backend=backend,
        ),
    ),
    Check(
        "attention_varlen", "causal, 4 sequences, heads 4/2",
        _varlen_inputs,
        lambda i, backend, _: tpweave.attention_varlen(*i, 33, 45, causal=True, return_lse=True, backend=backend),
    ),
    Check(
        "attention_varlen", "window 7, 3 over pages of 8",
        _paged_inputs,
        lambda i, backend, _: tpweave.attention_varlen(
            *i[:5], 33, 45, block_table=i[5], window=(7, 3), backend=backend
        ),
    ),
    Check(
        "attention_decode", "2x3 queries heads 6/2 cache 150",
        _decode_inputs,
        lambda i, backend, _: _decode(i, backend),
        gradients=False,
    ),
    Check(
        "attention_decode", "append 4, rotary",
        lambda d: (*_decode_inputs(d, 4), *_angles(d, 150, 15)),
        lambda i, backend, _: _decode(i, backend, rotary_cos=i[6], rotary_sin=i[7]),
        gradients=False,
    ),
    Check(
        "attention_decode", "pages of 10",
        lambda d: (*_decode_inputs(d, 2), torch.arange(30, device=d.device).flip(0).int().view(2, 15)),
        lambda i, backend, _: _decode(
            [i[0], *(x.reshape(30, 10, *x.shape[2:]) for x in i[1:3]), *i[3:]], backend, block_table=i[6]
        ),
        gradients=False,
    ),
    Check(
        "attention_decode", "int8 cache",
        lambda d: (d.normal(2, 3, 6, 40), *((d.integers(255, 2, 150, 2, 40) - 127).to(torch.int8) for _ in range(2)),
                   d.integers(140, 2), d.normal(2, 0, 2, 40), d.normal(2, 0, 2, 40)),
        lambda i, backend, _: _decode(i, backend, k_scale=0.02, v_scale=0.03),
        gradients=False,
    ),
    Check(
        "merge_attention", "3 parts",
        lambda d: [d.normal(2, 5, 3, 40) for _ in range(3)] + [d.normal(2, 3, 5).float() for _ in range(3)],
        lambda i, backend, _: tpweave.merge_attention(i[:3], i[3:], backend=backend),
    ),
    *(
        Check(
            "quantize_blocks", f"7x131 int{bits}{'' if seed is None else ' stochastic'}",
            lambda d: (d.normal(7, 131),),
            lambda i, backend, _, bits=bits, seed=seed: _there_and_back(i[0], bits, seed, backend),
            gradients=False,
        )
        for bits in (8, 4)
        for seed in (None, 3)
    ),
    *(
        Check(
            "all_reduce", f"{rows}x{columns}",
            lambda d, rows=rows, columns=columns: (d.normal(rows, columns),),
            lambda i, backend, group: tpweave.all_reduce(i[0], group, backend=backend),
            collective=True,
        )
        # 33x65 travels in one step, 3x60000 in two.
        for rows, columns in ((33, 65), (3, 60000))
    ),
    *(
        Check(
            "all_reduce_rms_norm", f"{rows}x{columns} residual",
            lambda d, rows=rows, columns=columns: (
                d.normal(rows, columns), d.shared_normal(rows, columns), d.shared_normal(columns)),
            lambda i, backend, group: tpweave.all_reduce_rms_norm(*i, 1e-6, group, backend=backend),
            collective=True,
        )
        for rows, columns in ((33, 65), (45, 6000))
    ),
    Check(
        "distributed_topk", "9 of 4x(300+r)",
        # Ties in every dtype; the gradient says which of them were taken.
        lambda d: (torch.arange(4 * (300 + d.rank), device=d.device).view(4, -1).to(d.dtype) * 7 % 128 + d.rank / 2,),
        lambda i, backend, group: tpweave.distributed_topk(
            i[0], 9, group, splits=[300 + rank for rank in range(group.size)], backend=backend
        ),
        collective=True,
    ),
    Check(
        "vocab_parallel_embedding", "20 of 7+r rows of 33",
        lambda d: (torch.arange(20, device=d.device) * 3 % (7 * d.ranks), d.normal(7 + d.rank, 33)),
        lambda i, backend, group: tpweave.vocab_parallel_embedding(
            *i, group, splits=[7 + rank for rank in range(group.size)], backend=backend
        ),
        collective=True,
    ),
    Check(
        "all_gather", "uneven 2x(3+r)x5",
        lambda d: (d.normal(2, 3 + d.rank, 5), _uneven(d)),
        lambda i, backend, group: tpweave.all_gather(i[0], 1, group, splits=i[1], backend=backend),
        collective=True,
    ),
    Check(
        "reduce_scatter", "uneven 2x(3+r)x5",
        lambda d: (d.normal(2, sum(_uneven(d)), 5), _uneven(d)),
        lambda i, backend, group: tpweave.reduce_scatter(i[0], 1, group, splits=i[1], backend=backend),
        collective=True,
    ),
    Check(
        "all_to_all", "uneven 2x(3+r)x5",
        lambda d: (d.normal(2, sum(_uneven(d)), 5), _uneven(d), [3 + d.rank] * d.ranks),
        lambda i, backend, group: tpweave.all_to_all(
            i[0], 1, group, in_splits=i[1], out_splits=i[2], backend=backend
        ),
        collective=True,
    ),
    *(
        Check(
            "quantized_all_reduce", f"33x65 int{bits}{'' if seed is None else ' stochastic'}",
            lambda d: (d.normal(33, 65),),
            lambda i, backend, group, bits=bits, seed=seed: tpweave.quantized_all_reduce(
                i[0], group, bits=bits, seed=seed, backend=backend
            ),
            collective=True,
        )
        for bits, seed in ((8, None), (4, 3))
    ),
    Check(
        "quantized_all_gather", "uneven 2x(30+r)x5 int8",
        lambda d: (d.normal(2, 30 + d.rank, 5), [30 + rank for rank in range(d.ranks)]),
        lambda i, backend, group: tpweave.quantized_all_gather(i[0], 1, group, splits=i[1], backend=backend),
        collective=True,
    ),
    Check(
        "quantized_reduce_scatter", "uneven 2x(3+r)x50 int4",
        lambda d: (d.normal(2, sum(_uneven(d)), 50), _uneven(d)),
        lambda i, backend, group: tpweave.quantized_reduce_scatter(
            i[0], 1, group, splits=i[1], bits=4, backend=backend
        ),
        collective=True,
    ),
    Check(
        "linear_cross_entropy", "6x16 onto 11 rows a rank, losses and entropies",
        lambda d: (d.shared_normal(6, 16), d.normal(11, 16) / 16, torch.arange(6, device=d.device)),
        lambda i, backend, group: tpweave.linear_cross_entropy(
            *i, group, reduction="none", return_entropy=True, label_smoothing=0.1, backend=backend
        ),
        collective=True,
    ),
    *(
        Check(
            "matmul_all_reduce", f"{rows}x48x56 bias",
            lambda d, rows=rows: (d.normal(rows, 48), d.normal(56, 48), d.shared_normal(56)),
            lambda i, backend, group: tpweave.matmul_all_reduce(i[0], i[1].t(), group, bias=i[2], backend=backend),
            collective=True,
        )
        for rows in (1, 40)
    ),
    *(
        Check(
            "matmul_reduce_scatter", f"uneven 2x(3+r)x48x56 dim {dim} bias",
            lambda d: (d.normal(2, sum(_uneven(d)), 48), d.normal(56, 48), d.shared_normal(56), _uneven(d)),
            lambda i, backend, group, dim=dim: tpweave.matmul_reduce_scatter(
                i[0], i[1].t(), "avg", dim, group, splits=i[3] if dim == 1 else None, bias=i[2], backend=backend
            ),
            collective=True,
        )
        for dim in (1, 2)
    ),
    *(
        Check(
            "all_gather_matmul", f"uneven 2x(3+r)x48 onto 56 and 7 columns, dim {dim}",
            lambda d, dim=dim: (
                d.normal(2, 3 + d.rank, 48).movedim(1, dim), d.normal(56, 48 if dim == 1 else sum(_uneven(d))),
                d.normal(7, 48 if dim == 1 else sum(_uneven(d))), d.normal(7), _uneven(d),
            ),
            lambda i, backend, group, dim=dim: _gathered(tpweave.all_gather_matmul(
                i[0], [i[1].t(), i[2].t()], dim, group, splits=i[4], biases=[None, i[3]], backend=backend
            )),
            collective=True,
        )
        for dim in (1, 2)
    ),
)  # fmt: skip


def outputs_and_gradients(check: Check, inputs: Sequence[Any], backend: str | None, group: Any = None) -> list[Tensor]:
    """What `check.call` returns, and the gradients of a fixed weighted sum of it; a missing gradient is empty."""
    leaves = [
        i.detach().requires_grad_(check.gradients and i.is_floating_point()) if isinstance(i, Tensor) else i
        for i in inputs
    ]
    out = check.call(leaves, backend, group)
    outs = [out] if isinstance(out, Tensor) else list(out)
    found = [o.detach() for o in outs]
    wanted = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad]
    if not wanted:
        return found
    weights = Draw("cpu", torch.float64)
    loss: Any = sum((o.double() * weights.normal(*o.shape).to(o.device)).sum() for o in outs if o.requires_grad)
    grads = torch.autograd.grad(loss, wanted, allow_unused=True)
    return found + [torch.empty(0, dtype=w.dtype) if g is None else g for g, w in zip(grads, wanted, strict=True)]


def run_check(check: Check, backend: str, device: torch.device | str, dtype: torch.dtype, group: Any = None) -> Result:
    """One check on one row."""
    facts = (check.op, check.name, str(dtype).removeprefix("torch."), backend)
    draw = Draw(device, dtype) if group is None else Draw(device, dtype, group.rank, group.size)
    inputs = check.make(draw)
    wide = [i.double() if isinstance(i, Tensor) and i.is_floating_point() else i for i in inputs]
    begin = time.perf_counter()
    try:
        got = outputs_and_gradients(check, inputs, backend, group)
        if got[0].device.type == "cuda":
            torch.cuda.synchronize(got[0].device)
    except BackendUnavailableError as error:
        return Result(*facts, "unavailable", str(error))
    seconds = time.perf_counter() - begin
    expected = outputs_and_gradients(check, wide, "reference", group)
    same = outputs_and_gradients(check, inputs, "reference", group)
    # Triton's interpreter cuts bits off where a GPU rounds to bf16: up to 2^-7 of a value, twice for a rounded sum.
    cuts = dtype == torch.bfloat16 and backend == "triton" and env.triton_interpreted()
    # The inputs' dtype, where an output is wider (a log-sum-exp in fp32 comes from probabilities in bf16).
    slack = 2**-6 if cuts else SLACK[dtype]
    worst = (0.0, 0.0)
    for out, want, plain in zip(got, expected, same, strict=True):
        error, bound, reason = accuracy(out, want, plain, eps=slack)
        if reason:
            return Result(*facts, "wrong", reason, error, bound, seconds)
        if bound > 0 and error * worst[1] >= worst[0] * bound:
            worst = (error, bound)
    return Result(*facts, "ok", "", *worst, seconds)


def run_checks(
    *,
    device: torch.device | str = "cpu",
    ops: Sequence[str] | None = None,
    dtypes: Sequence[torch.dtype] = DTYPES,
    backends: Sequence[str] | None = None,
    group: Any = None,
    quick: bool = False,
) -> Iterator[Result]:
    """Every check on every row, one result each.

    Args:
        device: where the inputs lie.
        ops: stems; all when None.
        dtypes: of the floating-point inputs.
        backends: rows by name; all but the reference when None.
        group: a TPGroup, on every rank of which this runs: collectives only. Without one: the other ops only.
        quick: only the first case of each operation, in the first dtype.

    Yields:
        a `Result`; where a row raises it is one with status "error". With a group, an error ends the run: the ranks
        would no longer meet.
    """
    seen: set[str] = set()
    for check in CHECKS:
        if check.collective != (group is not None) or (ops is not None and check.op not in ops):
            continue
        if quick and check.op in seen:
            continue
        seen.add(check.op)
        getattr(tpweave, check.op)  # fills the table
        for row in OPS[check.op].backends:
            if row.name == "reference" if backends is None else row.name not in backends:
                continue
            for dtype in dtypes[:1] if quick else dtypes:
                try:
                    yield run_check(check, row.name, device, dtype, group)
                except Exception as error:
                    name = str(dtype).removeprefix("torch.")
                    yield Result(check.op, check.name, name, row.name, "error", f"{type(error).__name__}: {error}")
                    if group is not None:
                        return
