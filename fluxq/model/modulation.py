"""Modulation ahead of time: one pass over its weights computes the modulation rows of many micro-steps.

Modulation holds 27 % of the weights but sees one vector per example, and unless something upstream trains, it depends
only on what is known before the run. So its weights pass through the GPU once for many micro-steps and take no memory
in between. The rows (344 D numbers per example, 2.1 MB in FLUX.1) wait in host memory.

Rows are computed in tiles. Tile k holds the W micro-steps from k W on. It is always computed as a whole: each
micro-step has a fixed place, and missing examples are zeros. An example's place and the shape of every product depend
only on the micro-step's number, so results are bit-identical no matter where a run was resumed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fluxq.kernels.chunks import FEW_ROWS

from .config import FluxConfig
from .flux import Flux
from .lora import Adapted, add_adapted

Conditioning = tuple[Tensor, Tensor, Tensor | None]
"""What modulation depends on: timesteps (B,), y (B, vec_in), and guidance (B,) for models that embed it."""


def is_known_ahead(config: FluxConfig, adapted: Adapted | str | Sequence[str]) -> bool:
    """Whether modulation stays fixed while LoRA on these layers, or targets, trains. Raises WrongRequest for invalid
    ones.
    """
    with torch.device("meta"):
        flux = Flux(config)
    add_adapted(flux, adapted if isinstance(adapted, Adapted) else Adapted(1, 1, adapted), torch.Generator())
    return not flux.trains_modulation


def sent(x: Tensor, device: torch.device) -> Tensor:
    """`x` on `device`. A GPU copies it when it comes to that; the CPU does not wait."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


class Lookahead:
    """The modulation rows of each micro-step, for `flux` with its current LoRA and layers.

    conditioning(index): that of micro-step `index`, at most `batch` examples. steps: how many micro-steps there are;
    None: no limit. A tile holds up to FEW_ROWS examples: up to there a product takes as long as reading its weight, and
    runs in 16 bits whatever the layers' `compute`, just as within the step.
    """

    def __init__(
        self, flux: Flux, conditioning: Callable[[int], Conditioning], batch: int, steps: int | None = None
    ) -> None:
        self._flux, self._conditioning, self._batch, self._steps = flux, conditioning, batch, steps
        self._window = max(1, FEW_ROWS // batch)
        if steps is not None:
            self._window = min(self._window, steps)
        self._trains = flux.trains_modulation
        self._tile, self._counts, self._rows = -1, list[int](), list[Tensor]()

    def rows(self, index: int) -> tuple[Tensor, ...] | None:
        """The `modulation` argument of `flux` in micro-step `index`; None if it trains, and so belongs in the step."""
        if self._trains and torch.is_grad_enabled():
            return None
        tile, place = divmod(index, self._window)
        if tile != self._tile:
            self._compute(tile)
        first, count = place * self._batch, self._counts[place]
        joined = torch.cat([rows[first : first + count] for rows in self._rows], dim=1)
        return sent(joined, self._flux.device).split([rows.shape[1] for rows in self._rows], dim=1)

    @torch.no_grad()
    def _compute(self, tile: int) -> None:
        flux, start = self._flux, tile * self._window
        stop = start + self._window if self._steps is None else min(start + self._window, self._steps)
        timesteps, y, guidance = zip(*(self._conditioning(index) for index in range(start, stop)), strict=True)
        guided = None if guidance[0] is None else self._padded(guidance)
        flux.ring.announce([(block.modulation_unit,) for block in flux.blocks])
        # .cpu() synchronizes after each block, so rows never pile up on the GPU. It costs nothing: this pass waits for
        # weight copies anyway, and they continue meanwhile.
        self._rows = [r.cpu() for r in flux.modulation_rows(self._padded(timesteps), self._padded(y), guided)]
        self._tile, self._counts = tile, [len(t) for t in timesteps]

    def _padded(self, values: Sequence[Tensor]) -> Tensor:
        """The values (b, ...) of the tile's micro-steps, each at its place, zero-padded, on the model's device."""
        tile = values[0].new_zeros(self._window, self._batch, *values[0].shape[1:])
        for place, value in zip(tile, values, strict=False):
            place[: len(value)] = value
        return tile.flatten(0, 1).to(self._flux.device)
