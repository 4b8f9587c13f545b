"""Environment variables that tpweave reads. One place, so that `tpweave info` can list them.

TPWEAVE_ISA       portable | avx2 | avx512 | avx512bf16: the CPU kernels to use (read by the C++ side at load)
TPWEAVE_BACKEND   op:backend[,op:backend...]: force one backend for an operation, as `backend=` does
TPWEAVE_TIMEOUT   seconds a collective waits for a late rank (default 300)
TPWEAVE_TRANSPORT shm | pg: what groups use, instead of shared memory wherever all ranks can map it
TRITON_INTERPRET  1 runs Triton kernels on CPU tensors in Triton's interpreter (for tests)
"""

from __future__ import annotations

import os

from tpweave.native import _C

NAMES = ("TPWEAVE_ISA", "TPWEAVE_BACKEND", "TPWEAVE_TIMEOUT", "TPWEAVE_TRANSPORT", "TRITON_INTERPRET")


def forced_backend(op: str) -> str | None:
    """The backend that TPWEAVE_BACKEND names for `op`, or None."""
    # Asked in every call: os.environ takes 1.4 us to say that there is none, getenv 0.2 us.
    setting = os.environ.get("TPWEAVE_BACKEND") if _C.environment_has("TPWEAVE_BACKEND") else None
    if not setting:
        return None
    for item in setting.split(","):
        name, separator, backend = item.partition(":")
        if not separator or not backend:
            raise ValueError(f"TPWEAVE_BACKEND is '{setting}'; it takes op:backend[,op:backend...]")
        if name.strip() == op:
            return backend.strip()
    return None


def timeout_seconds() -> float:
    """How long a collective waits for a late rank."""
    setting = os.environ.get("TPWEAVE_TIMEOUT", "300")
    try:
        seconds = float(setting)
    except ValueError:
        raise ValueError(f"TPWEAVE_TIMEOUT is '{setting}'; it takes a number of seconds") from None
    if not seconds > 0:
        raise ValueError(f"TPWEAVE_TIMEOUT is '{setting}'; it must be more than 0 seconds")
    return seconds


def forced_transport() -> str | None:
    """The transport that TPWEAVE_TRANSPORT names, or None."""
    setting = os.environ.get("TPWEAVE_TRANSPORT")
    if setting not in (None, "", "shm", "pg"):
        raise ValueError(f"TPWEAVE_TRANSPORT is '{setting}'; it takes shm or pg")
    return setting or None


def triton_interpreted() -> bool:
    """Whether Triton kernels run in the interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
