"""Benchmarks of whole models, one per way of running them."""
