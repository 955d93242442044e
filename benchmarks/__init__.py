"""Measurements. Each script runs as a module from the repository's root: `python -m benchmarks.kernels --help`."""

import fluxq  # noqa: F401 - it sets up torch's allocator, which has to come before torch is imported
