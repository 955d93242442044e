"""How fast GPUs are: a table of common ones, and a measurement of the one in this machine.

Nominal rates are dense. GeForce GPUs multiply bf16 with sums in fp32 at half the headline rate of their datasheets,
int8 at four times that and fp8 at twice. How much of the rates real code reaches is assumed, in `Efficiency`, next to
them. Everything computed from either is a prediction.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from .costs import Work
from .launches import LAUNCH_US, WIDTH, measure_launch_us

GIB = 2**30


@dataclass(frozen=True)
class Efficiency:
    """The fraction of the GPU's rates that code reaches: in matrix products in bf16 and in 8 bits that keep every
    multiprocessor busy, in attention and its gradient (of the bf16 rate), and in memory-bound ops.
    """

    bf16: float = 0.80
    eight_bits: float = 0.55
    attention: float = 0.60
    attention_backward: float = 0.50
    memory: float = 0.85


MEASURED = Efficiency(bf16=1.0, eight_bits=1.0, attention=0.75, attention_backward=0.62, memory=1.0)
"""For measured rates, which already include losses. Attention is not measured; it is scaled in the same proportion as
above."""


TILE = 128
"""Rows and columns of results that one multiprocessor computes at a time."""


def filled(rows: int, columns: int, sms: int) -> float:
    """The share of the GPU that a product of so many rows and columns of results keeps busy.

    Its `sms` multiprocessors each compute a tile at a time, so all wait for the last wave, which may have fewer tiles;
    tiles at the edges are computed whole. 1.0 if `sms` is 0: unknown.
    """
    tiles = math.ceil(rows / TILE) * math.ceil(columns / TILE)
    return rows * columns / (TILE**2 * sms * math.ceil(tiles / sms)) if sms else 1.0


@dataclass(frozen=True)
class GPU:
    """Rates of a GPU: TFLOP/s of bf16, int8 and fp8 products that fill it (0: not supported), GB/s of its memory and of
    copies from pinned host memory, and its GiB. capability: compute capability as one number, 89 for 8.9. word: whether
    the rates are `nominal` or `measured`. sms: its multiprocessors, 0 if unknown. launch_us: microseconds in which
    Python launches a kernel of a step, on average (launches.py).
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
    sms: int = 0
    launch_us: float = LAUNCH_US

    def seconds(self, work: Work) -> float:
        """The predicted time of `work`; infinite if the GPU lacks the arithmetic."""
        e, total = self.efficiency, work.moved / (self.memory_gb_s * 1e9 * self.efficiency.memory)
        rates = {"bf16": self.bf16 * e.bf16, "int8": self.int8 * e.eight_bits, "fp8": self.fp8 * e.eight_bits}
        idle = dict.fromkeys(rates, 0.0)  # FLOPs that waiting multiprocessors could have done
        for product in work.products:
            idle[product.kind] += product.flops * (1 / filled(product.rows, product.columns, self.sms) - 1)
        for flops, rate in (
            *((getattr(work, kind) + idle[kind], rate) for kind, rate in rates.items()),
            (work.attention, self.bf16 * e.attention),
            (work.attention_backward, self.bf16 * e.attention_backward),
        ):
            if flops:
                total += flops / (rate * 1e12) if rate else float("inf")
        return total

    @property
    def library(self) -> int:
        """Bytes that cuBLAS has of torch's allocator: a workspace for each of the two threads that multiply, of the
        size that torch gives it.
        """
        return 2 * (32 << 20 if self.capability >= 90 else 8320 << 10) if self.capability else 0

    @property
    def vram(self) -> int:
        return int(self.memory_gib * GIB)


PCIE_3_X16, PCIE_4_X8, PCIE_4_X16, PCIE_5_X8, PCIE_5_X16 = 12.3, 12.5, 24.5, 25.0, 50.0  # GB/s from pinned memory

_TABLE = (
    # name, compute capability, multiprocessors, bf16, int8, fp8 with sums in fp32, memory GB/s, GiB, bus
    ("rtx3060", 86, 28, 25.3, 101, 0, 360, 12, PCIE_4_X16),
    ("rtx3070", 86, 46, 40.6, 163, 0, 448, 8, PCIE_4_X16),
    ("rtx3080", 86, 68, 59.5, 238, 0, 760, 10, PCIE_4_X16),
    ("rtx3090", 86, 82, 71, 284, 0, 936, 24, PCIE_4_X16),
    ("rtx4060", 89, 24, 30.2, 121, 60, 272, 8, PCIE_4_X8),
    ("rtx4060ti", 89, 34, 44.1, 176, 88, 288, 16, PCIE_4_X8),
    ("rtx4070", 89, 46, 58.3, 233, 117, 504, 12, PCIE_4_X16),
    ("rtx4070tisuper", 89, 66, 88.2, 353, 176, 672, 16, PCIE_4_X16),
    ("rtx4080", 89, 76, 97.5, 390, 195, 717, 16, PCIE_4_X16),
    ("rtx4090", 89, 128, 165.2, 661, 330, 1008, 24, PCIE_4_X16),
    ("rtx5060ti", 120, 36, 47.4, 190, 95, 448, 16, PCIE_5_X8),
    ("rtx5070ti", 120, 70, 87.9, 352, 176, 896, 16, PCIE_5_X16),
    ("rtx5080", 120, 84, 112.6, 450, 225, 960, 16, PCIE_5_X16),
    ("rtx5090", 120, 170, 209.5, 838, 419, 1792, 32, PCIE_5_X16),
    ("a100", 80, 108, 312, 624, 0, 2039, 80, PCIE_4_X16),
    ("l40s", 89, 142, 362, 733, 733, 864, 48, PCIE_4_X16),
    ("h100", 90, 132, 989, 1979, 1979, 3350, 80, PCIE_5_X16),
    ("h200", 90, 132, 989, 1979, 1979, 4800, 141, PCIE_5_X16),
)
GPUS = {row[0]: GPU(*row[:2], *row[3:], sms=row[2]) for row in _TABLE}
"""Name -> GPU, each in the widest slot that it supports; a GPU in a narrower slot is measured."""
SMALLER = {("rtx4060ti", 8), ("rtx5060ti", 8)}
"""(name, GiB) of GPUs that are sold with less memory and no other difference."""


def gpu_named(name: str) -> GPU | None:
    """The GPU that people or its driver call so: "3060", "RTX 3060", "rtx3060-12gb", "NVIDIA A100-SXM4-80GB".

    None if it is not in GPUS, or not with that memory.
    """
    memory = re.search(r"(\d+) ?gi?b", name.lower())
    short = re.sub(r"\d+ ?gi?b|nvidia|geforce|tesla|pcie|sxm\d?|hbm\de?|[^a-z0-9]", "", name.lower())
    gpu = GPUS.get(short) or GPUS.get(f"rtx{short}")
    if gpu and memory and (gib := int(memory[1])) != gpu.memory_gib:
        return replace(gpu, name=f"{gpu.name}-{gib}gb", memory_gib=gib) if (gpu.name, gib) in SMALLER else None
    return gpu


VERSION = 3
"""Of what `measure` measures; older files are not read. 1 measured the vendor's products, of matrices of ones; 2 did
not measure Python, and its rates include the wait for the last wave.
"""
SHAPES = ((1536, 9216, 3072), (4608, 9216, 3072))
"""(M, N, K): rows of a batch at 512 and 1024 pixels, by a weight of the common size in transformers of 12 B weights."""

LORA_RANK = 16


def measure(
    folder: Path,
    device: str = "cuda",
    shapes: Sequence[tuple[int, int, int]] = SHAPES,
    seconds: float = 0.3,
    copied: int = 1 << 28,
    width: int = WIDTH,
) -> GPU:
    """Measure the GPU `device` (or a CPU, for tests) in a few seconds; the result is saved in `folder`.

    shapes: of the products; seconds: of each of the six measurements; copied: bytes of a copy; width: of the layers
    whose launches are timed. All numbers are random:
    constant ones flip fewer bits, take less power, and so run at a higher clock than training does.
    """
    import torch

    name, capability, sms, memory = _identity(device)
    slug = "".join(c if c.isalnum() else "-" for c in f"{name}-{torch.__version__}".lower())
    path = folder / f"gpu-{slug}-v{VERSION}.json"
    with suppress(OSError, ValueError, TypeError):
        saved = json.loads(path.read_text(encoding="utf-8"))
        return GPU(**{**saved, "efficiency": Efficiency(**saved["efficiency"])})
    flops = sum(2 * m * n * k / filled(m, n, sms) for m, n, k in shapes)  # those that fill the GPU in the same time
    rates = {kind: _rate(run, flops, device, seconds) / 1e12 for kind, run in _products(shapes, device).items()}
    source = torch.randint(256, (copied,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    memory_rate = _rate(lambda: target.copy_(source), 2 * copied, device, seconds) / 1e9
    host = torch.empty(copied, dtype=torch.uint8, pin_memory=device.startswith("cuda"))
    host.copy_(source)
    bus = _rate(lambda: target.copy_(host, non_blocking=True), copied, device, seconds) / 1e9
    rounded = {kind: _rounded(rates.get(kind, 0.0)) for kind in ("bf16", "int8", "fp8")}
    gpu = GPU(name, capability, **rounded, memory_gb_s=_rounded(memory_rate), memory_gib=round(memory / GIB, 2),
              bus_gb_s=_rounded(bus), word="measured", efficiency=MEASURED, sms=sms,
              launch_us=_rounded(measure_launch_us(device, width, seconds)))  # fmt: skip
    with suppress(OSError):  # if the folder is read-only, the next run measures again
        folder.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(asdict(gpu), indent=1), encoding="utf-8")
        temporary.replace(path)
    return gpu


def _rounded(rate: float) -> float:
    """To four digits."""
    return float(f"{rate:.4g}")


def _identity(device: str) -> tuple[str, int, int, int]:
    """(name, compute capability, multiprocessors, bytes of memory)."""
    import torch

    if not device.startswith("cuda"):
        return device, 0, 0, 0
    about = torch.cuda.get_device_properties(torch.device(device))
    return about.name, 10 * about.major + about.minor, about.multi_processor_count, about.total_memory


def _products(shapes: Sequence[tuple[int, int, int]], device: str) -> dict[str, Callable[[], Any]]:
    """By type, the products of all shapes as training multiplies them, if `device` can: fluxq's own in 8 bits, the
    vendor's in bf16, with LoRA's padding behind each row.
    """
    import torch

    from fluxq.kernels import ops, reference
    from fluxq.kernels.chunks import padding

    def bf16(m: int, n: int, k: int) -> Callable[[], Any]:
        x, w = (torch.randn(rows, k + padding(LORA_RANK), device=device).bfloat16() for rows in (m, n))
        return lambda: torch.mm(x, w.t())

    def eight_bits(m: int, n: int, k: int, dtype: torch.dtype) -> Callable[[], Any]:
        (a, a_scale), (b, b_scale) = (
            reference.row_quantize(torch.randn(rows, k, device=device), dtype) for rows in (m, n)
        )
        s, up = (torch.randn(rows, LORA_RANK, device=device) for rows in (m, n))
        bias = torch.randn(n, device=device).bfloat16()
        return lambda: ops(a).matmul_8bit(a, a_scale, b, b_scale, torch.bfloat16, s, up, bias)

    makers: dict[str, Callable[[int, int, int], Callable[[], Any]]] = {
        "bf16": bf16,
        "int8": partial(eight_bits, dtype=torch.int8),
    }
    if device.startswith("cuda"):
        makers["fp8"] = partial(eight_bits, dtype=torch.float8_e4m3fn)
    usable = {}
    for kind, make in makers.items():
        with suppress(RuntimeError, NotImplementedError, ValueError):  # this GPU lacks the arithmetic
            each = [make(*shape) for shape in shapes]
            for run in each:
                run()
            usable[kind] = partial(_all, each)
    return usable


def _all(each: Sequence[Callable[[], Any]]) -> None:
    for run in each:
        run()


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
