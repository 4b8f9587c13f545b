"""Compiling kernels for GPUs that are not there: each kernel module lists what to compile in `COMPILE_SPECS`.

    COMPILE_SPECS = [
        CompileSpec(_scale_kernel, {"x_ptr": "*bf16", "count": "i32"}, {"BLOCK": 1024}, num_warps=4),
    ]

`python -m tpweave.kernels.cross_compile` compiles every spec of every kernel module for every target and prints one
line of JSON each. It needs TRITON_INTERPRET unset: interpreted kernels cannot be compiled.
"""

from __future__ import annotations

import argparse
import importlib
import json
import pkgutil
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import tpweave.kernels

# Name -> (backend, architecture, threads a warp, binary that must come out, shared memory a block may have in bytes).
TARGETS: dict[str, tuple[str, int | str, int, str, int]] = {
    "sm_80": ("cuda", 80, 32, "cubin", 163 * 1024),
    "sm_90": ("cuda", 90, 32, "cubin", 227 * 1024),
    "sm_100": ("cuda", 100, 32, "cubin", 227 * 1024),
    "gfx942": ("hip", "gfx942", 64, "hsaco", 64 * 1024),
}


@dataclass(frozen=True)
class CompileSpec:
    """One way in which a kernel is compiled.

    Attributes:
        kernel: the `@triton.jit` function.
        signature: argument -> Triton type, e.g. `"*bf16"`, `"i32"`, `"fp32"`; pointers are taken as 16-byte aligned.
        constants: the constexpr arguments.
        num_warps: as at the launch.
    """

    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    num_warps: int = 4


def compile_for(spec: CompileSpec, target: str) -> dict[str, Any]:
    """Compiles `spec`; returns kernel, target, whether the binary is there, shared memory and its limit in bytes."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    backend, arch, warp_size, binary, shared_limit = TARGETS[target]
    names = spec.kernel.arg_names
    missing = [n for n in names if n not in spec.signature and n not in spec.constants]
    unknown = [n for n in (*spec.signature, *spec.constants) if n not in names]
    if missing or unknown:
        raise ValueError(f"spec of {spec.kernel.__name__}: missing {missing}, unknown {unknown}")
    source = ASTSource(
        spec.kernel,
        signature={name: spec.signature.get(name, "constexpr") for name in names},
        constexprs=dict(spec.constants),
        attrs={
            (i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if spec.signature.get(n, "").startswith("*")
        },
    )
    target_info = GPUTarget(backend, arch, warp_size)
    compiled = triton.compile(source, target=target_info, options={"num_warps": spec.num_warps})
    return {
        "kernel": f"{spec.kernel.__module__}.{spec.kernel.__name__}",
        "target": target,
        "binary": binary,
        "bytes": len(compiled.asm.get(binary, b"")),
        "shared": compiled.metadata.shared,
        "shared_limit": shared_limit,
    }


def kernel_modules() -> list[str]:
    """Every module of tpweave.kernels that holds kernels: those of its sub-packages."""
    walked = pkgutil.walk_packages(tpweave.kernels.__path__, "tpweave.kernels.")
    return sorted(m.name for m in walked if not m.ispkg and m.name.count(".") > 2)


def jit_functions(module: str) -> list[Any]:
    """The kernels that a module launches: its `@triton.jit` functions named `_..._kernel`."""
    values = vars(importlib.import_module(module))
    return [v for name, v in values.items() if name.endswith("_kernel") and hasattr(v, "arg_names")]


def compile_all(targets: list[str]) -> Iterator[dict[str, Any]]:
    """Every spec for every target. Raises ValueError where a kernel has no spec."""
    for name in kernel_modules():
        specs = getattr(importlib.import_module(name), "COMPILE_SPECS", [])
        bare = [f.__name__ for f in jit_functions(name) if all(spec.kernel is not f for spec in specs)]
        if bare:
            raise ValueError(f"{name}: no COMPILE_SPECS entry for {', '.join(bare)}")
        for spec in specs:
            for target in targets:
                yield compile_for(spec, target)


def main() -> None:
    parser = argparse.ArgumentParser(description="Compile every Triton kernel for GPUs that need not be here.")
    parser.add_argument(
        "targets", nargs="*", default=list(TARGETS), help=f"of {', '.join(TARGETS)}; all when none is given"
    )
    for row in compile_all(parser.parse_args().targets):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
