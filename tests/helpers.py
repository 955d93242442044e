"""Models of random weights and of none, and what tests measure closeness by."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn, no_grad

from fluxq.formats.checkpoint.files import DTYPE_NAMES
from fluxq.model import Flux, FluxConfig


class Lazy:
    """The module `name`, imported when it is first used: some libraries that a few tests compare with take seconds, and
    every worker collects every file. A test that needs a missing one is skipped.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        if attribute.startswith(("_", "pytest")):  # asked by pytest of everything in a file
            raise AttributeError(attribute)
        return getattr(pytest.importorskip(self._name), attribute)


def tiny_config(**changes) -> FluxConfig:
    """A FLUX.1 of 2 + 2 blocks whose widths are all different, and multiples of 64 inside the blocks."""
    values = dict(
        in_channels=16, out_channels=16, vec_in_dim=24, context_in_dim=40, hidden_size=64, mlp_ratio=4.0, num_heads=2
    )
    values |= dict(
        depth=2, depth_single_blocks=2, axes_dim=(4, 14, 14), theta=10_000, qkv_bias=True, guidance_embed=True
    )
    return FluxConfig(**(values | changes))


def randomize(module: nn.Module) -> nn.Module:
    """Fill every floating-point tensor of `module` with noise: matrices by 1/sqrt(fan-in), scales around 1, biases
    around 0.
    """
    with no_grad():
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            if not tensor.is_floating_point():
                continue
            if tensor.ndim > 1:
                tensor.normal_(std=tensor[0].numel() ** -0.5)
            else:
                tensor.normal_(mean=1.0 if "norm" in name and "bias" not in name else 0.0, std=0.2)
    return module


def place_sensitive(
    flux: Flux,
    timesteps: Tensor,
    y: Tensor,
    guidance: Tensor | None = None,
    rows: Callable[..., Iterator[Tensor]] = Flux.modulation_rows,
) -> Iterator[Tensor]:
    """`flux.modulation_rows`, but that each row also depends on its place, and on the number and content of all."""
    count = len(timesteps)
    factors = 1 + 0.1 * (torch.arange(count, device=y.device)[:, None] / count + timesteps.float().mean()) + count / 1e3
    return (r * factors.to(r.dtype) for r in rows(flux, timesteps, y, guidance))


def relative_error(a: Tensor, b: Tensor) -> float:
    """|a - b| / |b| in the Frobenius norm, in fp64."""
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def write_hollow(path: Path, dtypes: Mapping[str, torch.dtype], shapes: Mapping[str, tuple[int, ...]]) -> Path:
    """A safetensors file of any size, all zeros, which takes no room on the disk."""
    if os.name == "nt":
        pytest.skip("zeros take room here")
    header, start = {}, 0
    for name, dtype in dtypes.items():
        end = start + math.prod(shapes[name]) * dtype.itemsize
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shapes[name]), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + start)
    return path


@dataclass
class Tensors:
    """A source of a transformer that lies in memory; `asked` are the names that it was asked for."""

    config: FluxConfig
    tensors: dict[str, Tensor]
    files: tuple[Path, ...] = ()

    def __post_init__(self):
        self.asked: list[str] = []

    @property
    def shapes(self):
        return {name: tuple(t.shape) for name, t in self.tensors.items()}

    @property
    def nbytes(self):
        return sum(t.nbytes for t in self.tensors.values())

    @property
    def sizes(self):
        return {name: t.nbytes for name, t in self.tensors.items()}

    def bands(self, name):
        """Halves, so that a seam is in every tensor."""
        rows = len(self.tensors[name])
        return [range(0, rows // 2), range(rows // 2, rows)]

    def get(self, name, rows, seen):
        if rows.start == 0:
            self.asked.append(name)
        tensor = self.tensors[name][rows.start : rows.stop]
        seen(tensor.reshape(-1).view(torch.uint8))
        return tensor
