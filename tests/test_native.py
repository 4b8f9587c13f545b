"""The compiled module: which instruction set it uses, its one pool of threads, and how its objects were built."""

import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest
import torch

import tpweave
from tpweave.native import _C, DTYPE_CODES
from tpweave.ops.attention_decode import _CACHE_CODES

ROOT = pathlib.Path(__file__).parent.parent
ISAS = ("portable", "avx2", "avx512", "avx512bf16")
OBJECTS = sorted(ROOT.glob("build/objects*/**/*.o"))


def run(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}, timeout=120
    )


def test_available_isas_are_a_prefix_of_all():
    assert _C.available_isas() == list(ISAS[: len(_C.available_isas())])
    assert _C.active_isa() in _C.available_isas()


@pytest.mark.parametrize("name", _C.available_isas())
def test_environment_forces_an_isa(name):
    out = run("from tpweave.native import _C; print(_C.active_isa())", TPWEAVE_ISA=name)
    assert out.stdout.strip() == name, out.stderr


@pytest.mark.parametrize("name", ["avx1024", "AVX2", *(isa for isa in ISAS if isa not in _C.available_isas())])
def test_unavailable_isa_is_an_error_with_the_choices(name):
    out = run("import torch, tpweave; tpweave.rms_norm(torch.zeros(1, 4), None)", TPWEAVE_ISA=name)
    assert out.returncode == 1
    assert f"instruction set '{name}' is not available here; this machine runs: portable" in out.stderr.splitlines()[-1]
    with pytest.raises(ValueError, match=f"'{name}' is not available"):
        _C.set_active_isa(name)


def test_empty_setting_is_no_setting():
    out = run("from tpweave.native import _C; print(_C.active_isa())", TPWEAVE_ISA="")
    assert out.stdout.strip() in _C.available_isas()


def test_one_openmp_runtime_and_it_is_torchs():
    x = torch.randn(512, 512)
    torch.mm(x, x)
    tpweave.rms_norm(x, None)
    maps = pathlib.Path("/proc/self/maps").read_text()
    runtimes = set(re.findall(r"\S+/lib(?:g|i)?omp[^/\s]*\.so[^/\s]*", maps))
    assert len(runtimes) == 1, runtimes
    assert pathlib.Path(_C.openmp_runtime()).samefile(runtimes.pop())


def test_threads_follow_torch():
    before = torch.get_num_threads()
    try:
        for threads in (1, 3, 2):
            torch.set_num_threads(threads)
            assert _C.max_threads() == threads
    finally:
        torch.set_num_threads(before)


def test_dtype_codes_match_the_native_ones():
    header = (ROOT / "csrc/common/dtype.h").read_text()
    native = {name.lower(): int(code) for name, code in re.findall(r"\bk(\w+) = (\d+)", header)}
    # Codes of caches are no numbers to add: attention_decode alone names them.
    assert native.pop("float8e4m3") == _CACHE_CODES[torch.float8_e4m3fn]
    assert native == {str(dtype).removeprefix("torch."): code for dtype, code in DTYPE_CODES.items()}


def isa_of(path):
    return path.suffixes[0].removeprefix(".") if len(path.suffixes) == 2 else None


@pytest.mark.skipif(not OBJECTS, reason="needs the objects of a build in this checkout")
@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm (binutils)")
def test_units_of_an_isa_share_no_symbol():
    """Of a function that two units define the linker keeps one, perhaps the one compiled for the wider machine."""
    kernels = [path for path in OBJECTS if isa_of(path) in ISAS]
    assert len(kernels) >= len(_C.available_isas())
    for path in kernels:
        out = subprocess.run(
            ["nm", "-C", "--defined-only", "--extern-only", str(path)], check=True, capture_output=True
        )
        symbols = [line.split(maxsplit=2)[2] for line in out.stdout.decode().splitlines()]
        assert symbols, path
        shared = [name for name in symbols if f"tpweave::{isa_of(path)}::" not in name]
        assert not shared, f"{path.relative_to(ROOT)} defines {shared}"


@pytest.mark.skipif(not OBJECTS, reason="needs the objects of a build in this checkout")
def test_portable_units_include_no_intrinsics():
    for path in OBJECTS:
        if isa_of(path) == "portable":
            includes = path.with_suffix(".d").read_text()
            assert "intrin.h" not in includes, path


def test_other_processors_build_the_portable_units_only(monkeypatch):
    code = (
        "import platform, runpy, setuptools; platform.machine = lambda: 'aarch64'; setuptools.setup = lambda **_: None;"
        "print(list(runpy.run_path('setup.py')['BuildExt'].isas()))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert out.stdout.strip() == "['portable']"
