"""flash-attn 2.8's names on tpweave's attention, on CPU and GPU tensors.

    from tpweave.compat import flash_attn
    out = flash_attn.flash_attn_func(q, k, v, causal=True)

or, for code that itself says `from flash_attn import ...`:

    from tpweave.compat import flash_attn
    flash_attn.install()

Order of arguments, return values, and the shape and dtype of the log-sum-exp are flash-attn's. What differs: fp32 is
taken too, head dims and page sizes need not be multiples of anything, the log-sum-exp is differentiable, every backward
is deterministic, and dropout is drawn from torch's default CPU generator.
"""

from __future__ import annotations

import importlib
import sys

from tpweave.compat.flash_attn.flash_attn_interface import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)

__version__ = "2.8.3"  # of flash-attn, whose interface this is

__all__ = [
    "__version__",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "install",
    "uninstall",
]

_SUBMODULES = (
    "bert_padding",
    "flash_attn_interface",
    "layers",
    "layers.rotary",
    "ops",
    "ops.triton",
    "ops.triton.rotary",
)


def install() -> None:
    """Make `import flash_attn` and its submodules give these names, in this process, until `uninstall`.

    Raises:
        RuntimeError: another flash_attn has been imported already.

    Example:
        >>> from tpweave.compat import flash_attn
        >>> flash_attn.install()
        >>> from flash_attn.bert_padding import unpad_input
    """
    ours = sys.modules[__name__]
    present = sys.modules.get("flash_attn", ours)
    if present is not ours:
        raise RuntimeError(f"flash_attn has been imported already, from {getattr(present, '__file__', 'somewhere')}")
    modules = {f"flash_attn.{name}": importlib.import_module(f"{__name__}.{name}") for name in _SUBMODULES}
    sys.modules.update(modules, flash_attn=ours)


def uninstall() -> None:
    """Undo `install`: `import flash_attn` looks for the package again. Does nothing where it was not installed."""
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "flash_attn" and module.__name__.startswith(__name__):
            del sys.modules[name]
