"""Builds tpweave._C: every csrc unit once, and `*_kernel.cpp` under csrc/cpu once per instruction set.

Environment: CXX (compiler), MAX_JOBS (parallel compilations), CXXFLAGS (added last),
TPWEAVE_EMULATE_AVX512=1 (AVX-512 units compiled against tests/emulation, for testing them on AVX2 machines; build it
aside: `TPWEAVE_EMULATE_AVX512=1 python setup.py build --build-lib build/emulated`, then PYTHONPATH=build/emulated).
"""

import concurrent.futures
import os
import pathlib
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig

from setuptools import Extension, find_packages, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

ROOT = pathlib.Path(__file__).parent.resolve()
BASE_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-ffp-contract=off", "-pthread"]
AVX2_FLAGS = ["-mavx2", "-mfma", "-mf16c", "-mbmi2"]
AVX512_FLAGS = [*AVX2_FLAGS, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
AVX512_FLAGS += ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]  # gcc 12 warns of its own avx512fintrin.h
ISA_FLAGS = {
    "portable": [],
    "avx2": AVX2_FLAGS,
    "avx512": AVX512_FLAGS,
    "avx512bf16": [*AVX512_FLAGS, "-mavx512bf16"],
}
# gcc remarks that 64-byte vectors are passed in memory without AVX-512. The lanes' loops take long to compile at -O3.
EMULATION_FLAGS = ["-DTPWEAVE_EMULATED_AVX512", f"-I{ROOT / 'tests/emulation'}", "-Wno-psabi", "-O1"]


def version() -> str:
    text = (ROOT / "python/tpweave/version.py").read_text()
    return re.search(r'__version__ = "([^"]+)"', text).group(1)


def compiler() -> str:
    for name in filter(None, (os.environ.get("CXX"), "c++", "g++", "clang++")):
        if shutil.which(shlex.split(name)[0]):
            return name
    sys.exit("tpweave: no C++17 compiler found (looked for $CXX, c++, g++, clang++); install one, e.g. package g++.")


class Build(build):
    """Starts from an empty folder: files of an earlier state of the sources would end up in the wheel."""

    def run(self):
        library = pathlib.Path(self.build_lib).resolve()
        if library.is_relative_to(ROOT / "build"):
            shutil.rmtree(library, ignore_errors=True)
        super().run()


class BuildExt(build_ext):
    """Compiles in parallel and only what changed, from the compiler's own dependency files."""

    def build_extension(self, ext):
        import pybind11

        cxx = shlex.split(compiler())
        python_include = sysconfig.get_paths()["include"]
        if not os.path.exists(f"{python_include}/Python.h"):
            sys.exit(f"tpweave: Python.h is missing in {python_include}; install it, e.g. the package python3-dev.")
        includes = [f"-I{ROOT / 'csrc'}", f"-I{pybind11.get_include()}", f"-I{python_include}"]
        extra = [*includes, *shlex.split(os.environ.get("CXXFLAGS", ""))]
        emulate = os.environ.get("TPWEAVE_EMULATE_AVX512") == "1"
        # Not build_temp, which is a new directory in each editable install: everything would be compiled again.
        objects = ROOT / "build" / "objects"
        jobs = []
        for source in sorted((ROOT / "csrc").rglob("*.cpp")):
            stem = source.relative_to(ROOT / "csrc").with_suffix("")
            if not source.name.endswith("_kernel.cpp"):
                if emulate and "TPWEAVE_EMULATED_AVX512" in source.read_text():
                    target = ROOT / "build" / "objects-emulated" / f"{stem}.o"
                    jobs.append((source, target, [*BASE_FLAGS, *extra, *EMULATION_FLAGS]))
                else:
                    jobs.append((source, objects / f"{stem}.o", [*BASE_FLAGS, *extra]))
                continue
            for level, (isa, flags) in enumerate(self.isas().items()):
                defines = [f"-DTPWEAVE_ISA_NAMESPACE={isa}", f"-DTPWEAVE_ISA_LEVEL={level}"]
                if emulate and level > 1:
                    target = ROOT / "build" / "objects-emulated" / f"{stem}.{isa}.o"
                    jobs.append((source, target, [*BASE_FLAGS, *AVX2_FLAGS, *defines, *extra, *EMULATION_FLAGS]))
                else:
                    jobs.append((source, objects / f"{stem}.{isa}.o", [*BASE_FLAGS, *flags, *defines, *extra]))
        workers = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
        with concurrent.futures.ThreadPoolExecutor(workers) as pool:
            for done in [pool.submit(self.compile_one, cxx, *job) for job in jobs]:
                done.result()
        library = pathlib.Path(self.get_ext_fullpath(ext.name)).resolve()
        library.parent.mkdir(parents=True, exist_ok=True)
        # OpenMP is found at run time in the process (common/parallel.cpp), so it is not linked.
        self.call([*cxx, "-shared", "-pthread", *[str(job[1]) for job in jobs], "-o", str(library), "-ldl", "-lrt"])

    @staticmethod
    def isas():
        if platform.machine() in ("x86_64", "AMD64"):
            return ISA_FLAGS
        return {"portable": ISA_FLAGS["portable"]}

    def compile_one(self, cxx, source, target, flags):
        command = [*cxx, *flags, "-MMD", "-c", str(source), "-o", str(target)]
        stamp = target.with_suffix(".cmd")
        if target.exists() and stamp.exists() and stamp.read_text() == shlex.join(command):
            needed = target.with_suffix(".d").read_text().replace("\\\n", " ").split(":", 1)[1].split()
            if all(os.path.exists(f) and os.path.getmtime(f) <= target.stat().st_mtime for f in needed):
                return
        target.parent.mkdir(parents=True, exist_ok=True)
        stamp.unlink(missing_ok=True)
        self.call(command)
        stamp.write_text(shlex.join(command))

    @staticmethod
    def call(command):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.stderr:
            print(done.stderr, file=sys.stderr)
        if done.returncode != 0:
            sys.exit(f"tpweave: the compiler failed: {shlex.join(command)}")


setup(
    version=version(),
    ext_modules=[Extension("tpweave._C", sources=[])],
    cmdclass={"build": Build, "build_ext": BuildExt},
    package_dir={"tpweave": "python/tpweave", "tpweave.kernels": "kernels", "tpweave.benchmarks": "benchmarks"},
    packages=[
        *("tpweave" + ("." + p if p else "") for p in ["", *find_packages("python/tpweave")]),
        "tpweave.kernels",
        *(f"tpweave.kernels.{p}" for p in find_packages("kernels")),
        "tpweave.benchmarks",
        *(f"tpweave.benchmarks.{p}" for p in find_packages("benchmarks")),
    ],
    package_data={"tpweave": ["py.typed"]},
)
