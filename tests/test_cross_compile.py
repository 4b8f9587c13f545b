"""Every Triton kernel compiles for GPUs of four kinds without one being here, within their memory and registers."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

from tpweave.kernels.cross_compile import TARGETS, CompileSpec, compile_for, jit_functions, kernel_modules


def run_compiler(cache, *arguments):
    # A process of its own: here the kernels are decorated for the interpreter, which cannot compile them.
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache)}
    command = [sys.executable, "-m", "tpweave.kernels.cross_compile", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=560)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """What came out for all targets: the compilers' processes start once."""
    return run_compiler(tmp_path_factory.mktemp("triton"))


@pytest.mark.timeout(600)
@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_compiles(compiled, target):
    rows = [row for row in compiled if row["target"] == target]
    for row in rows:
        assert row["bytes"] > 0, row
        assert row["shared"] <= row["shared_limit"], row
        assert 0 < row["registers"] <= 512 and row["spills"] <= row["spills_limit"], row
    names = {row["kernel"] for row in rows}
    assert {f"{m}.{f.__name__}" for m in kernel_modules() for f in jit_functions(m)} == names


def test_kernels_without_a_spec_are_refused(monkeypatch):
    from tpweave.kernels import cross_compile
    from tpweave.kernels.ops import rope

    monkeypatch.setattr(rope, "COMPILE_SPECS", [])
    with pytest.raises(ValueError, match=r"ops\.rope: no COMPILE_SPECS entry for _rope_kernel"):
        list(cross_compile.compile_all([]))


def test_spec_must_name_every_argument():
    from tpweave.kernels.ops.rope import _rope_kernel

    with pytest.raises(ValueError, match=r"missing \['y_ptr'.*unknown \['z_ptr'\]"):
        compile_for(CompileSpec(_rope_kernel, {"x_ptr": "*bf16", "z_ptr": "*bf16"}, {}), "sm_90")
