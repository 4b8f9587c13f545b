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
import multiprocessing
import pkgutil
import re
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
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
        signature: argument -> Triton type, e.g. `"*bf16"`, `"i32"`, `"fp32"`, a tuple of these, or None for None;
            pointers are taken as 16-byte aligned, `"i32:16"` is a multiple of 16.
        constants: the constexpr arguments.
        num_warps, num_stages: as at the launch.
        targets: names of `TARGETS` that are launched so; all when empty.
        max_spills: bytes that a thread may keep in memory for want of registers.
    """

    kernel: Any
    signature: dict[str, Any]
    constants: dict[str, Any]
    num_warps: int = 4
    num_stages: int | None = None
    targets: tuple[str, ...] = ()
    max_spills: int = 0


def _typed(value: Any, path: tuple[int, ...], constants: dict[Any, Any], attributes: dict[Any, Any]) -> Any:
    """The type of an argument as the compiler takes it; notes its constants and multiples of 16 by their path."""
    if value is None:
        constants[path] = None
        return "constexpr"
    if isinstance(value, tuple):
        types = [_typed(item, (*path, i), constants, attributes) for i, item in enumerate(value)]
        return type(value)(*types) if hasattr(value, "_fields") else tuple(types)
    name, _, multiple = value.partition(":")
    if name.startswith("*") or multiple == "16":
        attributes[path] = [["tt.divisibility", 16]]
    return name


def _resources(compiled: Any, binary: str) -> tuple[int, int]:
    """Registers of a thread, and the bytes of local memory it spills to."""
    if binary == "hsaco":
        text = compiled.asm["amdgcn"]

        def stated(pattern: str) -> int:
            found = re.search(pattern, text)
            if found is None:
                raise RuntimeError(f"the compiler's output does not state {pattern}")
            return int(found[1])

        return stated(r"\.vgpr_count:\s+(\d+)"), stated(r"\.private_segment_fixed_size:\s+(\d+)")
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm[binary])
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage))
    return int(found["REG"]), int(found["STACK"]) + int(found["LOCAL"])


def compile_for(spec: CompileSpec, target: str) -> dict[str, Any]:
    """Compiles `spec`; returns what came out and what it uses, with its limits.

    Returns:
        kernel, target, binary and its bytes; shared memory of a block and spilled memory of a thread, each with its
        limit in bytes; registers of a thread; num_warps.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    backend, arch, warp_size, binary, shared_limit = TARGETS[target]
    names = spec.kernel.arg_names
    missing = [n for n in names if n not in spec.signature and n not in spec.constants]
    unknown = [n for n in (*spec.signature, *spec.constants) if n not in names]
    if missing or unknown:
        raise ValueError(f"spec of {spec.kernel.__name__}: missing {missing}, unknown {unknown}")
    constants: dict[Any, Any] = dict(spec.constants)
    attributes: dict[Any, Any] = {}
    signature = {
        name: _typed(spec.signature[name], (i,), constants, attributes) if name in spec.signature else "constexpr"
        for i, name in enumerate(names)
    }
    source = ASTSource(spec.kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": spec.num_warps}
    if spec.num_stages is not None:
        options["num_stages"] = spec.num_stages
    compiled = triton.compile(source, target=GPUTarget(backend, arch, warp_size), options=options)
    registers, spills = _resources(compiled, binary)
    return {
        "kernel": f"{spec.kernel.__module__}.{spec.kernel.__name__}",
        "target": target,
        "binary": binary,
        "bytes": len(compiled.asm.get(binary, b"")),
        "shared": compiled.metadata.shared,
        "shared_limit": shared_limit,
        "registers": registers,
        "spills": spills,
        "spills_limit": spec.max_spills,
        "num_warps": spec.num_warps,
    }


def kernel_modules() -> list[str]:
    """Every module of tpweave.kernels that holds kernels: those of its sub-packages."""
    walked = pkgutil.walk_packages(tpweave.kernels.__path__, "tpweave.kernels.")
    return sorted(m.name for m in walked if not m.ispkg and m.name.count(".") > 2)


def jit_functions(module: str) -> list[Any]:
    """The kernels that a module launches: its `@triton.jit` functions named `_..._kernel`."""
    values = vars(importlib.import_module(module))
    return [v for name, v in values.items() if name.endswith("_kernel") and hasattr(v, "arg_names")]


def _compile(module: str, index: int, target: str) -> dict[str, Any]:
    return compile_for(importlib.import_module(module).COMPILE_SPECS[index], target)


def compile_all(targets: list[str]) -> Iterator[dict[str, Any]]:
    """Every spec for every target, on all processors. Raises ValueError where a kernel has no spec."""
    jobs = []
    for name in kernel_modules():
        specs = getattr(importlib.import_module(name), "COMPILE_SPECS", [])
        bare = [f.__name__ for f in jit_functions(name) if all(spec.kernel is not f for spec in specs)]
        if bare:
            raise ValueError(f"{name}: no COMPILE_SPECS entry for {', '.join(bare)}")
        for index, spec in enumerate(specs):
            jobs += [(name, index, target) for target in targets if not spec.targets or target in spec.targets]
    if jobs:
        with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
            yield from pool.map(_compile, *zip(*jobs, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description="Compile every Triton kernel for GPUs that need not be here.")
    parser.add_argument(
        "targets", nargs="*", default=list(TARGETS), help=f"of {', '.join(TARGETS)}; all when none is given"
    )
    for row in compile_all(parser.parse_args().targets):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
