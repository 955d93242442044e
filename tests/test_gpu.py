"""What only a card can show. `make gpu` runs these with the python at hand; elsewhere they are skipped."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import randomise, relative_error, tiny_config

from fluxq.config import ModelConfig, config_from_dict
from fluxq.data.store import Text
from fluxq.kernels import dequantize, quantize
from fluxq.model import Flux, add_lora
from fluxq.model.embed import image_ids, text_ids
from fluxq.models import Models
from fluxq.nano import pictures
from fluxq.sample import Shot, draw
from fluxq.train import train

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nf4_bytes_on_the_card_equal_the_processors(dtype):
    w = torch.randn(130, 4096).to(dtype)
    host, card = quantize(w, "nf4"), quantize(w.cuda(), "nf4")
    assert torch.equal(card.codes.cpu(), host.codes)
    assert torch.equal(card.absmax.cpu(), host.absmax)
    assert torch.equal(dequantize(card, torch.bfloat16).cpu(), dequantize(host, torch.bfloat16))


def plain_linear(x, weight, bias=None, down=None, up=None, scale=1.0, compute="bf16"):
    """What anybody would write with autograd, in x's dtype."""
    y = F.linear(x, weight, None if bias is None else bias.to(x.dtype))
    return y if down is None else y + scale * F.linear(F.linear(x, down.to(x.dtype)), up.to(x.dtype))


def test_a_step_in_bf16_is_within_twice_the_error_of_plain_pytorch(monkeypatch):
    """Against fp32 of the same bf16 weights: fluxq's gradient of every LoRA may err at most twice as much as
    autograd's.
    """
    flux = randomise(Flux(tiny_config(hidden_size=256, num_heads=8))).bfloat16().cuda()
    for layer in add_lora(flux, 8, 4).values():
        torch.nn.init.normal_(layer.lora_up, std=0.05)
    img, txt = torch.randn(2, 48, 16, device="cuda"), torch.randn(2, 33, 40, device="cuda")
    y, t, g = torch.randn(2, 24, device="cuda"), torch.rand(2, device="cuda"), torch.ones(2, device="cuda")
    ids, dy = (image_ids(6, 8, "cuda"), text_ids(33, "cuda")), torch.randn(2, 48, 16, device="cuda")

    def gradients() -> list[torch.Tensor]:
        out = flux(img, ids[0], txt, ids[1], t, y, g)
        return list(torch.autograd.grad(out, list(flux.parameters()), dy.to(out.dtype)))

    ours = gradients()
    monkeypatch.setattr("fluxq.model.linear.lora_linear", plain_linear)
    monkeypatch.setattr("fluxq.model.flux.run_block", lambda block, ring, *inputs: block(*inputs))
    theirs = gradients()
    for _, buffer in flux.named_buffers():
        buffer.data = buffer.data.float()
    for a, b, exact in zip(ours, theirs, gradients(), strict=True):
        assert relative_error(a, exact) <= 2 * relative_error(b, exact) + 1e-6


def test_every_model_lies_where_it_is_asked_to_and_answers_as_on_the_processor():
    answers = {}
    for device in ("cpu", "cuda"):
        models = Models(ModelConfig(name="nano"), torch.device(device))
        text, autoencoder = models.load_text_encoders(), models.load_autoencoder()
        encoded = text.encode(["a large red star", ""])
        picture = torch.randn(1, 3, 96, 96, generator=torch.Generator().manual_seed(0)).to(device)
        latents = autoencoder.encode(picture)
        texts = {"x": Text(encoded.t5[0].cpu(), encoded.clip[0].cpu(), "x", 5, False)}
        drawn = draw(models.load_flux(), autoencoder, texts, [Shot("x", 1, 96, 96, steps=2)])[0]
        answers[device] = [encoded.t5, encoded.clip, latents, autoencoder.decode(latents), to_tensor(drawn)]
    for host, card in zip(answers["cpu"], answers["cuda"], strict=True):
        assert relative_error(card.cpu(), host) < 0.03


def to_tensor(picture) -> torch.Tensor:
    return torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).float()


def test_a_run_trains_saves_and_goes_on(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for i, (picture, caption) in enumerate(pictures.concept(seed=1, count=4)):
        picture.save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(caption)
    values = {
        "model": {"name": "nano"},
        "data": {"folders": [str(folder)], "cache": str(tmp_path / "cache")},
        "training": {"steps": 3, "optimizer": "adamw"},
        "samples": {"every": 3, "steps": 2},
        "output": {"out": str(tmp_path / "run"), "name": "x"},
    }
    result = train(config_from_dict(values, "a test"))
    assert result.peak_bytes and 0 < result.peak_bytes < 2**30
    values["training"]["steps"] = 5
    assert train(config_from_dict(values, "a test"), resume=True).steps == 5
