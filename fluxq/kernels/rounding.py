"""Parameters in the dtype of a product. Those that are slices of a flat tensor are rounded all at once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def rounded(parameter: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """`parameter` in `dtype`, without a gradient.

    A parameter may have an attribute `rounded`, which makes it from the dtype or, while parameters change, returns
    None (fluxq/training/flat.py).
    """
    if parameter is None or parameter.dtype == dtype:
        return parameter
    make: Callable[[torch.dtype], Tensor | None] | None = getattr(parameter, "rounded", None)
    made = None if make is None else make(dtype)
    return parameter.to(dtype) if made is None else made
