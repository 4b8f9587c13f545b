"""A real encoder, all-MiniLM-L6-v2, on sentences of mixed lengths: packed through `tpweave.pack_padded` beside padded.

Texts are the docstrings of Python's standard library and the paragraphs of tpweave's README, in a fixed mixed order; a
batch of them is embedded (mean of the last hidden states). Tokenizing is not counted; packing is. Padding counts as no
work in the rate, so it is the same for all: two flops for each weight and token. The second rival sorts its texts by
length and embeds 4 at a time, as sentence-transformers does, which leaves little padding.
"""

import functools
import importlib
import inspect
import random

import torch

import tpweave
from tpweave.benchmarks.registry import Bench, Case

MODULES = (
    "argparse", "asyncio", "collections", "contextlib", "csv", "dataclasses", "datetime", "decimal", "difflib", "email",
    "fractions", "functools", "heapq", "inspect", "itertools", "json", "logging", "pathlib", "random", "re", "shutil",
    "socket", "statistics", "string", "subprocess", "tarfile", "textwrap", "threading", "typing", "unittest", "uuid",
)  # fmt: skip
MAX_TOKENS = 256
LARGEST_DIFFERENCE = 1e-5


def texts():
    """Docstrings and paragraphs, the same on every run with the same Python."""
    from tpweave.demo.encoder import readme_paragraphs

    found = set(readme_paragraphs())
    for name in MODULES:
        module = importlib.import_module(name)
        owners = [value for _, value in inspect.getmembers(module, inspect.isclass)]
        for owner in [module, *owners]:
            for _, value in inspect.getmembers(owner, inspect.isroutine):
                text = inspect.getdoc(value)
                if text and len(text) > 20:
                    found.add(text)
    return sorted(found)


@functools.cache
def models():
    """(stock model, the same with tpweave's attention, tokenizer)."""
    from transformers import AutoModel, AutoTokenizer

    from tpweave.demo.encoder import model_folder

    tpweave.register_attention()
    folder = model_folder()
    stock, ours = (
        AutoModel.from_pretrained(folder, attn_implementation=name).eval() for name in ("sdpa", "tpweave")
    )  # fmt: skip
    return stock, ours, AutoTokenizer.from_pretrained(folder)


def make(batch):
    stock, ours, tokenizer = models()
    chosen = random.Random(0).sample(texts(), batch)
    tokenize = functools.partial(tokenizer, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
    lengths = tokenize(chosen)["attention_mask"].sum(1)
    order = lengths.argsort().tolist()
    parts = [[chosen[i] for i in order[start : start + 4]] for start in range(0, batch, 4)]
    return {
        "stock": stock, "ours": ours, "tokens": dict(tokenize(chosen)), "lengths": lengths, "order": order,
        "sorted": [dict(tokenize(part)) for part in parts],
    }  # fmt: skip


def mean_of_padded(model, tokens):
    hidden = model(**tokens).last_hidden_state
    mask = tokens["attention_mask"][..., None].to(hidden.dtype)
    return (hidden * mask).sum(1) / mask.sum(1)


def ours(inputs):
    packed = tpweave.pack_padded(inputs["tokens"])
    hidden = inputs["ours"](**packed).last_hidden_state[0]
    return torch.segment_reduce(hidden, "mean", lengths=inputs["lengths"], axis=0)


def padded(inputs):
    return mean_of_padded(inputs["stock"], inputs["tokens"])


def padded_by_length(inputs):
    means = torch.cat([mean_of_padded(inputs["stock"], tokens) for tokens in inputs["sorted"]])
    return means[torch.tensor(inputs["order"]).argsort()]


def check(inputs, result):
    difference = (result - padded(inputs)).abs().max().item()
    assert difference < LARGEST_DIFFERENCE, f"embeddings differ by {difference:.1e}"


def flops(inputs):
    weights = sum(p.numel() for p in inputs["ours"].encoder.parameters() if p.dim() == 2)
    return 2 * weights * int(inputs["lengths"].sum())


BENCH = Bench(
    stem="encoder_packing",
    cases=(Case("MiniLM fp32, 16 texts", {"batch": 16}),),
    make=make,
    ours=ours,
    rivals={"padded Transformers SDPA": padded, "the same, sorted by length": padded_by_length},
    check=check,
    flops=flops,
)
