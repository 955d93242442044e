"""Optimizers that start from the same place."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack

import pytest
import torch
from live_bytes import LiveBytes
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fluxq.config import config_from_dict
from fluxq.errors import WrongRequest
from fluxq.training import optim
from fluxq.training.libraries import LIBRARIES, import_bitsandbytes
from fluxq.training.optim import (
    build_optimizer,
    lora_groups,
    optimizer_step,
    restart_rates,
    update,
)


def test_unknown_names_list_the_known_ones():
    with pytest.raises(WrongRequest, match="adamw, adamw8bit, .*, or package.module.Class, not 'sgd'"):
        config_from_dict({"training": {"optimizer": "sgd"}}, "a test")


def test_adamw8bit_follows_adamw_closely():
    """On a quadratic bowl both end in the same place; 8-bit state costs little."""
    ends = {}
    for name in ("adamw", "adamw8bit"):
        torch.manual_seed(3)
        target, p = torch.randn(64, 128), nn.Parameter(torch.randn(64, 128))
        optimizer = build_optimizer(name, [p], 0.05, 0.0)
        for _ in range(120):
            (p - target).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        ends[name] = ((p - target).norm() / target.norm()).item()
        if name == "adamw8bit":
            assert optimizer.state[p]["state1"].dtype == torch.uint8
    assert ends["adamw8bit"] < ends["adamw"] + 0.02 < 0.2


class Losses:
    """The losses of micro-steps, which need nothing ahead. shares: of those that are not full."""

    def __init__(self, loss: Callable[[int], torch.Tensor], shares: Mapping[int, float] | None = None) -> None:
        self.loss, self.prepared, self.shares = loss, [], shares or {}

    def share(self, index: int) -> float:
        return self.shares.get(index, 1.0)

    def prepare(self, index: int) -> None:
        self.prepared.append(index)


def bowls() -> list[nn.Parameter]:
    """Parameters with 8-bit state, and with state that stays in fp32."""
    torch.manual_seed(3)
    return [nn.Parameter(torch.randn(shape)) for shape in ((64, 128), (3, 5))]


def slope(parameters: list[nn.Parameter]) -> torch.Tensor:
    return sum((p.square().sum() for p in parameters), torch.zeros(()))


@pytest.mark.parametrize("name", ["adamw", "adamw8bit", "lion8bit"])
def test_one_update_of_all_is_the_update_of_each_to_the_bit(name):
    """Against the library's own optimizer, with a state per tensor, also for sizes that are no multiple of a block."""
    shapes = ((64, 128), (3, 5), (16, 300), (70, 61), (1, 33))
    own, theirs = ([nn.Parameter(torch.randn(shape, generator=seeded)) for shape in shapes] for seeded in seeds(2, 5))
    flat = build_optimizer(name, own, 0.05, 0.1)
    library = LIBRARIES[name].load()
    apart = library(theirs, lr=0.05, weight_decay=0.1)
    (gradients,) = seeds(1, 6)
    for _ in range(5):
        for p, q in zip(own, theirs, strict=True):
            p.grad = torch.randn(p.shape, generator=gradients)
            q.grad = p.grad.clone()
        flat.step()
        apart.step()
    for p, q in zip(own, theirs, strict=True):
        assert torch.equal(p, q)
        for key, value in apart.state[q].items():
            assert torch.equal(torch.as_tensor(flat.state[p][key]), torch.as_tensor(value)), key
            assert torch.as_tensor(flat.state[p][key]).dtype == torch.as_tensor(value).dtype


def test_a_state_that_was_saved_per_tensor_is_taken_over():
    """As runs saved it when each tensor had its own state, nested by bitsandbytes."""
    own, theirs = bowls(), bowls()
    apart = import_bitsandbytes().optim.AdamW8bit(theirs, lr=0.05, weight_decay=0.1)
    slope(theirs).backward()
    apart.step()
    flat = build_optimizer("adamw8bit", own, 0.05, 0.1)
    flat.load_state_dict(apart.state_dict())
    with torch.no_grad():
        for p, q in zip(own, theirs, strict=True):
            p.copy_(q)
    for optimizer, parameters in ((flat, own), (apart, theirs)):
        optimizer.zero_grad()
        slope(parameters).backward()
        optimizer.step()
    assert all(map(torch.equal, own, theirs))


def test_importing_bitsandbytes_leaves_torchs_compiler_as_it_was():
    compile = torch.compile
    import_bitsandbytes()
    assert torch.compile is compile


def seeds(count: int, seed: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for _ in range(count)]


def test_every_image_weighs_the_same_in_batches_that_are_not_full():
    """Batches of 4: seven images in two micro-steps, or six with the last batch of a bucket that has two."""
    losses = {0: torch.tensor([1.0, 2.0, 3.0, 4.0]), 1: torch.tensor([9.0, 5.0])}
    parameter = nn.Parameter(torch.ones(3))
    optimizer = build_optimizer("adamw", [parameter], 1.0, 0.0)
    objective = Losses(lambda index: (losses[index] * parameter[0]).mean(), shares={1: 0.5})
    loss, norm = optimizer_step(optimizer, objective, 0, 2, 0.0, 0.0)
    assert loss == pytest.approx(24 / 6) and norm == pytest.approx(24 / 8), "each counts as 1 of 8"


def test_a_step_is_the_mean_of_its_micro_steps_clipped():
    parameters, seen = bowls()[:1], []
    optimizer = build_optimizer("adamw", parameters, 1.0, 0.0)

    def loss_of(index: int) -> torch.Tensor:
        seen.append(index)
        return index * parameters[0].sum()

    start = parameters[0].detach().clone()
    losses = Losses(loss_of)
    loss, norm = optimizer_step(optimizer, losses, 3, 2, 1e-3, 0.5)
    assert losses.prepared == [8], "the first micro-step of the next step"
    assert seen == [6, 7] and loss == pytest.approx(6.5 * float(start.sum()), rel=1e-5)
    assert norm == pytest.approx(6.5 * 8192**0.5, rel=1e-5)
    torch.testing.assert_close(parameters[0].detach(), start - 1e-3)
    assert float(optimizer.state[parameters[0]]["exp_avg"].norm()) == pytest.approx(0.1 * 0.5, rel=1e-4)
    assert parameters[0].grad is None
    before = [t.clone() for t in (parameters[0].detach(), optimizer.state[parameters[0]]["exp_avg"])]
    _, norm = optimizer_step(optimizer, Losses(lambda index: parameters[0].sum() * math.inf), 4, 1, 1e-3, 0.0)
    assert norm == math.inf and optimizer.done == 5, "skipped, but done"
    assert all(map(torch.equal, before, (parameters[0].detach(), optimizer.state[parameters[0]]["exp_avg"])))


@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
def test_an_update_out_of_memory_changes_nothing_or_says_that_it_did(name, monkeypatch):
    parameters = bowls()
    optimizer = build_optimizer(name, parameters, 0.05, 0.1)
    slope(parameters).backward()
    before = [p.detach().clone() for p in parameters]

    def fail(*_, **__) -> None:
        raise torch.OutOfMemoryError("injected")

    with monkeypatch.context() as patch:
        patch.setattr(optimizer, "step", fail)
        with pytest.raises(torch.OutOfMemoryError, match="injected"):
            update(optimizer)
    assert all(map(torch.equal, before, parameters))

    def fail_half_way(*_, **__) -> None:
        optimizer.flats[0].updates += 1
        fail()

    monkeypatch.setattr(optimizer, "step", fail_half_way)
    with pytest.raises(WrongRequest, match="the last save is intact"):
        update(optimizer)


def test_nothing_is_computed_once_weights_are_updated(monkeypatch):
    """Otherwise it could run out of memory, and the step would be repeated."""
    parameters = bowls()
    optimizer = build_optimizer("adamw", parameters, 0.05, 0.1)
    real, after = optim.update, []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            after.extend([op] * (op.namespace == "aten"))
            return op(*args, **(kwargs or {}))

    with ExitStack() as stack:
        monkeypatch.setattr(optim, "update", lambda o: (real(o), stack.enter_context(Watch())))
        optimizer_step(optimizer, Losses(lambda index: slope(parameters)), 0, 2, 1e-3, 1.0)
    assert after == []


def test_temporary_memory_of_adamw_is_tested_before_anything_changes(monkeypatch):
    """With foreach, as on a GPU: if the roots of exp_avg_sq do not fit, that fails before the update."""
    parameters = bowls()
    optimizer = build_optimizer("adamw", parameters, 0.05, 0.1)
    optimizer.flats[0].inner.param_groups[0]["foreach"] = True
    slope(parameters).backward()
    with LiveBytes() as live:
        optimizer.step()
        assert live.peak == 2 * optimizer.flats[0].values.nbytes  # the gathered gradients and the roots
    before = [p.detach().clone() for p in parameters]

    def refuse(*_, **__) -> None:
        raise torch.OutOfMemoryError("injected")

    monkeypatch.setattr(torch, "empty", refuse)
    with pytest.raises(torch.OutOfMemoryError):
        update(optimizer)
    assert all(map(torch.equal, before, parameters))


@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
def test_groups_keep_their_own_learning_rates_under_one_schedule(name):
    """Adam's first update moves every weight by its learning rate."""
    weights = [nn.Parameter(torch.full((64, 128), 2.0)) for _ in range(2)]
    groups = [{"params": [weights[0]], "lr": 0.1}, {"params": [weights[1]], "lr": 0.02}]
    optimizer = build_optimizer(name, groups, 9.0, 0.0)
    optimizer_step(optimizer, Losses(lambda index: sum((w.sum() for w in weights), torch.zeros(()))), 0, 1, 0.5, 0.0)
    assert [float(2 - w.detach().mean()) for w in weights] == pytest.approx([0.05, 0.01], rel=1e-3)
    assert [group["lr"] for group in optimizer.param_groups] == [0.05, 0.01]


def test_a_resumed_run_steps_by_the_learning_rate_that_is_asked_now():
    """One rate for each group; a rate without a group, that of a text encoder which does not train, is left over."""
    weight = nn.Parameter(torch.full((64, 128), 2.0))
    optimizer = build_optimizer("adamw", [{"params": [weight], "lr": 0.1}], 9.0, 0.0)
    restart_rates(optimizer, 0.02, None)
    optimizer_step(optimizer, Losses(lambda index: weight.sum()), 0, 1, 0.5, 0.0)
    assert float(2 - weight.detach().mean()) == pytest.approx(0.01, rel=1e-3)


def test_gradients_left_by_an_attempt_out_of_memory_do_not_count():
    parameters = bowls()[:1]
    optimizer = build_optimizer("adamw", parameters, 1.0, 0.0)
    parameters[0].grad = torch.full_like(parameters[0], 7.0)
    _, norm = optimizer_step(optimizer, Losses(lambda index: parameters[0].sum()), 0, 1, 1.0, 0.0)
    assert norm == pytest.approx(8192**0.5, rel=1e-5)


@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
def test_ups_learn_by_their_own_rate_under_one_norm_also_after_a_resume(name):
    """LoRA+. Adam's first update moves every weight by its learning rate."""
    model = nn.Module()
    for layer in ("a", "b"):
        model.add_module(layer, nn.Module())
        for part in ("lora_down", "lora_up"):
            model.get_submodule(layer).register_parameter(part, nn.Parameter(torch.full((64, 128), 2.0)))
    optimizer = build_optimizer(name, lora_groups(model, 0.02, 5.0), 9.0, 0.0)
    loss = Losses(lambda index: sum((w.sum() for w in model.parameters()), torch.zeros(())))
    _, norm = optimizer_step(optimizer, loss, 0, 1, 0.5, 0.0)
    assert norm == pytest.approx((4 * 64 * 128) ** 0.5, rel=1e-5)
    moved = {path: float(2 - p.detach().mean()) for path, p in model.named_parameters()}
    assert moved == pytest.approx({path: 0.05 if path.endswith("up") else 0.01 for path in moved}, rel=1e-3)
    restart_rates(optimizer, 0.004)
    optimizer_step(optimizer, loss, 1, 1, 1.0, 0.0)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.004, 0.02])
    assert len(lora_groups(model, 0.02, 1.0)) == 1, "of one rate, one group and one flat tensor"


def test_two_models_restart_with_their_own_rates():
    weights = [nn.Parameter(torch.zeros(8, 8)) for _ in range(4)]
    groups = [{"params": [w], "lr": 1.0, **({"plus_ratio": 4.0} if i % 2 else {})} for i, w in enumerate(weights)]
    optimizer = build_optimizer("adamw", groups, 9.0, 0.0)
    restart_rates(optimizer, 0.01, 0.002)
    assert [group["initial_lr"] for group in optimizer.param_groups] == pytest.approx([0.01, 0.04, 0.002, 0.008])
