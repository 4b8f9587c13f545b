"""quantize_blocks: the native codec to the bit of the reference, its error bound, its random rounding, odd numbers."""

import itertools

import pytest
import torch

import tpweave
from tpweave.ops.quantize_blocks import dequantize, quantize
from tpweave.reference.ops.quantize_blocks import NEAREST, BlockFormat, Rounding, dither

FORMATS = [BlockFormat(8, 128), BlockFormat(4, 32), BlockFormat(8, 32), BlockFormat(4, 256), BlockFormat(8, 1024)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
COUNTS = [0, 1, 31, 32, 33, 127, 129, 1000, 2048, 5003]
ROUNDINGS = [NEAREST, Rounding(2**40 + 3, 7)]

pytestmark = pytest.mark.usefixtures("one_thread")


def numbers(count, dtype=torch.float32, step=0):
    """Of magnitudes from block to block that differ by powers of ten."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(count, generator=generator)
    return (x * 10.0 ** (torch.arange(count) // 100 % 7 - 3)).to(dtype)


def same_bits(a, b):
    return torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))


@pytest.mark.parametrize("form", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_native_codec_has_the_bits_of_the_reference(isa, form, dtype):
    for count, rounding in itertools.product(COUNTS, ROUNDINGS):
        x = numbers(count, dtype)
        first = 3 * form.unit
        want = quantize(x, form, rounding, first, backend="reference")
        got = quantize(x, form, rounding, first, backend="cpu")
        assert all(map(same_bits, got, want)), (count, rounding)
        residuals = [numbers(count, step=1), numbers(count, step=1)]
        want, got = (
            quantize(x, form, rounding, first, residual, backend)
            for residual, backend in zip(residuals, ("reference", "cpu"), strict=True)
        )
        assert all(map(same_bits, got, want)) and torch.equal(*residuals), (count, rounding)


@pytest.mark.parametrize("form", FORMATS[:2], ids=str)
@pytest.mark.parametrize(("own", "out"), [(d, d) for d in DTYPES] + [(d, torch.float32) for d in DTYPES[1:]])
def test_native_sums_have_the_bits_of_the_reference(isa, form, own, out):
    for count, sources, average in itertools.product(COUNTS, (1, 2, 5), (False, True)):
        packed = [quantize(numbers(count, step=step), form, backend="reference") for step in range(sources)]
        codes, scales = [c for c, _ in packed], [s for _, s in packed]
        for plain in (None, sources // 2):
            if plain is not None:
                codes[plain] = scales[plain] = None
            mine = None if plain is None else numbers(count, own, step=9)
            want, got = (
                dequantize(codes, scales, count, form, out, mine, average, backend) for backend in ("reference", "cpu")
            )
            assert got.dtype == out and torch.equal(got, want), (count, sources, average, plain)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("form", FORMATS, ids=str)
@pytest.mark.parametrize("seed", [None, 5])
def test_error_is_within_the_bound(form, seed, backend):
    x = numbers(5003)
    codes, scales = tpweave.quantize_blocks(x, *form, seed=seed, backend=backend)
    y = tpweave.dequantize_blocks(codes, scales, x.shape, bits=form.bits, block=form.block, backend=backend)
    step = scales.double().repeat_interleave(form.block)[: x.numel()]
    largest = torch.stack([block.abs().max() for block in x.split(form.block)]).double()
    assert (scales.double() <= largest / form.top * (1 + 2**-7)).all()
    error = (y.double() - x.double()).abs()
    assert (error <= step * ((0.5 if seed is None else 1) + 2**-16)).all()
    # The bound is not idle.
    assert (error > step * (0.49 if seed is None else 0.9)).any()


def test_codes_of_a_known_block():
    x = torch.zeros(32)
    x[:6] = torch.tensor([127, -127, 0.5, 1.5, -2.5, 63.4])
    codes, scales = tpweave.quantize_blocks(x, 8, 32)
    assert scales.tolist() == [1.0] and codes.view(torch.int8)[:7].tolist() == [127, -127, 0, 2, -2, 63, 0]
    x = torch.zeros(32)
    x[:3], x[16:19] = torch.tensor([7.0, -7.0, 1.0]), torch.tensor([-1.0, 2.0, 3.4])
    codes, scales = tpweave.quantize_blocks(x, 4)
    assert scales.tolist() == [1.0] and codes.tolist() == [0xF7, 0x29, 0x31, *[0] * 13]


@pytest.mark.parametrize("form", FORMATS[:2], ids=str)
def test_stochastic_rounding_is_unbiased_and_reproducible(form):
    x = numbers(640)
    total = torch.zeros_like(x, dtype=torch.float64)
    seen = set()
    for seed in range(400):
        codes, scales = tpweave.quantize_blocks(x, *form, seed=seed)
        total += tpweave.dequantize_blocks(codes, scales, x.shape, bits=form.bits, block=form.block)
        seen.add(bytes(codes.tolist()))
    step = scales.double().repeat_interleave(form.block)
    # A mean of 400 roundings is off by a standard deviation of step / 40 at most.
    assert ((total / 400 - x).abs() <= 5 / 40 * step).all()
    assert len(seen) == 400
    assert torch.equal(codes, tpweave.quantize_blocks(x, *form, seed=399)[0])
    assert not torch.equal(codes, tpweave.quantize_blocks(x, *form, seed=399, stream=1)[0])


def test_dither_counts_elements_of_the_whole_stream():
    rounding = Rounding(11, 2)
    whole = dither(rounding, 0, 1000, torch.device("cpu"))
    assert torch.equal(dither(rounding, 300, 450, torch.device("cpu")), whole[300:750])
    assert whole.abs().max() < 0.5 and whole.std().sub(1 / 12**0.5).abs() < 0.02
    far = dither(rounding, 2**40, 128, torch.device("cpu"))
    assert not torch.equal(far, whole[:128])
    # Numbers on a code stay there, whatever the random number.
    x = torch.arange(-127.0, 128.0)
    for seed in range(20):
        codes, scales = tpweave.quantize_blocks(x, 8, 256, seed=seed)
        assert torch.equal(tpweave.dequantize_blocks(codes, scales, x.shape, block=256), x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [8, 4])
def test_blocks_that_are_not_finite_come_back_as_nan(isa, dtype, bits):
    x = numbers(5 * 64 + 7, dtype)
    x[3], x[70], x[140], x[-1] = torch.inf, -torch.inf, torch.nan, torch.nan
    results = []
    for backend in ("cpu", "reference"):
        residual = torch.ones(x.numel())
        codes, scales = quantize(x, BlockFormat(bits, 64), NEAREST, 0, residual, backend)
        y = tpweave.dequantize_blocks(codes, scales, x.shape, dtype, bits=bits, block=64, backend=backend)
        bad = torch.tensor([True, True, True, False, False, True]).repeat_interleave(64)[: x.numel()]
        assert y[bad].isnan().all() and y[~bad].isfinite().all() and residual.isfinite().all()
        results.append((codes, scales, residual))
    assert all(map(same_bits, *results))


def test_zeros_and_the_smallest_numbers():
    tiny = torch.finfo(torch.float32).smallest_normal
    x = torch.zeros(4, 128)
    x[1] = tiny
    x[2] = torch.finfo(torch.float32).max
    x[3, :5] = 1e-42
    for seed, backend in itertools.product((None, 3), ("cpu", "reference")):
        codes, scales = tpweave.quantize_blocks(x, seed=seed, backend=backend)
        y = tpweave.dequantize_blocks(codes, scales, x.shape, backend=backend)
        assert torch.equal(y[0], x[0]) and (y[1] - x[1]).abs().max() <= tiny
        assert (y[3] - x[3]).abs().max() <= tiny and scales.isfinite().all() and scales.min() == tiny


def test_views_and_wide_numbers():
    x = numbers(6 * 50).view(6, 50)
    codes, scales = tpweave.quantize_blocks(x.t())
    assert torch.equal(codes, tpweave.quantize_blocks(x.t().contiguous())[0])
    wide, wide_scales = tpweave.quantize_blocks(x.t().double())
    assert torch.equal(codes, wide) and torch.equal(scales, wide_scales)
    y = tpweave.dequantize_blocks(codes, scales, (50, 6), torch.float64)
    assert y.dtype == torch.float64 and torch.equal(y.float(), tpweave.dequantize_blocks(codes, scales, (50, 6)))


@pytest.mark.parametrize("bits", [8, 4])
def test_opcheck_and_compile(bits):
    x = numbers(300)
    block = {8: 128, 4: 32}[bits]
    torch.library.opcheck(torch.ops.tpweave.quantize_blocks.default, (x, bits, block, 3, 0, None))
    codes, scales = tpweave.quantize_blocks(x, bits)
    args = (codes, scales, [3, 100], torch.bfloat16, bits, block, None)
    torch.library.opcheck(torch.ops.tpweave.dequantize_blocks.default, args)

    def there_and_back(x, seed):
        codes, scales = tpweave.quantize_blocks(x * 2, bits, seed=seed)
        return tpweave.dequantize_blocks(codes, scales, x.shape, bits=bits) + 1

    torch._dynamo.reset()
    compiled = torch.compile(there_and_back, fullgraph=True, backend="aot_eager")
    for seed in range(10):
        with torch._dynamo.config.patch(recompile_limit=2):
            assert torch.equal(compiled(x, seed), there_and_back(x, seed))


def test_bad_input_names_the_values():
    x = torch.ones(40)
    with pytest.raises(ValueError, match="bits is 5"):
        tpweave.quantize_blocks(x, 5)
    with pytest.raises(ValueError, match=r"block is 48.*power of two from 32 to 1024"):
        tpweave.quantize_blocks(x, 8, 48)
    with pytest.raises(ValueError, match="int64"):
        tpweave.quantize_blocks(torch.ones(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="seed is -1"):
        tpweave.quantize_blocks(x, seed=-1)
    with pytest.raises(ValueError, match="stream is 4294967296"):
        tpweave.quantize_blocks(x, stream=2**32)
    codes, scales = tpweave.quantize_blocks(x)
    with pytest.raises(ValueError, match=r"codes are torch\.uint8 \(40,\).*are uint8 \(41,\)"):
        tpweave.dequantize_blocks(codes, scales, (41,))
    with pytest.raises(ValueError, match="uint8"):
        tpweave.dequantize_blocks(codes.char(), scales, (40,))
