"""A whole FLUX in NF4 has the same gradients on both backends, with any policy and compute."""

from __future__ import annotations

import sys

import pytest
import torch
from helpers import randomize, relative_error, tiny_config

from fluxq.kernels import backend, quantize, reference
from fluxq.model import Flux, add_lora
from fluxq.model.embed import image_ids, text_ids
from fluxq.model.linear import Linear
from fluxq.model.lora import lora_layers


def gradients(flux: Flux, device: torch.device, masked: bool = False) -> list[torch.Tensor]:
    """masked: the second caption has 3 tokens, the first 6."""
    torch.manual_seed(1)
    c = flux.config
    img, txt, y = torch.randn(2, 9, c.in_channels), torch.randn(2, 6, c.context_in_dim), torch.randn(2, 24)
    inputs = (img, image_ids(3, 3), txt, text_ids(6), torch.tensor([0.3, 0.8]), y, torch.ones(2))
    mask = torch.arange(6) < torch.tensor([[6], [3]]) if masked else None
    out = flux(*(t.to(device) for t in inputs), txt_mask=mask)
    dy = torch.randn(out.shape).to(device)
    return [g.cpu() for g in torch.autograd.grad(out, list(flux.parameters()), dy)]


def quantize_weights_plainly(monkeypatch) -> None:
    """Frozen weights become 8-bit rows by the reference: row by row, that is most of what the interpreter does here.
    test_row_scaled.py and test_rotation.py have the kernel.
    """
    from fluxq.kernels.triton import convert

    def weight_rows(weight, dtype, rotation, rows):
        numbers = reference.dequantize(weight, torch.float32)[rows]
        return reference.row_quantize(numbers, dtype, rotation=rotation)

    monkeypatch.setattr(convert, "weight_rows", weight_rows)
    monkeypatch.setattr(convert, "row_scales", lambda *asked: weight_rows(*asked)[1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("policy", "compute", "targets", "masked"),
    [
        ("recompute", "bf16", "attention+mlp", True),
        ("keep_all", "bf16", "all", False),
        ("keep_all8", "int8", "attention", False),
        ("keep_qkv", "int8_dx", "all", True),
        ("keep_attention", "fp8_dx", "attention+mlp", False),
    ],
)
def test_gradients_are_the_same_on_both_backends(policy, compute, targets, masked, triton_ops, device, monkeypatch):
    """Every product takes the path of large shapes, but for the modulation's."""
    from fluxq.kernels.triton import linear, table

    monkeypatch.setattr(table, "FEW_ROWS", 10)
    monkeypatch.setattr(table, "_chosen", {})
    monkeypatch.setattr(sys.modules["fluxq.kernels.lora_linear"], "FEW_ROWS", 10)
    flux = randomize(Flux(tiny_config(depth=1, depth_single_blocks=1, mlp_ratio=2.0)))
    add_lora(flux, rank=3, alpha=2, targets=targets)
    for layer in lora_layers(flux).values():
        torch.nn.init.normal_(layer.get_parameter("lora_up"), std=0.1)
    for module in flux.modules():
        if isinstance(module, Linear) and module.in_features % 64 == 0:
            module.store(quantize(module.weight, "nf4"))
    flux.set_policy(policy)
    flux.set_compute(compute)
    with backend("reference"):
        expected = gradients(flux, torch.device("cpu"), masked)
    extended, calls = linear._extended, []
    monkeypatch.setattr(linear, "_extended", lambda *a: calls.append(a[1].shape) or extended(*a))
    flux.to(device)
    if device.type == "cpu":
        quantize_weights_plainly(monkeypatch)
    # A value next to the middle of two 8-bit numbers may fall either way: the backends divide differently.
    bound = 1e-4 if compute == "bf16" else 0.01
    for a, b in zip(gradients(flux, device, masked), expected, strict=True):
        assert relative_error(a, b) < bound
    assert compute != "bf16" or len(set(calls)) >= 4
