"""The sizes of a FLUX.1 transformer and its autoencoder.

Field names are those of the reference implementation (black-forest-labs/flux, `FluxParams` and `AutoEncoderParams`).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class FluxConfig:
    """Sizes of a FLUX.1 transformer. hidden_size: the width D. axes_dim: one head's channels for each RoPE axis."""

    in_channels: int
    out_channels: int
    vec_in_dim: int
    context_in_dim: int
    hidden_size: int
    mlp_ratio: float
    num_heads: int
    depth: int
    depth_single_blocks: int
    axes_dim: tuple[int, int, int]
    theta: int
    qkv_bias: bool
    guidance_embed: bool

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}")
        if sum(self.axes_dim) != self.head_dim or any(d % 2 for d in self.axes_dim):
            raise ValueError(f"axes_dim {self.axes_dim} must be even and add up to the head width {self.head_dim}")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def mlp_hidden(self) -> int:
        return int(self.hidden_size * self.mlp_ratio)

    @classmethod
    def dev(cls) -> FluxConfig:
        """FLUX.1 dev, and the other models with guidance embedding: Krea, Kontext."""
        return cls(64, 64, 768, 4096, 3072, 4.0, 24, 19, 38, (16, 56, 56), 10_000, True, True)

    @classmethod
    def schnell(cls) -> FluxConfig:
        """FLUX.1 schnell: dev without guidance embedding."""
        return cls(64, 64, 768, 4096, 3072, 4.0, 24, 19, 38, (16, 56, 56), 10_000, True, False)

    @classmethod
    def nano(cls) -> FluxConfig:
        """The bundled toy model (fluxq/nano)."""
        return cls(64, 64, 64, 128, 192, 4.0, 6, 2, 2, (4, 14, 14), 10_000, True, True)


@dataclass(frozen=True)
class AutoEncoderConfig:
    """Sizes of the FLUX.1 autoencoder: 8 x 8 pixels per latent, z_channels channels, latents = scale * (z - shift)."""

    resolution: int = 256
    in_channels: int = 3
    ch: int = 128
    out_ch: int = 3
    ch_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    z_channels: int = 16
    scale_factor: float = 0.3611
    shift_factor: float = 0.1159
    groups: int = 32
