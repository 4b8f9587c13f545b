"""Prints `run` when the emulated AVX-512 build is of use on this machine, else why not."""

from tpweave.native import _C

isas = _C.available_isas()
if "avx512bf16" in isas:
    print("this processor has AVX-512 BF16, the tests have run on it")
elif "avx2" not in isas:
    print("this processor has no AVX2")
else:
    print("run")
