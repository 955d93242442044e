"""Optimizers of libraries: which are found, what they are given, what they take, and that ours steps as theirs."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch
from live_bytes import LiveBytes
from torch import nn

from fluxq.config import OPTIMIZERS, TrainingConfig
from fluxq.config_files import config_from_dict
from fluxq.console import silent
from fluxq.errors import WrongRequest
from fluxq.model.costs import optimizer_bytes
from fluxq.training.defaults import resolve_optimizer
from fluxq.training.libraries import LIBRARIES, library_of, parse_arguments
from fluxq.training.optim import FlatOptimizer, build_optimizer

SLOW = ("adamw4bit", "adamwfp8", "adafactor", "muon")  # to import
NAMED = [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in OPTIMIZERS]


def matrices(*shapes: tuple[int, int]) -> list[nn.Parameter]:
    seeded = torch.Generator().manual_seed(3)
    return [nn.Parameter(torch.randn(shape, generator=seeded)) for shape in shapes]


def step(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], seed: int) -> None:
    seeded = torch.Generator().manual_seed(seed)
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=seeded)
    optimizer.step()


def require(name: str) -> None:
    if library_of(name).package == "pytorch_optimizer":
        pytest.importorskip("pytorch_optimizer")


@pytest.mark.parametrize("name", NAMED)
def test_steps_are_those_of_the_library(name):
    """To the bit, but that Prodigy sums over all numbers in another order."""
    require(name)
    shapes = ((64, 128), (16, 512), (128, 64))
    own, theirs = matrices(*shapes), matrices(*shapes)
    flat, apart = build_optimizer(name, own, 1e-3, 0.1), library_of(name).make(theirs, 1e-3, 0.1, {})
    for seed in range(3):
        step(flat, own, seed)
        with torch.compiler.set_stance("force_eager"):
            step(apart, theirs, seed)
    for p, q in zip(own, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5 if name == "prodigy" else 0, atol=0)
    assert not any(map(torch.equal, own, matrices(*shapes)))


@pytest.mark.parametrize("name", NAMED)
def test_the_state_takes_the_memory_that_is_predicted(name):
    require(name)
    rank, sides = 16, (3072, 12288, 9216)  # as in FLUX.1
    parameters = matrices(*((rank, side) for side in sides))
    optimizer = build_optimizer(name, parameters, 1e-3, 0.1)
    step(optimizer, parameters, 0)
    states = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
    stored = sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in states}.values())
    assert stored == pytest.approx(sum(optimizer_bytes(name, rank * side, rank) for side in sides), rel=0.03)
    for p in parameters:
        p.grad = torch.ones_like(p)
    optimizer.gather()
    cost = LIBRARIES[name].cost
    with LiveBytes() as live:
        optimizer.step()
    if LIBRARIES[name].is_elementwise and name != "adamw":  # which needs less on a GPU: see test_optim.py
        assert live.peak <= cost.temporary * min(cost.most, sum(flat.values.numel() for flat in optimizer.flats))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adamw4bit", "adamwfp8"])
def test_updates_by_torchao_take_no_more_than_is_predicted_and_no_compiler(name, monkeypatch):
    """Part by part: one flat tensor for no more numbers than `most`, or for one matrix."""
    cost = LIBRARIES[name].cost._replace(most=3 << 14)
    monkeypatch.setitem(LIBRARIES, name, replace(LIBRARIES[name], cost=cost))
    parameters = matrices(*[(16, 1024)] * 5, (16, 4096))
    optimizer = build_optimizer(name, parameters, 1e-3, 0.1)
    assert [len(flat.parameters) for flat in optimizer.flats] == [3, 2, 1]
    step(optimizer, parameters, 0)
    for p in parameters:
        p.grad = torch.ones_like(p)
    optimizer.gather()
    with LiveBytes() as live:
        optimizer.step()
    assert live.peak <= cost.temporary * 4096 * 16


def test_every_optimizer_has_a_default_learning_rate_with_a_reason():
    for name in OPTIMIZERS:
        said: list[str] = []
        if library_of(name).package != "pytorch_optimizer":
            assert resolve_optimizer(TrainingConfig(optimizer=name), said.append).learning_rate == library_of(name).rate
            assert said == [f"learning rate {library_of(name).rate:g}: {library_of(name).reason}"]
    assert LIBRARIES["prodigy"].rate == 1
    own = TrainingConfig(optimizer="torch.optim.NAdam")
    assert resolve_optimizer(own, said.append).learning_rate == 2e-3
    assert said[-1] == "learning rate 0.002: the default of torch.optim.NAdam"
    asked = TrainingConfig(learning_rate=0.5)
    assert resolve_optimizer(asked, silent) is asked


def test_arguments_reach_the_class():
    arguments = parse_arguments(["betas=(0.5, 0.9)", "amsgrad = True", "eps=1e-6", "name=some text"])
    assert arguments == {"betas": (0.5, 0.9), "amsgrad": True, "eps": 1e-6, "name": "some text"}
    arguments.pop("name")
    parameters = matrices((64, 128))
    optimizer = build_optimizer("adamw", parameters, 1e-3, 0.1, arguments)
    assert optimizer.param_groups[0]["betas"] == (0.5, 0.9) and optimizer.param_groups[0]["eps"] == 1e-6
    step(optimizer, parameters, 0)
    assert "max_exp_avg_sq" in optimizer.state[parameters[0]]


@pytest.mark.parametrize(
    ("optimizer", "arguments", "sentence"),
    [
        ("torch.optim.Nadam", (), "torch.optim.Nadam is not a class of optimizers; name one as package.module.Class"),
        ("torch.nn.Linear", (), "torch.nn.Linear is not a class of optimizers"),
        ("torch.optim.Optimizer", ("eps=1",), "torch.optim.Optimizer does not take its arguments"),
        (
            "no_such_package.Lamb",
            (),
            "cannot be imported .*; pip install the package that has no_such_package",
        ),
        ("adamw", ("betas",), "--optimizer-args takes NAME=VALUE, not 'betas'"),
        ("adamw", ("lr=3",), "--optimizer-args: lr is a setting of its own"),
        ("adamw", ("momentum=3",), "torch.optim.AdamW does not take its arguments: .*momentum"),
        ("adamw", ("eps=-1",), "torch.optim.AdamW does not take its arguments: Invalid epsilon value: -1"),
    ],
)
def test_what_is_not_an_optimizer_or_not_taken_is_refused(optimizer, arguments, sentence):
    with pytest.raises(WrongRequest, match=sentence):
        resolve_optimizer(TrainingConfig(optimizer=optimizer, optimizer_args=arguments), silent)


def test_a_missing_package_is_named_with_the_extra_that_has_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    with pytest.raises(WrongRequest, match=r"cannot be imported .*; pip install 'fluxq\[optimizers\]'"):
        resolve_optimizer(TrainingConfig(optimizer="prodigy"), silent)


def test_names_that_are_no_class_are_refused_with_the_known_ones():
    for name in ("sgd", "torch.", ".SGD", "torch optim.SGD", 3):
        with pytest.raises(WrongRequest, match="adamw, adamw8bit, .*, or package.module.Class, not"):
            config_from_dict({"training": {"optimizer": name}}, "a test")


class Swallowing(torch.optim.SGD):
    """Takes any argument, and knows one."""

    def __init__(self, params, lr: float = 0.1, **more) -> None:
        super().__init__(params, lr, momentum=more.get("momentum", 0.0))


def test_arguments_that_a_class_swallows_are_refused(monkeypatch):
    monkeypatch.setattr(torch.optim, "Swallowing", Swallowing, raising=False)
    known = TrainingConfig(optimizer="torch.optim.Swallowing", optimizer_args=("momentum=0.5",))
    resolve_optimizer(known, silent)
    with pytest.raises(WrongRequest, match="torch.optim.Swallowing ignores beta1; it takes lr"):
        resolve_optimizer(replace(known, optimizer_args=("momentum=0.5", "beta1=0.5")), silent)


@pytest.mark.parametrize("name", ["prodigy", "came", "schedulefree_adamw"])
def test_arguments_that_pytorch_optimizer_swallows_are_refused(name):
    require(name)
    with pytest.raises(WrongRequest, match="ignores beta1; it takes lr, betas, "):
        resolve_optimizer(TrainingConfig(optimizer=name, optimizer_args=("beta1=0.5",)), silent)


def test_a_class_without_weight_decay_says_so():
    said: list[str] = []
    resolve_optimizer(TrainingConfig(optimizer="torch.optim.Rprop"), said.append)
    assert said[0] == "weight decay: none, as torch.optim.Rprop takes none"
    assert all(library_of(name).takes_decay() for name in (*OPTIMIZERS, "torch.optim.NAdam"))


class Hoarder(torch.optim.SGD):
    """Its state cannot be saved."""

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        super().step()
        for p in self.param_groups[0]["params"]:
            self.state[p]["history"] = {1, 2}


def test_a_state_that_cannot_be_saved_is_refused_at_the_first_step(monkeypatch):
    monkeypatch.setattr(torch.optim, "Hoarder", Hoarder, raising=False)
    parameters = matrices((4, 4))
    with pytest.raises(WrongRequest, match="torch.optim.Hoarder cannot be saved, as its history is a set; choose"):
        step(FlatOptimizer("torch.optim.Hoarder", parameters, 1e-3, 0.0), parameters, 0)
