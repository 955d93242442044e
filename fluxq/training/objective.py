"""What training minimizes: the flow-matching loss of micro-step i.

A micro-step is known by its number alone: its images, captions, noise and timesteps are drawn by address (seed,
purpose, number, example), so stopping and resuming changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import Protocol

from torch import Tensor

from fluxq.caching.batches import Batch
from fluxq.config import TrainingConfig
from fluxq.flow import conditioning, flow_loss, sample_noise, validation_loss
from fluxq.kernels.dropout import dropping
from fluxq.model.clip import Clip
from fluxq.model.flux import Flux
from fluxq.model.modulation import Conditioning, Lookahead, sent

from .dropout import Dropout
from .losses import weighted_error
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
    """

    def __init__(
        self,
        flux: Flux,
        batches: NumberedBatches,
        training: TrainingConfig,
        clip: Clip | None = None,
        dropout: Dropout | None = None,
    ) -> None:
        self.flux, self.batches, self.training, self.clip, self.dropout = flux, batches, training, clip, dropout
        self._lookahead: Lookahead | None = None
        self._prepared: tuple[int, Batch, Tensor, Tensor] | None = None

    def loss(self, index: int) -> Tensor:
        """The mean loss of micro-step `index`, with modulation that was computed ahead wherever that is possible.

        Modulation is first computed when this is first called, so the model must have its rotations by then.
        """
        if self._lookahead is None:
            self._lookahead = Lookahead(self.flux, self.conditioning, self.batches.largest)
        rows, examples = self._lookahead.rows(index), len(self.batches.examples_of(index))
        with dropping(None if self.dropout is None else self.dropout.drawn(index, examples)):
            return self._loss(index, rows)

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
            self._loss(index, None)

    def conditioning(self, index: int) -> Conditioning:
        """The timesteps, pooled vectors and guidance of micro-step `index`."""
        return conditioning(self.flux, self._timesteps(index), self.batches.pooled_of(index), self.training.guidance)

    def validation(self, batches: Iterable[Batch]) -> float:
        """The mean squared error on held-out `batches` at fixed timesteps and noise, whatever loss is trained with."""
        settings = self.training
        return validation_loss(self.flux, map(self._with_pooled, batches), settings.shift, settings.guidance)

    def described(self, index: int) -> str:
        """What micro-step `index` sees: its images, captions and timesteps."""
        batch, t = self.batches.batch(index), self._timesteps(index).tolist()
        captions = batch.captions or [""] * len(t)
        return "; ".join(f"{n} ({c!r}) at t = {t:.3f}" for n, c, t in zip(batch.examples, captions, t, strict=True))

    def _loss(self, index: int, modulation: tuple[Tensor, ...] | None) -> Tensor:
        prepared, self._prepared = self._prepared, None
        if prepared is None or prepared[0] != index:  # the first, or one that is repeated
            prepared = index, *self._inputs(index)
        _, batch, noise, t = prepared
        batch, guidance = self._with_pooled(batch), self.training.guidance
        given = self.flux, batch.latents, noise, t, batch.txt, batch.pooled, guidance, modulation, batch.txt_mask
        return flow_loss(*given, batch.weights, partial(weighted_error, self.training)).mean()

    def _inputs(self, index: int) -> tuple[Batch, Tensor, Tensor]:
        """The batch, the noise and the timesteps of micro-step `index`, on the model's device."""
        batch, settings, device = self.batches.batch(index), self.training, self.flux.device
        noise = sample_noise(batch.latents.shape[1:], settings.seed, index, batch.examples)
        latents, txt, pooled = (sent(x, device) for x in (batch.latents, batch.txt, batch.pooled))
        mask, weights = (None if x is None else sent(x, device) for x in (batch.txt_mask, batch.weights))
        batch = replace(batch, latents=latents, txt=txt, pooled=pooled, txt_mask=mask, weights=weights)
        return batch, sent(noise, device), sent(self._timesteps(index), device)

    def _timesteps(self, index: int) -> Tensor:
        width, height = self.batches.bucket_of(index)
        examples, tokens = self.batches.examples_of(index), width // 16 * (height // 16)
        return sample_timesteps(self.training, index, examples, tokens, self.batches.largest)

    def _with_pooled(self, batch: Batch) -> Batch:
        return batch if self.clip is None else replace(batch, pooled=self.clip.pooled(batch.captions))
