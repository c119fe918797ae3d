"""Side-by-side ratios, each file runnable alone: python -m benchmarks.bench_dump. Nothing here is timed in tests."""
