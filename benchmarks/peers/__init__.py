"""The opponents: other libraries doing the same work. One that is not installed is skipped, with the reason.

No file here has the name of the package that it uses: run as a script, it would shadow that package.
"""

from __future__ import annotations

import importlib
from types import ModuleType

from benchmarks.cases import Skip
from fluxq.console import quiet_imports


def need(package: str) -> ModuleType:
    """The package; raises Skip if it is missing or does not load."""
    try:
        with quiet_imports():
            return importlib.import_module(package)
    except ModuleNotFoundError as error:
        raise Skip(f"{error.name or package} is not installed") from error
    except Exception as error:  # built for another PyTorch or another GPU
        raise Skip(f"{package} does not load: {error}") from error
