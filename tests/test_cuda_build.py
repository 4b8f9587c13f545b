"""The CUDA library where no GPU is: it builds for three kinds, within registers, with the instructions it needs."""

import importlib.util
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest
import torch

import tpweave
from tpweave.comm.all_reduce_rms_norm import MAX_CUDA_COLUMNS
from tpweave.distributed.cuda_memory import MAX_RANKS, library_objection

ROOT = pathlib.Path(__file__).parent.parent
ARCHITECTURES = ("sm_80", "sm_90a", "sm_100a")
REDUCING = ("one_shot_kernel", "two_shot_kernel", "all_reduce_rms_norm_kernel")


def run_setup(*arguments, **variables):
    environment = {name: value for name, value in os.environ.items() if name not in ("CUDA_HOME", "TPWEAVE_CUDA")}
    environment = {**environment, **variables}
    command = [sys.executable, "setup.py", "--quiet", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)


def tool(name):
    """A program of CUDA's, from PATH or from triton, which brings some."""
    folders = [os.environ.get("PATH", "")]
    found = importlib.util.find_spec("triton")
    if found is not None and found.submodule_search_locations:
        folders.append(str(pathlib.Path(found.submodule_search_locations[0]) / "backends/nvidia/bin"))
    return shutil.which(name, path=os.pathsep.join(folders))


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    if shutil.which("nvcc") is None and not os.path.exists("/usr/local/cuda/bin/nvcc"):
        pytest.skip("needs nvcc")
    pytest.importorskip("pybind11")
    folder = tmp_path_factory.mktemp("cuda")
    done = run_setup("build_ext", "--build-lib", str(folder), TPWEAVE_CUDA="1", TORCH_CUDA_ARCH_LIST="")
    assert done.returncode == 0, done.stderr
    (path,) = (folder / "tpweave").glob("_cuda.*.so")
    return path


def test_no_kernel_spills_and_registers_are_bounded(library):
    seen = set()
    for log in (ROOT / "build/objects/cuda").rglob("*.log"):
        entries = re.findall(
            r"entry function '(\w+)' for '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
            r"(\d+) bytes spill loads.*?Used (\d+) registers",
            log.read_text(),
            re.S,
        )
        for name, architecture, *counts in entries:
            stack, stores, loads, registers = map(int, counts)
            assert stack == stores == loads == 0, (name, architecture)
            # 512 threads of 128 registers are a multiprocessor's 65536.
            assert registers <= 128, (name, architecture)
            seen.add((re.search(r"[a-z_]+_kernel", name).group(), architecture))
    kernels = set(re.findall(r"\b([a-z_]+_kernel)\(", "".join(p.read_text() for p in ROOT.glob("csrc/cuda/*/*.cu"))))
    assert set(REDUCING) < kernels
    assert seen == {(kernel, architecture) for kernel in kernels for architecture in ARCHITECTURES}


def test_machine_code_orders_signals_and_moves_16_bytes(library):
    if tool("cuobjdump") is None or tool("nvdisasm") is None:
        pytest.skip("needs cuobjdump and nvdisasm, of CUDA or of triton")
    path = os.pathsep.join([os.path.dirname(tool("nvdisasm")), os.environ["PATH"]])
    done = subprocess.run(
        [tool("cuobjdump"), "-sass", str(library)], env={**os.environ, "PATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    codes = {}
    for part in done.stdout.split("code for ")[1:]:
        architecture = part.split()[0]
        for function in part.split("Function : ")[1:]:
            codes[architecture, function.split()[0]] = function
    assert {architecture for architecture, _ in codes} == set(ARCHITECTURES)
    for (architecture, name), code in codes.items():
        where = (architecture, name)
        if "one_shot" in name or "two_shot" in name or "rms_norm" in name or "stage_kernel" in name:
            # ld.acquire.sys: a strong load, after which the L1 cache is emptied.
            assert re.search(r"LDG?\.E\.64\.STRONG\.SYS.*CCTL\.IVALL", code, re.S), where
            # st.release.sys: a fence, then a strong store.
            assert re.search(r"MEMBAR\.\S*SYS.*STG?\.E\.64\.STRONG\.SYS", code, re.S), where
            assert re.search(r"LDG?\.E\.128", code) and re.search(r"STG?\.E\.128", code), where
            # Peers' memory changes while the kernel runs: never through the read-only path.
            assert "LDG.E.128.CONSTANT" not in code, where


def test_library_loads_without_a_gpu_and_tpweave_does_not_load_it(library):
    load = (
        "import importlib.util, sys; spec = importlib.util.spec_from_file_location('tpweave._cuda', sys.argv[1]);"
        "m = importlib.util.module_from_spec(spec); spec.loader.exec_module(m); print(m.MAX_RANKS, m.MAX_NORM_COLUMNS)"
    )
    done = subprocess.run([sys.executable, "-c", load, str(library)], capture_output=True, text=True)
    # The Python side holds the same numbers, for it does not load the library to say why not.
    assert done.stdout.split() == [str(MAX_RANKS), str(MAX_CUDA_COLUMNS)], done.stderr
    ops = (
        "import sys, tpweave; from tpweave.dispatch import load_ops; load_ops(); print('tpweave._cuda' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", ops], capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr


def test_architectures_are_chosen():
    if shutil.which("nvcc") is None:
        pytest.skip("needs nvcc")
    code = (
        "import setuptools, runpy; setuptools.setup = lambda **k: None;"
        "found = runpy.run_path('setup.py'); print(found['gencodes'](found['nvcc']()))"
    )

    def gencodes(setting):
        environment = {**os.environ, "TORCH_CUDA_ARCH_LIST": setting, "TPWEAVE_CUDA": "1"}
        return subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)

    assert gencodes("7.5 8.6;9.0a+PTX").stdout.strip() == str(
        ["-gencode=arch=compute_86,code=[sm_86]", "-gencode=arch=compute_90a,code=[sm_90a,compute_90a]"]
    )
    assert "no CUDA kernels for 7.5" in gencodes("7.5 8.6").stderr
    for setting, words in {"7.0": "no GPU to build for in '7.0'", "Hopper": "names 'Hopper'"}.items():
        done = gencodes(setting)
        assert done.returncode == 1 and words in done.stderr


@pytest.mark.parametrize(
    ("setting", "code", "words"),
    [
        ("auto", 0, "no nvcc found, so the CUDA kernels are left out"),
        ("0", 0, ""),
        ("1", 1, "TPWEAVE_CUDA is 1, but there is no nvcc in /nowhere/bin"),
        ("yes", 1, "TPWEAVE_CUDA is 'yes'; it takes auto, 0 or 1"),
    ],
)
def test_without_nvcc(setting, code, words):
    done = run_setup("--name", TPWEAVE_CUDA=setting, CUDA_HOME="/nowhere")
    assert done.returncode == code
    assert words in done.stderr and done.stderr.count("tpweave: ") == (1 if words else 0)


@pytest.mark.parametrize("op", ["all_reduce", "all_gather", "all_reduce_rms_norm"])
def test_rows_say_why_they_do_not_run(op):
    reasons = dict(tpweave.explain(op, torch.ones(4)).rows)
    assert reasons["cuda"] == "needs cuda tensors, these are on cpu"


def test_a_machine_without_a_gpu_is_told(monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    library_objection.cache_clear()
    assert library_objection(0) == "needs a GPU"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "tpweave._cuda", None)
    library_objection.cache_clear()
    assert library_objection(0).startswith("needs tpweave._cuda, which was not built or does not load")
    library_objection.cache_clear()
