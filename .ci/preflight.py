"""Checks what `make` needs besides the right Python, before anything is downloaded: one line says what is missing."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig

CXX17 = "#include <optional>\nint main() { if constexpr (true) return std::optional<int>(0).value(); }\n"


def missing() -> str | None:
    version = ".".join(map(str, sys.version_info[:2]))
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError:
        return f"the venv module is missing; install it, e.g. the package python{version}-venv"
    include = sysconfig.get_paths()["include"]
    if not os.path.exists(os.path.join(include, "Python.h")):
        return f"Python.h is missing in {include}; install it, e.g. the package python{version}-dev"
    names = [name for name in (os.environ.get("CXX"), "c++", "g++", "clang++") if name]
    compiler = next((name for name in names if shutil.which(shlex.split(name)[0])), None)
    if compiler is None:
        return f"no C++17 compiler found (looked for {', '.join(names)}); install one, e.g. the package g++"
    command = [*shlex.split(compiler), "-std=c++17", "-fsyntax-only", "-x", "c++", "-"]
    check = subprocess.run(command, input=CXX17, capture_output=True, text=True)
    if check.returncode != 0:
        reason = (check.stderr.strip() or "no message").splitlines()[0]
        return f"the compiler {compiler} does not compile C++17 ({reason}); set CXX to another"
    return None


if __name__ == "__main__":
    reason = missing()
    if reason is not None:
        sys.exit(f"tpweave: {reason}.")
