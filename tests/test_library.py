"""The short way past torch.library is taken only where nothing could want to see the op."""

import importlib

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import tpweave
from tpweave.library import is_plain_call


def test_plain_tensors_and_parameters_are_plain():
    x, weight = torch.ones(2, 8), torch.nn.Parameter(torch.ones(8))
    assert is_plain_call(x, None)
    assert not is_plain_call(x, weight)
    with torch.no_grad():
        assert is_plain_call(x, weight)
    with torch.inference_mode():
        assert is_plain_call(torch.ones(2))


def test_fake_tensors_get_fake_results():
    with FakeTensorMode():
        x = torch.ones(2, 8)
        assert not is_plain_call(x)
        assert tpweave.rms_norm(x, None).shape == (2, 8)


def test_tracing_sees_the_op():
    traced = torch.fx.experimental.proxy_tensor.make_fx(lambda x: tpweave.layer_norm(x, None, None))(torch.ones(2, 8))
    assert torch.ops.tpweave.layer_norm.default in {node.target for node in traced.graph.nodes}


def test_transforms_see_the_op():
    seen = []

    def function(x):
        seen.append(is_plain_call(x))
        return x

    torch.func.vmap(function)(torch.ones(2, 8))
    torch.func.jvp(function, (torch.ones(2),), (torch.ones(2),))
    with torch.autograd.forward_ad.dual_level():
        function(torch.ones(2))
    assert seen == [False, False, False]


def test_subclasses_see_the_op():
    class Tagged(torch.Tensor):
        pass

    assert not is_plain_call(torch.ones(2).as_subclass(Tagged))


@pytest.mark.parametrize("grad", [False, True])
def test_both_ways_agree(grad):
    x, gate = torch.randn(3, 40, requires_grad=grad), torch.randn(3, 40)
    q, k, angles = torch.randn(1, 3, 2, 8, requires_grad=grad), torch.randn(1, 3, 1, 8), torch.randn(3, 4)
    for call in (
        lambda: tpweave.rms_norm(x, None, residual=gate),
        lambda: tpweave.layer_norm(x, None, None, residual=gate),
        lambda: (tpweave.gated_activation(x, gate),),
        lambda: tpweave.rope(q, k, angles.cos(), angles.sin()),
    ):
        with torch.no_grad():
            plain = call()
        for a, b in zip(plain, call(), strict=True):
            assert torch.equal(a, b) and b.requires_grad == grad


def small_ops():
    x, weight, residual = torch.randn(3, 40), torch.randn(40), torch.randn(3, 40)
    q, k, angles = torch.randn(1, 3, 2, 8), torch.randn(1, 3, 1, 8), torch.randn(3, 4)
    return {
        "rms_norm": (x, weight, 1e-6, residual, None),
        "layer_norm": (x, weight, None, 1e-5, None, None),
        "gated_activation": (x, residual, "silu", None),
        "rope": (q, k, angles.cos(), angles.sin(), False, False, None),
    }


@pytest.mark.parametrize("name", small_ops())
def test_recorded_calls_are_torch_librarys(name):
    op = getattr(importlib.import_module(f"tpweave.ops.{name}"), f"_{name}_op")
    args = small_ops()[name]
    results = []
    for call in (op, op.overload):
        leaves = [a.detach().clone().requires_grad_() if isinstance(a, torch.Tensor) else a for a in args]
        outs = call(*leaves)
        outs = [outs] if isinstance(outs, torch.Tensor) else list(outs)
        assert all(o.requires_grad for o in outs)
        torch.manual_seed(1)
        used = [o for o in outs[:2] if o.numel()]
        wanted = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        grads = torch.autograd.grad(used, wanted, [torch.randn_like(o) for o in used], allow_unused=True)
        results.append([*used, *grads])
    for a, b in zip(*results, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


def test_second_derivatives_are_refused_not_wrong():
    x = torch.randn(3, 8, requires_grad=True)
    (dx,) = torch.autograd.grad(tpweave.rms_norm(x, None).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(dx.sum(), x)


def test_meta_tensors_go_through_the_library():
    op = importlib.import_module("tpweave.ops.rms_norm")._rms_norm_op
    y, _, rstd = op(torch.empty(4, 8, device="meta"), None, 1e-6, None, None)
    assert (y.shape, rstd.shape, y.device.type) == ((4, 8), (1, 4), "meta")


class Seen(TorchDispatchMode):
    """The ops of tpweave that run under it, with their arguments."""

    def __init__(self):
        super().__init__()
        self.calls = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "tpweave":
            self.calls[func] = args
        return func(*args, **(kwargs or {}))


def attend(**options):
    q, k, v = (torch.randn(2, 5, heads, 8, requires_grad=True) for heads in (4, 2, 2))
    return tpweave.attention(q, k, v, causal=True, return_lse=True, **options)


def attend_packed(**options):
    q, k, v = (torch.randn(7, heads, 8, requires_grad=True) for heads in (4, 2, 2))
    cu = torch.tensor([0, 3, 7], dtype=torch.int32)
    return tpweave.attention_varlen(q, k, v, cu, cu, 4, 4, causal=True, return_lse=True, **options)


def trained_options():
    return {"bias": torch.randn(1, 4, 1, 1, requires_grad=True), "sinks": torch.randn(4, requires_grad=True)}


def of_rows(*others):
    return torch.randn(3, 8, requires_grad=True), *(torch.randn(n, requires_grad=True) for n in others)


BACKWARDS = {
    "rms_norm": lambda: tpweave.rms_norm(*of_rows(8), residual=torch.randn(3, 8)),
    "rms_norm without weight": lambda: tpweave.rms_norm(*of_rows(), None),
    "layer_norm": lambda: tpweave.layer_norm(*of_rows(8, 8)),
    "layer_norm without parameters": lambda: tpweave.layer_norm(*of_rows(), None, None),
    "gated_activation": lambda: tpweave.gated_activation(*of_rows(), torch.randn(3, 8, requires_grad=True)),
    "attention": attend,
    "attention with options": lambda: attend(**trained_options(), softcap=3.0, dropout_p=0.3, seed=1),
    "attention_varlen": attend_packed,
    "attention_varlen with options": lambda: attend_packed(**trained_options(), dropout_p=0.3, seed=1),
}


@pytest.mark.parametrize("name", BACKWARDS)
def test_backward_ops_pass_opcheck(name):
    with Seen() as seen:
        outs = BACKWARDS[name]()
        outs = [outs] if isinstance(outs, torch.Tensor) else outs
        sum(out.square().sum() for out in outs).backward()
    backwards = [op for op in seen.calls if op._schema.name.endswith("_bwd")]
    assert [op._schema.name for op in backwards] == [f"tpweave::{name.split()[0]}_bwd"]
    for op in backwards:
        torch.library.opcheck(op, [x.detach() if isinstance(x, torch.Tensor) else x for x in seen.calls[op]])
