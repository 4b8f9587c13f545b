"""Tensor-parallel kernels for PyTorch: fused attention, collectives woven into matmuls, layers that drop in.

Names are imported on first use: `import tpweave` costs little beyond `import torch`.
"""

from __future__ import annotations

import importlib
from typing import Any

from tpweave.version import __version__

_EXPORTS = {
    "SwapReport": "tpweave.patch.report",
    "TPGroup": "tpweave.distributed.group",
    "all_gather": "tpweave.comm.all_gather",
    "all_gather_matmul": "tpweave.comm.all_gather_matmul",
    "all_reduce": "tpweave.comm.all_reduce",
    "all_reduce_": "tpweave.comm.all_reduce",
    "all_reduce_rms_norm": "tpweave.comm.all_reduce_rms_norm",
    "all_to_all": "tpweave.comm.all_to_all",
    "attention": "tpweave.ops.attention",
    "attention_decode": "tpweave.ops.attention_decode",
    "attention_varlen": "tpweave.ops.attention_varlen",
    "dequantize_blocks": "tpweave.ops.quantize_blocks",
    "distributed_topk": "tpweave.comm.distributed_topk",
    "explain": "tpweave.dispatch",
    "gated_activation": "tpweave.ops.gated_activation",
    "init": "tpweave.distributed.group",
    "layer_norm": "tpweave.ops.layer_norm",
    "linear_cross_entropy": "tpweave.comm.linear_cross_entropy",
    "matmul_all_reduce": "tpweave.comm.matmul_all_reduce",
    "matmul_reduce_scatter": "tpweave.comm.matmul_reduce_scatter",
    "merge_attention": "tpweave.ops.merge_attention",
    "pack_padded": "tpweave.patch.packing",
    "pad_packed": "tpweave.patch.packing",
    "parallelize": "tpweave.patch.core",
    "quantize_blocks": "tpweave.ops.quantize_blocks",
    "quantized_all_gather": "tpweave.comm.quantized_all_gather",
    "quantized_all_reduce": "tpweave.comm.quantized_all_reduce",
    "quantized_reduce_scatter": "tpweave.comm.quantized_reduce_scatter",
    "reduce_scatter": "tpweave.comm.reduce_scatter",
    "register_attention": "tpweave.patch.hf",
    "restore": "tpweave.patch.core",
    "rms_norm": "tpweave.ops.rms_norm",
    "rope": "tpweave.ops.rope",
    "vocab_parallel_embedding": "tpweave.comm.vocab_parallel_embedding",
}
_PACKAGES = ("layers",)

__all__ = ["__version__", *_EXPORTS, *_PACKAGES]


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return importlib.import_module(f"tpweave.{name}")
    if name not in _EXPORTS:
        raise AttributeError(f"module 'tpweave' has no attribute '{name}'")
    value = getattr(importlib.import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
