"""all_reduce_rms_norm: the kernel against float64, every row on the ranks, lent inputs, codes, gradients, bad calls."""

import pytest
import torch
from comm_support import FLOATS, assert_check, assert_ranks_disagree, cases, numbers, same_bits_on_all_ranks

import tpweave
from tpweave.comm.all_reduce_rms_norm import ALL_REDUCE_RMS_NORM, reduced_norm
from tpweave.reference.comm.all_reduce_rms_norm import reduced_norm_reference
from tpweave.testing import assert_accurate

# The last one travels in several pieces, which three ranks norm by parts.
SHAPES = [(1, 7), (33,), (0, 5), (2, 3, 130), (5, 0), (9, 4096), (70, 2047)]
EPS = 1e-5


@pytest.mark.parametrize("dtype", FLOATS[:3], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_kernel_matches_float64(isa, dtype, ranks):
    for rows, hidden in ((1, 1), (3, 8), (2, 77), (4, 256), (1, 4099)):
        parts, residual = torch.randn(ranks, rows, hidden).to(dtype), torch.randn(rows, hidden).to(dtype)
        for weight in (None, torch.randn(hidden).to(dtype), torch.randn(hidden)):
            for added in (None, residual):
                exact = reduced_norm_reference(list(parts.double()), added, weight, EPS, None)
                same = reduced_norm_reference(list(parts), added, weight, EPS, None)
                got = reduced_norm(parts, added, weight, EPS, None)
                for out, want, plain in zip(got, exact, same, strict=True):
                    assert out.dtype == plain.dtype and out.shape == plain.shape
                    assert_accurate(out, want, plain)


@pytest.mark.parametrize(("quantize", "limit"), [("int8", 127), ("fp8", 448)])
def test_codes_are_the_nearest(isa, quantize, limit):
    rows = torch.randn(6, 1000) * torch.logspace(-6, 6, 1000)
    rows[2], rows[3, ::2] = 0, -rows[3, ::2] * 1e3
    weight = torch.rand(1000) + 0.5
    codes, residual_out, scales = reduced_norm(rows[None], None, weight, EPS, quantize)
    want, _, want_scales = reduced_norm_reference([rows], None, weight, EPS, quantize)
    assert codes.dtype == want.dtype and torch.equal(residual_out, rows)
    torch.testing.assert_close(scales, want_scales, rtol=1e-5, atol=0)
    assert (codes[2].float() == 0).all() and scales[2] == 0
    assert codes[[0, 1, 3, 4, 5]].float().abs().amax(1).eq(limit).all()
    exact = (rows / (rows.double().square().mean(1, keepdim=True) + EPS).sqrt() * weight / scales[:, None]).nan_to_num(
        0
    )
    # Half a step of the code, which for fp8 is 2^-4 of its value and at least 2^-10.
    step = torch.full_like(exact, 0.5) if quantize == "int8" else exact.abs().div(16).clamp(min=2**-10)
    assert ((codes.double() - exact).abs() <= step * 1.0001).all()
    # Neighbouring codes only where the fp32 quotient falls on the other side of the middle.
    assert (codes.float() != want.float()).float().mean() < 1e-3


def test_fp8_codes_are_torchs_for_every_exponent():
    # The row's norm is 1 / scale of its codes: values that need no rounding, and the ties between them.
    values = torch.arange(0, 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    row = torch.cat([values, (values[1:] + values[:-1]) / 2, values.neg()])
    codes, _, _ = reduced_norm(row[None, None], None, None, 0.0, "fp8")
    scaled = row[None] / 448 * 448
    near = (codes.float() - scaled).abs() <= scaled.abs() / 16 + 2**-10
    assert near.all()
    assert (codes.float()[0, : len(values)] == values).all()


def exact_and_plain(shape, dtype, group, step, with_residual, weight):
    parts = [numbers(shape, dtype, rank, step) for rank in range(group.size)]
    residual = numbers(shape, dtype, 77, step) if with_residual else None
    exact = reduced_norm_reference([part.double() for part in parts], residual, weight, EPS, None)
    # What it replaces: it rounds the sum of the ranks and that with the residual.
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    h = total if residual is None else total + residual
    return residual, exact, (tpweave.rms_norm(h, weight, EPS, backend="reference"), h)


def dtypes_of(backend):
    return FLOATS[:3] if backend == "shm" else FLOATS


def norms_are_right(group, backend):
    for dtype in dtypes_of(backend):
        results = []
        for step, shape in enumerate(SHAPES):
            for with_residual in (True, False):
                weight = (None, numbers(shape[-1:], dtype, 99), numbers(shape[-1:], torch.float32, 98))[step % 3]
                residual, exact, plain = exact_and_plain(shape, dtype, group, step, with_residual, weight)
                x = numbers(shape, dtype, group.rank, step)
                before = x.clone()
                got = tpweave.all_reduce_rms_norm(x, residual, weight, EPS, group, backend=backend)
                assert torch.equal(x, before)
                for out, want, same in zip(got, exact, plain, strict=False):
                    assert out.dtype == dtype and out.shape == x.shape
                    if out.numel():
                        assert_accurate(out, want, same)
                results += got
        same_bits_on_all_ranks(group, results)


def codes_are_right(group, backend):
    for step, (quantize, dtype) in enumerate((q, d) for q in ("int8", "fp8") for d in FLOATS[:3]):
        shape = ((3, 70), (330, 1111))[step % 2]
        x, residual = numbers(shape, dtype, group.rank, step), numbers(shape, dtype, 77, step)
        weight = numbers(shape[-1:], dtype, 99)
        got = tpweave.all_reduce_rms_norm(x, residual, weight, EPS, group, quantize=quantize, backend=backend)
        parts = [numbers(shape, dtype, rank, step) for rank in range(group.size)]
        want, want_h, want_scales = reduced_norm_reference(parts, residual, weight, EPS, quantize)
        codes, scales, residual_out = got
        torch.testing.assert_close(scales, want_scales, rtol=1e-5, atol=0)
        torch.testing.assert_close(residual_out, want_h, rtol=0, atol=0)
        assert codes.dtype == want.dtype and (codes.float() != want.float()).float().mean() < 2e-3
        same_bits_on_all_ranks(group, got)


def strided_lent_and_repeated(group, backend):
    lent = group.empty((40, 3000))
    for step in range(30 if backend in (None, "shm") else 6):
        rows, hidden = 1 + 11 * step % 40, 3000 if step % 3 == 0 else 1 + 531 * step % 2000
        wide = [numbers((hidden, rows), torch.float32, rank, step).t() for rank in range(group.size)]
        x, residual = wide[group.rank], numbers((rows, 2 * hidden), torch.float32, 77, step)[:, ::2]
        # Some ranks lend, some do not; what they lend is overwritten at once.
        if step % 3 == 0 and (step % 2 == 0 or group.rank == 0):
            x = lent[:rows].copy_(x)
        weight = numbers((2 * hidden,), torch.float32, 99, step)[::2]
        y, h = tpweave.all_reduce_rms_norm(x, residual, weight, EPS, group, backend=backend)
        lent.fill_(float("nan"))
        exact = sum(part.double() for part in wide) + residual
        torch.testing.assert_close(h.double(), exact, rtol=1e-5, atol=1e-5)
        want = exact * (exact.square().mean(-1, keepdim=True) + EPS).rsqrt() * weight
        torch.testing.assert_close(y.double(), want, rtol=1e-4, atol=1e-4)


def gradients_match_the_undivided_norm(group, backend):
    for with_residual in (True, False):
        xs = [numbers((3, 5, 24), torch.float32, rank).requires_grad_() for rank in range(group.size)]
        residual = numbers((3, 5, 24), torch.float32, 77).requires_grad_() if with_residual else None
        weight = numbers((24,), torch.float32, 99).requires_grad_()
        dy, dh = numbers((3, 5, 24), torch.float32, 50), numbers((3, 5, 24), torch.float32, 51)
        inputs = (xs[group.rank], weight) if residual is None else (xs[group.rank], weight, residual)

        total = sum(xs) if residual is None else sum(xs) + residual
        want_y = tpweave.rms_norm(total, weight, EPS, backend="reference")
        for use_y, use_h in ((1, 1), (1, 0), (0, 1)):
            want = torch.autograd.grad(
                use_y * (want_y * dy).sum() + use_h * (total * dh).sum(), inputs, retain_graph=True
            )
            y, h = tpweave.all_reduce_rms_norm(xs[group.rank], residual, weight, EPS, group, backend=backend)
            outs, grads = zip(*[(o, g) for o, g, use in ((y, dy, use_y), (h, dh, use_h)) if use], strict=True)
            got = torch.autograd.grad(outs, inputs, grads, allow_unused=True)
            for g, w in zip(got, want, strict=True):
                torch.testing.assert_close(torch.zeros_like(w) if g is None else g, w, rtol=1e-4, atol=1e-5)


def opcheck_and_compile(group, backend):
    x = numbers((6, 5), torch.float32, group.rank).requires_grad_()
    residual, weight = numbers((6, 5), torch.float32, 77).requires_grad_(), numbers((5,), torch.float32, 99)
    weight.requires_grad_()
    arguments = (x, residual, weight, EPS, group.name, backend)
    torch.library.opcheck(torch.ops.tpweave.all_reduce_rms_norm.default, arguments)
    quantized = (x.detach(), None, None, EPS, "int8", group.name, backend)
    torch.library.opcheck(torch.ops.tpweave.all_reduce_rms_norm_quantized.default, quantized)

    def step(x):
        y, h = tpweave.all_reduce_rms_norm(x * 2, residual, weight, EPS, group, backend=backend)
        return y + h

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), step(x))
    (want,) = torch.autograd.grad(step(x).square().sum(), x)
    (got,) = torch.autograd.grad(compiled(x).square().sum(), x)
    assert torch.equal(got, want)


def ranks_disagree(group, backend):
    x, rank = torch.ones(4, 8), group.rank

    def call(group, x=x, **more):
        return tpweave.all_reduce_rms_norm(x, x if rank or not more else None, None, EPS, group, backend=backend)

    assert_ranks_disagree(
        group,
        lambda group: call(group, torch.ones(4 + rank, 8)),
        lambda group: call(group, torch.ones(8, 4) if rank else x),
        lambda group: call(group, differs=True),
        lambda group: tpweave.all_reduce_rms_norm(
            x, None, None, EPS, group, quantize="int8" if rank else "fp8", backend=backend
        ),
    )


def a_wrong_rank_is_noticed(group, backend):
    x, weight = numbers((4, 64), torch.float32, group.rank), numbers((64,), torch.float32, 99)
    if group.rank == 0:
        x[2, 17] += 0.5
    _, exact, plain = exact_and_plain((4, 64), torch.float32, group, 0, False, weight)
    y, _ = tpweave.all_reduce_rms_norm(x, None, weight, EPS, group, backend=backend)
    with pytest.raises(AssertionError):
        assert_accurate(y, exact[0], plain[0])


CHECKS = {
    norms_are_right: ("1", "2", "3", "1and3of4"),
    codes_are_right: ("1", "3"),
    strided_lent_and_repeated: ("2", "3"),
    gradients_match_the_undivided_norm: ("1", "2", "1and3of4"),
    opcheck_and_compile: ("2",),
    ranks_disagree: ("3",),
    a_wrong_rank_is_noticed: ("2",),
}


@pytest.mark.parametrize(("check", "backend", "world"), cases(ALL_REDUCE_RMS_NORM, CHECKS))
def test_on_ranks(check, backend, world):
    assert_check(ALL_REDUCE_RMS_NORM, CHECKS, check, backend, world)


def test_bad_input_names_the_values():
    x = torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"weight has shape \(4,\)"):
        tpweave.all_reduce_rms_norm(x, None, torch.ones(4))
    with pytest.raises(ValueError, match=r"residual is torch.float64"):
        tpweave.all_reduce_rms_norm(x, x.double(), None)
    with pytest.raises(ValueError, match=r"'int4'.*'int8' or 'fp8'"):
        tpweave.all_reduce_rms_norm(x, None, None, quantize="int4")
    with pytest.raises(ValueError, match="no gradient with quantize"):
        tpweave.all_reduce_rms_norm(x.requires_grad_(), None, None, quantize="fp8")
    with pytest.raises(ValueError, match="int64"):
        tpweave.all_reduce_rms_norm(torch.ones(2, dtype=torch.int64), None, None)
