"""What is shipped: the sdist's and the wheel's contents, metadata, pins, and the editable install."""

import email
import os
import pathlib
import re
import subprocess
import sys
import tarfile
import zipfile

import pytest

import tpweave

ROOT = pathlib.Path(__file__).parent.parent
NAME = re.compile(r"[A-Za-z0-9_.-]+")

pytest.importorskip("pybind11")


def backend_call(function, target):
    """A hook of the build backend, run in the checkout, and the file it made."""
    code = f"from setuptools import build_meta; build_meta.{function}({str(target)!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    (made,) = target.iterdir()
    return made


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    # What an earlier build left behind.
    for library in ROOT.glob("build/lib*"):
        (library / "tpweave").mkdir(exist_ok=True)
        (library / "tpweave" / "gone.py").write_text("raise AssertionError")
    return zipfile.ZipFile(backend_call("build_wheel", tmp_path_factory.mktemp("wheel")))


def test_wheel_holds_one_package(wheel):
    names = wheel.namelist()
    assert "tpweave/gone.py" not in names
    top = {name.split("/")[0] for name in names}
    assert top == {"tpweave", f"tpweave-{tpweave.__version__}.dist-info"}
    for needed in ("py.typed", "kernels/__init__.py", "benchmarks/run.py", "reference/ops/rms_norm.py"):
        assert f"tpweave/{needed}" in names
    assert [name for name in names if re.fullmatch(r"tpweave/_C\..*\.so", name)]


def test_wheel_holds_every_python_source(wheel):
    folders = {"python/tpweave": "tpweave", "kernels": "tpweave/kernels", "benchmarks": "tpweave/benchmarks"}
    for folder, package in folders.items():
        for path in (ROOT / folder).rglob("*.py"):
            assert f"{package}/{path.relative_to(ROOT / folder).as_posix()}" in wheel.namelist()


def test_metadata(wheel):
    info = f"tpweave-{tpweave.__version__}.dist-info"
    metadata = email.message_from_bytes(wheel.read(f"{info}/METADATA"))
    assert metadata["Version"] == tpweave.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.10"
    core = [req for req in metadata.get_all("Requires-Dist") if "extra ==" not in req]
    assert sorted(NAME.match(req).group() for req in core) == ["numpy", "torch"]
    assert f"{info}/licenses/LICENSE" in wheel.namelist()
    assert "tpweave = tpweave.cli.main:main" in wheel.read(f"{info}/entry_points.txt").decode()


def test_sdist_holds_every_tracked_file(tmp_path):
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("needs a git checkout")
    with tarfile.open(backend_call("build_sdist", tmp_path)) as archive:
        held = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    tracked = {name for name in listed.stdout.splitlines() if (ROOT / name).exists()}
    assert tracked - held == set()
    assert not [name for name in held if name.endswith((".so", ".o", ".pyc"))]


def test_every_requirement_is_pinned():
    pins = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            assert re.fullmatch(r'[a-z0-9.-]+==[^;\s]+(; python_version [<>=]+ "3\.\d+")?', line), line
            pins.setdefault(line.split("==")[0], []).append(line)
    text = (ROOT / "pyproject.toml").read_text()
    requirements = re.findall(
        r'"([A-Za-z][A-Za-z0-9-]*)(?:>=[\d.]+)?"',
        text.partition("dependencies = ")[2].partition("[project.scripts]")[0],
    )
    assert {"torch", "numpy", "pytest", "ruff"} <= set(requirements)
    assert set(requirements) - set(pins) == set()
    assert pins["torch"] == ["torch==2.13.0"]


def test_import_works_from_another_directory(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    code = "import tpweave, tpweave.kernels, tpweave.benchmarks; print(tpweave.__version__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == tpweave.__version__, done.stderr
    done = subprocess.run(
        [sys.executable, "-c", "import kernels"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert "No module named 'kernels'" in done.stderr


@pytest.mark.parametrize(
    ("path", "seen"),
    [
        ({"python3": "exit 0"}, "no C++17 compiler"),
        (
            {"c++": "cat > /dev/null; echo 'error: unrecognized option -std=c++17' >&2; exit 1"},
            "does not compile C++17",
        ),
    ],
)
def test_preflight_names_what_is_missing(tmp_path, path, seen):
    for name, script in path.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n".replace("cat", "/bin/cat"))
        (tmp_path / name).chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if name != "CXX"} | {"PATH": str(tmp_path)}
    command = [sys.executable, str(ROOT / ".ci/preflight.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("tpweave: ") and seen in line
