"""How fast GPUs are: a table of common ones, and a measurement of the one in this machine.

Nominal rates are dense. GeForce GPUs multiply bf16 with sums in fp32 at half the headline rate of their datasheets,
int8 at four times that and fp8 at twice. How much of the rates real code reaches is assumed, in `Efficiency`, next to
them. Everything computed from either is a prediction.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from .costs import Work

GIB = 2**30


@dataclass(frozen=True)
class Efficiency:
    """The fraction of the GPU's rates that code reaches: in matrix products in bf16 and in 8 bits, in attention and its
    gradient (of the bf16 rate), and in memory-bound ops.
    """

    bf16: float = 0.80
    eight_bits: float = 0.55
    attention: float = 0.60
    attention_backward: float = 0.50
    memory: float = 0.85


MEASURED = Efficiency(bf16=1.0, eight_bits=1.0, attention=0.75, attention_backward=0.62, memory=1.0)
"""For measured rates, which already include losses. Attention is not measured; it is scaled in the same proportion as
above."""


@dataclass(frozen=True)
class GPU:
    """Rates of a GPU: TFLOP/s of bf16, int8 and fp8 products (0: not supported), GB/s of its memory and of copies from
    pinned host memory, and its GiB. capability: compute capability as one number, 89 for 8.9. word: whether the rates
    are `nominal` or `measured`.
    """

    name: str
    capability: int
    bf16: float
    int8: float
    fp8: float
    memory_gb_s: float
    memory_gib: float
    bus_gb_s: float
    word: str = "nominal"
    efficiency: Efficiency = Efficiency()

    def seconds(self, work: Work) -> float:
        """The predicted time of `work`; infinite if the GPU lacks the arithmetic."""
        e, total = self.efficiency, work.moved / (self.memory_gb_s * 1e9 * self.efficiency.memory)
        for flops, rate in (
            (work.bf16, self.bf16 * e.bf16),
            (work.int8, self.int8 * e.eight_bits),
            (work.fp8, self.fp8 * e.eight_bits),
            (work.attention, self.bf16 * e.attention),
            (work.attention_backward, self.bf16 * e.attention_backward),
        ):
            if flops:
                total += flops / (rate * 1e12) if rate else float("inf")
        return total

    @property
    def vram(self) -> int:
        return int(self.memory_gib * GIB)


PCIE_3_X16, PCIE_4_X8, PCIE_4_X16, PCIE_5_X8, PCIE_5_X16 = 12.3, 12.5, 24.5, 25.0, 50.0  # GB/s from pinned memory

_TABLE = (
    # name, compute capability, bf16, int8, fp8 with sums in fp32, memory GB/s, GiB, bus
    ("rtx3060", 86, 25.3, 101, 0, 360, 12, PCIE_4_X16),
    ("rtx3070", 86, 40.6, 163, 0, 448, 8, PCIE_4_X16),
    ("rtx3080", 86, 59.5, 238, 0, 760, 10, PCIE_4_X16),
    ("rtx3090", 86, 71, 284, 0, 936, 24, PCIE_4_X16),
    ("rtx4060", 89, 30.2, 121, 60, 272, 8, PCIE_4_X8),
    ("rtx4060ti", 89, 44.1, 176, 88, 288, 16, PCIE_4_X8),
    ("rtx4070", 89, 58.3, 233, 117, 504, 12, PCIE_4_X16),
    ("rtx4070tisuper", 89, 88.2, 353, 176, 672, 16, PCIE_4_X16),
    ("rtx4080", 89, 97.5, 390, 195, 717, 16, PCIE_4_X16),
    ("rtx4090", 89, 165.2, 661, 330, 1008, 24, PCIE_4_X16),
    ("rtx5060ti", 120, 47.4, 190, 95, 448, 16, PCIE_5_X8),
    ("rtx5070ti", 120, 87.9, 352, 176, 896, 16, PCIE_5_X16),
    ("rtx5080", 120, 112.6, 450, 225, 960, 16, PCIE_5_X16),
    ("rtx5090", 120, 209.5, 838, 419, 1792, 32, PCIE_5_X16),
    ("a100", 80, 312, 624, 0, 2039, 80, PCIE_4_X16),
    ("l40s", 89, 362, 733, 733, 864, 48, PCIE_4_X16),
    ("h100", 90, 989, 1979, 1979, 3350, 80, PCIE_5_X16),
    ("h200", 90, 989, 1979, 1979, 4800, 141, PCIE_5_X16),
)
GPUS = {row[0]: GPU(*row) for row in _TABLE}
"""Name -> GPU, each in the widest slot that it supports; a GPU in a narrower slot is measured."""


def measure(folder: Path, device: str = "cuda", size: int = 4096, seconds: float = 0.3, copied: int = 1 << 28) -> GPU:
    """Measure the GPU `device` (or a CPU, for tests) in about two seconds; the result is saved in `folder`.

    size: of the matrices; seconds: of each of the five measurements; copied: bytes of a copy.
    """
    import torch

    name, capability, memory = _identity(device)
    slug = "".join(c if c.isalnum() else "-" for c in f"{name}-{torch.__version__}".lower())
    path = folder / f"card-{slug}.json"
    with suppress(OSError, ValueError, TypeError):
        saved = json.loads(path.read_text(encoding="utf-8"))
        return GPU(**{**saved, "efficiency": Efficiency(**saved["efficiency"])})
    rates = {k: _rate(run, 2 * size**3, device, seconds) / 1e12 for k, run in _products(size, device).items()}
    source = torch.zeros(copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    memory_rate = _rate(lambda: target.copy_(source), 2 * copied, device, seconds) / 1e9
    host = torch.zeros(copied, dtype=torch.uint8, pin_memory=device.startswith("cuda"))
    bus = _rate(lambda: target.copy_(host, non_blocking=True), copied, device, seconds) / 1e9
    rounded = {k: round(rates.get(k, 0.0), 3) for k in ("bf16", "int8", "fp8")}
    gpu = GPU(name, capability, **rounded, memory_gb_s=round(memory_rate, 2), memory_gib=round(memory / GIB, 2),
                bus_gb_s=round(bus, 2), word="measured", efficiency=MEASURED)  # fmt: skip
    with suppress(OSError):  # if the folder is read-only, the next run measures again
        folder.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(asdict(gpu), indent=1), encoding="utf-8")
        temporary.replace(path)
    return gpu


def _identity(device: str) -> tuple[str, int, int]:
    """(name, compute capability, bytes of memory)."""
    import torch

    if not device.startswith("cuda"):
        return device, 0, 0
    about = torch.cuda.get_device_properties(torch.device(device))
    return about.name, 10 * about.major + about.minor, about.total_memory


def _products(size: int, device: str) -> dict[str, Callable[[], Any]]:
    """The matrix products that torch supports on `device`, by type: torch's own, not fluxq's kernels."""
    import torch

    a = torch.ones(size, size, dtype=torch.bfloat16, device=device)
    eight, scale = a.to(torch.int8), torch.ones((), device=device)
    products: dict[str, Callable[[], Any]] = {
        "bf16": lambda: a @ a,
        "int8": lambda: torch._int_mm(eight, eight.t()),
    }
    if device.startswith("cuda"):
        f8 = a.to(torch.float8_e4m3fn)
        products["fp8"] = lambda: torch._scaled_mm(f8, f8.t(), scale, scale, out_dtype=torch.bfloat16)
    usable = {}
    for name, run in products.items():
        with suppress(RuntimeError, NotImplementedError):  # this GPU lacks the arithmetic
            run()
            usable[name] = run
    return usable


def _rate(run: Callable[[], Any], amount: float, device: str, seconds: float) -> float:
    """`amount` per second: from the median time of `run`, repeated for `seconds`."""
    import torch

    def timed(count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            run()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / count

    timed(2)
    once = max(timed(1), 1e-7)
    count = max(1, int(seconds / 5 / once))
    return amount / sorted(timed(count) for _ in range(5))[2]


def with_bus(gpu: GPU, gb_s: float) -> GPU:
    """`gpu` in another slot."""
    return replace(gpu, bus_gb_s=gb_s)
