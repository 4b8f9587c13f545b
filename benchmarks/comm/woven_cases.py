"""The shapes on which the matmuls woven into collectives are measured: M rows of all ranks, K a rank, N columns."""

from tpweave.benchmarks.registry import Case

CASES = tuple(
    Case(f"{dtype} M{m} K2048 N4096", {"rows": m, "depth": 2048, "columns": 4096, "dtype": dtype})
    for dtype in ("fp32", "bf16")
    for m in (16, 512, 1024, 2048, 4096)
)

# 60 shapes on which they must not be slower than in sequence: `--case sweep`.
SWEEP = tuple(
    Case(f"sweep M{m} K{k} N{n} fp32", {"rows": m, "depth": k, "columns": n, "dtype": "fp32"})
    for m in (2, 16, 64, 256, 1024)
    for k in (128, 512, 2048)
    for n in (256, 1024, 2048, 4096)
)
