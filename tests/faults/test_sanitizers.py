"""The shm protocol, ranks as threads over one arena, under ThreadSanitizer (every read of shared memory is ordered) and
under AddressSanitizer with UndefinedBehaviorSanitizer (no access outside of what was allocated)."""

import concurrent.futures
import pathlib
import platform
import shutil
import subprocess

import pytest

ROOT = pathlib.Path(__file__).parents[2]
SOURCES = [
    "csrc/symm_mem/arena.cpp", "csrc/symm_mem/communicator.cpp", "csrc/symm_mem/heap.cpp", "csrc/symm_mem/peers.cpp",
    "csrc/cpu/comm/all_gather.cpp", "csrc/cpu/comm/all_reduce.cpp", "csrc/cpu/comm/all_to_all.cpp",
    "csrc/cpu/comm/reduce_scatter.cpp", "csrc/common/cpu_features.cpp", "tests/faults/shm_stress.cpp",
]  # fmt: skip
KERNEL = "csrc/cpu/comm/all_reduce_kernel.cpp"
# Every table must link; the one for any machine runs.
ISAS = ("portable", "avx2", "avx512", "avx512bf16") if platform.machine() in ("x86_64", "AMD64") else ("portable",)
FLAGS = ["-std=c++17", "-O1", "-pthread", f"-I{ROOT / 'csrc'}"]


def run(command, **kwargs):
    return subprocess.run(command, capture_output=True, text=True, **kwargs)


SANITIZERS = {"thread": "thread", "address": "address,undefined"}


@pytest.fixture(scope="module", params=SANITIZERS)
def stress(request, tmp_path_factory):
    sanitize = f"-fsanitize={SANITIZERS[request.param]}"
    compiler = next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)
    if compiler is None:
        pytest.skip("no C++ compiler")
    directory = tmp_path_factory.mktemp("stress")
    (directory / "probe.cpp").write_text("int main() { return 0; }")
    probe = [compiler, sanitize, str(directory / "probe.cpp"), "-o", str(directory / "probe")]
    if run(probe).returncode != 0 or run([str(directory / "probe")]).returncode != 0:
        pytest.skip(f"the compiler's {sanitize} does not work here")

    def compile_one(source, name, *flags):
        target = directory / f"{name}.o"
        done = run(
            [
                compiler,
                *FLAGS,
                sanitize,
                "-fno-sanitize-recover=all",
                *flags,
                "-c",
                str(ROOT / source),
                "-o",
                str(target),
            ]
        )
        assert done.returncode == 0, done.stderr
        return str(target)

    jobs = [(source, pathlib.Path(source).stem) for source in SOURCES]
    # Level 0 for all: the same portable code under each table's name.
    jobs += [(KERNEL, isa, f"-DTPWEAVE_ISA_NAMESPACE={isa}", "-DTPWEAVE_ISA_LEVEL=0") for isa in ISAS]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(lambda job: compile_one(*job), jobs))
    program = directory / "stress"
    done = run([compiler, sanitize, "-pthread", *objects, "-o", str(program)])
    assert done.returncode == 0, done.stderr
    return program


@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_no_race_and_no_stray_access(stress, ranks):
    done = run([str(stress), str(ranks), "40"], timeout=120)
    assert done.returncode == 0 and done.stdout == "right\n", done.stdout + done.stderr[-6000:]
