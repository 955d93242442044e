"""FLUX.1, the transformer: a rectified-flow model of image latents (black-forest-labs/flux), frozen except for LoRA.

Parameter names are those of the original checkpoint files, so that a file loads without a key map.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from fluxq.offload import AllResident, HostInputs, Ring

from .blocks import (
    Block,
    DoubleStreamBlock,
    LastLayer,
    Modulation,
    SingleStreamBlock,
    run_block,
    run_modulation,
)
from .config import FluxConfig
from .embed import MLPEmbedder, rope_angles, sinusoid
from .linear import Linear


class Flux(nn.Module):
    """The transformer. Fresh from the constructor its layers hold uninitialized floating-point buffers, to be loaded.

    It computes in the dtype of its vectors, biases and norms; what carries time, guidance and positions stays fp32 on
    the way in.
    """

    def __init__(self, config: FluxConfig) -> None:
        super().__init__()
        self.config = config
        self.ring: Ring = AllResident()
        self.inputs: HostInputs | None = None  # where block inputs wait for the backward pass, if not on the GPU
        self.trains_y = False  # whether gradients are wanted of y: CLIP's LoRA, upstream of it, trains
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
        """What the model computes in."""
        return self._sample.dtype

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return self._sample.device

    @property
    def blocks(self) -> list[Block]:
        """All blocks in forward order."""
        return [*self.double_blocks, *self.single_blocks]  # type: ignore[list-item]

    @property
    def blocks_units(self) -> tuple[tuple[str, ...], ...]:
        """The units that each block computes with, in forward order."""
        return tuple(block.units for block in self.blocks)

    @property
    def blocks_with_backward(self) -> range:
        """The numbers of the blocks that have a backward pass: from the first that something trainable lies in, or all
        where that lies upstream of the blocks. Of the inputs only y may need a gradient (`trains_y`).
        """
        upstream = (self.img_in, self.txt_in, self.time_in, self.vector_in, self.guidance_in)
        trains = [self.trains_y or _trains(*upstream), *(_trains(block) for block in self.blocks)]
        first = trains.index(True) if True in trains else len(trains)
        return range(max(0, first - 1), len(self.blocks))

    @property
    def trains_modulation(self) -> bool:
        """Whether anything trainable lies upstream of `vec` or in what reads it: then rows change from step to step."""
        modulations = (m for m in self.modules() if isinstance(m, Modulation))
        embedders = (self.time_in, self.vector_in, self.guidance_in)
        return self.trains_y or _trains(*embedders, self.final_layer.adaLN_modulation, *modulations)

    @property
    def units_with_backward(self) -> frozenset[str]:
        """The units, modulation's too, that a training step goes back through."""
        embedders = (self.time_in, self.vector_in, self.guidance_in)
        found = {unit for i in self.blocks_with_backward for unit in self.blocks[i].units}
        for block in self.blocks:
            modulations = (part for part in block.children() if isinstance(part, Modulation))
            if self.trains_y or _trains(*embedders, *modulations):
                found.add(block.modulation_unit)
        return frozenset(found)

    def set_policy(self, policy: str | Sequence[str]) -> None:
        """Have every block keep that for its backward pass, or each block its own (fluxq/kernels/replay.py). Only
        keep_all8 rounds.
        """
        each = [policy] * len(self.blocks) if isinstance(policy, str) else policy
        for block, own in zip(self.blocks, each, strict=True):
            block.policy = own or "recompute"  # a plan names none where there is no backward pass

    def set_compute(self, compute: str) -> None:
        """Have the blocks multiply their frozen weights so (fluxq/kernels/lora_linear.py)."""
        for block in (*self.double_blocks, *self.single_blocks):
            for layer in block.modules():
                if isinstance(layer, Linear):
                    layer.compute = compute

    @property
    def _sample(self) -> Tensor:
        """A vector that every format leaves as it is."""
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
    ) -> Tensor:
        """The velocity (noise - image) at every image token, (B, Li, out_channels) in the model's dtype.

        img (B, Li, in_channels) packed latents; txt (B, Lt, context) T5 tokens; ids (B, L, 3) or (L, 3); timesteps (B,)
        in 0..1, 1 is noise; y (B, vec_in) CLIP's pooled vector; guidance (B,), needed by models that embed it (dev).
        modulation: what `modulation_rows` gives for timesteps, y and guidance, where it has been computed ahead.
        """
        rows = iter(self.modulation_rows(timesteps, y, guidance) if modulation is None else modulation)
        cos, sin = rope_angles(torch.cat([txt_ids, img_ids], dim=-2), self.config.axes_dim, self.config.theta)
        img = self.img_in(img.to(self.dtype))
        txt = self.txt_in(txt.to(self.dtype))

        away = None if self.inputs is None else self.inputs.begin()
        for block in self.double_blocks:
            img, txt = run_block(block, self.ring, img, txt, next(rows), cos, sin, away=away)  # type: ignore[arg-type]
        x, length = torch.cat([txt, img], dim=1), txt.shape[1]
        del img, txt
        for block in self.single_blocks:
            x = run_block(block, self.ring, x, next(rows), cos, sin, away=away)  # type: ignore[arg-type]
        return self.final_layer(x[:, length:], next(rows))

    def modulation_rows(self, timesteps: Tensor, y: Tensor, guidance: Tensor | None = None) -> Iterator[Tensor]:
        """The rows that modulate each block, (B, 12 D) or (B, 3 D), and then the last layer, (B, 2 D).

        Each is computed when it is asked for; arguments as of `forward`.
        """
        if (guidance is None) == self.config.guidance_embed:
            raise ValueError(
                "this model needs guidance" if guidance is None else "this model (schnell) takes no guidance"
            )
        vec = self.time_in(sinusoid(timesteps).to(self.dtype)) + self.vector_in(y.to(self.dtype))
        if self.guidance_in is not None and guidance is not None:
            vec = vec + self.guidance_in(sinusoid(guidance).to(self.dtype))
        for block in self.blocks:
            yield run_modulation(block, self.ring, vec)
        yield self.final_layer.modulation_rows(vec)


def _trains(*modules: nn.Module | None) -> bool:
    return any(p.requires_grad for m in modules if m is not None for p in m.parameters())
