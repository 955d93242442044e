"""Requests to latents: Euler steps from noise, several images of one shape at once.

The noise of an image depends only on its seed, so an image does not depend on the others in its batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby

import torch
from torch import Tensor, nn

from fluxq.caching.batches import joined
from fluxq.caching.store import Text
from fluxq.data.randomness import normal
from fluxq.flow import conditioning, euler, euler_timesteps, resolution_shift, velocity
from fluxq.formats.lora import Lora
from fluxq.formats.lora.algebra import Adapter, combined
from fluxq.memory.phases import TOKENS_PER_BATCH
from fluxq.model.clip import Clip
from fluxq.model.flux import Flux
from fluxq.model.lora import set_lora
from fluxq.model.modulation import Lookahead

from .requests import Request

Texts = Mapping[str, Text]
"""Prompt -> its embeddings."""

Loras = Sequence[tuple[Lora, float]]
"""LoRAs to apply together, each with its strength."""


@torch.no_grad()
def denoise(
    flux: Flux,
    texts: Texts,
    requests: Sequence[Request],
    progress: Callable[[int, int], None] = lambda done, total: None,
    tokens: int = TOKENS_PER_BATCH,
) -> list[Tensor]:
    """The latents (16, H/8, W/8) of `requests`, in order, in CPU memory.

    texts: every prompt and negative prompt. progress: called with (steps done, all steps) after each step. tokens: the
    most that go through the transformer at once, except that one image always does.
    """
    latents: dict[int, Tensor] = {}
    total, done = sum(request.steps for request in requests), 0

    def count(steps: int) -> None:
        nonlocal done
        done += steps
        progress(done, total)

    for members in _batches(requests, texts, tokens):
        batch = _denoise_batch(flux, texts, [requests[i] for i in members], partial(count, len(members)))
        latents |= zip(members, batch.cpu(), strict=True)
    return [latents[i] for i in range(len(requests))]


def _batches(requests: Sequence[Request], texts: Texts, most_tokens: int) -> Iterator[list[int]]:
    """The indices of requests that are denoised together."""

    def shape(i: int) -> tuple:
        request = requests[i]
        return (request.width, request.height, request.steps, request.guidance, request.cfg)

    for _, group in groupby(sorted(range(len(requests)), key=shape), key=shape):
        members = list(group)
        first = requests[members[0]]
        text = max(len(texts[requests[i].prompt].t5) for i in members)
        tokens = first.width // 16 * (first.height // 16) + text
        size = max(1, most_tokens // tokens)
        yield from (members[start : start + size] for start in range(0, len(members), size))


def _denoise_batch(flux: Flux, texts: Texts, requests: Sequence[Request], tick: Callable[[], None]) -> Tensor:
    """Latents (B, 16, H/8, W/8) of requests with the same settings. `tick` is called after every step."""
    first, device = requests[0], flux.device
    h, w = first.height // 8, first.width // 8
    times = euler_timesteps(first.steps, resolution_shift(h * w // 4) if flux.config.guidance_embed else 1.0)

    def velocity_of(prompts: Sequence[str]) -> Callable[[Tensor, float], Tensor]:
        """(x, t) -> the velocity toward images of `prompts`."""
        txt, pooled, mask = joined([texts[prompt] for prompt in prompts])
        txt, pooled = txt.to(device), pooled.to(device)
        conditions = [
            conditioning(flux, torch.full((len(requests),), t, device=device), pooled, first.guidance) for t in times
        ]
        lookahead = Lookahead(flux, conditions.__getitem__, len(requests), first.steps)

        def field(x: Tensor, t: float) -> Tensor:
            step = times.index(t)
            return velocity(flux, x, conditions[step][0], txt, pooled, first.guidance, lookahead.rows(step), mask)

        return field

    positive = velocity_of([request.prompt for request in requests])
    negative = velocity_of([request.negative for request in requests]) if first.cfg > 1 else None

    def guided(x: Tensor, t: float) -> Tensor:
        v = positive(x, t)
        if negative is None:
            return v
        v_negative = negative(x, t)
        return v_negative + first.cfg * (v - v_negative)

    noise = torch.stack([normal((16, h, w), request.seed, "sample") for request in requests]).to(device)
    return euler(guided, noise, times, tick)


def attach_loras(model: nn.Module, loras: Sequence[tuple[Mapping[str, Adapter], float]]) -> None:
    """Give `model` the sum of these LoRAs, each at its strength, in place of any LoRA it has."""
    set_lora(model, {path: (a.down, a.up, a.scale) for path, a in combined(loras).items()})


@torch.no_grad()
def encode_pooled(clip: Clip, texts: Texts) -> Texts:
    """`texts` with new pooled vectors from `clip`."""
    return {prompt: replace(text, clip=clip.pooled([prompt])[0].cpu()) for prompt, text in texts.items()}
