"""The linear op on both backends: its mathematics, its gradient, and that it keeps no weight alive."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from fluxq.kernels import backend, lora_linear, quantize


@pytest.fixture(params=["reference", "triton"], autouse=True)
def _each_backend(request, device):
    if request.param == "triton":
        request.getfixturevalue("triton_ops")
    with torch.device(device):
        yield


def operands(dtype=torch.float64, rank=3, shape=(2, 5)):
    x = torch.randn(*shape, 64, dtype=dtype, requires_grad=True)
    weight, bias = torch.randn(33, 64, dtype=dtype), torch.randn(33, dtype=dtype)
    down = torch.randn(rank, 64, dtype=dtype, requires_grad=True)
    up = torch.randn(33, rank, dtype=dtype, requires_grad=True)
    return x, weight, bias, down, up


@pytest.mark.slow
def test_gradients_in_fp64():
    x, weight, bias, down, up = operands()
    assert torch.autograd.gradcheck(lambda x, d, u: lora_linear(x, weight, bias, d, u, 0.7), (x, down, up))


def test_gradients_without_lora_in_fp64():
    x, weight, *_ = operands()
    assert torch.autograd.gradcheck(lambda x: lora_linear(x, weight), (x,))


def test_equals_the_sum_of_its_parts():
    x, weight, bias, down, up = operands()
    expected = F.linear(x, weight, bias) + 0.7 * F.linear(F.linear(x, down), up)
    torch.testing.assert_close(lora_linear(x, weight, bias, down, up, 0.7), expected)


def test_frozen_input_still_gives_lora_gradients():
    x, weight, bias, down, up = operands()
    lora_linear(x.detach(), weight, bias, down, up).sum().backward()
    assert x.grad is None
    assert down.grad is not None and up.grad is not None


def test_gradients_have_the_dtype_of_their_arguments():
    x, weight, bias, down, up = operands()
    x16 = x.detach().bfloat16().requires_grad_()
    down32, up32 = (t.detach().float().requires_grad_() for t in (down, up))
    y = lora_linear(x16, weight.bfloat16(), bias.bfloat16(), down32, up32, 0.7)
    y.sum().backward()
    assert (y.dtype, x16.grad.dtype, down32.grad.dtype, up32.grad.dtype) == (
        *[torch.bfloat16] * 2,
        *[torch.float32] * 2,
    )


@pytest.mark.parametrize("format", ["nf4", "bf16"])
def test_autograd_keeps_no_frozen_weight(format):
    x, weight, bias, down, up = operands(torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        lora_linear(x, quantize(weight, format), bias, down, up)
    assert torch.Size((33, 64)) not in kept
    assert sorted(kept) == sorted([x.shape, down.shape, up.shape, torch.Size((2, 5, 3))])


class Launches(TorchDispatchMode):
    """Inside it, records each operation's name and the shape of its result."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.seen.append((func._schema.name.removeprefix("aten::"), tuple(getattr(out, "shape", ()))))
        return out


@pytest.mark.parametrize("compute", ["bf16", "int8_dx"])
def test_the_gradient_multiplies_by_up_once_and_rounds_no_lora_again(compute):
    """With LoRA in fp32 and an input in bf16, of more than FEW_ROWS rows."""
    x, weight, bias, down, up = operands(torch.float32, rank=7, shape=(70,))
    x = x.detach().bfloat16().requires_grad_()
    y = lora_linear(x, quantize(weight, "int8"), bias, down, up, 0.7, compute)
    with Launches() as launches:
        torch.autograd.grad(y, (x, down, up), torch.ones_like(y))
    assert [name for name, shape in launches.seen if shape == (70, 7) and "mm" in name] in (["mm"], ["addmm_"])
    cast = [shape for name, shape in launches.seen if name == "_to_copy"]
    # d_down and d_up, where they are not in fp32 already
    assert all(cast.count(shape) <= 1 for shape in (down.shape, up.shape)), cast


def test_the_gradient_uses_the_lora_of_its_forward_pass():
    """An optimizer step in between, in place, does not affect it; the next product uses the new values."""
    x, weight, bias, down, up = operands(torch.float32)
    x = x.detach().bfloat16().requires_grad_()

    def run():
        return lora_linear(x, weight.bfloat16(), bias, down, up, 0.7)

    expected = torch.autograd.grad(run().sum(), x)[0]
    y = run()
    with torch.no_grad():
        down.mul_(2)
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], expected)
    assert not torch.equal(run(), y)


def test_mismatched_widths_name_both_numbers():
    x, weight, _, down, up = operands()
    with pytest.raises(ValueError, match="width 64, not 63"):
        lora_linear(x[..., :63], weight)
    with pytest.raises(ValueError, match=r"\(3, 64\) and up \(32, 3\) do not fit a \(33, 64\)"):
        lora_linear(x, weight, None, down, up[:32])
    with pytest.raises(ValueError, match="down and up together"):
        lora_linear(x, weight, None, down)


def test_unknown_compute_and_backend_are_refused():
    x, weight, *_ = operands()
    with pytest.raises(ValueError, match="compute must be one of bf16"):
        lora_linear(x, weight, compute="fp4")
    with pytest.raises(ValueError, match="backend must be one of reference"), backend("cuda"):
        pass
