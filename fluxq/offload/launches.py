"""How long Python takes to launch a kernel on this machine, from a small real sequence of fluxq's own ops.

A step is thousands of kernels (fluxq/model/launches.json counts them), each launched by Python and PyTorch. The GPU
works meanwhile; but if it needs less time than that, it waits, and Python limits the step.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor

LAUNCH_US = 70.0
"""Microseconds a launch, for GPUs of the table: 51 to 81 in the best steps of benchmarks/results/emulated_host.md."""

SEQUENCE = 30
"""Launches of a step that take as long as the sequence below. Fitted to benchmarks/results/emulated_host.md."""

BURST = 10
"""Sequences between two waits for the GPU: fewer launches than a stream queues before Python has to wait."""

ROWS, WIDTH, RANK = 128, 3072, 16
"""Large enough for the kernels of large inputs, small enough for the GPU to be done soon."""


def measure_launch_us(device: str, width: int = WIDTH, seconds: float = 0.3) -> float:
    """Microseconds of CPU time per launch of a step: the median of bursts of the sequence."""
    times, burst = list[float](), burst_of(device, width)
    while sum(times) < seconds / BURST or len(times) < 3:
        times.append(burst())
    return 1e6 * median(times) / SEQUENCE


def burst_of(device: str, width: int = WIDTH) -> Callable[[], float]:
    """A function that runs a burst and returns the seconds of CPU time of one sequence."""
    sequence = _sequence(torch.device(device), width)
    for _ in range(3):
        sequence()  # compiles

    def burst() -> float:
        start = time.process_time()
        for _ in range(BURST):
            sequence()
        elapsed = time.process_time() - start
        if device.startswith("cuda"):
            torch.cuda.synchronize()  # outside the clock: a GPU that is still busy would make the next burst wait
        return elapsed / BURST

    return burst


def _sequence(device: torch.device, width: int) -> Callable[[], None]:
    """An MLP with LoRA on NF4 weights, forward and backward, as a block of FLUX runs it."""
    from fluxq.kernels import gated_add, gelu_tanh, lora_linear, modulate, quantize, wants

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device)

    x, dy = (randn(1, ROWS, width).bfloat16() for _ in range(2))
    shift, scale, gate = (randn(1, 1, width).bfloat16() for _ in range(3))
    layers = []
    for _ in range(2):
        lora = [randn(*shape).requires_grad_() for shape in ((RANK, width), (width, RANK))]
        layers.append((quantize(randn(width, width).bfloat16(), "nf4"), randn(width).bfloat16(), *lora))
    inner, outer = layers
    loras = [*inner[2:], *outer[2:]]

    def run() -> None:
        modulated = modulate(x.requires_grad_(), shift, scale, wants("bf16", inner[2], x))
        hidden = gelu_tanh(lora_linear(modulated, *inner), wants=wants("bf16", outer[2], x))
        y = gated_add(x, gate, lora_linear(hidden, *outer))
        torch.autograd.grad(y, [x, *loras], dy)

    return run
