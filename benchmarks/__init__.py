"""The benchmarks: `registry.py` says what an entry is, `run.py` measures it. Installed as tpweave.benchmarks."""
