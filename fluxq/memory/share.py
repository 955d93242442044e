"""torch's share of the GPU: what is free, except for what is allocated outside torch.

cuBLAS, Triton and CUDA ask the driver for memory when they are first used, often in the middle of a step; torch's
allocator would have taken it by then, since it grows as long as the driver gives. So torch is held to less: it runs out
first, and gives back what it does not use.
"""

from __future__ import annotations

from functools import cache

import torch

from fluxq.errors import is_out_of_memory
from fluxq.offload.planner import OUTSIDE


@cache
def take_share() -> None:
    """Hold torch's allocator to its share of the current GPU; nothing without one. Call this before weights are loaded
    and before free memory is read for a plan. Only the first call counts: later ones would take their share of a share.
    """
    if not torch.cuda.is_available():
        return
    try:
        try:
            warm_up(torch.device("cuda"))
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise  # else the first step makes what is missing, and is repeated if it cannot
        free, total = torch.cuda.mem_get_info()
    except RuntimeError:  # another program may use the GPU exclusively; whoever loads weights will say so
        return
    torch.cuda.set_per_process_memory_fraction(share(free, total, torch.cuda.memory_reserved()))


def share(free: int, total: int, reserved: int) -> float:
    """The fraction of a GPU that torch may reserve, if it has reserved that many bytes and so many are free."""
    return min(1.0, max(0, reserved + free - OUTSIDE) / total)


def warm_up(device: torch.device) -> None:
    """Multiply matrices here and in autograd's thread: each thread has a cuBLAS handle and workspace of its own."""
    x = torch.ones(16, 16, dtype=torch.bfloat16, device=device, requires_grad=True)
    (x @ x).sum().backward()
