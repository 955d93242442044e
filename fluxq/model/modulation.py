"""Modulation ahead of time: the rows that modulate the blocks in coming micro-steps, from one pass over its weights.

Modulation holds 27 % of the weights, sees one vector an example, and unless something upstream of it trains, depends
only on what is known before a run begins. So its weights pass through the GPU once for many micro-steps, and are not
there in between; the rows (344 D numbers an example, 2.1 MB in FLUX.1) wait in the host's memory.

Rows are computed in tiles. Tile k is that of the W micro-steps from k W on; all of it is always computed, with every
micro-step at its own place, absent examples filled up with zeros. So an example's place and the shape of every product
depend on the micro-step's number alone, and not one bit depends on where a run was resumed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fluxq.kernels.cutting import FEW_ROWS

from .config import FluxConfig
from .flux import Flux
from .lora import add_lora

Conditioning = tuple[Tensor, Tensor, Tensor | None]
"""What modulation depends on: timesteps (B,), y (B, vec_in), and guidance (B,) for models that embed it."""


def is_known_ahead(config: FluxConfig, targets: str | Sequence[str]) -> bool:
    """Whether LoRA on `targets` leaves modulation as it is. Raises WrongRequest for targets that are no such."""
    with torch.device("meta"):
        flux = Flux(config)
    add_lora(flux, 1, 1, targets, torch.Generator())
    return not flux.trains_modulation


class Lookahead:
    """The modulation of micro-steps by number, for `flux` as its LoRA and its layers are now.

    conditioning(index) is that of micro-step `index`, of at most `batch` examples; `steps` is how many there are, None
    for any number. A tile has the rows of as many examples as fit into FEW_ROWS: up to there a product takes the time
    of reading its weight, and is computed in 16 bits whatever the layers' `compute`, as it is in the step.
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
        """What `flux` takes as `modulation` in micro-step `index`; None where something upstream of it trains, so that
        it has to be computed in the step.
        """
        if self._trains and torch.is_grad_enabled():
            return None
        tile, place = divmod(index, self._window)
        if tile != self._tile:
            self._compute(tile)
        first, count = place * self._batch, self._counts[place]
        joined = torch.cat([rows[first : first + count] for rows in self._rows], dim=1)
        return joined.to(self._flux.device).split([rows.shape[1] for rows in self._rows], dim=1)

    @torch.no_grad()
    def _compute(self, tile: int) -> None:
        flux, start = self._flux, tile * self._window
        stop = start + self._window if self._steps is None else min(start + self._window, self._steps)
        timesteps, y, guidance = zip(*(self._conditioning(index) for index in range(start, stop)), strict=True)
        guided = None if guidance[0] is None else self._filled_up(guidance)
        flux.ring.announce([(block.modulation_unit,) for block in flux.blocks])
        # The host waits for each block's rows, so that they take no room on the GPU. This pass waits for copies of
        # weights anyway, and those go on meanwhile.
        self._rows = [r.cpu() for r in flux.modulation_rows(self._filled_up(timesteps), self._filled_up(y), guided)]
        self._tile, self._counts = tile, [len(t) for t in timesteps]

    def _filled_up(self, values: Sequence[Tensor]) -> Tensor:
        """The values (b, ...) of the tile's micro-steps, each at its place, on the model's device."""
        tile = values[0].new_zeros(self._window, self._batch, *values[0].shape[1:])
        for place, value in zip(tile, values, strict=False):
            place[: len(value)] = value
        return tile.flatten(0, 1).to(self._flux.device)
