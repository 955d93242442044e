"""Measurements. Each script runs as a module from the repository's root: `python -m benchmarks.kernels --help`."""
