"""What only a card can show. `make gpu` runs these with the python at hand; elsewhere they are skipped."""

from __future__ import annotations

import pytest
import torch
from helpers import randomise, relative_error, tiny_config

from fluxq.kernels import dequantize, quantize
from fluxq.model import Flux, add_lora
from fluxq.model.embed import image_ids, text_ids

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nf4_bytes_on_the_card_equal_the_processors(dtype):
    w = torch.randn(130, 4096).to(dtype)
    host, card = quantize(w, "nf4"), quantize(w.cuda(), "nf4")
    assert torch.equal(card.codes.cpu(), host.codes)
    assert torch.equal(card.absmax.cpu(), host.absmax)
    assert torch.equal(dequantize(card, torch.bfloat16).cpu(), dequantize(host, torch.bfloat16))


def test_a_step_in_bf16_is_within_twice_the_error_of_plain_pytorch():
    """Against fp32 on the card: fluxq's bf16 gradient of every LoRA may err at most twice as much as autograd's own."""
    config = tiny_config(hidden_size=256, num_heads=8)
    flux = randomise(Flux(config)).cuda()
    for layer in add_lora(flux, 8, 4).values():
        torch.nn.init.normal_(layer.lora_up, std=0.05)
    img, txt = torch.randn(2, 48, 16, device="cuda"), torch.randn(2, 33, 40, device="cuda")
    y, t, g = torch.randn(2, 24, device="cuda"), torch.rand(2, device="cuda"), torch.ones(2, device="cuda")
    ids, dy = (image_ids(6, 8, "cuda"), text_ids(33, "cuda")), torch.randn(2, 48, 16, device="cuda")

    def gradients(plain: bool) -> list[torch.Tensor]:
        run = (lambda block, ring, *inputs: block(*inputs)) if plain else None
        with pytest.MonkeyPatch.context() as patch:
            if run:
                patch.setattr("fluxq.model.flux.run_block", run)
            out = flux(img, ids[0], txt, ids[1], t, y, g)
        return list(torch.autograd.grad(out, list(flux.parameters()), dy.to(out.dtype)))

    exact = gradients(plain=False)
    for _, buffer in flux.named_buffers():
        buffer.data = buffer.data.bfloat16()
    ours, theirs = gradients(plain=False), gradients(plain=True)
    for a, b, e in zip(ours, theirs, exact, strict=True):
        assert relative_error(a, e) <= 2 * relative_error(b, e) + 1e-6
