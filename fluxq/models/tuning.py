"""Kernel choices measured on this GPU: `fluxq bench kernels --tune` saves them in the cache folder, and all later runs
use them.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch

from fluxq.console import Notify
from fluxq.errors import WrongRequest
from fluxq.formats.quantized import cache_folder
from fluxq.kernels.dispatch import triton_installed


def tuned_file(gpu: str) -> Path:
    """The file with the choices measured on the GPU of this name."""
    return cache_folder() / f"kernels-{re.sub(r'[^a-z0-9]+', '-', gpu.lower()).strip('-')}.json"


def use_tuned(device: torch.device, notify: Notify) -> None:
    """Make the kernels use the choices measured on the GPU `device`, if there are any.

    Raises WrongRequest if their file is damaged.
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
