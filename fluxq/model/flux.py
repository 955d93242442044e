"""FLUX.1's transformer: a rectified-flow model of image latents (black-forest-labs/flux), frozen except for LoRA.

Parameter names are those of the original checkpoint files, so a file loads without a key map.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from fluxq.offload import AllResident, HostInputs, Ring

from .blocks import Block, DoubleStreamBlock, LastLayer, Modulation, SingleStreamBlock, run_block, run_modulation
from .config import FluxConfig
from .embed import MLPEmbedder, rope_angles, sinusoid
from .linear import Linear


class Flux(nn.Module):
    """The transformer. A new one holds uninitialized floating-point buffers: load weights before use.

    It computes in the dtype of its biases and norm scales. Time, guidance and positions stay fp32 until embedded.
    """

    def __init__(self, config: FluxConfig) -> None:
        super().__init__()
        self.config = config
        self.ring: Ring = AllResident()
        self.inputs: HostInputs | None = None  # keeps block inputs for the backward pass; None: on the GPU
        self.trains_y = False  # whether y needs a gradient: it does when CLIP trains
        width = config.hidden_size
        self.img_in = Linear(config.in_channels, width)
        self.txt_in = Linear(config.context_in_dim, width)
        self.time_in = MLPEmbedder(256, width)
        self.vector_in = MLPEmbedder(config.vec_in_dim, width)
        self.guidance_in = MLPEmbedder(256, width) if config.guidance_embed else None
        self.double_blocks = nn.ModuleList(DoubleStreamBlock(config, f"double_blocks.{i}") for i in range(config.depth))
        self.single_blocks = nn.ModuleList(
            SingleStreamBlock(config, f"single_blocks.{i}") for i in range(config.depth_single_blocks)
        )
        self.final_layer = LastLayer(config)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the model computes in."""
        return self._unquantized.dtype

    @property
    def device(self) -> torch.device:
        """The device that the model computes on."""
        return self._unquantized.device

    @property
    def blocks(self) -> list[Block]:
        """All blocks in forward order."""
        return [*self.double_blocks, *self.single_blocks]  # type: ignore[list-item]

    @property
    def blocks_units(self) -> tuple[tuple[str, ...], ...]:
        """The units of each block, in forward order, without modulation."""
        return tuple(block.units for block in self.blocks)

    @property
    def blocks_with_backward(self) -> range:
        """Indices of the blocks that have a backward pass: the first with something trainable, and all after it.

        If something before the blocks trains, that is all of them. Of the inputs, only y may need a gradient.
        """
        upstream = (self.img_in, self.txt_in, self.time_in, self.vector_in, self.guidance_in)
        trains = [self.trains_y or _trains(*upstream), *(_trains(block) for block in self.blocks)]
        first = trains.index(True) if True in trains else len(trains)
        return range(max(0, first - 1), len(self.blocks))

    @property
    def trains_modulation(self) -> bool:
        """Whether the modulation rows change from step to step: something that computes them trains."""
        modulations = (m for m in self.modules() if isinstance(m, Modulation))
        embedders = (self.time_in, self.vector_in, self.guidance_in)
        return self.trains_y or _trains(*embedders, self.final_layer.adaLN_modulation, *modulations)

    @property
    def units_with_backward(self) -> frozenset[str]:
        """The units, modulation included, that the backward pass needs."""
        embedders = (self.time_in, self.vector_in, self.guidance_in)
        units = {unit for i in self.blocks_with_backward for unit in self.blocks[i].units}
        for block in self.blocks:
            modulations = (part for part in block.children() if isinstance(part, Modulation))
            if self.trains_y or _trains(*embedders, *modulations):
                units.add(block.modulation_unit)
        return frozenset(units)

    def set_policy(self, policy: str | Sequence[str]) -> None:
        """Set what blocks keep for backward: one policy for all, or one each (fluxq/kernels/replay.py).

        Only keep_all8 rounds.
        """
        policies = [policy] * len(self.blocks) if isinstance(policy, str) else policy
        for block, own in zip(self.blocks, policies, strict=True):
            block.policy = own or "recompute"  # in a plan, a block without a backward pass has the policy ""

    def set_compute(self, compute: str) -> None:
        """Set the type in which blocks multiply their frozen weights (COMPUTES in fluxq/kernels/lora_linear.py)."""
        for layer in (m for block in self.blocks for m in block.modules() if isinstance(m, Linear)):
            layer.compute = compute

    @property
    def _unquantized(self) -> Tensor:
        """A buffer that no format quantizes."""
        return self.get_buffer("final_layer.linear.bias")

    def forward(
        self,
        img: Tensor,
        img_ids: Tensor,
        txt: Tensor,
        txt_ids: Tensor,
        timesteps: Tensor,
        y: Tensor,
        guidance: Tensor | None = None,
        modulation: Iterable[Tensor] | None = None,
        txt_mask: Tensor | None = None,
    ) -> Tensor:
        """The velocity (noise - image) of every image token, (B, Li, out_channels) in the model's dtype.

        img (B, Li, in_channels): packed latents. txt (B, Lt, context_in_dim): T5 states. ids (B, L, 3) or (L, 3).
        timesteps (B,) in 0..1; 1 is pure noise. y (B, vec_in_dim): CLIP's pooled vector. guidance (B,): only for models
        that embed it (dev). modulation: the result of `modulation_rows`, if computed ahead (modulation.py).
        txt_mask (B, Lt), if given, is True for text that is attended to; the rest, padding, changes nothing.
        """
        rows = iter(self.modulation_rows(timesteps, y, guidance) if modulation is None else modulation)
        cos, sin = rope_angles(torch.cat([txt_ids, img_ids], dim=-2), self.config.axes_dim, self.config.theta)
        img = self.img_in(img.to(self.dtype))
        txt = self.txt_in(txt.to(self.dtype))
        mask = None if txt_mask is None else nn.functional.pad(txt_mask.to(img.device), (0, img.shape[1]), value=True)

        offload = None if self.inputs is None else self.inputs.begin()
        for block in self.double_blocks:
            img, txt = run_block(block, self.ring, img, txt, next(rows), cos, sin, mask=mask, offload=offload)  # type: ignore[arg-type]
        x, txt_tokens = torch.cat([txt, img], dim=1), txt.shape[1]
        del img, txt
        for block in self.single_blocks:
            x = run_block(block, self.ring, x, next(rows), cos, sin, mask=mask, offload=offload)  # type: ignore[arg-type]
        return self.final_layer(x[:, txt_tokens:], next(rows))

    def modulation_rows(self, timesteps: Tensor, y: Tensor, guidance: Tensor | None = None) -> Iterator[Tensor]:
        """Yields the rows that modulate each block, (B, 12 D) or (B, 3 D), then the last layer, (B, 2 D).

        Arguments as in `forward`. Raises ValueError if guidance is missing, or given to a model without it.
        """
        if (guidance is None) == self.config.guidance_embed:
            what = "needs guidance" if guidance is None else "(schnell) takes no guidance"
            raise ValueError(f"this model {what}")
        vec = self.time_in(sinusoid(timesteps).to(self.dtype)) + self.vector_in(y.to(self.dtype))
        if self.guidance_in is not None and guidance is not None:
            vec = vec + self.guidance_in(sinusoid(guidance).to(self.dtype))
        for block in self.blocks:
            yield run_modulation(block, self.ring, vec)
        yield self.final_layer.modulation_rows(vec)


def _trains(*modules: nn.Module | None) -> bool:
    return any(p.requires_grad for m in modules if m is not None for p in m.parameters())
