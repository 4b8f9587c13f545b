"""Benchmarks of `tpweave.comm`, one `bench_<stem>.py` per stem."""
