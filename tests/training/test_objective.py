"""The objective: the loss of a micro-step depends on its number alone."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from helpers import randomize, tiny_config

from fluxq.bench.timed_step import SameBatch
from fluxq.caching import Batch
from fluxq.config import LoraConfig, TrainingConfig
from fluxq.flow import flow_loss, sample_noise
from fluxq.model import Flux, add_lora
from fluxq.model.lora import lora_layers
from fluxq.training.dropout import Dropout
from fluxq.training.losses import weighted_error
from fluxq.training.objective import Objective
from fluxq.training.timesteps import sample_timesteps

TRAINING = TrainingConfig(batch=2, seed=7, timesteps="flux_shift", guidance=1.5)


def objective(training: TrainingConfig = TRAINING) -> Objective:
    torch.manual_seed(0)
    flux = randomize(Flux(tiny_config()))
    for layer in add_lora(flux, 2, 3).values():
        torch.nn.init.normal_(layer.lora_up, std=0.05)
    names = ["photos/a.png", "photos/b.png#2"]
    c = flux.config
    batch = Batch(torch.randn(2, c.in_channels // 4, 8, 6), torch.randn(2, 5, c.context_in_dim),
                  torch.randn(2, c.vec_in_dim), names)  # fmt: skip
    return Objective(flux, SameBatch(batch, 64), training)


EVERYTHING = replace(TRAINING, timesteps="logit_normal", stratify=4, min_timestep=0.1, max_timestep=0.8, loss="huber",
                     huber_schedule="snr", weighting="cosmap")  # fmt: skip


@pytest.mark.parametrize("training", [TRAINING, EVERYTHING])
def test_a_loss_does_not_depend_on_the_order_of_the_steps(training):
    """So a run that is resumed sees what it would have seen."""
    first, second = objective(training), objective(training)
    forward = [float(first.loss(i)) for i in range(4)]
    backward = [float(second.loss(i)) for i in (3, 2, 1, 0)]
    assert forward == backward[::-1] and len(set(forward)) == 4


def test_a_loss_is_the_flow_loss_at_the_steps_own_noise_and_timesteps():
    one = objective()
    batch = one.batches.batch(3)
    t = sample_timesteps(TRAINING, 3, batch.examples, 16)
    noise = sample_noise(batch.latents.shape[1:], 7, 3, batch.examples)
    expected = flow_loss(one.flux, batch.latents, noise, t, batch.txt, batch.pooled, 1.5).mean()
    torch.testing.assert_close(one.loss(3), expected, rtol=1e-5, atol=0)


def test_a_loss_is_that_of_the_settings_at_their_timesteps():
    one = objective(EVERYTHING)
    batch = one.batches.batch(3)
    t = sample_timesteps(EVERYTHING, 3, batch.examples, 16, 2)
    noise = sample_noise(batch.latents.shape[1:], 7, 3, batch.examples)
    given = one.flux, batch.latents, noise, t, batch.txt, batch.pooled, 1.5, None, None, batch.weights
    expected = flow_loss(*given, partial(weighted_error, EVERYTHING)).mean()
    torch.testing.assert_close(one.loss(3), expected, rtol=1e-5, atol=0)
    assert not torch.equal(t, sample_timesteps(EVERYTHING, 3, batch.examples, 16, 1)), "images are numbered by batch"


def test_validation_is_the_squared_error_whatever_is_minimized():
    plain, other = objective(), objective(EVERYTHING)
    batch = plain.batches.batch(0)
    assert torch.equal(plain.validation([batch]), other.validation([batch]))


def test_dropout_is_for_training_alone_and_the_same_for_a_step_that_is_repeated():
    plain = objective()
    layers = lora_layers(plain.flux)
    dropout = Dropout(layers, LoraConfig(dropout=0.2, rank_dropout=0.3, module_dropout=0.1), 7)
    other = Objective(plain.flux, plain.batches, TRAINING, dropout=dropout)
    batch = plain.batches.batch(0)
    losses = [float(other.loss(index)) for index in (0, 1, 0)]
    assert losses[0] == losses[2] != float(plain.loss(0)) and losses[1] != float(plain.loss(1))
    assert torch.equal(plain.validation([batch]), other.validation([batch]))


def test_what_is_prepared_changes_no_loss():
    """Also if another micro-step comes than the one that was prepared, as when a step is repeated."""
    plain, ahead = objective(), objective()
    for index, prepared in ((0, 1), (1, 2), (1, 2), (2, 5), (3, 4)):
        loss = float(ahead.loss(index))
        ahead.prepare(prepared)
        assert loss == float(plain.loss(index))


def test_nothing_is_read_beyond_the_last_step():
    class Counted(SameBatch):
        read: list[int] = []

        def batch(self, index):
            self.read.append(index)
            return super().batch(index)

    one = objective()
    batches = Counted(one.batches.content, 64)
    last = Objective(one.flux, batches, replace(TRAINING, steps=3, accumulate=2))
    for index in range(8):
        last.prepare(index)
    assert batches.read == list(range(6))


def test_a_clip_that_trains_gives_the_pooled_vectors():
    class Halved:
        def __init__(self, batch: Batch) -> None:
            self.batch = batch

        def pooled(self, captions):
            return 0.5 * self.batch.pooled

    one = objective()
    batch, plain = one.batches.batch(0), float(one.loss(0))
    trained = Objective(one.flux, one.batches, TRAINING, Halved(batch))
    one.flux.trains_y = True
    assert float(trained.loss(0)) != plain
