"""The rule by which a kernel is close enough: its error is at most twice that of plain PyTorch in the same dtype."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from helpers import relative_error
from torch import Tensor


def with_gradients(run: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The outputs of run(*inputs) in `dtype`, and the gradients of the inputs for one fixed random gradient each."""
    leaves = [t.detach().to(dtype).requires_grad_() for t in inputs]
    outputs = list(run(*leaves))
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(t.shape, generator=generator).to(t.device, torch.bfloat16).to(t.dtype) for t in outputs]
    return [*(t.detach() for t in outputs), *torch.autograd.grad(outputs, leaves, grads)]


def assert_as_close_as_plain(
    run: Callable[..., Sequence[Tensor]],
    plain: Callable[..., Sequence[Tensor]],
    exact: Callable[..., Sequence[Tensor]],
    inputs: Sequence[Tensor],
    dtype: torch.dtype,
) -> None:
    """Outputs and gradients of `run` in `dtype` against `exact` in fp64, by the error of `plain` in `dtype`.

    Where kernels are interpreted, a cast to bf16 cuts off instead of rounding, which doubles its error.
    """
    inputs = [t.to(dtype) for t in inputs]
    results = (with_gradients(f, inputs, d) for f, d in ((run, dtype), (plain, dtype), (exact, torch.float64)))
    slack = 2.0 * (2.0 if dtype == torch.bfloat16 and not inputs[0].is_cuda else 1.0)
    for i, (ours, yardstick, truth) in enumerate(zip(*results, strict=True)):
        assert ours.dtype == dtype and ours.shape == truth.shape
        error, allowed = relative_error(ours, truth), slack * relative_error(yardstick, truth)
        assert error <= allowed + torch.finfo(dtype).eps / 2, f"value {i}: {error:.2e}, allowed {allowed:.2e}"
