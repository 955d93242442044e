"""The limit on the norm of a layer's change, against the formula with the whole change."""

from __future__ import annotations

import pytest
import torch
from helpers import randomize, tiny_config

from fluxq.model import Flux
from fluxq.model.lora import Adapted, add_adapted
from fluxq.training.max_norm import MaxNorm


def layers(size: float = 0.3) -> list:
    adapted = Adapted(4, 3.0, ranks=("mlp=2", r"single_blocks\.1\..*=6"), alphas=("mlp=5",))
    added = [*add_adapted(randomize(Flux(tiny_config())), adapted).values()]
    for i, layer in enumerate(added):
        torch.nn.init.normal_(layer.lora_up, std=size * (1 + i % 5))
    return added


def change(layer) -> torch.Tensor:
    return layer.lora_scale * layer.lora_up.detach().double() @ layer.lora_down.detach().double()


def test_changes_above_the_limit_are_scaled_down_to_it_and_others_keep_every_bit():
    some = layers()
    limit = float(torch.stack([change(layer).norm() for layer in some]).median()) * 1.001
    before = [(change(layer), layer.lora_down.detach().clone(), layer.lora_up.detach().clone()) for layer in some]
    limited = MaxNorm(some, limit)
    assert limited.scaled is None
    limited()
    scaled = 0
    for layer, (whole, down, up) in zip(some, before, strict=True):
        if whole.norm() <= limit:
            assert torch.equal(layer.lora_down, down) and torch.equal(layer.lora_up, up)
            continue
        scaled += 1
        root = (limit / whole.norm()).sqrt().float()
        torch.testing.assert_close(layer.lora_down, down * root)
        torch.testing.assert_close(layer.lora_up, up * root)
        assert float(change(layer).norm()) == pytest.approx(limit, rel=1e-5)
    assert int(limited.scaled) == scaled > 5


def test_a_lora_that_changes_nothing_yet_stays_so():
    some = layers(size=0.0)
    limited = MaxNorm(some, 0.1)
    limited()
    assert int(limited.scaled) == 0
    assert all(layer.lora_down.isfinite().all() and not layer.lora_up.any() for layer in some)


def test_layers_of_one_shape_are_scaled_together_and_the_cpu_never_waits():
    class Launches(torch.utils._python_dispatch.TorchDispatchMode):
        names: list[str] = []

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.names.append(str(function))
            return function(*args, **(kwargs or {}))

    limited = MaxNorm(layers(), 0.1)
    with Launches() as seen:
        limited()
    assert not [name for name in seen.names if "item" in name or "_local_scalar" in name or "nonzero" in name]
    products = [name for name in seen.names if "bmm" in name]
    assert len(products) == 2 * len(limited._alike) < len(layers())
