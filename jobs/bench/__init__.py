"""Benchmarks: each script runs from the repository's root as ``python -m jobs.bench.NAME``."""
