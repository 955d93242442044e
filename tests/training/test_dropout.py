"""What each micro-step leaves out of the LoRA: by its number alone, with the chances that were asked for."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import randomize, tiny_config

from fluxq.config import LoraConfig
from fluxq.kernels.dropout import dropping
from fluxq.model import Flux, add_lora
from fluxq.training.dropout import Dropout


def dropout(rank: int = 4, seed: int = 7, **rates: float) -> Dropout:
    return Dropout(add_lora(randomize(Flux(tiny_config())), rank, rank), LoraConfig(**rates), seed)


def test_nothing_is_drawn_if_it_is_off():
    assert dropout().drawn(3, 2) is None


def test_a_micro_step_draws_the_same_whatever_was_drawn_before():
    one, other = dropout(dropout=0.1, rank_dropout=0.5), dropout(dropout=0.1, rank_dropout=0.5)
    other.drawn(0, 2)
    for index, is_same in ((3, True), (4, False)):
        pairs = [*zip(one.drawn(3, 2).values(), other.drawn(index, 2).values(), strict=True)]
        assert all(torch.equal(a.factors, b.factors) and a.key == b.key for a, b in pairs) is is_same
        assert any(torch.equal(a.key, b.key) for a, b in pairs) is is_same
    keys = [int(each.key) for each in one.drawn(3, 2).values()]
    assert len(set(keys)) == len(keys) == len(one.layers), "each layer has its own"


@pytest.mark.parametrize("rates", [{"rank_dropout": 0.3}, {"dropout": 0.2}, {"rank_dropout": 0.3, "dropout": 0.2}])
def test_what_remains_makes_up_for_what_is_left_out(rates):
    factors = torch.cat([each.factors for each in dropout(64, **rates).drawn(0, 3).values()], 1)
    ranks, inputs = rates.get("rank_dropout", 0), rates.get("dropout", 0)
    assert set(factors.unique().tolist()) == {*[0.0] * bool(ranks), factors.max().item()}
    assert factors.max().item() == pytest.approx(1 / ((1 - ranks) * (1 - inputs)))
    assert abs((factors == 0).float().mean() - ranks) <= 5 * math.sqrt(ranks * (1 - ranks) / factors.numel())
    assert {each.rate for each in dropout(**rates).drawn(0, 1).values()} == {inputs}


def test_a_module_is_left_out_whole_for_all_images_and_not_made_up_for():
    one = dropout(module_dropout=0.5)
    drawn = [each.factors for index in range(20) for each in one.drawn(index, 2).values()]
    assert {tuple(f.unique().tolist()) for f in drawn} == {(0.0,), (1.0,)}
    left_out = sum(not f.any() for f in drawn)
    assert abs(left_out / len(drawn) - 0.5) < 5 * 0.5 / math.sqrt(len(drawn))


def test_a_layer_whose_lora_is_left_out_is_the_frozen_layer():
    layers = dropout().layers
    layer, x = next(iter(layers.values())), torch.randn(2, 3, 64)
    torch.nn.init.normal_(layer.lora_up)
    frozen = layer(x) - (x @ layer.lora_down.T) @ layer.lora_up.T
    drawn = Dropout(layers, LoraConfig(module_dropout=0.99), 7).drawn(0, 2)
    assert not drawn[layer].factors.any()
    with dropping(drawn):
        torch.testing.assert_close(layer(x), frozen)
