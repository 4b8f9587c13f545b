"""The emulation of AVX-512 against the processor, where it has the instructions."""

import pathlib
import shutil
import subprocess

import pytest

from tpweave.native import _C

HERE = pathlib.Path(__file__).parent
CSRC = HERE.parent / "csrc"
AVX2 = ["-mavx2", "-mfma", "-mf16c", "-mbmi2"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512bf16"]


def results(compiler: str, program: pathlib.Path, flags: list[str]) -> list[str]:
    defines = ["-DTPWEAVE_ISA_NAMESPACE=checked", "-DTPWEAVE_ISA_LEVEL=3"]
    source = HERE / "emulation/check_ops.cpp"
    common = ["-std=c++17", "-O1", "-ffp-contract=off", "-w", *defines, *AVX2, f"-I{CSRC}"]
    subprocess.run([compiler, *common, *flags, str(source), "-o", str(program)], check=True)
    return subprocess.run([program], check=True, capture_output=True, text=True).stdout.splitlines()


def test_emulation_gives_the_bits_of_the_processor(tmp_path):
    with open("/proc/cpuinfo") as cpuinfo:
        has_bf16 = "avx512_bf16" in cpuinfo.read()
    if not has_bf16 or "avx512" not in _C.available_isas():
        pytest.skip("this processor has no AVX-512 BF16 to compare the emulation with")
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    emulated = results(
        compiler, tmp_path / "emulated", ["-DTPWEAVE_EMULATED_AVX512", f"-I{HERE / 'emulation'}", "-Wno-psabi"]
    )
    hardware = results(compiler, tmp_path / "hardware", AVX512)
    assert len(emulated) > 5000
    different = [pair for pair in zip(emulated, hardware, strict=True) if pair[0] != pair[1]]
    assert not different, "\n".join("\n".join(pair) for pair in different[:5])
