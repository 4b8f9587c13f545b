"""tpweave._cuda compiled for the host (tests/emulation/cuda), with ranks that are threads of this process."""

import functools
import importlib.util
import os
import pathlib
import subprocess
import sys
import threading

import torch

ROOT = pathlib.Path(__file__).parent.parent.parent


@functools.cache
def emulated_library():
    """The module; built once a process, and only what changed is compiled."""
    folder = ROOT / "build" / "emulated-cuda"
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--build-lib", str(folder)]
    environment = {**os.environ, "TPWEAVE_EMULATE_CUDA": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    (path,) = (folder / "tpweave").glob("_cuda.*.so")
    spec = importlib.util.spec_from_file_location("tpweave._cuda", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _aligned_zeros(nbytes):
    memory = torch.zeros(nbytes + 256, dtype=torch.uint8)
    begin = -memory.data_ptr() % 256
    return memory[begin : begin + nbytes]


class Ranks:
    """The ranks of one group and their channels over one memory."""

    def __init__(self, size, data_bytes=1 << 20):
        library = emulated_library()
        self.size = size
        self.memory = [_aligned_zeros(library.PAD_BYTES + data_bytes) for _ in range(size)]
        addresses = [memory.data_ptr() for memory in self.memory]
        self.channels = [library.Channel(rank, addresses, data_bytes, 0) for rank in range(size)]

    def run(self, call, ranks=None):
        """`call(rank, channel)` on all ranks at once, or on some; what each returned."""
        results, errors = [None] * self.size, []

        def body(rank):
            try:
                results[rank] = call(rank, self.channels[rank])
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=body, args=(rank,)) for rank in ranks or range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        return results
