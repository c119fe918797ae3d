"""Benchmarks, each of which runs alone: python -m benchmarks.bench_dump. The tests do not check times."""
