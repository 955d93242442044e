"""Captions of several lengths in one batch: padding is masked, so every image is as it is alone."""

from __future__ import annotations

import pytest
import torch
from helpers import Tensors, randomize, tiny_config

from fluxq.caching.batches import joined
from fluxq.caching.store import Text
from fluxq.flow import flow_loss, velocity
from fluxq.formats.quantized import QuantizedFile, load_quantized, write_quantized
from fluxq.formats.stream import expect_training, load_streamed
from fluxq.kernels import POLICIES
from fluxq.model import Flux, add_lora
from fluxq.model.lora import lora_layers
from fluxq.offload import HostInputs, Late
from fluxq.offload.arena import Arena
from fluxq.offload.inputs import INPUTS

CPU = torch.device("cpu")
LENGTHS = (7, 1, 4)


def model(targets="all") -> Flux:
    flux = randomize(Flux(tiny_config(depth=1, depth_single_blocks=2))).double()
    for layer in add_lora(flux, rank=3, alpha=2, targets=targets).values():
        layer.lora_down.data = layer.lora_down.double()
        layer.lora_up.data = torch.randn_like(layer.lora_up, dtype=torch.float64) / 10
    return flux


def inputs(flux: Flux) -> tuple[list[torch.Tensor], list[Text]]:
    """latents, noise (3, 4, 6, 10) and timesteps (3,); and captions."""
    torch.manual_seed(0)
    c, batch = flux.config, len(LENGTHS)
    latents, noise = torch.randn(2, batch, c.in_channels // 4, 6, 10).double()
    texts = [Text(torch.randn(n, c.context_in_dim).double(), torch.randn(c.vec_in_dim).double(), "", n, False)
             for n in LENGTHS]  # fmt: skip
    return [latents, noise, torch.rand(batch).double()], texts


def gradients(flux: Flux, loss: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, list(flux.parameters())))


def masked(flux: Flux) -> torch.Tensor:
    """The loss of each image, (B,), in one batch."""
    given, texts = inputs(flux)
    txt, pooled, mask = joined(texts)
    return flow_loss(flux, *given, txt, pooled, 2.0, None, mask)


def alone(flux: Flux) -> torch.Tensor:
    """The loss of each image, (B,), one by one, without a mask or padding."""
    given, texts = inputs(flux)
    parts = [[x[i : i + 1] for x in given] for i in range(len(texts))]
    return torch.cat([flow_loss(flux, *own, *joined([text])[:2], 2.0) for own, text in zip(parts, texts, strict=True)])


def test_texts_are_padded_only_if_their_lengths_differ():
    _, texts = inputs(model())
    txt, pooled, mask = joined(texts)
    assert txt.shape == (3, 7, 40) and mask is not None and mask.sum(1).tolist() == [*LENGTHS]
    assert txt[~mask].count_nonzero() == 0 and torch.equal(pooled[1], texts[1].clip)
    for same in (texts[:1], [texts[0], texts[0]]):
        txt, _, mask = joined(same)
        assert mask is None and torch.equal(txt, torch.stack([text.t5 for text in same]))


@pytest.mark.slow
@pytest.mark.parametrize("policy", [p for p in POLICIES if p != "keep_all8"])
def test_a_ragged_batch_has_the_losses_and_the_gradient_of_its_images(policy):
    flux = model()
    expected = alone(flux)
    wanted = gradients(flux, expected.mean())
    flux.set_policy(policy)
    found = masked(flux)
    torch.testing.assert_close(found, expected)
    for a, b in zip(gradients(flux, found.mean()), wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_padding_changes_nothing_whatever_it_holds():
    """Not even the gradient: of the padding itself it is zero, and of LoRA it is the same to the bit."""
    flux = model("attention+mlp")
    (latents, noise, t), texts = inputs(flux)
    txt, pooled, mask = joined(texts)
    found = []
    for padding in (0.0, 50.0):
        filled = torch.where(mask[..., None], txt, padding).requires_grad_()
        loss = flow_loss(flux, latents, noise, t, filled, pooled, 2.0, None, mask)
        of_txt, *of_lora = torch.autograd.grad(loss.mean(), [filled, *flux.parameters()])
        assert of_txt[mask].count_nonzero() > 0 and of_txt[~mask].count_nonzero() == 0
        found.append([loss, *of_lora])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_the_mask_is_that_of_plain_attention_with_minus_infinity(monkeypatch):
    """Velocity and gradients against softmax(scores - inf at padding) v, with padding that is not zero."""
    flux = model()
    (latents, _, t), texts = inputs(flux)
    txt, pooled, mask = joined(texts)
    txt = torch.where(mask[..., None], txt, torch.randn_like(txt))
    found = velocity(flux, latents, t, txt, pooled, 2.0, None, mask)
    dv = torch.randn_like(found)
    wanted, attended = torch.autograd.grad(found, list(flux.parameters()), dv), []

    def plain(q, k, v, ours):
        attended.append(ours)
        keys = torch.cat([mask, torch.ones(3, k.shape[2] - mask.shape[1], dtype=torch.bool)], 1)
        scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~keys[:, None, None], -torch.inf)
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)

    monkeypatch.setattr("fluxq.model.blocks.attention", plain)
    monkeypatch.setattr("fluxq.model.flux.run_block", lambda block, ring, *given, mask, offload: block(*given, mask))
    expected = velocity(flux, latents, t, txt, pooled, 2.0, None, mask)
    assert len(attended) == 3 and all(m is not None and m.shape == (3, 7 + 15) for m in attended)
    torch.testing.assert_close(found, expected)
    for a, b in zip(wanted, torch.autograd.grad(expected, list(flux.parameters()), dv), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.slow
def test_streamed_weights_and_block_inputs_change_no_bit_of_a_ragged_batch(tmp_path):
    source = randomize(Flux(tiny_config())).bfloat16()
    tensors = {name: t.contiguous() for name, t in source.state_dict().items()}
    write_quantized(tmp_path / "a.safetensors", Tensors(source.config, tensors), "int8", {}, CPU)
    stored, found = QuantizedFile.open(tmp_path / "a.safetensors"), []
    for flux in (load_quantized(stored, CPU), load_streamed(stored, CPU, (), 2, Late(), poison=True)):
        add_lora(flux, 3, 2, "attention+mlp", torch.Generator().manual_seed(1))
        for layer in lora_layers(flux).values():
            torch.nn.init.constant_(layer.get_parameter("lora_up"), 0.01)
        if found:
            flux.inputs = HostInputs(Late(), lambda n: Arena({INPUTS: n}, lambda unit, out: None), poison=True)
        expect_training(flux)
        loss = masked(flux)
        found.append([loss, *gradients(flux, loss.mean())])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)
