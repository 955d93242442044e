"""What training minimizes: the flow-matching loss of micro-step i.

A micro-step is known by its number alone: its images, captions, noise and timesteps are drawn by address (seed,
purpose, number, example), so stopping and resuming changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from fluxq.caching.batches import Batch
from fluxq.config import TrainConfig, TrainingConfig
from fluxq.data.captions import in_class
from fluxq.data.examples import Scan
from fluxq.data.randomness import generator, normal
from fluxq.flow import conditioning, flow_loss, sample_noise, validation_losses, velocity
from fluxq.kernels.dropout import dropping
from fluxq.model.clip import Clip
from fluxq.model.flux import Flux
from fluxq.model.lora import lora_strength
from fluxq.model.modulation import Conditioning, Lookahead, sent

from .dropout import Dropout
from .losses import predicted, weighted_error
from .timesteps import sample_timesteps

CALIBRATION_BATCHES = 2


class NumberedBatches(Protocol):
    """Micro-batches by number; caching.Batches is one. Only `batch` may read latents and T5's embeddings.

    largest: the most examples of any.
    """

    @property
    def largest(self) -> int: ...
    def batch(self, index: int) -> Batch: ...
    def seen_before(self, index: int) -> int: ...
    def bucket_of(self, index: int) -> tuple[int, int]: ...
    def examples_of(self, index: int) -> list[str]: ...
    def pooled_of(self, index: int) -> Tensor: ...


class Objective:
    """The loss of `flux` on `batches`, with `dropout` of its LoRA. With `clip`, a CLIP-L that trains, pooled vectors
    come from it as it is now.

    in_class: the same batches with the name of a class in place of the trigger. For those captions the output is held
    to that of the base model, which is differential output preservation: at the noise and timesteps of the micro-step,

        loss + preserve_weight * mean over the images of |v(x_t, t, class) - v(x_t, t, class) without LoRA|^2

    where an image without a trigger, so with the same caption in both, counts 0 in the second mean.
    """

    def __init__(
        self,
        flux: Flux,
        batches: NumberedBatches,
        training: TrainingConfig,
        clip: Clip | None = None,
        dropout: Dropout | None = None,
        in_class: NumberedBatches | None = None,
    ) -> None:
        self.flux, self.batches, self.training, self.clip = flux, batches, training, clip
        self.dropout, self.in_class = dropout, in_class
        self._lookahead: Lookahead | None = None
        self._class_lookahead: Lookahead | None = None
        self._prepared: tuple[int, Batch, Tensor, Tensor] | None = None

    def terms(self, index: int) -> Iterator[Tensor]:
        """What adds up to the loss of micro-step `index`. Run each backward before the next, so that memory holds one.

        Modulation is computed ahead wherever that is possible, and first when this is first called, so the model must
        have its rotations by then.
        """
        if self._lookahead is None:
            self._lookahead = Lookahead(self.flux, self.conditioning, self.batches.largest)
        inputs, modulation = self._taken(index), self._lookahead.rows(index)
        dropped = None if self.dropout is None else self.dropout.drawn(index, len(inputs[0].examples))
        with dropping(dropped):
            loss = self._loss(index, inputs, modulation)
        yield loss
        with dropping(dropped):
            kept = self._preservation(index, *inputs)
        if kept is not None:
            yield self.training.preserve_weight * kept

    def loss(self, index: int) -> Tensor:
        """The mean loss of micro-step `index`, without preservation."""
        return next(self.terms(index))

    def share(self, index: int) -> float:
        """How full micro-step `index` is: 1, or less for the last batch of a bucket and smaller batches of a folder."""
        return len(self.batches.examples_of(index)) / self.batches.largest

    def prepare(self, index: int) -> None:
        """Read what micro-step `index` needs and start its copies to the GPU, while that is still busy.

        Nothing is read beyond the last step.
        """
        settings = self.training
        if settings.steps is None or index < settings.steps * settings.accumulate:
            self._prepared = index, *self._inputs(index)

    def calibration(self) -> None:
        """Forward passes of the first micro-steps, with modulation computed in the step, so every layer sees inputs."""
        for index in range(CALIBRATION_BATCHES):
            self._loss(index, self._taken(index), None)

    def conditioning(self, index: int) -> Conditioning:
        """The timesteps, pooled vectors and guidance of micro-step `index`."""
        return self._conditioning(self.batches.pooled_of, index)

    def _conditioning(self, pooled_of: Callable[[int], Tensor], index: int) -> Conditioning:
        return conditioning(self.flux, self._timesteps(index), pooled_of(index), self.training.guidance)

    def validation(self, batches: Iterable[Batch]) -> Tensor:
        """The squared errors (times, images) at fixed timesteps and noise, whatever loss is trained with."""
        settings = self.training
        return validation_losses(self.flux, map(self._with_pooled, batches), settings.shift, settings.guidance)

    def described(self, index: int) -> str:
        """What micro-step `index` sees: its images, captions and timesteps."""
        batch, t = self.batches.batch(index), self._timesteps(index).tolist()
        captions = batch.captions or [""] * len(t)
        return "; ".join(f"{n} ({c!r}) at t = {t:.3f}" for n, c, t in zip(batch.examples, captions, t, strict=True))

    def _taken(self, index: int) -> tuple[Batch, Tensor, Tensor]:
        """`_inputs(index)`, which may have been prepared."""
        prepared, self._prepared = self._prepared, None
        if prepared is None or prepared[0] != index:  # the first, or one that is repeated
            return self._inputs(index)
        return prepared[1:]

    def _loss(self, index: int, inputs: tuple[Batch, Tensor, Tensor], modulation: tuple[Tensor, ...] | None) -> Tensor:
        batch, noise, t = inputs
        batch, guidance = self._with_pooled(batch), self.training.guidance
        given = self.flux, batch.latents, noise, t, batch.txt, batch.pooled, guidance, modulation, batch.txt_mask
        error, predict = partial(weighted_error, self.training), partial(predicted, self.training.prediction)
        return flow_loss(*given, batch.weights, error, predict, self._further_noise(index, batch)).mean()

    def _preservation(self, index: int, batch: Batch, noise: Tensor, t: Tensor) -> Tensor | None:
        """How far LoRA moves the output for the captions with the class; None if no image has a trigger."""
        if self.in_class is None:
            return None
        other, device, guidance = self.in_class.batch(index), self.flux.device, self.training.guidance
        counts = torch.tensor([a != b for a, b in zip(batch.captions, other.captions, strict=True)])
        if not counts.any():
            return None
        pooled_of = self.in_class.pooled_of
        if self._class_lookahead is None:
            known = partial(self._conditioning, pooled_of)
            self._class_lookahead = Lookahead(self.flux, known, self.batches.largest)
        # what trains depends on LoRA, so it is computed in each pass
        modulation = None if self.flux.trains_modulation else self._class_lookahead.rows(index)
        txt, pooled, counts = (sent(x, device) for x in (other.txt, other.pooled, counts))
        mix = t[:, None, None, None]
        x = (1 - mix) * batch.latents + mix * noise
        given = self.flux, x, t, txt, pooled, guidance, modulation, other.txt_mask
        self.flux.ring.announce(self.flux.blocks_units)  # a forward pass without a backward pass
        with torch.no_grad(), lora_strength(self.flux, 0.0):
            base = velocity(*given)
        return ((velocity(*given) - base).square().mean(dim=(1, 2, 3)) * counts).mean()

    def _inputs(self, index: int) -> tuple[Batch, Tensor, Tensor]:
        """The batch, the noise and the timesteps of micro-step `index`, on the model's device."""
        batch, settings, device = self.batches.batch(index), self.training, self.flux.device
        noise = sample_noise(batch.latents.shape[1:], settings.seed, index, batch.examples)
        latents, txt, pooled = (sent(x, device) for x in (batch.latents, batch.txt, batch.pooled))
        mask, weights = (None if x is None else sent(x, device) for x in (batch.txt_mask, batch.weights))
        batch = replace(batch, latents=latents, txt=txt, pooled=pooled, txt_mask=mask, weights=weights)
        return batch, sent(noise, device), sent(self._timesteps(index), device)

    def _further_noise(self, index: int, batch: Batch) -> Tensor | None:
        """What `input_noise` adds to the noise of micro-step `index`; None for nothing."""
        settings, strength = self.training, self.training.input_noise
        if not strength:
            return None
        if settings.input_noise_random:
            strength *= generator(settings.seed, "strength of further noise", index).random()
        shape = batch.latents.shape[1:]
        further = [normal(shape, settings.seed, "further noise", index, example) for example in batch.examples]
        return strength * sent(torch.stack(further), self.flux.device)

    def _timesteps(self, index: int) -> Tensor:
        width, height = self.batches.bucket_of(index)
        examples, tokens = self.batches.examples_of(index), width // 16 * (height // 16)
        return sample_timesteps(self.training, index, examples, tokens, self.batches.largest)

    def _with_pooled(self, batch: Batch) -> Batch:
        return batch if self.clip is None else replace(batch, pooled=self.clip.pooled(batch.captions))


def class_captions(config: TrainConfig, scanned: Scan) -> dict[str, str]:
    """Caption -> the caption with `preserve_class` in place of the trigger; {} without a class to preserve."""
    if (name := config.training.preserve_class) is None:
        return {}
    trained = {folder.path for folder in config.data.folders}
    examples = [e for e in scanned.examples if e.folder.path in trained and not e.held_out]
    pairs = {text: in_class(text, e.folder.trigger, name.strip()) for e in examples for text in e.texts}
    return {text: other for text, other in pairs.items() if text != other}
