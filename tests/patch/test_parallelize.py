"""parallelize and restore as such: the report, refusals, errors, and that a failed call changes nothing."""

import copy

import pytest
import torch
from test_families import build, check_gradients
from torch import nn

import tpweave
from tpweave.errors import UnsupportedModelError
from tpweave.layers import LayerNorm
from tpweave.testing import run_ranks

QWEN3_TABLE = """\
qwen3 on rank 0 of 1: 29 modules swapped, 2 adjusted, 6 kept
module                                        class                           what became of it
(model)                                       Qwen3ForCausalLM      kept      its parts are listed below
model                                         Qwen3Model            kept      its parts are listed below
model.embed_tokens                            Embedding             swapped   VocabParallelEmbedding: tokens 0:67 of 67
model.layers                                  ModuleList            kept      its parts are listed below
model.layers.* (x2)                           Qwen3DecoderLayer     kept      its parts are listed below
model.layers.*.self_attn (x2)                 Qwen3Attention        adjusted  query heads 0:6 of 6, KV heads 0:3 of 3
model.layers.*.self_attn.q_proj (x2)          Linear                swapped   ColumnParallelLinear: rows 0:60 of 60
"""


def fingerprint(model):
    return [(name, id(module), type(module)) for name, module in model.named_modules()], {
        name: (id(p), p.detach().clone()) for name, p in model.named_parameters()
    }


def assert_unchanged(model, before):
    modules, parameters = before
    assert fingerprint(model)[0] == modules
    for name, parameter in model.named_parameters():
        assert id(parameter) == parameters[name][0] and torch.equal(parameter, parameters[name][1])
    assert not any(module._forward_pre_hooks or hasattr(module, "tpweave_heads") for module in model.modules())
    assert model.config._attn_implementation != "tpweave"


def test_report():
    report = tpweave.parallelize(build("qwen3"))
    lines = str(report).splitlines()
    assert "\n".join(lines[:9]) + "\n" == QWEN3_TABLE
    assert lines[-1].split()[:4] == ["lm_head", "Linear", "swapped", "ColumnParallelLinear:"]
    assert "summed over ranks" in next(line for line in lines if "q_norm" in line)
    values = report.to_dict()
    assert (values["family"], values["rank"], values["size"]) == ("qwen3", 0, 1)
    assert [values[action] for action in ("swapped", "adjusted", "kept")] == [29, 2, 6]
    assert len(values["modules"]) == 37
    assert values["modules"][2] == {
        "path": "model.embed_tokens", "module": "Embedding", "action": "swapped", "by": "VocabParallelEmbedding",
        "note": "tokens 0:67 of 67",
    }  # fmt: skip


def test_every_module_of_bert_has_a_reason():
    model = build("bert")
    names = [name for name, _ in model.named_modules()]
    report = tpweave.parallelize(model)
    assert [entry.path for entry in report.entries] == names
    notes = {entry.path: (entry.action, entry.note) for entry in report.entries}
    assert notes["bert.embeddings.position_embeddings"] == (
        "kept", "positions and token types: small, and needed whole",
    )  # fmt: skip
    assert notes["bert.encoder.layer.0.attention.self.dropout"] == ("kept", "no parameters")
    assert all(entry.note for entry in report.entries)


def test_twice_and_restoring_what_is_not_parallel():
    model = build("llama")
    with pytest.raises(ValueError, match="LlamaForCausalLM is not parallel"):
        tpweave.restore(model)
    tpweave.parallelize(model)
    with pytest.raises(UnsupportedModelError, match="parallel already"):
        tpweave.parallelize(model)
    with pytest.raises(UnsupportedModelError, match=r"its part 'inner.*parallel already"):
        outer = nn.Module()
        outer.inner, outer.config = model, model.config
        tpweave.parallelize(outer)
    tpweave.restore(model)
    tpweave.parallelize(model)


def test_unknown_models():
    import transformers as hf

    with pytest.raises(UnsupportedModelError, match=r"Sequential, without a Transformers config.*bert, llama, mistral"):
        tpweave.parallelize(nn.Sequential(nn.Linear(2, 2)))
    with torch.device("meta"), pytest.raises(UnsupportedModelError, match=r"embed_tokens\.weight' is on the meta"):
        tpweave.parallelize(build("llama"))
    gpt2 = hf.GPT2Model(hf.GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=11, n_positions=8))
    with pytest.raises(UnsupportedModelError, match="GPT2Model, of model type 'gpt2'; known model types: bert, llama"):
        tpweave.parallelize(gpt2)


def test_refusals_keep_a_unit_whole_and_strict_raises():
    model = build("llama")

    class Wrapped(nn.Linear):
        """As quantised or LoRA layers are."""

    projection = model.model.layers[1].self_attn.v_proj
    model.model.layers[1].self_attn.v_proj = Wrapped(projection.in_features, projection.out_features)
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda module, args, out: out)
    stock = copy.deepcopy(model)
    before = fingerprint(model)
    with pytest.raises(UnsupportedModelError, match=r"layers\.1\.self_attn: v_proj is a .*Wrapped, not an nn\.Linear"):
        tpweave.parallelize(model, strict=True)
    assert_unchanged(model, before)
    report = tpweave.parallelize(model)
    notes = {entry.path: (entry.action, entry.note) for entry in report.entries}
    assert notes["model.layers.1.self_attn"][0] == "kept" and "Wrapped" in notes["model.layers.1.self_attn"][1]
    assert notes["model.layers.1.self_attn.q_proj"] == (
        "kept", "left whole like model.layers.1.self_attn, of which it is a part",
    )  # fmt: skip
    assert "up_proj has hooks" in notes["model.layers.0.mlp"][1]
    assert notes["model.layers.0.self_attn"][0] == "adjusted"
    ids = torch.arange(1, 9)[None]
    torch.testing.assert_close(model(ids).logits, stock(ids).logits, rtol=1e-5, atol=1e-5)


def test_a_tie_that_cannot_be_kept():
    model = build("llama")
    model.lm_head.register_forward_hook(lambda module, args, out: out)
    before = fingerprint(model)
    with pytest.raises(UnsupportedModelError, match=r"lm_head\.weight is tied.*has hooks"):
        tpweave.parallelize(model)
    assert_unchanged(model, before)


def check_disagreements(rank, size):
    model = build("llama", seed=rank)
    before = fingerprint(model)
    with pytest.raises(ValueError, match=r"hold different models: parameter 'model\.embed_tokens\.weight'"):
        tpweave.parallelize(model)
    assert_unchanged(model, before)
    # One rank alone has a problem: the others say so instead of waiting.
    model = build("llama")
    before = fingerprint(model)
    with pytest.raises(ValueError, match=r"need 2 weights" if rank == 1 else r"rank 1 cannot .*need 2 weights"):
        tpweave.parallelize(model, shares=[1] if rank == 1 else None)
    assert_unchanged(model, before)


def check_stock_attention(rank, size):
    """attention=False keeps sdpa, and raises where it could not take the heads."""
    stock, model = build("llama"), build("llama")
    report = tpweave.parallelize(model, attention=False)
    assert model.config._attn_implementation == "sdpa" and report.count("adjusted") == 2
    ids = torch.arange(1, 13).view(2, 6)
    torch.testing.assert_close(model(ids).logits, stock(ids).logits, rtol=1e-5, atol=1e-5)
    tpweave.restore(model)
    before = fingerprint(model)
    with pytest.raises(UnsupportedModelError, match=r"rank 0 would have 5 query heads over 2.*attention=True"):
        tpweave.parallelize(model, attention=False, shares=[5, 1])
    assert_unchanged(model, before)


def check_dropout(rank, size):
    """In training, every rank drops what one process would, whatever heads it has."""
    model = build("bert")
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.3
    tpweave.register_attention()
    stock = copy.deepcopy(model)
    stock.set_attn_implementation("tpweave")
    tpweave.parallelize(model)
    ids = torch.arange(1, 13).view(2, 6)
    results = []
    for trained in (stock, model):
        torch.manual_seed(3)
        results.append(trained(ids).logits)
        results[-1].square().sum().backward()
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-5)
    check_gradients(model, stock, "dropout")
    assert not torch.equal(results[1], model(ids).logits)


def check_norms_are_shared(rank, size):
    model = build("bert")
    weight = model.bert.embeddings.LayerNorm.weight
    tpweave.parallelize(model)
    assert isinstance(model.bert.embeddings.LayerNorm, LayerNorm) and model.bert.embeddings.LayerNorm.weight is weight


def check_other_heads(rank, size):
    """A BERT decoder with cross-attention, and a Llama with a task head: what is not in the tables stays and works."""
    import transformers as hf

    torch.manual_seed(0)
    common = {"vocab_size": 31, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 1, "pad_token_id": 0}
    bert = hf.BertConfig(
        **common, num_attention_heads=4, is_decoder=True, add_cross_attention=True, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    llama = hf.LlamaConfig(**common, num_attention_heads=4, num_key_value_heads=2, num_labels=3)
    ids, encoded = torch.arange(1, 13).view(2, 6), torch.randn(2, 5, 24)
    seen = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    for stock, inputs in (
        (hf.BertLMHeadModel(bert), {"encoder_hidden_states": encoded, "encoder_attention_mask": seen}),
        (hf.LlamaForSequenceClassification(llama), {}),
    ):
        model = copy.deepcopy(stock)
        report = tpweave.parallelize(model, strict=True)
        assert report.count("adjusted") == (2 if inputs else 1)
        wanted, got = stock(ids, **inputs).logits, model(ids, **inputs).logits
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
        wanted.square().sum().backward()
        got.square().sum().backward()
        check_gradients(model, stock, type(stock).__name__)


def check_all(rank, size):
    check_other_heads(rank, size)
    check_disagreements(rank, size)
    check_stock_attention(rank, size)
    check_dropout(rank, size)
    check_norms_are_shared(rank, size)


def test_several_ranks():
    run_ranks(2, check_all)
    run_ranks(5, check_dropout)
