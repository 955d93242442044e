"""Requests: one for each image to sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fluxq.config import SamplesConfig
from fluxq.data.buckets import multiple_of_16


@dataclass(frozen=True)
class Request:
    """One image to sample. With the model and the LoRAs, these fields determine it.

    guidance: FLUX.1-dev's input. cfg: true classifier-free guidance; above 1 it adds a pass with the `negative` prompt.
    """

    prompt: str
    seed: int
    width: int
    height: int
    steps: int = 20
    guidance: float = 3.5
    cfg: float = 1.0
    negative: str = ""

    def describe(self) -> str:
        """The settings in the form that UIs and image viewers read from a PNG's `parameters`."""
        negative = f"\nNegative prompt: {self.negative}" if self.cfg > 1 and self.negative else ""
        return (
            f"{self.prompt}{negative}\nSteps: {self.steps}, Sampler: Euler, CFG scale: {self.cfg:g}, "
            f"Distilled CFG Scale: {self.guidance:g}, Seed: {self.seed}, Size: {self.width}x{self.height}"
        )


def requests_for(samples: SamplesConfig, prompts: Sequence[str], resolution: int) -> list[Request]:
    """One request per prompt, each with its own seed. `resolution`: the width or height that `samples` leaves unset."""
    width = multiple_of_16("width", samples.width or resolution)
    height = multiple_of_16("height", samples.height or resolution)
    settings = (samples.steps, samples.guidance, samples.cfg, samples.negative)
    return [Request(prompt, samples.seed + i, width, height, *settings) for i, prompt in enumerate(prompts)]
