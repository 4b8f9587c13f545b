"""linear_cross_entropy: both rows against torch's cross entropy of full logits, whole and divided vocabularies."""

import functools
import itertools

import pytest
import torch
import torch.nn.functional as F
from comm_support import assert_check, cases, numbers, same_bits_on_all_ranks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import tpweave
from tpweave.comm import linear_cross_entropy as module
from tpweave.comm.linear_cross_entropy import LINEAR_CROSS_ENTROPY
from tpweave.distributed.splits import even_splits
from tpweave.errors import CollectiveMismatchError
from tpweave.testing import assert_accurate

BACKENDS = [row.name for row in LINEAR_CROSS_ENTROPY.backends]
OPTIONS = {
    "plain": {},
    "smoothing": {"label_smoothing": 0.1},
    "z loss": {"z_loss": 1e-2},
    "softcap": {"softcap": 3.0},
    "all": {"label_smoothing": 0.2, "z_loss": 1e-3, "softcap": 5.0},
}


@pytest.fixture
def small_chunks(monkeypatch):
    """Several chunks of tokens and several blocks of rows, both uneven."""
    monkeypatch.setattr(module, "_CHUNK_ELEMENTS", 100)
    monkeypatch.setattr(module, "_ROW_BLOCK", 10)


def make(dtype, tokens=(2, 7), vocabulary=33, hidden=16, ignored=True):
    x = numbers((*tokens, hidden), dtype, 1)
    weight, bias = numbers((vocabulary, hidden), dtype, 2), numbers((vocabulary,), dtype, 3)
    labels = torch.randint(vocabulary, tokens, generator=torch.Generator().manual_seed(4))
    if ignored:
        labels.view(-1)[[1, 5]] = -100
    return x, weight, bias, labels


def by_torch(hidden, weight, bias, labels, *, label_smoothing=0.0, z_loss=0.0, softcap=0.0):
    """Per-token loss and entropy by autograd's own functions."""
    x = F.linear(hidden, weight, bias).flatten(0, -2)
    if softcap:
        x = softcap * torch.tanh(x / softcap)
    kept = labels.flatten() != -100
    loss = F.cross_entropy(x, labels.flatten(), label_smoothing=label_smoothing, reduction="none")
    loss = loss + z_loss * torch.logsumexp(x, -1) ** 2 * kept
    entropy = torch.distributions.Categorical(logits=x).entropy() * kept
    return loss.view(labels.shape), entropy.view(labels.shape)


def outcomes(function, inputs):
    """Outputs and the gradients of a fixed weighted sum of them."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    outs = function(*leaves)
    loss = sum((out * torch.linspace(0.5, 1.5, out.numel(), dtype=out.dtype).view(out.shape)).sum() for out in outs)
    return [*(out.detach() for out in outs), *torch.autograd.grad(loss, leaves)]


# Not every combination: fp32 takes all options with two reductions, half precision all options with one.
MATCHES = [
    *itertools.product(OPTIONS, [torch.float32], ["mean", "none"], [False, True]),
    *itertools.product(["all"], [torch.float32], ["sum"], [False, True]),
    *itertools.product(OPTIONS, [torch.bfloat16, torch.float16], ["mean"], [True]),
    *itertools.product(["all"], [torch.bfloat16, torch.float16], ["sum", "none"], [False]),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("name", "dtype", "reduction", "entropy"), MATCHES, ids=str)
def test_matches_torch(small_chunks, name, backend, dtype, reduction, entropy):
    options = OPTIONS[name]
    *inputs, labels = make(dtype)
    wide = [x.double() for x in inputs]

    def ours(hidden, weight, bias):
        out = tpweave.linear_cross_entropy(
            hidden, weight, labels, bias=bias, reduction=reduction, return_entropy=entropy, backend=backend, **options
        )
        return out if entropy else (out,)

    def torchs(hidden, weight, bias):
        loss, h = by_torch(hidden, weight, bias, labels, **options)
        count = (labels != -100).sum()
        loss = {"none": loss, "sum": loss.sum(), "mean": loss.sum() / count}[reduction]
        return (loss, h) if entropy else (loss,)

    got, want, same = outcomes(ours, inputs), outcomes(torchs, wide), outcomes(torchs, inputs)
    assert got[0].dtype == torch.float32
    for a, b, c in zip(got, want, same, strict=True):
        # Losses leave in fp32 but come from logits of the inputs' dtype.
        assert_accurate(a, b, c, eps=None if dtype == torch.float32 else 2e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_edges(backend):
    hidden, weight, bias, labels = make(torch.float32)
    nothing = tpweave.linear_cross_entropy(hidden[:0], weight, labels[:0], reduction="none", backend=backend)
    assert nothing.shape == (0, 7)
    ignored = torch.full_like(labels, -100)
    leaf = hidden.clone().requires_grad_()
    total = tpweave.linear_cross_entropy(leaf, weight, ignored, reduction="sum", backend=backend)
    assert total == 0 and torch.equal(torch.autograd.grad(total, leaf)[0], torch.zeros_like(leaf))
    assert torch.isnan(tpweave.linear_cross_entropy(hidden, weight, ignored, backend=backend))
    banned = torch.zeros_like(bias).masked_fill(torch.arange(33) == 32, float("-inf"))
    got = tpweave.linear_cross_entropy(hidden, weight, labels % 32, bias=banned, backend=backend)
    torch.testing.assert_close(
        got, F.cross_entropy((hidden @ weight.t())[..., :32].flatten(0, 1), labels.flatten() % 32)
    )
    # Logits far beyond what exp takes.
    large = tpweave.linear_cross_entropy(hidden * 1e4, weight, labels, backend=backend)
    want = F.cross_entropy((hidden * 1e4 @ weight.t()).flatten(0, 1), labels.flatten())
    torch.testing.assert_close(large, want)


class LargestTensor(TorchDispatchMode):
    """Counts the elements of the largest tensor that is made."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(x.numel() for x in tree_leaves(result) if isinstance(x, torch.Tensor))])
        return result


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_logits_are_never_whole(monkeypatch, reduction):
    monkeypatch.setattr(module, "_CHUNK_ELEMENTS", 4000)
    hidden, weight, _, labels = make(torch.float32, tokens=(300,), vocabulary=500, hidden=8)
    hidden.requires_grad_(), weight.requires_grad_()
    with LargestTensor() as largest:
        tpweave.linear_cross_entropy(hidden, weight, labels, reduction=reduction).sum().backward()
    assert largest.numel == 4000


def test_repeats_are_equal():
    *inputs, labels = make(torch.bfloat16, tokens=(50,), vocabulary=1000)
    first = outcomes(lambda h, w, b: (tpweave.linear_cross_entropy(h, w, labels % 900, bias=b),), inputs)
    again = outcomes(lambda h, w, b: (tpweave.linear_cross_entropy(h, w, labels % 900, bias=b),), inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("options", ["plain", "all"])
def test_gradcheck_in_float64(options, reduction):
    hidden, weight, bias, labels = make(torch.float64, tokens=(6,), vocabulary=9, hidden=3)
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]

    def function(h, w, b):
        return tpweave.linear_cross_entropy(h, w, labels, bias=b, reduction=reduction,
                                            return_entropy=reduction == "none", **OPTIONS[options])  # fmt: skip

    torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_opcheck_and_compile(reduction):
    hidden, weight, bias, labels = make(torch.float32, tokens=(6,))
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    group = tpweave.init()
    call = (*leaves, labels.abs(), group.name, [33], -100, 0.1, 0.0, 0.0)
    if reduction == "none":
        torch.library.opcheck(torch.ops.tpweave.linear_cross_entropy_tokens.default, (*call, None))
    else:
        torch.library.opcheck(torch.ops.tpweave.linear_cross_entropy_sum.default, (*call, True, True, None))

    def function(h, w, b):
        return tpweave.linear_cross_entropy(h, w, labels, bias=b, reduction=reduction)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    got, want = compiled(*leaves), function(*leaves)
    assert torch.equal(got, want)
    for a, b in zip(torch.autograd.grad(got.sum(), leaves), torch.autograd.grad(want.sum(), leaves), strict=True):
        assert torch.equal(a, b)


H, W, Y = torch.zeros(4, 8), torch.zeros(10, 8), torch.zeros(4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("call", "seen"),
    [
        (lambda: tpweave.linear_cross_entropy(H, W[:, :7], Y), r"hidden is \(4, 8\), weight is \(10, 7\)"),
        (lambda: tpweave.linear_cross_entropy(H, W, Y[:3]), r"labels is torch.int64 \(3,\)"),
        (lambda: tpweave.linear_cross_entropy(H, W, Y.float()), "labels is torch.float32"),
        (lambda: tpweave.linear_cross_entropy(H, W.half(), Y), "weight is torch.float16"),
        (lambda: tpweave.linear_cross_entropy(H, W, Y, bias=W[0]), r"bias has shape \(8,\)"),
        (lambda: tpweave.linear_cross_entropy(H, W, Y + 10), r"label 10 is not in \[0, 10\)"),
        (lambda: tpweave.linear_cross_entropy(H, W, Y - 1), r"label -1 is not in"),
        (lambda: tpweave.linear_cross_entropy(H, W, Y, label_smoothing=1.5), "label_smoothing is 1.5"),
        (lambda: tpweave.linear_cross_entropy(H, W, Y, softcap=-1.0), "softcap -1.0"),
        (lambda: tpweave.linear_cross_entropy(H, W, Y, reduction="max"), "reduction is 'max'"),
        (lambda: tpweave.linear_cross_entropy(H, W, Y, splits=[9]), r"splits \[9\] gives rank 0 9"),
        (lambda: tpweave.linear_cross_entropy(H, W[:0], Y), "vocabulary is empty"),
    ],
)
def test_bad_inputs_are_named(call, seen):
    with pytest.raises(ValueError, match=seen):
        call()


def divided(group, parts, inputs, labels, **settings):
    """The op on this rank's rows: outputs, dhidden, and this rank's dweight and dbias."""
    hidden, weight, bias = inputs
    weight, bias = (x.split(parts)[group.rank].contiguous() for x in (weight, bias))
    return outcomes(
        lambda h, w, b: tpweave.linear_cross_entropy(h, w, labels, group, bias=b, return_entropy=True, **settings),
        (hidden, weight, bias),
    )


def uneven(ranks):
    return [33 - 2 * (ranks - 1), *[2] * (ranks - 1)]


def losses_are_those_of_the_whole_vocabulary(group, backend):
    module._CHUNK_ELEMENTS = 300
    *inputs, labels = make(torch.float32)
    wide = [x.double() for x in inputs]
    all_on_last = [0] * (group.size - 1) + [33]
    for splits in (even_splits(33, group.size), all_on_last, uneven(group.size)):
        for options in (OPTIONS["plain"], OPTIONS["all"]):
            settings = {**options, "reduction": "none", "backend": backend}
            got = divided(group, splits, inputs, labels, **settings)
            want = outcomes(functools.partial(by_torch, labels=labels, **options), wide)
            want = [*want[:3], *(x.split(splits)[group.rank] for x in want[3:])]
            same_bits_on_all_ranks(group, got[:3])
            for a, b in zip(got, want, strict=True):
                torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)
            given = divided(group, splits, inputs, labels, splits=splits, **settings)
            assert all(torch.equal(a, b) for a, b in zip(got, given, strict=True))


def the_sum_has_the_same_gradients(group, backend):
    *inputs, labels = make(torch.bfloat16)
    splits = even_splits(33, group.size)
    hidden, weight, bias = inputs
    weight, bias = (x.split(splits)[group.rank].contiguous() for x in (weight, bias))
    got = outcomes(lambda h, w, b: (tpweave.linear_cross_entropy(h, w, labels, group, bias=b, backend=backend),),
                   (hidden, weight, bias))  # fmt: skip
    count = (labels != -100).sum()

    def lone(*x):
        return (by_torch(*x, labels)[0].sum() / count,)

    wants, sames = outcomes(lone, [x.double() for x in inputs]), outcomes(lone, inputs)
    for index, (a, want, same) in enumerate(zip(got, wants, sames, strict=True)):
        if index >= 2:
            want, same = (x.split(splits)[group.rank] for x in (want, same))
        assert_accurate(a, want, same, eps=2e-3)


def ranks_with_other_tokens_disagree(group, backend):
    if group.size == 1:
        return
    hidden, weight, _, labels = make(torch.float32, tokens=(4 + group.rank,), ignored=False)
    with pytest.raises(CollectiveMismatchError):
        tpweave.linear_cross_entropy(hidden, weight, labels, group, backend=backend)


CHECKS = {
    losses_are_those_of_the_whole_vocabulary: ("2", "3", "1and3of4"),
    the_sum_has_the_same_gradients: ("2", "3", "1and3of4"),
}
MISMATCHES = {ranks_with_other_tokens_disagree: ("2", "3")}


@pytest.mark.parametrize(("check", "backend", "world"), cases(LINEAR_CROSS_ENTROPY, CHECKS))
def test_on_ranks(check, backend, world):
    assert_check(LINEAR_CROSS_ENTROPY, CHECKS, check, backend, world)


@pytest.mark.parametrize(("check", "backend", "world"), cases(LINEAR_CROSS_ENTROPY, MISMATCHES))
def test_mismatch(check, backend, world):
    assert_check(LINEAR_CROSS_ENTROPY, MISMATCHES, check, backend, world)
