"""Part 3: stock PyTorch (nn.Linear and gloo's all-reduce, SDPA) against tpweave: checked, then timed in turns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

import tpweave
from tpweave.benchmarks.run import time_interleaved
from tpweave.cli.bench import GLOO_NOTE, human_time
from tpweave.demo import decoder
from tpweave.demo.report import Report

Tensor = torch.Tensor


@dataclass(frozen=True)
class Row:
    """Two ways to the same result."""

    name: str
    stock: Callable[[], Tensor]
    ours: Callable[[], Tensor]
    tolerance: float


def _all_reduce() -> Row:
    x = torch.randn(1 << 18)

    def stock() -> Tensor:
        y = x.clone()
        dist.all_reduce(y)
        return y

    return Row("all-reduce, 1 MB", stock, lambda: tpweave.all_reduce(x), 1e-6)


def _matmul_all_reduce() -> Row:
    x, weight = torch.randn(1, 2048), torch.randn(4096, 2048)

    def stock() -> Tensor:
        y = F.linear(x, weight)
        dist.all_reduce(y)
        return y

    return Row("matmul + all-reduce, 1x2048x4096", stock, lambda: tpweave.matmul_all_reduce(x, weight.t()), 1e-5)


def _attention(dtype: torch.dtype, name: str, tolerance: float) -> Row:
    q, k, v = (torch.randn(1, 2048, 8, 64).to(dtype) for _ in range(3))
    # SDPA gets its own layout, so that no transpose is counted against it.
    q_t, k_t, v_t = (x.transpose(1, 2).contiguous() for x in (q, k, v))
    return Row(
        f"attention, causal, {name}, S 2048",
        lambda: F.scaled_dot_product_attention(q_t, k_t, v_t, is_causal=True).transpose(1, 2),
        lambda: tpweave.attention(q, k, v, causal=True),
        tolerance,
    )


def shard_by_hand(model: Any) -> Any:
    """The stock way: every nn.Linear keeps a slice, and gloo adds what attention and MLP put out. In place."""
    rank, size = dist.get_rank(), dist.get_world_size()

    def add_up(module: torch.nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        dist.all_reduce(out)
        return out

    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj):
            linear.weight = torch.nn.Parameter(linear.weight.chunk(size, 0)[rank].contiguous())
        for linear in (attention.o_proj, mlp.down_proj):
            linear.weight = torch.nn.Parameter(linear.weight.chunk(size, 1)[rank].contiguous())
            linear.register_forward_hook(add_up)
    return model


def _forward_step() -> Row:
    stock, ours = shard_by_hand(decoder.build_model()).eval(), decoder.build_model().eval()
    tpweave.parallelize(ours)
    tokens = torch.randint(256, (1, 256), generator=torch.Generator().manual_seed(2))
    return Row(
        "forward step of part 2's decoder, 256 tokens",
        lambda: stock(input_ids=tokens, use_cache=False).logits,
        lambda: ours(input_ids=tokens, use_cache=False).logits,
        1e-4,
    )


@torch.inference_mode()
def run(report: Report, repeats: int) -> None:
    """Check and time every row; rank 0 prints the table."""
    report.title("3. Stock PyTorch against tpweave, two ranks, one thread each")
    torch.manual_seed(dist.get_rank())
    rows = [
        _all_reduce(),
        _matmul_all_reduce(),
        _attention(torch.float32, "fp32", 1e-5),
        _attention(torch.bfloat16, "bf16", 2e-2),
        _forward_step(),
    ]
    measured = []
    with report.progress("measuring", len(rows)) as bar:
        for row in rows:
            stock, ours = row.stock().float(), row.ours().float()
            error = ((ours - stock).abs().max() / stock.abs().max()).item()
            errors = [0.0] * dist.get_world_size()
            dist.all_gather_object(errors, error)
            timings = time_interleaved({"stock": row.stock, "tpweave": row.ours}, repeats=repeats)
            measured.append(
                {
                    "name": row.name,
                    "stock_seconds": timings["stock"].seconds,
                    "seconds": timings["tpweave"].seconds,
                    "ratio": timings["stock"].seconds / timings["tpweave"].seconds,
                    "error": max(errors),
                    "tolerance": row.tolerance,
                }
            )
            bar.advance()
    cells = [
        (row["name"], human_time(row["stock_seconds"]), human_time(row["seconds"]), f"{row['ratio']:.1f}x")
        for row in measured
    ]
    report.table("medians of interleaved runs, slowest rank", ("what", ">stock", ">tpweave", ">faster"), cells)
    report.say(GLOO_NOTE, "dim")
    wrong = [row["name"] for row in measured if not row["error"] <= row["tolerance"]]
    report.check("results of both ways agree", not wrong, f"wrong: {', '.join(wrong)}" if wrong else "all do", "all")
    report.results["comparison"] = measured
