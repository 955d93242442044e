"""The rows of benchmarks/kernels.py, one file per topic."""
