"""Rectified flow, as FLUX.1 is trained and sampled: the path from image to noise, the loss, shifted times, Euler steps.

t = 0 is the image, t = 1 is noise; x_t = (1 - t) image + t noise, and the model learns the velocity noise - image
(Liu et al. 2022; Esser et al. 2024). training/timesteps.py draws the t of training. Every random number is addressed
by (seed, purpose, micro-step, example), never consumed from a stream.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from fluxq.caching.batches import Batch
from fluxq.data.randomness import normal
from fluxq.model.embed import image_ids, pack, text_ids, unpack
from fluxq.model.flux import Flux
from fluxq.model.modulation import Conditioning, Lookahead

VALIDATION_TIMES = 6


def shift_time(t: Tensor, shift: float) -> Tensor:
    """t moved toward noise: shift t / (1 + (shift - 1) t). A shift of 1 changes nothing."""
    return shift * t / (1 + (shift - 1) * t)


def resolution_shift(tokens: int) -> float:
    """FLUX.1-dev's shift for an image of `tokens` tokens: exp of the line through (256, 0.5) and (4096, 1.15)."""
    return math.exp(0.5 + (tokens - 256) * (1.15 - 0.5) / (4096 - 256))


def sample_noise(shape: Sequence[int], seed: int, index: int, examples: Sequence[str]) -> Tensor:
    """Noise (B, 16, H, W) fp32 for the `examples` of micro-step `index`; `shape` is one example's (16, H, W)."""
    return torch.stack([normal(shape, seed, "noise", index, example) for example in examples])


def conditioning(flux: Flux, t: Tensor, pooled: Tensor, guidance: float) -> Conditioning:
    """The model's inputs (t (B,), pooled text (B, D), guidance (B,)); guidance is None for models without it."""
    return t, pooled, torch.full_like(t, guidance) if flux.config.guidance_embed else None


def velocity(
    flux: Flux,
    x: Tensor,
    t: Tensor,
    txt: Tensor,
    pooled: Tensor,
    guidance: float,
    modulation: Sequence[Tensor] | None = None,
    txt_mask: Tensor | None = None,
) -> Tensor:
    """The model's velocity, fp32, at latents x (B, 16, H, W) and times t (B,). modulation and txt_mask: see Flux."""
    height, width = x.shape[2:]
    img_ids, txt_ids = image_ids(height // 2, width // 2, x.device), text_ids(txt.shape[1], x.device)
    conditions = conditioning(flux, t, pooled, guidance)
    return unpack(flux(pack(x), img_ids, txt, txt_ids, *conditions, modulation, txt_mask), height, width).float()


def flow_loss(
    flux: Flux,
    latents: Tensor,
    noise: Tensor,
    t: Tensor,
    txt: Tensor,
    pooled: Tensor,
    guidance: float,
    modulation: Sequence[Tensor] | None = None,
    txt_mask: Tensor | None = None,
    weights: Tensor | None = None,
    error: Callable[[Tensor, Tensor], Tensor] = lambda difference, t: difference.square(),
    predict: Callable[[Tensor, Tensor, Tensor], Tensor] = lambda v, x, t: v,
    further: Tensor | None = None,
) -> Tensor:
    """The mean error of the velocity for each example, (B,) fp32. latents, noise (B, 16, H, W); t (B,).

    weights: how much each latent's error counts, (B, 1, H, W) or a shape that broadcasts to it. error: of the
    difference (B, 16, H, W) between prediction and target at t; by default its square. predict: of velocity, x
    and t (B, 1, 1, 1), what is compared with the target. further: added to the noise that the model sees.
    """
    t = t.to(latents.device)
    mix = t[:, None, None, None]
    x = (1 - mix) * latents + mix * (noise if further is None else noise + further)
    target = noise - latents
    v = velocity(flux, x, t, txt, pooled, guidance, modulation, txt_mask)
    errors = error(predict(v, x, mix) - target, t)
    return (errors if weights is None else errors * weights.to(errors.device)).mean(dim=(1, 2, 3))


def euler_timesteps(steps: int, shift: float) -> list[float]:
    """The steps + 1 times from 1 down to 0, evenly spaced, then shifted by `shift`."""
    return shift_time(torch.linspace(1, 0, steps + 1, dtype=torch.float64), shift).tolist()


def euler(
    field: Callable[[Tensor, float], Tensor], x: Tensor, times: Sequence[float], tick: Callable[[], None] = lambda: None
) -> Tensor:
    """Integrate dx/dt = `field(x, t)` from `x` through `times` with Euler's method; returns the last x.

    `tick` is called after every step.
    """
    for t, t_next in zip(times, times[1:], strict=False):
        x = x + (t_next - t) * field(x, t)
        tick()
    return x


@torch.no_grad()
def validation_losses(flux: Flux, batches: Iterable[Batch], shift: float, guidance: float) -> Tensor:
    """Flow losses (VALIDATION_TIMES, images) at fixed times, evenly spaced, then shifted by `shift`; low noise first.

    Each image's noise depends only on its name, so its losses do not depend on how images are batched.
    """
    grid, losses = shift_time((torch.arange(VALIDATION_TIMES) + 0.5) / VALIDATION_TIMES, shift), []
    for batch in batches:
        count = len(batch.examples)
        noise = sample_noise(batch.latents.shape[1:], 0, -1, batch.examples)
        latents, noise, txt, pooled = (x.to(flux.device) for x in (batch.latents, noise, batch.txt, batch.pooled))
        at_times = [conditioning(flux, t.expand(count), batch.pooled, guidance) for t in grid]
        ahead = Lookahead(flux, at_times.__getitem__, count, VALIDATION_TIMES)
        given = flux, latents, noise
        more = batch.txt_mask, batch.weights
        rows = [
            flow_loss(*given, t, txt, pooled, guidance, ahead.rows(i), *more) for i, (t, _, _) in enumerate(at_times)
        ]
        losses.append(torch.stack(rows))
    return torch.cat(losses, dim=1).cpu()
