"""Kernel choices measured on this GPU: `fluxq bench kernels --tune` keeps them in the cache folder, and they are used
from then on.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import torch

from fluxq.errors import WrongRequest
from fluxq.formats.quantized import cache_folder
from fluxq.kernels.dispatch import triton_installed


def tuned_file(gpu: str) -> Path:
    """Where the choices measured on the GPU of that name lie."""
    return cache_folder() / f"kernels-{re.sub(r'[^a-z0-9]+', '-', gpu.lower()).strip('-')}.json"


def use_tuned(device: torch.device, notify: Callable[[str], None]) -> None:
    """Have kernels take the choices that were measured on the GPU `device`, if any were. A damaged file is a
    WrongRequest that names it.
    """
    if device.type != "cuda" or not triton_installed():
        return
    path = tuned_file(torch.cuda.get_device_name(device))
    if not path.is_file():
        return
    from fluxq.kernels.triton import table

    try:
        rows = table.read(path)
    except ValueError as error:
        raise WrongRequest(str(error)) from error
    table.use_measured(rows)
    notify(f"kernels: {len(rows)} choices measured on this GPU, from {path}")
