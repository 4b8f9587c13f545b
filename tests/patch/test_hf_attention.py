"""attn_implementation="tpweave" against the eager implementation: outputs, losses, gradients, generation."""

import pytest
import torch
from hf_models import PAD, build, decoders, inputs_of, others, padded_text
from torch import nn

import tpweave
from tpweave.patch import hf

TOLERANCE = 1e-5
ROUNDING = 2e-7


def version():
    import transformers

    return tuple(int(part) for part in transformers.__version__.split(".")[:2])


def assert_near(got, want, what, tolerance=TOLERANCE):
    error = (got - want).abs().max().item() / max(want.abs().max().item(), 1e-3) if want.numel() else 0.0
    assert got.shape == want.shape and error <= tolerance, f"{what}: {tuple(got.shape)}, off by {error:.2e}"


def assert_gradients_near(ours, eager, what):
    # Some gradients are zero but for rounding (key biases shift all scores of a query alike): what is left of them is
    # measured against the model's largest.
    floor = 0.05 * max(p.grad.abs().max().item() for p in eager.parameters() if p.grad is not None)
    for (name, own), wanted in zip(ours.named_parameters(), eager.parameters(), strict=True):
        assert (own.grad is None) == (wanted.grad is None), f"{what} {name}"
        if own.grad is not None:
            error = (own.grad - wanted.grad).abs().max().item() / max(wanted.grad.abs().max().item(), floor)
            assert error <= TOLERANCE, f"{what} {name}: off by {error:.2e}"


def tensors_of(output, path=""):
    """(path, tensor) for every tensor in a model's output, but for caches."""
    if isinstance(output, torch.Tensor):
        yield path, output
    elif isinstance(output, dict):
        for name, value in output.items():
            if "past_key_values" not in name:
                yield from tensors_of(value, f"{path}.{name}")
    elif isinstance(output, (tuple, list)):
        for i, value in enumerate(output):
            yield from tensors_of(value, f"{path}.{i}")


def check_losses(eager, ours, inputs, what):
    eager.zero_grad(), ours.zero_grad()
    wanted, got = eager(**inputs), ours(**inputs)
    assert_near(got.loss, wanted.loss, f"{what} loss")
    wanted.loss.backward()
    got.loss.backward()
    assert_gradients_near(ours, eager, what)
    return wanted, got


def generate(model, inputs, **options):
    inputs = {name: x for name, x in inputs.items() if name not in ("labels", "return_loss")}
    with torch.no_grad():
        return model.generate(**inputs, max_new_tokens=8, do_sample=False, pad_token_id=PAD, **options)


@pytest.mark.parametrize("name", decoders())
def test_decoders(name):
    eager, ours = build(name)
    for side in ("right", "left"):
        inputs = padded_text(side)
        seen = inputs["attention_mask"].bool()
        wanted, got = check_losses(eager, ours, inputs, f"{name} {side}")
        assert_near(got.logits[seen], wanted.logits[seen], f"{name} {side} logits")
    one = {key: x[:1] for key, x in inputs.items()}
    caches = [{}, {"cache_implementation": "static"}]
    if name == "llama4" and version() < (5, 20):
        caches.pop()  # Transformers itself raises there, with any implementation
    for batch in (one, inputs):
        for options in caches:
            wanted, got = (generate(model, batch, **options) for model in (eager, ours))
            assert torch.equal(got, wanted), f"{name} {options}: {got.tolist()} instead of {wanted.tolist()}"


@pytest.mark.parametrize("name", others())
def test_other_models(name):
    eager, ours = build(name)
    inputs = inputs_of(name)
    wanted, got = check_losses(eager, ours, inputs, name)
    seen = inputs["attention_mask"].bool() if "attention_mask" in inputs else None
    for (path, mine), (_, theirs) in zip(tensors_of(got), tensors_of(wanted), strict=True):
        if seen is not None and mine.shape[:2] == seen.shape:
            mine, theirs = mine[seen], theirs[seen]
        assert_near(mine, theirs, f"{name} {path}")
    if name in ("whisper", "t5", "llava", "qwen2_5_vl"):
        wanted, got = (generate(model, inputs) for model in (eager, ours))
        assert torch.equal(got, wanted), f"{name}: {got.tolist()} instead of {wanted.tolist()}"


def packed(lengths=(7, 11, 2)):
    """The same tokens one after the other in one row, and as a padded batch."""
    padded = padded_text("right", lengths)
    seen = padded["attention_mask"].bool()
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    return padded, seen, {"input_ids": padded["input_ids"][seen][None], "position_ids": positions}


@pytest.mark.parametrize("name", decoders())
@pytest.mark.parametrize("given", ["position_ids", "cu_seq_lens"])
def test_packed_sequences_equal_padded_ones(name, given, monkeypatch):
    if name == "llama4" and version() < (5, 23):
        pytest.skip("before 5.23 Transformers counts chunks over the whole row, not in each packed sequence")
    _, model = build(name)
    padded, seen, row = packed()
    if given == "cu_seq_lens":
        row = tpweave.pack_padded(padded)
        row.pop("labels")
    calls = count_calls(monkeypatch)
    # Labels are shifted in the model, over the borders too: a loss of our own.
    weight = torch.randn(int(seen.sum()), 61)
    grads = []
    for inputs in ({key: padded[key] for key in ("input_ids", "attention_mask")}, row):
        model.zero_grad()
        calls.clear()
        logits = model(**inputs, use_cache=False).logits
        logits = logits[seen] if inputs is not row else logits[0]
        (logits * weight).sum().backward()
        grads.append((logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}))
    assert calls and set(calls) == {"varlen"}
    (wanted, wanted_grads), (got, got_grads) = grads
    assert_near(got, wanted, name)
    floor = 0.01 * max(grad.abs().max().item() for grad in wanted_grads.values())
    for key, grad in wanted_grads.items():
        error = (got_grads[key] - grad).abs().max().item() / max(grad.abs().max().item(), floor)
        assert error <= TOLERANCE, f"{name} {key}: off by {error:.2e}"


def count_calls(monkeypatch):
    """A list that grows by the kind of each call of attention."""
    calls = []
    dense = hf.attend_local_heads

    def attend(*args, **options):
        calls.append("varlen" if options.get("function") is not None else "dense")
        return dense(*args, **options)

    monkeypatch.setattr(hf, "attend_local_heads", attend)
    return calls


@pytest.mark.parametrize("name", ["bert", "modernbert"])
def test_packed_encoders(name):
    _, model = build(name)
    padded = padded_text("right")
    seen = padded["attention_mask"].bool()
    packed = tpweave.pack_padded(padded)
    assert packed["input_ids"].shape == (1, int(seen.sum()))
    labels = packed.pop("labels")
    wanted = model(input_ids=padded["input_ids"], attention_mask=padded["attention_mask"]).logits
    got = model(**packed).logits
    assert_near(got[0], wanted[seen], name)
    again = tpweave.pad_packed(got, padded["attention_mask"])
    assert_near(again, wanted.masked_fill(~seen[..., None], 0.0), name)
    assert torch.equal(tpweave.pad_packed(labels, padded["attention_mask"], fill=-100), padded["labels"])


def test_images_of_a_tower_are_packed_not_looped(monkeypatch):
    eager, ours = build("qwen2_5_vl")
    inputs = inputs_of("qwen2_5_vl")
    calls = count_calls(monkeypatch)
    tower, pixels = ours.model.visual, {"grid_thw": inputs["image_grid_thw"]}
    wanted = eager.model.visual(inputs["pixel_values"], **pixels)
    for expected in (None, ["varlen", "varlen"]):
        calls.clear()
        got = tower(inputs["pixel_values"], **pixels)
        assert expected is None or calls == expected
        assert_near(got.pooler_output, wanted.pooler_output, "tower")
    # The tower follows when the implementation is changed afterwards.
    ours.set_attn_implementation("sdpa")
    calls.clear()
    tower(inputs["pixel_values"], **pixels)
    assert calls == []
    ours.set_attn_implementation("tpweave")
    tower(inputs["pixel_values"], **pixels)
    assert calls == ["varlen", "varlen"]


def test_ways_to_choose_it(tmp_path):
    import transformers as hf

    eager, _ = build("bert")
    eager.save_pretrained(tmp_path)
    inputs = inputs_of("bert")
    wanted = eager(**inputs).logits[inputs["attention_mask"].bool()]
    models = [
        hf.AutoModelForMaskedLM.from_pretrained(tmp_path, attn_implementation="tpweave"),
        hf.AutoModelForMaskedLM.from_pretrained(tmp_path),
    ]
    models[1].set_attn_implementation("tpweave")
    made = hf.AutoModelForMaskedLM.from_config(eager.config, attn_implementation="tpweave")
    made.load_state_dict(eager.state_dict())
    for model in [*models, made.eval()]:
        assert model.config._attn_implementation == "tpweave"
        assert_near(model(**inputs).logits[inputs["attention_mask"].bool()], wanted, "bert")


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss", "gpt2", "bert", "vit"])
def test_output_attentions(name):
    eager, ours = build(name)
    inputs = padded_text("right") if name in decoders() else inputs_of(name)
    wanted, got = (model(**inputs, output_attentions=True) for model in (eager, ours))
    assert len(got.attentions) == len(wanted.attentions) == 2
    for mine, theirs in zip(got.attentions, wanted.attentions, strict=True):
        rows = (
            inputs["attention_mask"].bool()
            if "attention_mask" in inputs
            else torch.ones(mine.shape[0], mine.shape[2]) > 0
        )
        assert_near(mine.transpose(1, 2)[rows], theirs.transpose(1, 2)[rows], name)


@pytest.mark.parametrize("name", ["llama", "gpt_oss", "llama4", "t5"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(name, reentrant):
    eager, ours = build(name)
    inputs = padded_text("right")
    ours.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    ours.train(), eager.train()
    check_losses(eager, ours, inputs, name)


def test_dropout():
    """Reproducible by torch's seed, the same under gradient checkpointing, other than without, right on average."""
    import transformers as hf

    tpweave.register_attention()
    config = hf.BertConfig(
        vocab_size=61, hidden_size=24, intermediate_size=20, num_hidden_layers=2, num_attention_heads=3,
        pad_token_id=PAD, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.4, attn_implementation="tpweave",
    )  # fmt: skip
    model = hf.BertForMaskedLM(config).train()
    inputs = padded_text("right")

    def run(seed):
        torch.manual_seed(seed)
        model.zero_grad()
        out = model(**inputs)
        out.loss.backward()
        return out.logits.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]

    logits, grads = run(1)
    again, _ = run(1)
    other, _ = run(2)
    assert torch.equal(logits, again) and not torch.equal(logits, other)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    again, again_grads = run(1)
    assert torch.equal(logits, again)
    for mine, theirs in zip(again_grads, grads, strict=True):
        torch.testing.assert_close(mine, theirs)
    q, k, v = (torch.randn(1, 2, 5, 8) for _ in range(3))
    core = nn.Module()
    core.is_causal = False
    mean = sum(tpweave_out(core, q, k, v, dropout=0.4) for _ in range(400)) / 400
    assert (mean - tpweave_out(core, q, k, v)).abs().max() < 0.4


def tpweave_out(*args, **options):
    return hf.attention_forward(*args, None, **options)[0]


def test_masks_of_heads_and_biases():
    """What T5-like and user-made masks hold for each head, against torch's own attention."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    core = nn.Module()
    core.is_causal, core.num_key_value_groups = True, 2
    q, k, v = (torch.randn(2, heads, 6, 8) for heads in (4, 2, 2))
    added = torch.randn(2, 4, 6, 6)
    for mask, bias in (
        (added, None), (added > -1, None), (None, added), (added[:, :1] > -1, added), (added[:, :1], added[:1]),
    ):  # fmt: skip
        bias = None if bias is None else bias.clone().requires_grad_()
        theirs_bias = None if bias is None else bias.detach().clone().requires_grad_()
        got = hf.attention_forward(core, q, k, v, mask, position_bias=bias)[0]
        wanted = sdpa_attention_forward(core, q, k, v, mask, position_bias=theirs_bias)[0]
        assert_near(got, wanted, "output")
        if bias is not None:
            got.square().sum().backward()
            wanted.square().sum().backward()
            assert_near(bias.grad, theirs_bias.grad, "bias")
    with pytest.raises(ValueError, match=r"attention_mask is torch.int64 \(2, 4, 6, 6\)"):
        hf.attention_forward(core, q, k, v, added.long())
    with pytest.raises(ValueError, match="packed sequences with a position bias"):
        cu = torch.tensor([0, 4, 12])
        hf.attention_forward(core, q, k, v, None, position_bias=added, cu_seq_lens_q=cu, cu_seq_lens_k=cu)
