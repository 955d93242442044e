"""How torch's CUDA allocator is set up: with segments that can grow, where the user has set nothing else.

A step allocates large tensors of many sizes. In segments of fixed size they leave gaps that nothing else fits into: at
1024 px the allocator reserves 0.7 to 1.9 GiB more than is alive, and a plan that fills a 12 GB GPU runs out of memory.
The same plans run with segments that grow, which reserve 0.4 to 0.8 GiB more and give pages back when memory is short.

Of torch 2.11 to 2.14, each reads PYTORCH_CUDA_ALLOC_CONF, and where that is not set PYTORCH_ALLOC_CONF, the newer name.
They are read once, while torch is imported, so `fluxq/__init__.py` calls `use_expandable_segments` before that.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Mapping, MutableMapping

VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")


def use_expandable_segments(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set the allocator's variable, unless one of VARIABLES is set, even to nothing. Only on Linux, WSL included: torch
    has no such segments elsewhere.

    `PYTORCH_ALLOC_CONF=expandable_segments:False fluxq ...` turns it off.
    """
    if sys.platform == "linux" and not any(name in environment for name in VARIABLES):
        environment[VARIABLES[0]] = "expandable_segments:True"
        # torch then asks the driver about links between servers, and warns where a GPU has none: every GeForce
        warnings.filterwarnings("ignore", message="nvmlDeviceGetGpuFabricInfoV failed")


def has_expandable_segments(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether torch's allocator has been told to use segments that can grow, and can."""
    set_to = next((environment[name] for name in ("PYTORCH_CUDA_ALLOC_CONF", VARIABLES[0]) if name in environment), "")
    return sys.platform == "linux" and "expandable_segments:True" in set_to.replace(" ", "")
