"""Builds tpweave._C: every csrc unit once, and `*_kernel.cpp` under csrc/cpu once per instruction set.

Where nvcc is found, tpweave._cuda too, from csrc/cuda: a library of its own, which nothing loads without a GPU.

Environment: CXX (compiler), MAX_JOBS (parallel compilations), CXXFLAGS (added last),
TPWEAVE_CUDA (auto; 0 leaves tpweave._cuda out; 1 fails where nvcc is missing), CUDA_HOME (where nvcc is, else PATH),
TORCH_CUDA_ARCH_LIST (as torch's extensions take it, e.g. "8.0;9.0a+PTX"; by default sm_80, sm_90a and sm_100a),
TPWEAVE_EMULATE_AVX512=1 (AVX-512 units compiled against tests/emulation, for testing them on AVX2 machines; build it
aside: `TPWEAVE_EMULATE_AVX512=1 python setup.py build --build-lib build/emulated`, then PYTHONPATH=build/emulated),
TPWEAVE_EMULATE_CUDA=1 (only tpweave._cuda, compiled by CXX against tests/emulation/cuda: its kernels run on the host).
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

# Named as in TORCH_CUDA_ARCH_LIST. Newer GPUs run the PTX of the first.
CUDA_ARCHITECTURES = ("8.0+PTX", "9.0a", "10.0a")
NVCC_FLAGS = ["-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra", "-Xptxas=-v"]
CUDA_EMULATION_FLAGS = [f"-I{ROOT / 'tests/emulation/cuda'}", "-x", "c++", "-Wno-unknown-pragmas", "-O1"]


def version() -> str:
    text = (ROOT / "python/tpweave/version.py").read_text()
    return re.search(r'__version__ = "([^"]+)"', text).group(1)


def compiler() -> str:
    for name in filter(None, (os.environ.get("CXX"), "c++", "g++", "clang++")):
        if shutil.which(shlex.split(name)[0]):
            return name
    sys.exit("tpweave: no C++17 compiler found (looked for $CXX, c++, g++, clang++); install one, e.g. package g++.")


def nvcc() -> str | None:
    """The CUDA compiler that TPWEAVE_CUDA asks for, None to build without."""
    setting = os.environ.get("TPWEAVE_CUDA", "auto")
    if setting not in ("auto", "0", "1"):
        sys.exit(f"tpweave: TPWEAVE_CUDA is '{setting}'; it takes auto, 0 or 1.")
    if setting == "0":
        return None
    home = os.environ.get("CUDA_HOME")
    path = f"{home}/bin" if home else os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/cuda/bin"])
    found = shutil.which("nvcc", path=path)
    if found is None and setting == "1":
        sys.exit(f"tpweave: TPWEAVE_CUDA is 1, but there is no nvcc in {path}; install CUDA or set CUDA_HOME.")
    if found is None:
        print("tpweave: no nvcc found, so the CUDA kernels are left out (CUDA_HOME says where it is).", file=sys.stderr)
    return found


def gencodes(compiler: str) -> list[str]:
    """nvcc's arguments for the GPUs to build for."""
    setting = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip()
    known = subprocess.run([compiler, "--list-gpu-code"], check=True, capture_output=True, text=True).stdout.split()
    found = []
    for name in re.split(r"[\s;,]+", setting) if setting else CUDA_ARCHITECTURES:
        parts = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", name)
        if parts is None:
            sys.exit(f"tpweave: TORCH_CUDA_ARCH_LIST names '{name}'; it takes numbers, e.g. 8.0;9.0a+PTX.")
        major, minor, variant, ptx = parts.groups()
        if int(major) < 8 or f"sm_{major}{minor}" not in known:
            print(f"tpweave: no CUDA kernels for {name}: it takes 8.0 or later, known to {compiler}.", file=sys.stderr)
            continue
        number = f"{major}{minor}{variant}"
        codes = [f"sm_{number}", *([f"compute_{number}"] if ptx else [])]
        found.append(f"-gencode=arch=compute_{number},code=[{','.join(codes)}]")
    if not found:
        sys.exit(f"tpweave: no GPU to build for in '{setting or CUDA_ARCHITECTURES}'; TPWEAVE_CUDA=0 leaves CUDA out.")
    return found


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

        python_include = sysconfig.get_paths()["include"]
        if not os.path.exists(f"{python_include}/Python.h"):
            sys.exit(f"tpweave: Python.h is missing in {python_include}; install it, e.g. the package python3-dev.")
        includes = [f"-I{ROOT / 'csrc'}", f"-I{pybind11.get_include()}", f"-I{python_include}"]
        library = pathlib.Path(self.get_ext_fullpath(ext.name)).resolve()
        library.parent.mkdir(parents=True, exist_ok=True)
        make = {"tpweave._C": self.build_cpu, "tpweave._cuda": self.build_cuda}[ext.name]
        make(includes, str(library))

    def build_cpu(self, includes, library):
        cxx = shlex.split(compiler())
        extra = [*includes, *shlex.split(os.environ.get("CXXFLAGS", ""))]
        emulate = os.environ.get("TPWEAVE_EMULATE_AVX512") == "1"
        # Not build_temp, which is a new directory in each editable install: everything would be compiled again.
        objects = ROOT / "build" / "objects"
        jobs = []
        for source in sorted((ROOT / "csrc").rglob("*.cpp")):
            stem = source.relative_to(ROOT / "csrc").with_suffix("")
            if stem.parts[0] == "cuda":
                continue
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
        self.compile_all(cxx, jobs)
        # OpenMP is found at run time in the process (common/parallel.cpp), so it is not linked.
        self.call([*cxx, "-shared", "-pthread", *[str(job[1]) for job in jobs], "-o", library, "-ldl", "-lrt"])

    def build_cuda(self, includes, library):
        sources = sorted(p for p in (ROOT / "csrc/cuda").rglob("*") if p.suffix in (".cu", ".cpp"))
        if os.environ.get("TPWEAVE_EMULATE_CUDA") == "1":
            command, objects = shlex.split(compiler()), ROOT / "build" / "objects-emulated-cuda"
            host = device = [*BASE_FLAGS, *CUDA_EMULATION_FLAGS, *includes]
            link = ["-pthread"]
        else:
            command, objects = [nvcc()], ROOT / "build" / "objects"
            if "CXX" in os.environ:
                command += ["-ccbin", shlex.split(os.environ["CXX"])[-1]]
            host = [*NVCC_FLAGS, *includes]
            device = [*host, *gencodes(command[0])]
            # The run time is in the library, and stays there: torch brings its own, perhaps of another version.
            link = ["-cudart=static", "-Xlinker=--exclude-libs=ALL"]
        jobs = []
        for source in sources:
            target = objects / source.relative_to(ROOT / "csrc").with_suffix(".o")
            jobs.append((source, target, device if source.suffix == ".cu" else host))
        self.compile_all(command, jobs)
        self.call([*command, "-shared", *[str(job[1]) for job in jobs], "-o", library, *link])

    def compile_all(self, command, jobs):
        workers = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
        with concurrent.futures.ThreadPoolExecutor(workers) as pool:
            for done in [pool.submit(self.compile_one, command, *job) for job in jobs]:
                done.result()

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
        self.call(command, log=target.with_suffix(".log") if "-Xptxas=-v" in flags else None)
        stamp.write_text(shlex.join(command))

    @staticmethod
    def call(command, log=None):
        done = subprocess.run(command, capture_output=True, text=True)
        if log is not None:
            # Registers and spills of each kernel, for tests/test_cuda_build.py.
            log.write_text(done.stderr)
        if done.stderr and (log is None or done.returncode != 0 or "warning" in done.stderr):
            print(done.stderr, file=sys.stderr)
        if done.returncode != 0:
            sys.exit(f"tpweave: the compiler failed: {shlex.join(command)}")


def extensions() -> list[Extension]:
    if os.environ.get("TPWEAVE_EMULATE_CUDA") == "1":
        return [Extension("tpweave._cuda", sources=[])]
    names = ["tpweave._C"]
    # What AVX-512 is emulated for has no use for a GPU.
    if os.environ.get("TPWEAVE_EMULATE_AVX512") != "1" and nvcc() is not None:
        names.append("tpweave._cuda")
    return [Extension(name, sources=[]) for name in names]


setup(
    version=version(),
    ext_modules=extensions(),
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
