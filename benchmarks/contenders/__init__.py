"""The servers that benchmarks/serving.py measures, one process each."""
