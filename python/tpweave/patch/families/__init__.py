"""The tables of the model families that `tpweave.parallelize` knows, one per file."""

from __future__ import annotations

from tpweave.patch.families.bert import BERT
from tpweave.patch.families.llama import LLAMA
from tpweave.patch.families.mistral import MISTRAL
from tpweave.patch.families.qwen2 import QWEN2
from tpweave.patch.families.qwen3 import QWEN3
from tpweave.patch.family import Family

FAMILIES: dict[str, Family] = {family.name: family for family in (BERT, LLAMA, MISTRAL, QWEN2, QWEN3)}
