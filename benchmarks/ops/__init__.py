"""Benchmarks of `tpweave.ops`, one `bench_<stem>.py` per stem."""
