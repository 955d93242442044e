"""How close kernels have to be: at most twice the error of plain PyTorch in the same dtype, half a step in 8 bits."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from helpers import relative_error
from torch import Tensor

from fluxq.kernels import Activations

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
EIGHT_BITS = [torch.int8, torch.float8_e4m3fn]


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
    slack: float = 1.0,
) -> None:
    """Outputs and gradients of `run` in `dtype` against `exact` in fp64, by the error of `plain` in `dtype`; `slack`
    where twice that is too little, and the test says why.

    Where kernels are interpreted, a cast to bf16 cuts off instead of rounding, which doubles its error.
    """
    inputs = [t.to(dtype) for t in inputs]
    results = (with_gradients(f, inputs, d) for f, d in ((run, dtype), (plain, dtype), (exact, torch.float64)))
    slack *= 2.0 * (2.0 if dtype == torch.bfloat16 and not inputs[0].is_cuda else 1.0)
    for i, (ours, yardstick, truth) in enumerate(zip(*results, strict=True)):
        assert ours.dtype == dtype and ours.shape == truth.shape
        error, allowed = relative_error(ours, truth), slack * relative_error(yardstick, truth)
        assert error <= allowed + 4 * torch.finfo(torch.float32).eps, f"value {i}: {error:.2e}, allowed {allowed:.2e}"


def assert_close_in_eight_bits(made: Activations, down: Tensor | None, eight_bits: torch.dtype) -> None:
    """The values stand for x within half a step of the type, their scale is that of the row's largest number, and s is
    the product of x.
    """
    rows = made.x.flatten(0, 1).double()
    assert made.values.dtype == eight_bits and made.values.shape == rows.shape and made.values.is_contiguous()
    largest = 127 if eight_bits == torch.int8 else 448
    torch.testing.assert_close(made.scale.double(), rows.abs().amax(1) / largest, rtol=1e-6, atol=0)
    values, scaled = made.values.double(), rows / made.scale[:, None].double()
    assert values.abs().amax(1).eq(largest).all()
    step = (
        torch.ones_like(scaled)
        if eight_bits == torch.int8
        else scaled.abs().clamp(min=2**-6).log2().floor().sub(3).exp2()
    )
    assert ((values - scaled).abs() <= step / 2 * 1.001).all()
    if down is None:
        assert made.s is None
        return
    assert made.s.dtype == made.x.dtype
    expected = rows @ down.double().t()
    exact = 1e-5 if made.x.dtype == torch.float32 else 2**-7  # down is rounded to bf16 too
    assert ((made.s.double() - expected).norm() / expected.norm()).item() < exact
