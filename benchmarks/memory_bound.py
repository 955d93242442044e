"""What the benchmarks of memory-bound steps share: a step, its check, and its speed beside a copy of as many bytes.

On a card the backend is Triton and every run starts with a cold L2 cache; without one the reference runs on the
processor, at the smallest size.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOKENS = (1536, 2816, 4608) if DEVICE.type == "cuda" else (1536,)  # 512 of text, and 512, 768 and 1024 px
FEW = 576  # enough to learn what steps there are
ROUNDS = 50 if DEVICE.type == "cuda" else 7
WIDTH, HEADS, HIDDEN = 3072, 24, 12288


@dataclass(frozen=True)
class Step:
    """A step of fluxq and the same in plain PyTorch, both giving the same tensors; the bytes it has to move."""

    ours: Callable[[], tuple[Tensor, ...]]
    plain: Callable[[], tuple[Tensor, ...]]
    moved: int


def random(*shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE, dtype=torch.bfloat16)


def nbytes(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def gradients(
    plain: Callable[..., tuple[Tensor, ...]], inputs: tuple[Tensor, ...], grads: tuple[Tensor, ...]
) -> Callable[[], tuple[Tensor, ...]]:
    """What runs autograd's backward pass of plain(*inputs) alone."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    outputs = plain(*leaves)
    return lambda: torch.autograd.grad(outputs, leaves, grads, retain_graph=True)


def check(step: Step) -> None:
    """Both sides agree within what bf16 can tell apart."""
    for ours, plain in zip(step.ours(), step.plain(), strict=True):
        error = (ours.float() - plain.float()).norm() / plain.float().norm()
        assert ours.shape == plain.shape and error < 0.01, f"{error:.4f} apart"


def run(benchmark, step: Step, side: str) -> None:
    """Checks the step, then lets pytest-benchmark time one side of it, to the end of the work."""
    check(step)
    call = getattr(step, side)
    benchmark.pedantic(lambda: (call(), synchronize()), setup=flush, rounds=ROUNDS, warmup_rounds=2)
    benchmark.extra_info["gb_per_second"] = step.moved / benchmark.stats.stats.median / 1e9


def print_shares(steps: Mapping[str, Step], capsys) -> None:
    """Prints medians of alternating runs: ours, plain PyTorch, and a copy that moves as many bytes as ours has to."""
    for name, step in steps.items():
        check(step)
        source = torch.ones(step.moved // 2, dtype=torch.uint8, device=DEVICE)
        calls = {"ours": step.ours, "plain": step.plain, "copy": source.clone}
        times: dict[str, list[float]] = {side: [] for side in calls}
        for turn in range(ROUNDS + 3):
            for side, call in calls.items():
                flush()
                seconds = timed(call)
                if turn >= 3:
                    times[side].append(seconds)
        ours, plain, copy = (statistics.median(t) for t in times.values())
        with capsys.disabled():
            print(
                f"\n{name:32s} {ours * 1e6:9.1f} us, {step.moved / ours / 1e9:7.1f} GB/s, "
                f"{copy / ours:5.0%} of a copy's speed, {plain / ours:5.2f}x plain PyTorch",
                end="",
            )


def timed(call: Callable[[], object]) -> float:
    """Seconds of one call; on a card by events, so that the launch is not counted."""
    if DEVICE.type == "cpu":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def synchronize() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def flush() -> None:
    """Empty the card's L2 cache: nothing of a block's inputs is in it when a step begins."""
    if DEVICE.type == "cuda":
        torch.empty(256 << 20, dtype=torch.uint8, device=DEVICE).zero_()
