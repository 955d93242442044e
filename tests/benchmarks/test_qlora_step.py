"""The published recipe's whole step: what it trains, how it stores, and that it is checkpointed."""

from __future__ import annotations

import sys

import pytest
import torch

from benchmarks.cases import Skip
from benchmarks.peers import peft_lora, qlora_step
from fluxq.bench.random_model import random_flux
from fluxq.bench.timed_step import Setting, clock_steps, trainer
from fluxq.formats.checkpoint.keys import module_split
from fluxq.model import FluxConfig
from fluxq.model.lora import lora_layers

CPU, TINY, NANO = torch.device("cpu"), Setting(resolution=32, t5_length=4, rank=2), FluxConfig.nano()


@pytest.mark.slow
def test_the_recipe_trains_our_layers_in_nf4_with_checkpointing():
    for package in ("diffusers", "peft", "bitsandbytes"):
        pytest.importorskip(package)
    model = qlora_step.transformer(NANO, TINY.rank, CPU)
    flux = random_flux(NANO, "nf4", CPU, TINY.rank)
    ours = {name for path in lora_layers(flux) for name, *_ in module_split(path, NANO)}
    theirs = {name.removesuffix(".lora_A") for name, _ in model.named_modules() if name.endswith(".lora_A")}
    assert theirs == ours
    trained = peft_lora.trained(model)
    assert {p.dtype for p in trained} == {torch.float32} and all(p.requires_grad for p in trained)
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in trained}
    packed = [m for m in model.modules() if getattr(getattr(m, "weight", None), "dtype", None) == torch.uint8]
    assert len(packed) > len(ours) and not any(p.is_meta for p in model.parameters())
    assert model.training and model.is_gradient_checkpointing

    before = [p.detach().clone() for p in trained]
    theirs_row = clock_steps(qlora_step.trainer(model, NANO, TINY, "adamw"), CPU, 1, 3)
    ours_row = clock_steps(trainer(flux, TINY, "adamw"), CPU, 1, 3)
    assert theirs_row["ok"] and ours_row["ok"] and theirs_row.keys() == ours_row.keys()
    assert all(not torch.equal(a, b) for a, b in zip(before, trained, strict=True)), "every LoRA matrix learns"


def test_a_missing_package_is_a_reason_to_skip(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(Skip, match="bitsandbytes"):
        qlora_step.transformer(NANO, 2, CPU)
