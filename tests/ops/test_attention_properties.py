"""Whatever is thrown at the attention ops, they give what their definition gives, or a ValueError; they never crash.

hypothesis draws calls that are right, nearly right and wrong: dims, ranks, dtypes, devices, offsets that fall, lengths
beyond the cache, pages that do not exist. Each property runs in a process of its own, so that a segmentation fault is
a failure that names the call. The examples are the same in every run.
"""

import multiprocessing
import os
import pathlib
import tempfile
import traceback

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tpweave

settings.register_profile(
    "repeatable", derandomize=True, deadline=None, database=None, max_examples=200,
    suppress_health_check=list(HealthCheck), print_blob=False,
)  # fmt: skip
settings.load_profile("repeatable")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ODD_DTYPES = [torch.float64, torch.int64, torch.bool, torch.complex64, torch.int8]
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 4e-2, torch.float16: 4e-3, torch.float64: 1e-9}
LAST_CALL = "TPWEAVE_TEST_LAST_CALL"


def _run(name, path, pipe):
    os.environ[LAST_CALL] = path
    torch.set_num_threads(1)
    try:
        globals()[name]()
        pipe.send("")
    except BaseException:
        pipe.send(traceback.format_exc())


def isolated(name, timeout=200):
    """Run this module's function `name` in a process of its own; its exception or its death is a failure."""
    context = multiprocessing.get_context("forkserver")
    receiver, sender = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory() as folder:
        call = pathlib.Path(folder, "call")
        process = context.Process(target=_run, args=(name, str(call), sender), daemon=True)
        process.start()
        sender.close()
        try:
            report = receiver.recv() if receiver.poll(timeout) else f"nothing after {timeout} s"
        except EOFError:
            process.join()
            report = f"died with exit code {process.exitcode} in {call.read_text() if call.exists() else 'no call'}"
        finally:
            process.kill()
            process.join()
    assert not report, report


def shown(x):
    if isinstance(x, torch.Tensor):
        values = f" {x.tolist()}" if x.dtype in (torch.int32, torch.int64) and not x.is_meta else ""
        return f"{str(x.dtype)[6:]}{tuple(x.shape)} {x.device.type}{values}"
    return f"[{', '.join(map(shown, x))}]" if isinstance(x, list) else repr(x)


def outcome(op, args, keywords):
    """What a call gives: its results as a tuple, or the ValueError that it raises."""
    facts = ", ".join([*map(shown, args), *(f"{n}={shown(x)}" for n, x in keywords.items())])
    pathlib.Path(os.environ[LAST_CALL]).write_text(f"{op}({facts})")
    try:
        found = getattr(tpweave, op)(*args, **keywords)
    except ValueError as error:
        assert str(error), f"{op}({facts}): no message"
        return error
    except Exception as error:
        raise AssertionError(f"{op}({facts}) raised {type(error).__name__}: {error}") from error
    return found if isinstance(found, tuple) else (found,)


def check(op, args, keywords, written=()):
    """The chosen row and the reference agree; `written` counts the arguments that the op may write to."""
    results = []
    for backend in (None, "reference"):
        given_args = [x.clone() if i in written else x for i, x in enumerate(args)]
        results.append((outcome(op, given_args, {**keywords, "backend": backend}), given_args))
    (got, after), (want, want_after) = results
    if isinstance(want, ValueError) or isinstance(got, ValueError):
        assert isinstance(want, ValueError) and isinstance(got, ValueError), f"{got!r} but {want!r}"
        assert all(same_bytes(after[i], args[i]) for i in written), "a refused call wrote"
        return
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        tolerance = TOLERANCE[a.dtype] if a.dtype == got[0].dtype else TOLERANCE[got[0].dtype]
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)
    for i in written:
        torch.testing.assert_close(after[i].float(), want_after[i].float(), rtol=2e-2, atol=2e-2, equal_nan=True)


def same_bytes(a, b):
    return a.is_meta or torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def normal(seed, shape, dtype):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return x.to(dtype)


@st.composite
def damaged(draw, shapes, dtype):
    """Tensors of these shapes, of which up to two have something that does not fit."""
    shapes, dtypes, metas = [list(shape) for shape in shapes], [dtype] * len(shapes), set()
    for _ in range(draw(st.sampled_from((0, 0, 0, 0, 0, 0, 1, 1, 2)))):
        which = draw(st.integers(0, len(shapes) - 1))
        what = draw(st.sampled_from(("dim", "dim", "dim", "rank", "dtype", "device")))
        if what == "dim" and shapes[which]:
            axis = draw(st.integers(0, len(shapes[which]) - 1))
            shapes[which][axis] = draw(st.integers(0, 9))
        elif what == "rank" and shapes[which]:
            shapes[which] = shapes[which][1:] if draw(st.booleans()) else [1, *shapes[which]]
        elif what == "dtype":
            dtypes[which] = draw(st.sampled_from(DTYPES + ODD_DTYPES))
        elif what == "device":
            metas.add(which)
    tensors = [normal(i, shape, d) for i, (shape, d) in enumerate(zip(shapes, dtypes, strict=True))]
    return [x.to("meta") if i in metas else x for i, x in enumerate(tensors)]


# Values of options, most of them fitting.
WINDOWS = st.sampled_from(
    ((-1, -1), (3, 0), (0, 7), (5, -1), (9, 9), (1000, 1000), (-1, 2), (2, 2), (-2, 0), (1, 2, 3))
)
NUMBERS = {
    "chunk": st.sampled_from((1, 5, 16, 100, 2**40, -1)),
    "softcap": st.sampled_from((0.5, 2.0, 5.0, 30.0, 50.0, 9.0, -1.0, float("nan"), float("inf"))),
    "softmax_scale": st.sampled_from((None, 0.0, 0.5, -0.1)),
}


@st.composite
def options(draw, scores, dtype, *, of_decode=False):
    """Some keywords for scores [B, Hq, Sq, Sk]."""
    batch, heads, _, keys = scores
    found = {"return_lse": True, "causal": draw(st.booleans())}
    if draw(st.booleans()):
        found["window"] = draw(WINDOWS)
    for name, values in NUMBERS.items():
        if draw(st.integers(0, 4)) == 0:
            found[name] = draw(values)
    if draw(st.integers(0, 4)) == 0:
        shape = draw(st.sampled_from(([heads], [heads], [batch, heads], [batch, heads], [heads + 1], [])))
        found["alibi_slopes"] = normal(
            8, shape, draw(st.sampled_from((torch.float32, torch.float32, torch.int64)))
        ).abs()
    if draw(st.integers(0, 4)) == 0:
        found["sinks"] = normal(
            9, draw(st.sampled_from(([heads], [heads], [heads], [heads], [heads + 1], [1, heads]))), dtype
        )
    if of_decode:
        return found
    if draw(st.integers(0, 2)) == 0:
        shape = [draw(st.sampled_from((n, 1, 1, 1, 1, n + 1))) if draw(st.integers(0, 3)) == 0 else n for n in scores]
        found["bias"] = normal(
            10, shape, draw(st.sampled_from((dtype, dtype, torch.float32, torch.float32, torch.int64)))
        )
    if draw(st.integers(0, 2)) == 0:
        shape = draw(
            st.sampled_from(
                (scores, scores, (batch, keys), (batch, keys), (1, 1, 1, keys), (batch, keys + 1), (1,) * 5)
            )
        )
        found["mask"] = normal(11, shape, torch.float32) > -1.0
        if draw(st.integers(0, 9)) == 0:
            found["mask"] = found["mask"].float()
    if draw(st.integers(0, 3)) == 0:
        found["dropout_p"] = draw(st.sampled_from((0.1, 0.5, 0.9, 1.0, 0.3, -0.1, 1.5)))
        found["seed"] = draw(st.sampled_from((0, 5, -1, 2**63 - 1, torch.tensor([3]), torch.zeros(2))))
    return found


@st.composite
def heads_and_dims(draw):
    kv_heads = draw(st.integers(1, 3))
    depth = draw(st.sampled_from((1, 3, 16, 33, 64)))
    return kv_heads * draw(st.integers(1, 3)), kv_heads, depth, draw(st.sampled_from((depth, depth, 1, 20)))


@st.composite
def attention_calls(draw):
    heads, kv_heads, depth, depth_v = draw(heads_and_dims())
    batch, queries, keys = draw(st.integers(0, 3)), draw(st.integers(0, 20)), draw(st.integers(0, 70))
    dtype = draw(st.sampled_from(DTYPES))
    shapes = ((batch, queries, heads, depth), (batch, keys, kv_heads, depth), (batch, keys, kv_heads, depth_v))
    return draw(damaged(shapes, dtype)), draw(options((batch, heads, queries, keys), dtype))


def offsets(draw, batch, top):
    """[B + 1] numbers: mostly offsets into `top` tokens, sometimes anything."""
    numbers = [0, *draw(st.lists(st.integers(0, top), min_size=batch, max_size=batch))]
    if draw(st.integers(0, 11)) > 0:
        numbers.sort()
    elif draw(st.booleans()):
        numbers[draw(st.integers(0, batch))] = draw(st.sampled_from((-1, top + 1, 2**31 - 1, -(2**31))))
    return torch.tensor(numbers, dtype=draw(st.sampled_from((torch.int32,) * 29 + (torch.int64,))))


def integers(draw, shape, top, beyond):
    """int32 in [0, top], sometimes with one of `beyond` among them."""
    x = torch.randint(max(top, 0) + 1, shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))
    if x.numel() and draw(st.integers(0, 7)) == 0:
        x.view(-1)[draw(st.integers(0, x.numel() - 1))] = draw(st.sampled_from(beyond))
    return x.to(torch.int32)


@st.composite
def varlen_calls(draw):
    heads, kv_heads, depth, depth_v = draw(heads_and_dims())
    batch, tokens_q, tokens_k = draw(st.integers(0, 3)), draw(st.integers(0, 30)), draw(st.integers(0, 60))
    dtype = draw(st.sampled_from(DTYPES))
    cu_q, cu_k = offsets(draw, batch, tokens_q), offsets(draw, batch, tokens_k)
    longest = [int(max(cu.diff().tolist(), default=0)) for cu in (cu_q, cu_k)]
    longest = [min(max(0, n), 100) + draw(st.sampled_from((0, 0, 0, 0, 0, 0, 0, 2, 2, -1))) for n in longest]
    extra = {}
    outer = (tokens_k,)
    if draw(st.booleans()):
        page_size = draw(st.sampled_from((1, 4, 16)))
        columns = max(1, -(-tokens_k // page_size)) - draw(st.sampled_from((0, 0, 0, 0, 0, 1)))
        pages = draw(st.integers(1, 12))
        extra["block_table"] = integers(draw, (batch, columns), pages - 1, (-1, pages, 2**31 - 1, -(2**31)))
        outer = (pages, page_size)
    if draw(st.integers(0, 2)) == 0:
        extra["seqused_k"] = integers(draw, (batch,), min(tokens_k, 1), (-1, tokens_k + 1, 2**31 - 1))
    tensors = draw(damaged(((tokens_q, heads, depth), (*outer, kv_heads, depth), (*outer, kv_heads, depth_v)), dtype))
    keywords = draw(options((batch, heads, max(0, longest[0]), max(0, longest[1])), dtype))
    return [*tensors, cu_q, cu_k, *longest], {**keywords, **extra}


@st.composite
def decode_calls(draw):
    heads, kv_heads, depth, depth_v = draw(heads_and_dims())
    batch, queries, room = draw(st.integers(0, 3)), draw(st.integers(0, 4)), draw(st.integers(1, 70))
    dtype = draw(st.sampled_from(DTYPES))
    extra = {}
    outer = (batch + draw(st.integers(0, 1)), room)
    if draw(st.booleans()):
        page_size = draw(st.sampled_from((1, 4, 16)))
        columns, pages = -(-room // page_size), draw(st.integers(1, 12))
        extra["block_table"] = integers(draw, (batch, columns), pages - 1, (-1, pages, 2**31 - 1, -(2**31)))
        outer = (pages, page_size)
    elif draw(st.integers(0, 2)) == 0:
        extra["cache_batch_idx"] = integers(draw, (batch,), outer[0] - 1, (-1, outer[0], 2**31 - 1))
    if draw(st.integers(0, 3)) > 0:
        extra["cache_seqlens"] = integers(draw, (batch,), room - 5, (-1, room, room + 1, 2**31 - 1, -(2**31)))
    if draw(st.integers(0, 4)) == 0:
        extra["cache_leftpad"] = integers(draw, (batch,), 1, (-1, room + 1, 2**31 - 1))
    if draw(st.integers(0, 3)) == 0:
        extra["num_splits"] = draw(st.sampled_from((1, 2, 7, 1000, -1)))
    q, k, v = draw(
        damaged(((batch, queries, heads, depth), (*outer, kv_heads, depth), (*outer, kv_heads, depth_v)), dtype)
    )
    if draw(st.integers(0, 2)) == 0:
        new = draw(st.integers(0, 4))
        extra["k_new"], extra["v_new"] = draw(
            damaged(((batch, new, kv_heads, depth), (batch, new, kv_heads, depth_v)), dtype)
        )
        # Two sequences that append to the same page would race for its last value.
        extra.pop("block_table", None) if batch > 1 else None
        extra.pop("cache_batch_idx", None)
        if draw(st.booleans()) and depth > 1:
            table = (room + draw(st.sampled_from((0, 8, -3))), draw(st.sampled_from((1, depth // 2, depth))))
            extra["rotary_cos"], extra["rotary_sin"] = (
                normal(i, (max(0, table[0]), table[1]), dtype) for i in (20, 21)
            )
    return [q, k, v], {**draw(options((batch, heads, queries, 0), dtype, of_decode=True)), **extra}


@st.composite
def merge_calls(draw):
    batch, queries, heads, depth = (draw(st.integers(0, 4)) for _ in range(4))
    parts, dtype = draw(st.integers(0, 4)), draw(st.sampled_from(DTYPES))
    outs = draw(damaged([(batch, queries, heads, depth)] * parts, dtype)) if parts else []
    lses = draw(damaged([(batch, heads, queries)] * parts, torch.float32)) if parts else []
    if lses and draw(st.booleans()) and lses[0].is_floating_point() and not lses[0].is_meta:
        lses[0] = torch.full_like(lses[0], float("-inf"))
    if draw(st.integers(0, 9)) == 0:
        lses = lses[:-1]
    return [outs, lses], {}


@given(attention_calls())
def attention_property(call):
    check("attention", *call)


@given(varlen_calls())
def varlen_property(call):
    check("attention_varlen", *call)


@given(decode_calls())
def decode_property(call):
    check("attention_decode", *call, written=(1, 2))


@given(merge_calls())
def merge_property(call):
    check("merge_attention", *call)


def dies():
    pathlib.Path(os.environ[LAST_CALL]).write_text("a call")
    os.abort()


@pytest.mark.parametrize("prop", ["attention_property", "varlen_property", "decode_property", "merge_property"])
def test_right_or_a_value_error(prop):
    isolated(prop)


def test_a_crash_is_a_failure():
    with pytest.raises(AssertionError, match="exit code -6 in a call"):
        isolated("dies")
