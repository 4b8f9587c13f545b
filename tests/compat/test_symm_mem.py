"""torch.ops.symm_mem on CPU tensors: torch's own unfused forms are the reference, for values and strides."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed import _symmetric_memory as torch_symm_mem

from tpweave.compat import symm_mem
from tpweave.testing import run_ranks

# As torchtitan's and torch's tests: column-parallel and row-parallel linears over sequence shards.
BATCH, M, N, K = 4, 6, 16, 32


def draw(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def same(got, want):
    assert (got.shape, got.dtype) == (want.shape, want.dtype)
    # A group of one rank has nothing to join, and torch gives views of its inputs.
    assert got.stride() == want.stride() or dist.get_world_size() == 1, (got.stride(), want.stride())
    torch.testing.assert_close(got, want)


def gathers_and_scatters(rank, world_size):
    symm_mem.register()
    symm_mem.register()
    name = dist.group.WORLD.group_name
    for gather_dim in (0, 1, 2, -1):
        depth = K * world_size if gather_dim in (2, -1) else K
        a = draw(BATCH, M, K, seed=rank)
        bs = [draw(depth, N, seed=10 + i) for i in range(3)]
        want_a, want = torch_symm_mem._fused_all_gather_matmul_fallback(a, bs, gather_dim, name)
        got_a, got = torch.ops.symm_mem.fused_all_gather_matmul(a, bs, gather_dim, name)
        same(got_a, want_a)
        for ours, theirs in zip(got, want, strict=True):
            same(ours, theirs)
        got_a, got = torch.ops.symm_mem.fused_all_gather_matmul(a, bs, gather_dim, name, return_A=False)
        assert got_a is None
        same(got[0], want[0])
    for scatter_dim in (0, 1, 2):
        for reduce_op in ("sum", "avg"):
            a, b = draw(BATCH * world_size, M * world_size, K, seed=rank), draw(K, N * world_size, seed=20 + rank)
            want = torch_symm_mem._fused_matmul_reduce_scatter_fallback(a, b, reduce_op, scatter_dim, name)
            same(torch.ops.symm_mem.fused_matmul_reduce_scatter(a, b, reduce_op, scatter_dim, name), want)
    x = draw(2 * world_size, 3, seed=rank)
    want = torch.stack([draw(2 * world_size, 3, seed=r) for r in range(world_size)])
    same(torch.ops.symm_mem._low_contention_all_gather(x, name), want.flatten(0, 1))
    mean = torch.ops.symm_mem._low_contention_reduce_scatter(x, "avg", name)
    torch.testing.assert_close(mean, want.mean(0)[2 * rank : 2 * rank + 2])


def scaled(rank, world_size):
    symm_mem.register()
    name, f8 = dist.group.WORLD.group_name, torch.float8_e4m3fn
    bs = [draw(N, K, seed=30 + i).to(f8).t() for i in range(2)]
    for gather_dim in (0, 1):
        shards = [draw(BATCH, M, K, seed=r).to(f8) for r in range(world_size)]
        # gloo does not carry float8, so what torch's unfused form would give is put together here.
        full = torch.cat([shard.movedim(gather_dim, 0).float() for shard in shards]).to(f8)
        row_scales = [draw(BATCH, M, 1, seed=40 + r).abs() for r in range(world_size)]
        all_row_scales = torch.cat([scale.movedim(gather_dim, 0) for scale in row_scales])
        one, rows = torch.tensor(0.5), all_row_scales.flatten(0, -2).contiguous()
        b_rows = draw(1, N, seed=50).abs()
        for a_scale, flat_scale, b_scale in (
            (one, one, torch.tensor(2.0)),
            (row_scales[rank], rows, b_rows),
            (all_row_scales.movedim(0, gather_dim), rows, b_rows),
        ):
            dtypes = [None if a_scale.numel() == 1 else torch.bfloat16, torch.bfloat16]
            biases = [None, draw(N, dtype=torch.bfloat16)]
            got_a, got = torch.ops.symm_mem.fused_all_gather_scaled_matmul(
                shards[rank], bs, a_scale, [b_scale] * 2, gather_dim, name, biases, [None] * 2, dtypes, [False] * 2
            )
            assert torch.equal(got_a.float(), full.movedim(0, gather_dim).float())
            assert got_a.stride() == full.movedim(0, gather_dim).stride()
            for i, ours in enumerate(got):
                flat = full.flatten(0, -2)
                want = torch._scaled_mm(flat, bs[i], flat_scale, b_scale, biases[i], None, dtypes[i], False)
                want = want.unflatten(0, full.shape[:-1]).movedim(0, gather_dim)
                assert torch.equal(ours.float(), want.float()) and ours.stride() == want.stride()
                assert ours.dtype == want.dtype
    a, b = draw(BATCH * world_size, M, K, seed=rank).to(f8), bs[0]
    for a_scale, b_scale in ((torch.tensor(0.5), torch.tensor(2.0)), (draw(*a.shape[:2], 1).abs(), draw(1, N).abs())):
        arguments = (a, b, a_scale, b_scale, "avg", 0, 0, name, [*a.shape[:-1], N], None, None, torch.bfloat16)
        want = torch_symm_mem._fused_scaled_matmul_reduce_scatter_fallback(*arguments)
        same(torch.ops.symm_mem.fused_scaled_matmul_reduce_scatter(*arguments), want)


def gradients(rank, world_size, compiled):
    """A column-parallel and a row-parallel linear, against one process that holds all of them."""
    symm_mem.register()
    name = dist.group.WORLD.group_name
    x, w1, w2, dy = (
        draw(4 * world_size, K),
        draw(N * world_size, K, seed=1),
        draw(K, N * world_size, seed=2),
        draw(4 * world_size, K, seed=3),
    )
    whole = [t.clone().requires_grad_() for t in (x, w1, w2)]
    want = torch.relu(whole[0] @ whole[1].t()) @ whole[2].t()
    want.backward(dy)

    def layer(x, w1, w2):
        _, (hidden,) = torch.ops.symm_mem.fused_all_gather_matmul(x, [w1.t()], 0, name)
        return torch.ops.symm_mem.fused_matmul_reduce_scatter(torch.relu(hidden), w2.t(), "sum", 0, name)

    mine = [
        t.chunk(world_size, dim)[rank].clone().requires_grad_() for t, dim in zip((x, w1, w2), (0, 0, 1), strict=True)
    ]
    y = (torch.compile(layer, fullgraph=True, backend="aot_eager") if compiled else layer)(*mine)
    y.backward(dy.chunk(world_size, 0)[rank])
    torch.testing.assert_close(y, want.chunk(world_size, 0)[rank], rtol=1e-5, atol=1e-4)
    for part, full, dim in zip(mine, whole, (0, 0, 1), strict=True):
        torch.testing.assert_close(part.grad, full.grad.chunk(world_size, dim)[rank], rtol=1e-5, atol=1e-4)


def refusals(rank, world_size):
    symm_mem.register()
    name = dist.group.WORLD.group_name
    ops = torch.ops.symm_mem
    with pytest.raises(ValueError, match=r"\(3, 5\).*2 ranks"):
        ops.fused_matmul_reduce_scatter(torch.ones(3, 4), torch.ones(4, 5), "sum", 0, name)
    with pytest.raises(ValueError, match="at least 2 dims"):
        ops.fused_all_gather_matmul(torch.ones(3), [torch.ones(3, 4)], 0, name)
    with pytest.raises(ValueError, match="must be a matrix"):
        ops.fused_all_gather_matmul(torch.ones(3, 4), [torch.ones(4)], 0, name)
    with pytest.raises(ValueError, match="A_scale"):
        f8 = torch.ones(4, 16).to(torch.float8_e4m3fn)
        ops.fused_all_gather_scaled_matmul(
            f8, [f8.t()], torch.ones(3, 1), [torch.ones(())], 0, name, [None], [None], [None], [False]
        )


def every_check(rank, world_size):
    gathers_and_scatters(rank, world_size)
    if world_size == 2:
        scaled(rank, world_size)
        refusals(rank, world_size)
    for compiled in (False, True):
        gradients(rank, world_size, compiled)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_fused_collectives_of_torch_on_cpu_tensors(world_size):
    run_ranks(world_size, every_check)
