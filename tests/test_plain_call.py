"""Plain calls go straight to their kernels: with the bits of the long way, and only where nothing can tell."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import tpweave
from tpweave.native import _C, HAS_PLAIN_CALLS

pytestmark = pytest.mark.skipif(not HAS_PLAIN_CALLS, reason="this torch has no C interface for DLPack")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def packed(dtype, *, pages=False, **options):
    cu_q, cu_k = (torch.tensor(c, dtype=torch.int32) for c in ([0, 5, 5, 9], [0, 3, 10, 14]))
    q = torch.randn(9, 4, 8).to(dtype)
    k, v = (torch.randn(*((6, 3) if pages else (14,)), 2, d).to(dtype) for d in (8, 8))
    if pages:
        options["block_table"] = torch.tensor([[5, 0, 0], [1, 3, 2], [4, 0, 9]], dtype=torch.int32)
    return (q, k, v, cu_q, cu_k, 5, 7), options


def heads(dtype, batch=2, queries=5, keys=7, dims=(8, 8)):
    q = torch.randn(batch, queries, 4, dims[0]).to(dtype)
    return q, *(torch.randn(batch, keys, 2, d).to(dtype) for d in dims)


def cases(dtype):
    """(name, op, arguments, keywords) of calls that are plain."""

    def x(*shape):
        return torch.randn(*shape).to(dtype)

    angles = torch.randn(5, 3)
    merged = x(3, 2, 34)
    no = torch.zeros(2, 7, dtype=torch.bool)
    mask = no.index_fill(1, torch.tensor([0, 2, 3]), True)
    q, k, v = heads(dtype)
    return [
        ("rms_norm", (x(3, 40), x(40)), {}),
        ("rms_norm", (x(2, 3, 41), torch.randn(41), 1e-3), {"residual": x(2, 3, 41)}),
        ("rms_norm", (x(7), None), {}),
        ("layer_norm", (x(1, 512), x(512), x(512)), {}),
        ("layer_norm", (x(3, 40), None, torch.randn(40)), {"residual": x(3, 40)}),
        ("layer_norm", (x(3, 1), x(1), None, 1), {}),
        ("gated_activation", (x(3, 40), x(3, 40)), {}),
        ("gated_activation", tuple(merged.chunk(2, -1)), {"kind": "gelu_tanh"}),
        ("gated_activation", (merged[..., :17], x(3, 2, 17)), {"kind": "relu"}),
        ("gated_activation", (x(5), x(5)), {"kind": "sigmoid"}),
        ("rope", (x(2, 5, 4, 8), x(2, 5, 2, 8), angles.cos(), angles.sin()), {}),
        ("rope", (x(2, 5, 4, 7), x(2, 5, 1, 7), x(2, 5, 3), x(2, 5, 3)), {"interleaved": True}),
        ("rope", (x(2, 4, 5, 8).transpose(1, 2), x(2, 5, 1, 8), x(1, 5, 6)[..., :3], x(1, 5, 3)), {}),
        ("attention", (q, k, v), {}),
        ("attention", heads(dtype, dims=(8, 5)), {"causal": True, "return_lse": True}),
        ("attention", (q.transpose(1, 2).contiguous().transpose(1, 2), k, v), {"window": (2, 1), "softcap": 3}),
        ("attention", heads(dtype, 1, 300, 300), {"chunk": 64, "softmax_scale": 0.5, "return_lse": True}),
        ("attention", (q, k, v), {"mask": mask, "sinks": torch.randn(4), "alibi_slopes": torch.rand(2, 4)}),
        ("attention", (q, k, v), {"mask": mask[:, None, None], "bias": x(1, 4, 5, 1), "alibi_slopes": torch.rand(4)}),
        ("attention_varlen", *packed(dtype)),
        ("attention_varlen", *packed(dtype, causal=True, return_lse=True)),
        ("attention_varlen", *packed(dtype, pages=True, sinks=torch.randn(4), return_lse=True)),
        ("attention_varlen", *packed(dtype, seqused_k=torch.tensor([3, 0, 2], dtype=torch.int32), window=(1, 0))),
        ("attention_varlen", *packed(dtype, bias=x(3, 1, 5, 7), mask=torch.rand(3, 7) < 0.8)),
    ]  # fmt: skip


NUM_CASES = len(cases(torch.float32))


@pytest.fixture
def taken(monkeypatch):
    """The names of the ops whose short way gave a result, in order."""
    names = []

    def count(name):
        function = getattr(_C, name)

        def call(*args):
            done = function(*args)
            if done is not None:
                names.append(name.removesuffix("_plain"))
            return done

        return call

    for name in [name for name in dir(_C) if name.endswith("_plain")]:
        monkeypatch.setattr(_C, name, count(name))
    return names


def tuple_of(result):
    return (result,) if isinstance(result, torch.Tensor) else result


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_of_the_long_way(taken, isa, dtype):
    for name, args, keywords in cases(dtype):
        op = getattr(tpweave, name)
        taken.clear()
        short = tuple_of(op(*args, **keywords))
        assert taken == [name], (name, keywords)
        long = tuple_of(op(*args, **keywords, backend="cpu"))
        assert taken == [name]
        assert len(short) == len(long)
        for a, b in zip(short, long, strict=True):
            assert (a.dtype, a.shape, a.stride(), a.requires_grad) == (b.dtype, b.shape, b.stride(), False)
            assert torch.equal(a, b), (name, keywords)


def test_results_own_their_memory():
    x = torch.randn(3, 40)
    y = tpweave.gated_activation(x, x)
    assert y.untyped_storage().resizable() and not y.is_inference()
    with torch.inference_mode():
        assert tpweave.gated_activation(x, x).is_inference()


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops.append(func)
        return func(*args, **(kwargs or {}))


def every_op():
    """The first case of each op."""
    return {name: (args, keywords) for name, args, keywords in reversed(cases(torch.float32))}


def of_call(name, change):
    """The op with its tensors of floating point changed."""
    args, keywords = every_op()[name]
    args = [change(a) if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args]
    return lambda: tuple_of(getattr(tpweave, name)(*args, **keywords))


@pytest.mark.parametrize("name", every_op())
def test_who_wants_to_know_is_told(name, taken, monkeypatch):
    plain = of_call(name, lambda x: x)
    wanted = plain()
    assert taken.pop() == name

    class Tagged(torch.Tensor):
        pass

    outs = of_call(name, lambda x: x.clone().requires_grad_())()
    assert all(out.requires_grad for out in outs)
    if name != "attention_varlen":  # it needs its offsets on the same device
        assert all(out.is_meta for out in of_call(name, lambda x: x.to("meta"))())
    of_call(name, lambda x: x.double())()
    assert all(isinstance(out, Tagged) for out in of_call(name, lambda x: x.as_subclass(Tagged))())
    with Seen() as seen:
        plain()
    assert f"tpweave.{name}.default" in map(str, seen.ops)
    monkeypatch.setenv("TPWEAVE_BACKEND", f"{name}:reference")
    of_reference = plain()
    monkeypatch.delenv("TPWEAVE_BACKEND")
    assert not taken, taken
    for a, b in zip(of_reference, wanted, strict=True):
        torch.testing.assert_close(a, b)
    # Recording does not depend on the tensors alone.
    with torch.no_grad():
        of_call(name, lambda x: x.clone().requires_grad_())()
    assert taken.pop() == name


@pytest.mark.parametrize("name", ["rms_norm", "layer_norm", "gated_activation", "rope", "attention"])
def test_compiled_calls_stay_in_the_graph(name, taken):
    torch.compiler.reset()  # the cases share their code
    plain = of_call(name, lambda x: x)
    wanted = plain()
    assert taken.pop() == name
    found = torch.compile(plain, backend="eager", fullgraph=True)()
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(a, b)
    assert not taken


def test_transforms(taken):
    x, weight = torch.randn(4, 3, 40), torch.randn(40)
    wanted = tpweave.layer_norm(x, weight, None)
    taken.clear()
    assert torch.equal(torch.func.vmap(lambda x: tpweave.layer_norm(x, weight, None))(x), wanted)
    # torch.library's gradient is not for torch.func either: it says so.
    with pytest.raises(RuntimeError, match="functorch"):
        torch.func.grad(lambda x: tpweave.layer_norm(x, weight, None).sum())(x)
    assert not taken
    with torch.autograd.forward_ad.dual_level():
        torch.testing.assert_close(tpweave.layer_norm(x, weight, None), wanted)
    assert not taken
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(tpweave.layer_norm(x, weight, None), wanted)


def test_what_does_not_fit_is_refused_in_words(taken):
    x, q = torch.randn(3, 40), torch.randn(1, 3, 2, 8)
    args, _ = packed(torch.float32)
    falling = torch.tensor([0, 3, 2, 14], dtype=torch.int32)
    for call, message in (
        (lambda: tpweave.rms_norm(x, torch.ones(39)), "weight has shape"),
        (lambda: tpweave.layer_norm(x, None, None, residual=x[:2]), "residual is"),
        (lambda: tpweave.gated_activation(x, x, "swish"), "kind is 'swish'"),
        (lambda: tpweave.gated_activation(x, x[:2]), "they must match"),
        (lambda: tpweave.rope(q, q, x[:3, :5], x[:3, :5]), "more than half"),
        (lambda: tpweave.attention(q, q[:, :, :0], q[:, :, :0]), "must be a multiple"),
        (lambda: tpweave.attention(q, q, q, window=(-2, 0)), "window is"),
        (lambda: tpweave.attention(q, q, q, mask=torch.ones(1, 4, dtype=torch.bool)), "mask has shape"),
        (lambda: tpweave.attention_varlen(*args[:5], 4, 7), "max_seqlen_q is 4"),
        (lambda: tpweave.attention_varlen(*args[:4], falling, 5, 12), "never fall"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            call()
    assert not taken


def test_strange_arguments_take_the_long_way():
    for name in [name for name in dir(_C) if name.endswith("_plain")]:
        function = getattr(_C, name)
        assert function() is None
        assert function(*[None] * 30) is None
        assert function(*[torch.ones(2, 2)] * 30) is None
        assert function(*["x", 2**80, 1.5, (), object()] * 6) is None
    sparse = torch.eye(3).to_sparse()
    assert _C.gated_activation_plain(sparse, sparse, 0) is None


def test_errors_inside_are_pythons():
    with pytest.raises(ValueError, match="no kind 9"):
        _C.gated_activation_plain(torch.ones(2), torch.ones(2), 9)
