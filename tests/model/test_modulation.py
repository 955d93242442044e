"""Rows computed ahead are those of the step, and not one bit of them depends on what was asked for before."""

from __future__ import annotations

import pytest
import torch
from helpers import place_sensitive, randomize, relative_error, tiny_config

from fluxq.model import Flux, add_lora
from fluxq.model.embed import image_ids, text_ids
from fluxq.model.lora import lora_layers
from fluxq.model.modulation import Conditioning, Lookahead, is_known_ahead

COUNTS = (3, 3, 1, 2)  # examples of micro-steps, over and over: the last of a bucket may be short


def conditioning(index: int, guided: bool = True) -> Conditioning:
    generator, count = torch.Generator().manual_seed(index), COUNTS[index % len(COUNTS)]
    guidance = 1 + torch.rand(count, generator=generator) if guided else None
    return torch.rand(count, generator=generator), torch.randn(count, 24, generator=generator), guidance


def model(targets="attention+mlp", dtype=torch.bfloat16, **changes) -> Flux:
    torch.manual_seed(0)
    flux = randomize(Flux(tiny_config(**changes))).to(dtype)
    add_lora(flux, 3, 2, targets)
    for layer in lora_layers(flux).values():
        torch.nn.init.normal_(layer.get_parameter("lora_up"), std=0.1)
    return flux


def step(flux: Flux, index: int, rows) -> list[torch.Tensor]:
    """Output and gradients."""
    given, c, generator = (
        conditioning(index, flux.config.guidance_embed),
        flux.config,
        torch.Generator().manual_seed(-index),
    )
    img, txt = (torch.randn(len(given[0]), *s, generator=generator) for s in ((15, c.in_channels), (7, 40)))
    out = flux(img, image_ids(3, 5), txt, text_ids(7), *given, rows)
    dy = torch.randn(out.shape, generator=generator).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, list(flux.parameters()), dy)]


@pytest.mark.parametrize("guidance", [True, False])
@pytest.mark.parametrize("index", [0, 2, 22, 23, 1000])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2**-7)])
def test_rows_and_steps_are_those_of_modulation_in_the_step(dtype, tolerance, index, guidance):
    flux = model(dtype=dtype, guidance_embed=guidance)
    ahead = Lookahead(flux, lambda i: conditioning(i, guidance), 3)
    expected = list(flux.modulation_rows(*conditioning(index, guidance)))
    rows = ahead.rows(index)
    assert [r.shape for r in rows] == [r.shape for r in expected] and not any(r.requires_grad for r in rows)
    for a, b in zip(rows, expected, strict=True):
        assert relative_error(a, b) <= tolerance
    for a, b in zip(step(flux, index, rows), step(flux, index, None), strict=True):
        assert relative_error(a, b) <= 4 * tolerance  # of five layers, one after another


@pytest.mark.parametrize("sensitive", [False, True])
@pytest.mark.parametrize("steps", [None, 50])
def test_no_bit_depends_on_what_was_asked_for_before(steps, sensitive, monkeypatch):
    """21 micro-steps of 3 make a tile; the last one of 50 is filled up. Also with products that, as on a GPU, round
    by the row's place and by all of their shape.
    """
    if sensitive:
        monkeypatch.setattr(Flux, "modulation_rows", place_sensitive)
    flux = model()

    def lookahead():
        return Lookahead(flux, conditioning, 3, steps)

    once = lookahead()
    straight = [once.rows(index) for index in range(50)]
    for index in (0, 13, 20, 21, 30, 49):
        first, back = lookahead(), lookahead()
        back.rows(49 - index)
        for other in (first, back):
            assert all(torch.equal(a, b) for a, b in zip(other.rows(index), straight[index], strict=True)), index


def test_each_micro_step_is_asked_about_once_and_never_beyond_the_last():
    asked = []
    ahead = Lookahead(model(), lambda i: asked.append(i) or conditioning(i), 3, 30)
    for index in range(30):
        ahead.rows(index)
    assert asked == list(range(30))


@pytest.mark.parametrize(
    ("targets", "known"),
    [
        ("attention", True),
        ("attention+mlp", True),
        ([r"(img|txt)_in"], True),
        ([r"final_layer\.linear"], True),
        ("all", False),
        ([r"single_blocks\.1\.modulation\.lin"], False),
        ([r"double_blocks\.0\.txt_mod\.lin"], False),
        ([r"vector_in\.in_layer"], False),
        ([r"final_layer\.adaLN_modulation\.1"], False),
    ],
)
def test_what_trains_is_computed_in_the_step_and_gets_its_gradient(targets, known):
    """In sampling nothing trains, and all is known ahead."""
    flux = model(targets)
    assert is_known_ahead(flux.config, targets) == known
    ahead = Lookahead(flux, conditioning, 3)
    assert (ahead.rows(0) is not None) == known
    assert all(g.abs().max() > 0 for g in step(flux, 0, ahead.rows(0)))
    with torch.no_grad():
        for a, b in zip(ahead.rows(1), flux.modulation_rows(*conditioning(1)), strict=True):
            assert relative_error(a, b) <= 2**-7


def test_more_examples_than_a_tile_takes_are_one_micro_step():
    flux = model()
    given = torch.rand(70), torch.randn(70, 24), torch.ones(70)
    rows = Lookahead(flux, lambda index: given, 70, 2).rows(1)
    assert all(torch.equal(a, b) for a, b in zip(rows, flux.modulation_rows(*given), strict=True))
