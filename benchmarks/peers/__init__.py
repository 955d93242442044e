"""The opponents: what others would run in a case's place. Each is skipped, with the reason, where it is not installed.

No file is named like the package that it uses: run as a script, it would stand in that package's place.
"""

from __future__ import annotations

import importlib
from types import ModuleType

from benchmarks.cases import Skip
from fluxq.console import quiet_imports


def need(package: str) -> ModuleType:
    """The package, or Skip where it is missing or does not load."""
    try:
        with quiet_imports():
            return importlib.import_module(package)
    except ModuleNotFoundError as error:
        raise Skip(f"{error.name or package} is not installed") from error
    except Exception as error:  # built for another PyTorch or another GPU
        raise Skip(f"{package} does not load: {error}") from error
