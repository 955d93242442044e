"""What a block keeps for its backward pass changes memory and work, but no gradient."""

from __future__ import annotations

import sys

import pytest
import torch
from helpers import randomize, relative_error, tiny_config

from fluxq.kernels import POLICIES, reference
from fluxq.model import Flux, add_lora
from fluxq.model.embed import image_ids, text_ids
from fluxq.model.lora import lora_layers

EXACT = [p for p in POLICIES if p != "keep_all8"]


def model(targets="attention+mlp", dtype=torch.float32) -> Flux:
    flux = randomize(Flux(tiny_config(depth=1, depth_single_blocks=1))).to(dtype)
    add_lora(flux, rank=3, alpha=2, targets=targets)
    for layer in lora_layers(flux).values():
        torch.nn.init.normal_(layer.get_parameter("lora_up"), std=0.1)
    return flux


def step(flux: Flux) -> list[torch.Tensor]:
    """Gradients of every trainable tensor for one fixed input."""
    torch.manual_seed(1)
    c, tokens, length = flux.config, 15, 7
    img, txt, y = torch.randn(2, tokens, c.in_channels), torch.randn(2, length, c.context_in_dim), torch.randn(2, 24)
    out = flux(img, image_ids(3, 5), txt, text_ids(length), torch.tensor([0.3, 0.8]), y, torch.ones(2))
    return list(torch.autograd.grad(out, list(flux.parameters()), torch.randn(out.shape).to(out.dtype)))


def plain_gradients(flux: Flux, monkeypatch) -> list[torch.Tensor]:
    """The gradients of plain autograd, without replay."""
    with monkeypatch.context() as patch:
        patch.setattr("fluxq.model.flux.run_block", lambda block, ring, *inputs, mask, offload: block(*inputs, mask))
        return step(flux)


@pytest.mark.parametrize("targets", ["attention", "attention+mlp", "all"])
@pytest.mark.parametrize("policy", EXACT)
def test_gradients_equal_plain_autograd(policy, targets, monkeypatch):
    flux = model(targets)
    expected = plain_gradients(flux, monkeypatch)
    flux.set_policy(policy)
    for a, b in zip(step(flux), expected, strict=True):
        assert torch.equal(a, b) if targets != "all" else relative_error(a, b) < 1e-5  # vec's sums in another order


@pytest.mark.parametrize("policy", EXACT)
@pytest.mark.parametrize("layer", ["img_attn.proj", "img_mlp.0", "txt_attn.proj", "txt_attn.qkv", "txt_mlp.2"])
def test_a_single_layer_can_train_alone(layer, policy, monkeypatch):
    """Then one stream of the block needs no gradient in the replay."""
    flux = model([rf"double_blocks\.0\.{layer}"])
    expected = plain_gradients(flux, monkeypatch)
    flux.set_policy(policy)
    for a, b in zip(step(flux), expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("targets", ["attention+mlp", "all"])
def test_keep_all8_errs_no_more_than_its_rounding(targets, monkeypatch):
    """Three inner layers (image, text, single block) are rounded once each. A gradient is off by at most the sum of
    their relative errors, which would be its error if nothing damped them on the way.
    """
    flux = model(targets)
    expected = plain_gradients(flux, monkeypatch)
    flux.set_policy("keep_all8")
    rounding, quantize = [], reference.row_quantize

    def watched(x, dtype):
        rows, scale = quantize(x, dtype)
        rounding.append(relative_error(reference.row_dequantize(rows, scale, x.dtype), x))
        return rows, scale

    monkeypatch.setattr(reference, "row_quantize", watched)
    errors = [relative_error(a, b) for a, b in zip(step(flux), expected, strict=True)]
    assert len(rounding) == 3
    assert 0 < max(errors) < sum(rounding)


@pytest.mark.parametrize("policy", EXACT)
def test_scales_near_zero_are_not_divided_by(policy, monkeypatch):
    flux = model(dtype=torch.float64)
    for path in ("double_blocks.0.txt_attn.norm.key_norm", "single_blocks.0.norm.query_norm"):
        flux.get_submodule(path).scale[3] = 0.0
    expected = plain_gradients(flux, monkeypatch)
    assert all(g.isfinite().all() for g in expected)
    flux.set_policy(policy)
    for a, b in zip(step(flux), expected, strict=True):
        assert relative_error(a, b) < 1e-12


# Matrix products of the replay: per stream of a double block, in a single block; then attentions. Without modulation.
PRODUCTS = {
    "recompute": (["qkv", "proj", "inner"], ["qkv", "inner"], 2),
    "keep_attention": (["qkv", "proj", "inner"], ["qkv", "inner"], 0),
    "keep_qkv": (["inner"], ["inner"], 0),
    "keep_all8": ([], [], 0),
    "keep_all": ([], [], 0),
}


@pytest.mark.parametrize("policy", POLICIES)
def test_the_replay_multiplies_only_what_was_not_kept(policy, monkeypatch):
    flux = model()
    flux.set_policy(policy)
    width = flux.config.hidden_size
    names = {(3 * width, width): "qkv", (width, width): "proj", (4 * width, width): "inner"}
    made, attended, backward = [], [], []
    product, attend = reference.lora_linear, sys.modules["fluxq.kernels.attention"]._forward

    def counted(x, weight, bias, down, up, scale, part=None, *more):
        rows = len(weight) if part is None else part.stop - part.start
        made.append((bool(backward), names.get((rows, weight.shape[1]), "other"), x.shape[1:-1].numel() > 1))
        return product(x, weight, bias, down, up, scale, part, *more)

    def counted_attention(*arguments):
        attended.append(bool(backward))
        return attend(*arguments)

    monkeypatch.setattr(reference, "lora_linear", counted)
    monkeypatch.setattr(sys.modules["fluxq.kernels.attention"], "_forward", counted_attention)
    flux.final_layer.register_full_backward_hook(lambda *_: backward.append(True))
    step(flux)
    double, single, attentions = PRODUCTS[policy]
    replayed = sorted(name for late, name, many in made if late and many)
    assert replayed == sorted(2 * double + single)
    assert sum(attended) == attentions and len(attended) == 2 + attentions


X_DOWN = {"recompute": (1, 1), "keep_attention": (1, 1), "keep_qkv": (3, 1), "keep_all8": (4, 2), "keep_all": (4, 2)}
"""How many layers of all tokens, per policy and kind of block, are skipped in the replay: x down^T of each is kept."""


@pytest.mark.parametrize("policy", POLICIES)
def test_kept_values_have_the_planned_size(policy):
    """In units of U, one stream of activations: attention 1, q, k, v 3, residual 1 (double blocks), hidden 4 or 2."""
    flux = model(dtype=torch.bfloat16)
    flux.set_policy(policy)
    c, tokens, length = flux.config, 15, 7
    torch.manual_seed(1)
    img, txt = torch.randn(2, tokens, c.in_channels), torch.randn(2, length, c.context_in_dim)
    out = flux(img, image_ids(3, 5), txt, text_ids(length), torch.rand(2), torch.randn(2, 24), torch.ones(2))
    tapes = {}
    nodes = [out.grad_fn]
    while nodes:
        node = nodes.pop()
        if hasattr(node, "tape"):
            tapes[type(node.block).__name__] = node.tape
        nodes += [n for n, _ in node.next_functions if n is not None]
    rows = 2 * (tokens + length)
    unit, heads = rows * c.hidden_size * 2, rows * c.num_heads * 4
    units = {"recompute": (0, 0), "keep_attention": (1, 1), "keep_qkv": (5, 4), "keep_all8": (7, 6), "keep_all": (9, 8)}
    for block, count in zip(("DoubleStreamBlock", "SingleStreamBlock"), units[policy], strict=True):
        values = tapes[block].values
        tensors = [t for queue in values.values() for v in queue for t in (v if isinstance(v, tuple) else (v,))]
        small = (heads if "attention" in values else 0) + (2 * heads if "qkv" in values else 0)
        small += 4 * rows if policy == "keep_all8" else 0
        small += 2 * 3 * rows * X_DOWN[policy][block == "SingleStreamBlock"]
        assert sum(t.untyped_storage().nbytes() for t in tensors) == count * unit + small, block
