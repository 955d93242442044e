"""Dropout of LoRA on both backends: against plain PyTorch, with the same masks everywhere, and the same in a replay."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import randomize, relative_error, tiny_config

from fluxq.kernels import COMPUTES, POLICIES, backend, lora_linear_parts, quantize, reference
from fluxq.kernels.dropout import Dropped, current, dropped_by, dropping
from fluxq.kernels.lora_linear import lora_linear
from fluxq.model import Flux, add_lora
from fluxq.model.embed import image_ids, text_ids

KEY = torch.tensor([0x123456789ABCDEF0])


def test_the_hash_is_murmur3s_finalizer_twice_with_both_halves_of_the_key():
    def mixed(n: int) -> int:
        n = ((n ^ n >> 16) * 0x85EBCA6B) % 2**32
        n = ((n ^ n >> 13) * 0xC2B2AE35) % 2**32
        return n ^ n >> 16

    key = int(KEY)
    kept = [mixed(mixed((i + key) % 2**32) ^ key >> 32) >= round(0.7 * 2**32) for i in range(6)]
    assert reference.drop(torch.ones(2, 3), 0.7, KEY).flatten().bool().tolist() == kept


@pytest.mark.parametrize("rate", [0.1, 0.7])
def test_each_number_is_left_out_with_that_chance_and_by_itself(rate):
    drawn = [reference.drop(torch.ones(200, 300), rate, KEY + i) == 0 for i in (0, 1, 1 << 32)]
    slack = 5 * math.sqrt(rate * (1 - rate) / drawn[0].numel())
    for mask in drawn:
        assert abs(mask.float().mean() - rate) < slack
    for a, b in ((drawn[0], drawn[1]), (drawn[0], drawn[2]), (drawn[0][1:], drawn[0][:-1])):
        assert abs((a & b).float().mean() - rate**2) < slack, (
            "two keys, or two rows, have nothing to do with each other"
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rate", [0.2, 0.7])
def test_triton_leaves_out_the_same_numbers_also_of_strided_rows(rate, dtype, triton_ops, device):
    wide, key = torch.randn(2, 37, 1100, device=device).to(dtype), KEY.to(device)
    x, onto = wide[..., :1090], torch.randn(2, 37, 1090, device=device).to(dtype)
    assert torch.equal(triton_ops.drop(x, rate, key), reference.drop(x, rate, key))
    added = triton_ops.drop(x, rate, key, onto.clone())
    torch.testing.assert_close(added, reference.drop(x, rate, key, onto.clone()))


def operands(compute: str, device, rank: int = 5):
    dtype = torch.float32 if compute == "bf16" else torch.bfloat16
    x, dy = torch.randn(2, 70, 192).to(device, dtype).requires_grad_(), torch.randn(2, 70, 128).to(device, dtype)
    weight, bias = quantize(torch.randn(128, 192, device=device).to(dtype) / 14, "int8"), torch.randn(128).to(device)
    down, up = (torch.randn(*shape).div(8).to(device).requires_grad_() for shape in ((rank, 192), (128, rank)))
    factors = torch.tensor([[0, 2, 2, 0, 2], [2, 2, 0, 0, 2.0]]).to(device)
    return x, dy, weight, bias.to(dtype), down, up, Dropped(factors, 0.3, KEY.to(device))


@pytest.mark.usefixtures("either_backend")
@pytest.mark.parametrize("compute", [pytest.param(c, marks=pytest.mark.slow) if c != "bf16" else c for c in COMPUTES])
@pytest.mark.parametrize("parts", [False, True])
def test_a_layer_and_its_gradients_are_those_of_the_formula(parts, compute, device):
    x, dy, weight, bias, down, up, dropped = operands(compute, device)
    if parts:
        pieces, feeds = (slice(0, 48), slice(48, 128)), ("qkv", "hidden")
        y = torch.cat(lora_linear_parts(x, weight, bias, down, up, 0.7, compute, pieces, feeds, dropped=dropped), -1)
    else:
        y = lora_linear(x, weight, bias, down, up, 0.7, compute, dropped=dropped)
    got = [y, *torch.autograd.grad(y, (x, down, up), dy)]
    # plain PyTorch, with the mask as a matrix
    x64, down64, up64 = (t.detach().double().requires_grad_() for t in (x, down, up))
    mask = reference.drop(torch.ones_like(x), dropped.rate, dropped.key).double()
    w = weight.values.double() * weight.scale.double()[:, None]
    plain = F.linear(x64, w, bias.double()) + 0.7 * (((mask * x64) @ down64.T) * dropped.factors[:, None]) @ up64.T
    expected = [plain, *torch.autograd.grad(plain, (x64, down64, up64), dy.double())]
    tolerance = 1e-5 if compute == "bf16" else 0.06 if compute.startswith("fp8") else 0.02
    for ours, exact in zip(got, expected, strict=True):
        assert ours.shape == exact.shape and relative_error(ours, exact) < tolerance
    assert (expected[2][3] == 0).all() and (got[2][3] == 0).all(), "a rank that every example leaves out learns nothing"


def losses_and_gradients(policy: str, compute: str, targets: str) -> list[torch.Tensor]:
    torch.manual_seed(0)
    flux = randomize(Flux(tiny_config()))
    layers = add_lora(flux, 4, 3, targets, torch.Generator().manual_seed(1))
    for layer in layers.values():
        torch.nn.init.normal_(layer.lora_up, std=0.1)
    flux.set_policy(policy)
    flux.set_compute(compute)
    drawn = torch.Generator().manual_seed(2)
    masks = {
        layer: Dropped((torch.rand(2, 4, generator=drawn) > 0.4) * 1.6, 0.25, KEY + i)
        for i, layer in enumerate(layers.values())
    }
    img, txt, vec = torch.randn(2, 6, 16), torch.randn(2, 5, 40), torch.randn(2, 24)
    with dropping(masks):
        out = flux(img, image_ids(2, 6), txt, text_ids(5), torch.tensor([0.3, 0.6]), vec, torch.ones(2))
    assert current() is None and dropped_by(next(iter(masks))) is None
    with dropping({}):  # of the next micro-step: a replay goes by its own forward pass
        return [out, *torch.autograd.grad(out, list(flux.parameters()), torch.randn_like(out))]


@pytest.mark.parametrize("compute", ["bf16", pytest.param("int8_dx", marks=pytest.mark.slow)])
@pytest.mark.parametrize("targets", ["attention+mlp", "all"])
def test_every_replay_leaves_out_what_its_forward_pass_did(targets, compute):
    with backend("reference"):
        expected = losses_and_gradients("keep_all", compute, targets)
        for policy in POLICIES:
            if policy != "keep_all8":
                for a, b in zip(losses_and_gradients(policy, compute, targets), expected, strict=True):
                    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
