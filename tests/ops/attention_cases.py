"""Attention cases drawn by a seed from the whole space of shapes, layouts and options, and what each must give.

    check_cases(range(2000))  # [] or complaints in words

draws cases by their numbers, runs each through the row that the table chooses, on one of this machine's instruction
sets, and holds outputs and gradients against the definition in float64 by the accuracy rule of `tpweave.testing`.
"""

import dataclasses
import itertools
import random
from typing import Any

import torch

import tpweave
from tpweave.native import _C
from tpweave.reference.ops.attention import (
    AttentionOptions,
    attention_backward_reference,
    attention_reference,
    dropout_keep,
    visible_keys,
)
from tpweave.reference.ops.attention_decode import CacheOptions, attention_decode_reference
from tpweave.reference.ops.attention_varlen import (
    PackedSequences,
    attention_varlen_backward_reference,
    sequence_options,
)
from tpweave.testing import accuracy

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Products of a case's float64 definition, so that one takes some milliseconds.
MAX_WORK = 2_000_000


@dataclasses.dataclass
class Case:
    """One call: `kind` is dense, varlen, paged or decode; `options` are its keywords, `extra` its other arguments."""

    kind: str
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    options: dict[str, Any]
    extra: dict[str, Any]
    isa: str

    def __str__(self) -> str:
        def shown(x):
            if not isinstance(x, torch.Tensor):
                return repr(x)
            values = f" {x.tolist()}" if x.dtype == torch.int32 and x.numel() < 20 else ""
            return f"{str(x.dtype)[6:]}{tuple(x.shape)}{values}"

        tensors = ", ".join(
            f"{n} {shown(x)} strides {x.stride()}" for n, x in zip("qkv", (self.q, self.k, self.v), strict=True)
        )
        facts = ", ".join(f"{name}={shown(x)}" for name, x in {**self.options, **self.extra}.items())
        return f"{self.kind} on {self.isa}: {tensors}; {facts}"


class Drawer:
    """Random choices of one seed."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)

    def one_of(self, *values):
        return self.random.choice(values)

    def chance(self, share: float) -> bool:
        return self.random.random() < share

    def length(self) -> int:
        top = self.random.choices((0, 1, 8, 40, 130, 300), (1, 2, 4, 6, 6, 2))[0]
        return top if top <= 1 else self.random.randint(2, top)

    def head_dim(self) -> int:
        return self.one_of(16, 32, 64, 64, 128, self.random.randint(1, 64), self.random.randint(1, 256))

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator)

    def uniform(self, *shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=self.generator)

    def laid_out(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Normal numbers in one of the layouts that callers have."""
        layout = self.random.choices(("dense", "heads first", "part", "sparse", "expanded"), (6, 3, 3, 1, 1))[0]
        *outer, heads, depth = shape
        if layout == "heads first":
            return self.normal(*outer[:-1], heads, outer[-1], depth).to(dtype).transpose(-3, -2)
        if layout == "part":
            return self.normal(*outer, heads + 2, depth + 3).to(dtype)[..., 1 : heads + 1, 2 : depth + 2]
        if layout == "sparse":
            return self.normal(*outer, heads, 2 * depth).to(dtype)[..., ::2]
        if layout == "expanded":
            return self.normal(*outer, 1, depth).to(dtype).expand(shape)
        return self.normal(*shape).to(dtype)

    def broadcast(self, full: tuple[int, ...]) -> list[int]:
        return [n if self.chance(0.6) else 1 for n in full]


def _draw_options(draw: Drawer, batch, heads, queries, keys, dtype, decode=False) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if draw.chance(0.5):
        options["causal"] = True
    if draw.chance(0.3):
        options["window"] = (draw.one_of(-1, 0, 3, 17, 64, 500), draw.one_of(-1, 0, 2, 30))
    if draw.chance(0.12):
        options["chunk"] = draw.one_of(1, 5, 16, 64, 100)
    if draw.chance(0.2):
        options["softcap"] = draw.one_of(0.5, 5.0, 50.0)
    if draw.chance(0.15):
        options["softmax_scale"] = draw.one_of(0.0, 0.3, 1.0, -0.2)
    if draw.chance(0.2):
        options["alibi_slopes"] = draw.uniform(*draw.one_of((heads,), (batch, heads))) * 0.3
    if draw.chance(0.2):
        options["sinks"] = (draw.normal(heads) * 2).to(draw.one_of(dtype, torch.float32))
    if decode:
        return options
    full = (batch, heads, queries, keys)
    if draw.chance(0.2):
        bias = draw.normal(*draw.broadcast(full)).to(draw.one_of(dtype, torch.float32))
        if draw.chance(0.4):
            bias = bias.masked_fill(draw.uniform(*bias.shape) < 0.3, float("-inf"))
        options["bias"] = bias
    if draw.chance(0.3):
        shape = [batch, keys] if draw.chance(0.4) else draw.broadcast(full)
        mask = draw.uniform(*shape) < draw.one_of(0.2, 0.7, 0.97)
        if draw.chance(0.3) and mask.numel():
            mask[draw.random.randrange(mask.shape[0])] = False
        options["mask"] = mask
    if draw.chance(0.15):
        options["dropout_p"] = draw.one_of(0.1, 0.1, 0.5, 1.0)
        options["seed"] = draw.random.randrange(2**62)
        options["head_offset"] = draw.one_of(0, 0, 5)
    return options


def _magnify(draw: Drawer, case: Case) -> None:
    """Inputs of magnitude 1e4. Scores stay small where they decide the weights."""
    what = draw.random.choices(("none", "v", "q", "q and k", "all small"), (14, 1, 1, 1, 1))[0]
    if case.extra.get("k_new") is not None or case.k.dtype != case.q.dtype or what == "none":
        return
    if what == "v" and case.q.dtype == torch.float16 and "dropout_p" in case.options:
        return  # beyond fp16's range
    scale = case.options.get("softmax_scale", case.q.shape[-1] ** -0.5)
    factors = {
        "v": (1, 1, 1e4, 1), "q": (1e4, 1, 1, 1e-4), "q and k": (1e4, 1e4, 1, 1e-8), "all small": (1e-4, 1e-4, 1e-4, 1),
    }  # fmt: skip
    by_q, by_k, by_v, by_scale = factors[what]
    case.q, case.k, case.v = case.q * by_q, case.k * by_k, case.v * by_v
    case.options["softmax_scale"] = scale * by_scale


def draw_case(seed: int) -> Case:
    """Case number `seed`."""
    draw = Drawer(seed)
    kind = draw.random.choices(("dense", "varlen", "paged", "decode"), (10, 4, 2, 4))[0]
    dtype = draw.one_of(*DTYPES)
    while True:
        batch, kv_heads, group = draw.one_of(0, 1, 1, 2, 2, 3), draw.one_of(1, 1, 2, 3), draw.one_of(1, 1, 2, 3, 4)
        depth = draw.head_dim()
        depth_v = depth if draw.chance(0.7) else draw.head_dim()
        lengths = [(draw.length(), draw.length()) for _ in range(max(batch, 1))]
        if kind == "dense":
            lengths = lengths[:1] * batch
        elif kind == "decode":
            lengths = [(lengths[0][0] % 9, keys) for _, keys in lengths][:batch]
        products = sum(q * k for q, k in lengths)
        if products * kv_heads * group * (depth + depth_v) <= MAX_WORK:
            break
    lengths = lengths[:batch]
    heads = kv_heads * group
    make = {"dense": _draw_dense, "decode": _draw_decode}.get(kind, _draw_packed)
    case = make(draw, kind, lengths, batch, heads, kv_heads, depth, depth_v, dtype)
    case.isa = draw.one_of(*_C.available_isas())
    _magnify(draw, case)
    return case


def _draw_dense(draw, kind, lengths, batch, heads, kv_heads, depth, depth_v, dtype) -> Case:
    queries, keys = lengths[0] if lengths else (3, 5)
    shapes = ((queries, heads, depth), (keys, kv_heads, depth), (keys, kv_heads, depth_v))
    q, k, v = (draw.laid_out((batch, *shape), dtype) for shape in shapes)
    return Case(kind, q, k, v, _draw_options(draw, batch, heads, queries, keys, dtype), {}, "")


def _offsets(lengths: list[int], first: int) -> torch.Tensor:
    return torch.tensor([first, *lengths]).cumsum(0).to(torch.int32)


def _draw_packed(draw, kind, lengths, batch, heads, kv_heads, depth, depth_v, dtype) -> Case:
    queries, keys = [n for n, _ in lengths], [n for _, n in lengths]
    first = draw.one_of(0, 0, 2)
    longest_q, longest_k = max(queries, default=1) + draw.one_of(0, 3), max(keys, default=1) + draw.one_of(0, 3)
    q = draw.laid_out((sum(queries) + 2 * first, heads, depth), dtype)
    extra = {"cu_seqlens_q": _offsets(queries, first), "cu_seqlens_k": _offsets(keys, first)}
    extra.update(max_seqlen_q=longest_q, max_seqlen_k=longest_k)
    if kind == "paged":
        page_size, pages, table = _draw_pages(draw, batch, max(keys, default=0))
        extra["block_table"] = table
        shapes = [(pages, page_size, kv_heads, d) for d in (depth, depth_v)]
    else:
        shapes = [(sum(keys) + 2 * first, kv_heads, d) for d in (depth, depth_v)]
    k, v = (draw.laid_out(shape, dtype) for shape in shapes)
    if draw.chance(0.3):
        extra["seqused_k"] = torch.tensor([draw.random.randint(0, n) for n in keys], dtype=torch.int32)
    return Case(kind, q, k, v, _draw_options(draw, batch, heads, longest_q, longest_k, dtype), extra, "")


def _draw_pages(draw, batch, longest):
    page_size = draw.one_of(1, 7, 16, 16, 64)
    columns = max(1, -(-longest // page_size))
    pages = batch * columns + 2
    table = torch.randperm(pages, generator=draw.generator)[: batch * columns].view(batch, columns)
    return page_size, pages, table.to(torch.int32)


def _draw_decode(draw, kind, lengths, batch, heads, kv_heads, depth, depth_v, dtype) -> Case:
    queries, keys = (lengths[0][0] if lengths else 1), [n for _, n in lengths]
    q = draw.laid_out((batch, queries, heads, depth), dtype)
    new = draw.one_of(None, None, 1, queries)
    extra: dict[str, Any] = {"num_splits": draw.one_of(0, 0, 1, 3)}
    extra["cache_seqlens"] = torch.tensor(keys, dtype=torch.int32)
    # Rotary tables turn queries of later positions than the new keys', where there are more of them.
    room = max(keys, default=0) + max(new or 0, queries)
    if draw.chance(0.4):
        page_size, pages, extra["block_table"] = _draw_pages(draw, batch, room)
        shapes = [(pages, page_size, kv_heads, d) for d in (depth, depth_v)]
    else:
        entries = batch + draw.one_of(0, 2)
        shapes = [(entries, room + 1, kv_heads, d) for d in (depth, depth_v)]
        if draw.chance(0.4):
            extra["cache_batch_idx"] = torch.randperm(entries, generator=draw.generator)[:batch].to(torch.int32)
    if draw.chance(0.2):
        extra["cache_leftpad"] = torch.tensor([draw.random.randint(0, n) for n in keys], dtype=torch.int32)
    codes = draw.random.choices((None, torch.int8, torch.float8_e4m3fn), (5, 1, 1))[0]
    if codes is None:
        k, v = (draw.normal(*shape).to(dtype) for shape in shapes)
    else:
        k, v = ((draw.normal(*shape) * 30).to(codes) for shape in shapes)
        for name in ("k_scale", "v_scale"):
            extra[name] = draw.uniform(*draw.one_of((1,), (kv_heads,), (batch, kv_heads))) * 0.05 + 0.01
    if new is not None:
        extra["k_new"], extra["v_new"] = (draw.normal(batch, new, kv_heads, d).to(dtype) for d in (depth, depth_v))
        if depth > 1 and draw.chance(0.5):
            angles = draw.normal(room + 1, draw.random.randint(1, depth // 2)) * 3
            extra["rotary_cos"], extra["rotary_sin"] = angles.cos().to(dtype), angles.sin().to(dtype)
            extra["rotary_interleaved"] = draw.chance(0.5)
    return Case(kind, q, k, v, _draw_options(draw, batch, heads, queries, 0, dtype, decode=True), extra, "")


def _attention_options(q, options) -> AttentionOptions:
    settings = {"softmax_scale": q.shape[-1] ** -0.5, **options}
    mask = settings.get("mask")
    if mask is not None and mask.dim() == 2:
        settings["mask"] = mask[:, None, None]
    if "seed" in settings:
        settings["seed"] = torch.tensor([settings["seed"]])
    return AttentionOptions(**settings)


def plain(q, k, v, options, dtype, first_batch=0):
    """Attention with every intermediate rounded to `dtype`, as written by hand: how far an honest one is off."""

    def rounded(x):
        return x.to(dtype).float()

    group = q.shape[2] // k.shape[2]
    q, k, v = q.transpose(1, 2), *(x.transpose(1, 2).repeat_interleave(group, 1) for x in (k, v))
    x = rounded(q @ k.transpose(-1, -2) * options.softmax_scale)
    if options.softcap:
        x = rounded(options.softcap * torch.tanh(rounded(x / options.softcap)))
    queries, keys = x.shape[-2:]
    if options.alibi_slopes is not None:
        distance = (torch.arange(queries)[:, None] + keys - queries - torch.arange(keys)).abs()
        x = rounded(x - options.alibi_slopes[..., None, None] * distance)
    if options.bias is not None:
        x = rounded(x + options.bias)
    for seen in (visible_keys(queries, keys, options.causal, options.window, chunk=options.chunk), options.mask):
        if seen is not None:
            x = x.masked_fill(~seen, float("-inf"))
    sinks = x.new_full((1,), float("-inf")) if options.sinks is None else options.sinks[:, None, None]
    x = torch.cat([x, sinks.expand(*x.shape[:3], 1)], -1)
    top = x.detach().amax(-1, keepdim=True)
    weights = rounded(torch.exp(x - top.masked_fill(top == float("-inf"), 0.0)))
    total = weights.sum(-1, keepdim=True)
    weights = rounded(weights / total.masked_fill(total == 0, 1.0))[..., :-1]
    if options.dropout_p:
        keep = dropout_keep(
            options.seed, options.dropout_p, weights.shape, first_batch=first_batch, first_head=options.head_offset
        )
        weights = rounded(weights * keep / max(1 - options.dropout_p, 1e-30))
    return rounded(weights @ v).transpose(1, 2)


def _expected(case, q, k, v, options, attend):
    """`attend(q, k, v, options, first_batch)` of the whole case: out, and lse where it gives one."""
    options = _attention_options(case.q, options)
    if case.kind == "dense":
        return attend(q, k, v, options, 0)
    sequences = PackedSequences(**case.extra)
    rows = sequences.key_rows(k.shape[1])
    if case.kind == "paged":
        k, v = k.flatten(0, 1), v.flatten(0, 1)
    begin, end = int(sequences.cu_seqlens_q[0]), int(sequences.cu_seqlens_q[-1])
    outs, lses = [q.new_zeros(begin, q.shape[1], v.shape[-1])], [q.new_full((q.shape[1], begin), float("-inf"))]
    for b, (first, last) in enumerate(sequences.query_ranges()):
        part = sequence_options(options, b, last - first, len(rows[b]))
        out, lse = attend(q[None, first:last], k[rows[b]][None], v[rows[b]][None], part, b)
        outs.append(out[0])
        lses.append(lse[0])
    rest = q.shape[0] - end
    outs.append(q.new_zeros(rest, q.shape[1], v.shape[-1]))
    lses.append(q.new_full((q.shape[1], rest), float("-inf")))
    return torch.cat(outs), torch.cat(lses, 1)


def _exact(q, k, v, options, first_batch):
    return attention_reference(q, k, v, options, first_batch=first_batch)


def _rounding(dtype):
    def attend(q, k, v, options, first_batch):
        return plain(q, k, v, options, dtype, first_batch), q.new_zeros(q.shape[0], q.shape[2], q.shape[1])

    return attend


def _ours(case, q, k, v, options):
    if case.kind == "dense":
        return tpweave.attention(q, k, v, **options, return_lse=True)
    extra = dict(case.extra)
    cu = [extra.pop(name) for name in ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")]
    return tpweave.attention_varlen(q, k, v, *cu, **extra, **options, return_lse=True)


TRAINED = ("bias", "sinks")


def _results(case, call, convert, grad_out, grad_lse):
    """(out, lse, gradients) of one way to compute the case, its inputs put through `convert`."""
    leaves = [convert(x).detach().requires_grad_() for x in (case.q, case.k, case.v)]
    trained = {name: convert(case.options[name]).detach().requires_grad_() for name in TRAINED if name in case.options}
    options = {n: convert(x) if n == "alibi_slopes" else x for n, x in case.options.items()}
    out, lse = call(*leaves, {**options, **trained})
    loss = (out.to(grad_out.dtype) * grad_out).sum()
    if grad_lse is not None and lse.requires_grad:
        loss = loss + (lse.masked_fill(torch.isneginf(lse), 0.0).to(grad_out.dtype) * grad_lse).sum()
    wanted = [*leaves, *trained.values()]
    if not loss.requires_grad:  # no sequences
        return out.detach(), lse.detach(), [torch.zeros_like(x) for x in wanted]
    grads = torch.autograd.grad(loss, wanted, allow_unused=True)
    return (
        out.detach(),
        lse.detach(),
        [torch.zeros_like(x) if g is None else g for g, x in zip(grads, wanted, strict=True)],
    )


# Relative errors that fp32 sums of a head dim's products have.
FP32_SUMS = 2.0**-21


def _rounding_effects(case, grad_out, grad_lse, want, want_lse, generator):
    """How far the gradients move in float64 when the forward's results, from which they come, are rounded.

    A backward takes rowsum(dout * out) from dout v^T: what is left may be much smaller than the rounding of either.
    """
    rounded = []
    for x, dtype in ((want, case.q.dtype), (want_lse, torch.float32)):
        signs = torch.randint(2, x.shape, generator=generator) * 2 - 1
        rounded.append(x.to(dtype).double() * (1 + FP32_SUMS * signs))
    doubled = {n: x.double() for n, x in case.options.items() if isinstance(x, torch.Tensor) and x.is_floating_point()}
    options = _attention_options(case.q, {**case.options, **doubled})
    inputs = [x.double() for x in (case.q, case.k, case.v)]
    results = []
    for out, lse in ((want, want_lse), rounded):
        if case.kind == "dense":
            grads = attention_backward_reference(grad_out, grad_lse, *inputs, out, lse, options)
        else:
            sequences = PackedSequences(**case.extra)
            grads = attention_varlen_backward_reference(grad_out, grad_lse, *inputs, out, lse, sequences, options)
        results.append([g for g in grads if g is not None])
    return [(b - a).abs().max().item() if a.numel() else 0.0 for a, b in zip(*results, strict=True)]


def _complaints(name, got, want, same, factor, effect=0.0):
    """`effect` is an error that every implementation has: the bound grows by as many times it as by the same's."""
    want = want.masked_fill(want.abs() > torch.finfo(got.dtype).max, float("inf"))
    same = same if torch.isfinite(same).equal(torch.isfinite(want)) else want.to(got.dtype)
    error, bound, wrong = accuracy(got, want, same, factor=factor)
    return [f"{name}: {wrong}"] if wrong and not 0 < error <= bound + factor * effect else []


def _lse_complaints(got, want, dtype, same=None):
    if not torch.equal(torch.isneginf(got), torch.isneginf(want)):
        return ["lse: -inf elsewhere"]
    seen = ~torch.isneginf(want)
    error = (got[seen].double() - want[seen]).abs() - 1e-5 * want[seen].abs()
    tolerance = 1e-5 if dtype == torch.float32 else 2e-4
    if same is not None and error.numel():
        tolerance += 3 * (same[seen] - want[seen]).abs().max()
    return [f"lse: off by {error.max():.2e}"] if error.numel() and not error.max() <= tolerance else []


def _check_trained(case, with_lse, generator):
    """Complaints of a case with gradients."""
    shape = (*case.q.shape[:-1], case.v.shape[-1])
    grad_out = torch.randn(shape, generator=generator).to(case.q.dtype)
    lse_shape = (shape[0], shape[2], shape[1]) if case.kind == "dense" else (shape[1], shape[0])
    grad_lse = torch.randn(lse_shape, generator=generator) if with_lse else None
    wide = grad_out.double(), None if grad_lse is None else grad_lse.double()
    narrow = grad_out.float(), grad_lse

    def expected(attend):
        return lambda q, k, v, options: _expected(case, q, k, v, options, attend)

    out, lse, grads = _results(case, lambda q, k, v, o: _ours(case, q, k, v, o), lambda x: x, *narrow)
    want, want_lse, want_grads = _results(case, expected(_exact), lambda x: x.double(), *wide)
    same, _, same_grads = _results(case, expected(_rounding(case.q.dtype)), lambda x: x.float(), *narrow)
    if out.dtype != case.q.dtype or lse.dtype != torch.float32:
        return [f"out is {out.dtype}, lse {lse.dtype}"]
    complaints = _complaints("out", out, want, same.to(out.dtype), 2.0) + _lse_complaints(lse, want_lse, out.dtype)
    names = ["dq", "dk", "dv", *(f"d{name}" for name in TRAINED if name in case.options)]
    effects = _rounding_effects(case, *wide, want, want_lse, generator)
    for name, got, ideal, plain_grad, effect in zip(names, grads, want_grads, same_grads, effects, strict=True):
        complaints += _complaints(name, got, ideal, plain_grad.to(got.dtype), 3.0, effect)
    return complaints


def _check_decode(case):
    extra = dict(case.extra)
    batch, kv_heads = case.q.shape[0], case.k.shape[2]
    scales = {n: extra[n].expand(batch, kv_heads) for n in ("k_scale", "v_scale") if n in extra}
    options = _attention_options(case.q, case.options)
    results = []
    for dtype in (torch.float64, case.q.dtype):
        k, v = (x.to(dtype, copy=True) if x.dtype == case.q.dtype else x.clone() for x in (case.k, case.v))
        new = {n: extra[n].to(dtype) for n in ("k_new", "v_new") if n in extra}
        out, lse = attention_decode_reference(
            case.q.to(dtype), k, v, CacheOptions(**{**extra, **scales, **new}), options
        )
        results.append((out, lse, k, v))
    (want, want_lse, *_), (same, same_lse, same_k, same_v) = results
    k, v = case.k.clone(), case.v.clone()
    out, lse = tpweave.attention_decode(case.q, k, v, **extra, **case.options, return_lse=True)
    # What is appended is rounded to the cache's dtype, by a last bit differently where it was turned before.
    complaints = _complaints("out", out, want, same, 3.0) + _lse_complaints(lse, want_lse, case.q.dtype, same_lse)
    for name, cache, like, before in (("k_cache", k, same_k, case.k), ("v_cache", v, same_v, case.v)):
        turned = name == "k_cache" and "rotary_cos" in extra
        touched = like.float() != before.float()
        if not torch.equal(cache.float()[~touched], like.float()[~touched]) and not turned:
            complaints.append(f"{name}: changed where nothing is appended")
        close = torch.finfo(case.q.dtype).eps * 4 if case.k.dtype == case.q.dtype else 0.13
        off = (cache.float() - like.float()).abs() > (close * like.float().abs().clamp(min=1.0) if turned else 0)
        if off.any():
            complaints.append(f"{name}: {int(off.sum())} elements differ")
    return complaints


def complaints(seed: int) -> list[str]:
    """What is wrong with case `seed`, in words."""
    case = draw_case(seed)
    generator = torch.Generator().manual_seed(seed)
    before = _C.active_isa()
    _C.set_active_isa(case.isa)
    try:
        found = _check_decode(case) if case.kind == "decode" else _check_trained(case, seed % 2 == 0, generator)
    finally:
        _C.set_active_isa(before)
    return [f"case {seed}, {case}\n    {'; '.join(found)}"] if found else []


def check_cases(seeds) -> list[str]:
    """Complaints of all cases; memory that torch hands out is filled with NaNs."""
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        return list(itertools.chain.from_iterable(complaints(seed) for seed in seeds))
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = filled
