"""What all rows of one run share: the device and sizes, the time per row, and the GPU's best rates."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import ModuleType

import torch

from benchmarks.cases import Skip
from benchmarks.roofline import Ceilings
from fluxq.bench.kernel_cases import Layer, layer_shape
from fluxq.bench.memory_bound import Sizes, has_fp8
from fluxq.kernels import ops

LAYERS = ("qkv", "proj", "mlp.0", "mlp.2", "linear2")
TINY = dict(tokens=136, width=128, heads=2, text=70, rank=4)


@dataclass(frozen=True)
class BenchSetup:
    """rows: text and image tokens together; by default those of 512, 768 and 1024 pixels. seconds: per row."""

    device: torch.device
    ceilings: Ceilings
    tiny: bool = False
    rows: tuple[int, ...] = (1536, 2816, 4608)
    seconds: float = 0.4

    @property
    def sizes(self) -> Sizes:
        return Sizes(self.device, **TINY) if self.tiny else Sizes(self.device)

    def at(self, rows: int) -> Sizes:
        return replace(self.sizes, tokens=rows)

    def layer(self, name: str, rows: int, format: str) -> Layer:
        return Layer.random(self.sizes, (rows, *layer_shape(self.sizes, name)), format)

    @property
    def ours(self) -> ModuleType:
        """The backend that fluxq takes on this device."""
        return ops(torch.empty(0, device=self.device))

    @property
    def hopper(self) -> bool:
        return self.device.type == "cuda" and torch.cuda.get_device_capability(self.device)[0] == 9


def setting_of(device: torch.device, tiny: bool, ceilings: Ceilings) -> BenchSetup:
    """FLUX.1's sizes, or tiny ones that only show that everything runs."""
    if tiny:
        return BenchSetup(device, ceilings, True, (TINY["tokens"],), 0.0)
    return BenchSetup(device, ceilings)


def skip_missing_fp8(device: torch.device, compute: str) -> None:
    if compute.startswith("fp8") and not has_fp8(device):
        raise Skip("this GPU cannot multiply in fp8; on it fluxq computes in int8")
