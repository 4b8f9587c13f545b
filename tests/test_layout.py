"""The house's order: every stem has its files, every backend file its row, every public name its documentation."""

import ast
import importlib
import inspect
import pathlib
import pkgutil
import re
import subprocess
import sys

import pytest

import tpweave
from tpweave.dispatch import OPS
from tpweave.library import LIBRARY

ROOT = pathlib.Path(__file__).parent.parent
AREAS = ("ops", "comm")
SOURCE_SUFFIXES = {".py", ".cpp", ".h", ".cu", ".cuh"}


def import_everything():
    for module in pkgutil.walk_packages(tpweave.__path__, "tpweave."):
        if not module.name.startswith(("tpweave.kernels", "tpweave.benchmarks")):
            importlib.import_module(module.name)


def public_stems():
    """(area, stem) of every op: public under its module's name."""
    exports = tpweave._EXPORTS
    return [
        (area, path.stem)
        for area in AREAS
        for path in sorted((ROOT / "python/tpweave" / area).glob("*.py"))
        if exports.get(path.stem) == f"tpweave.{area}.{path.stem}"
    ]


def source_files():
    for folder in ("csrc", "kernels", "python", "benchmarks", "tests"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in SOURCE_SUFFIXES:
                yield path
    yield ROOT / "setup.py"


def test_every_op_in_a_table_is_a_public_stem():
    import_everything()
    stems = {stem for _, stem in public_stems()}
    assert len(stems) >= 4
    assert {name.removesuffix("_bwd") for name in OPS} == stems


@pytest.mark.parametrize(("area", "stem"), public_stems())
def test_stem_has_reference_test_and_benchmark(area, stem):
    needed = [
        f"python/tpweave/reference/{area}/{stem}.py",
        f"tests/{area}/test_{stem}.py",
        f"benchmarks/{area}/bench_{stem}.py",
    ]
    missing = [path for path in needed if not (ROOT / path).exists()]
    assert not missing, f"{stem} lacks {', '.join(missing)}"


@pytest.mark.parametrize("area", AREAS)
def test_no_reference_test_or_benchmark_without_its_stem(area):
    stems = {stem for stem_area, stem in public_stems() if stem_area == area}
    references = {path.stem for path in (ROOT / "python/tpweave/reference" / area).glob("*.py")} - {"__init__"}
    benchmarks = {path.stem.removeprefix("bench_") for path in (ROOT / "benchmarks" / area).glob("bench_*.py")}
    assert references - stems == set()
    assert benchmarks - stems == set()


def backend_files():
    for path in sorted((ROOT / "csrc/cpu").glob("*/*_kernel.cpp")):
        yield path.stem.removesuffix("_kernel"), ("cpu", "shm"), path.relative_to(ROOT)
    for path in sorted((ROOT / "csrc/cuda").glob("*/*.cu")):
        yield path.stem, ("cuda",), path.relative_to(ROOT)
    for area in AREAS:
        for path in sorted((ROOT / "kernels" / area).glob("*.py")):
            if path.stem != "__init__":
                yield path.stem, ("triton",), path.relative_to(ROOT)


@pytest.mark.parametrize(("stem", "rows", "path"), [pytest.param(*item, id=str(item[2])) for item in backend_files()])
def test_backend_file_has_a_row(stem, rows, path):
    import_everything()
    assert stem in OPS, f"{path}: there is no op '{stem}'"
    names = [row.name for row in OPS[stem].backends]
    assert set(names) & set(rows), f"{path}: the table of {stem} has only {names}"


def test_every_table_ends_in_a_row_without_needs():
    import_everything()
    for op in OPS.values():
        assert op.backends[-1].name == "reference", op.name


def test_every_registered_op_passes_opcheck_somewhere():
    """Backward ops are checked through the op whose gradient they give."""
    import_everything()
    checked = set()
    for path in (ROOT / "tests").rglob("test_*.py"):
        checked |= set(re.findall(r"opcheck\(\s*torch\.ops\.tpweave\.(\w+)\.default", path.read_text()))
    registered = {name.removeprefix("tpweave::") for name in LIBRARY._op_defs}
    assert {name for name in registered if not name.endswith("_bwd")} - checked == set()


def test_files_are_short():
    long = {
        str(path.relative_to(ROOT)): n for path in source_files() if (n := len(path.read_text().splitlines())) > 600
    }
    assert not long


def test_version_is_in_one_place():
    assert re.fullmatch(r"\d+\.\d+\.\d+", tpweave.__version__)
    holders = [
        path
        for path in [*source_files(), ROOT / "pyproject.toml", ROOT / "Makefile"]
        if re.search(rf"(?<![\d.]){re.escape(tpweave.__version__)}(?![\d.])", path.read_text())
    ]
    assert holders == [ROOT / "python/tpweave/version.py"]


def test_import_is_light():
    heavy = ("transformers", "triton", "matplotlib", "rich", "tpweave.kernels", "tpweave.benchmarks")
    before = f"import torch, sys; before = set(sys.modules); import tpweave; heavy = {heavy}; "
    report = "print(sorted(m for m in heavy if m in set(sys.modules) - before))"
    out = subprocess.run([sys.executable, "-c", before + report], check=True, capture_output=True, text=True)
    assert out.stdout.strip() == "[]"


@pytest.mark.parametrize("name", tpweave.__all__)
def test_public_name_is_importable_and_documented(name):
    value = getattr(tpweave, name)
    assert name in dir(tpweave)
    if inspect.isfunction(value) or inspect.isclass(value):
        assert inspect.getdoc(value), f"tpweave.{name} has no docstring"
    if inspect.isfunction(value):
        signature = inspect.signature(value)
        bare = [p.name for p in signature.parameters.values() if p.annotation is p.empty]
        assert not bare, f"tpweave.{name}: no annotation for {', '.join(bare)}"
        assert signature.return_annotation is not signature.empty, f"tpweave.{name}: no return annotation"


@pytest.mark.parametrize("stem", [stem for _, stem in public_stems()])
def test_op_docstring_has_its_sections(stem):
    text = inspect.getdoc(getattr(tpweave, stem))
    assert [part for part in ("Args:", "Returns:", "Raises:", "Example:") if part not in text] == []


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'nope'"):
        tpweave.nope  # noqa: B018


def imports_of(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


# A call goes model -> patch -> layers -> ops | comm -> dispatch; nothing below imports what is above it.
ABOVE = {
    "reference": ("ops", "comm", "layers", "patch", "cli"),
    "distributed": ("ops", "comm", "layers", "patch", "cli"),
    "ops": ("comm", "layers", "patch", "cli"),
    "comm": ("layers", "patch", "cli"),
    "layers": ("patch", "cli"),
    "patch": ("cli",),
}


@pytest.mark.parametrize("folder", ABOVE)
def test_nothing_imports_what_is_above_it(folder):
    for path in (ROOT / "python/tpweave" / folder).rglob("*.py"):
        for module in imports_of(path):
            above = [name for name in ABOVE[folder] if f"{module}.".startswith(f"tpweave.{name}.")]
            assert not above, f"{path.relative_to(ROOT)} imports {module}"
