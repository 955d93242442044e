"""`--preset person | style | product | concept`: settings for what a LoRA teaches, with the reason for each.

A preset has defaults of its own: what the user sets wins over it, and it wins over fluxq's defaults. Its numbers are
starting points from other trainers' examples and from guides (docs/presets.md names them), not measurements.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from fluxq.config import PRESET_NAMES, TrainConfig, TrainingConfig

LEARNING_RATE = 1e-4
LEARNING_RATE_REASON = (
    "ai-toolkit's example for FLUX.1 has it; by SimpleTuner's guide 1e-3 ruins a LoRA and 1e-5 does next to nothing"
)
STRENGTH = 0.8


@dataclass(frozen=True)
class Choice:
    """A setting, like "lora.rank", with its value in a preset and the reason."""

    key: str
    value: Any
    reason: str


@dataclass(frozen=True)
class Preset:
    """teaches: examples of what it is for. images: how many guides advise, from and to; None: no advice, no limit.

    seen: how many images training sees in total, for the reason `why`. choices: what else it sets.
    """

    teaches: str
    images: tuple[int, int | None] | None
    seen: int
    why: str
    choices: tuple[Choice, ...]


def _choices(resolution: tuple, dropout: tuple, rank: tuple, timesteps: tuple) -> tuple[Choice, ...]:
    """Each argument: a value and its reason."""
    keys = ("data.resolution", "data.caption_dropout", "lora.rank", "training.timesteps")
    pairs = zip(keys, (resolution, dropout, rank, timesteps), strict=True)
    return tuple(Choice(key, *about) for key, about in pairs)


PRESETS = {
    "person": Preset(
        "a person, an animal or a character",
        (10, 30),
        1500,
        "guides see a likeness converge at about 1,500",
        _choices(
            (768, "a face is a small part of most photos and has few pixels below that"),
            (0, "the person should come with the trigger, not without it"),
            (16, "ai-toolkit's example for FLUX.1 has it, and a likeness needs no more"),
            ("shift", "the shape of a face is decided at high noise, where ai-toolkit's `content` trains too"),
        ),
    ),
    "style": Preset(
        "a way of painting, drawing or photographing",
        (50, None),
        3000,
        "60 times each of 50 images; ai-toolkit calls 500 to 4,000 a good range",
        _choices(
            (768, "texture is a part of a style; 1024 shows more of it, but is slower"),
            (0.1, "a style should also come with captions that do not describe it; 0.05 to 0.1 is usual"),
            (32, "a style touches all of an image, so it usually gets more than the 16 of a likeness"),
            ("sigmoid", "texture and color are decided at lower noise, where ai-toolkit's `style` trains too"),
        ),
    ),
    "product": Preset(
        "a thing that has to look exactly so: a bottle, a shoe, a car",
        (10, 30),
        1500,
        "guides see a product converge at about 1,500",
        _choices(
            (1024, "labels, seams and edges need pixels"),
            (0, "the product should come with the trigger, not without it"),
            (16, "ai-toolkit's example for FLUX.1 has it, and one thing needs no more"),
            ("sigmoid", "labels and surfaces are decided at lower noise than shift trains at"),
        ),
    ),
    "concept": Preset(
        "a pose, an action, a garment, a kind of scene",
        None,
        2000,
        "ai-toolkit's example for FLUX.1 has it",
        _choices(
            (512, "layout needs few pixels, and small images train fastest"),
            (0.05, "ai-toolkit's example for FLUX.1 has it"),
            (32, "a concept has many forms, so it usually gets more than the 16 of a likeness"),
            ("shift", "layout is decided at high noise, where ai-toolkit's `content` trains too"),
        ),
    ),
}
assert tuple(PRESETS) == PRESET_NAMES


def preset_of(training: TrainingConfig) -> Preset | None:
    return None if training.preset is None else PRESETS[training.preset]


def fill(values: dict[str, Any]) -> None:
    """Put into a config's tables what their preset sets and they do not.

    Steps and learning rate are not among it: they depend on images and optimizer (defaults.py). Nano keeps its own
    resolution, and a LoRA to start from its own rank. Timesteps are left alone if one of their settings would lose its
    effect.
    """
    from .timesteps import USED_BY  # torch is not needed without a preset

    training, model, lora = (values.get(name, {}) for name in ("training", "model", "lora"))
    if (preset := PRESETS.get(training.get("preset"))) is None:
        return  # none, or one that does not exist, which reading the values will refuse
    kept = {
        "data.resolution": model.get("name") == "nano",
        "lora.rank": bool(lora.get("from_lora")),
    }
    for choice in preset.choices:
        section, name = choice.key.split(".")
        if name == "timesteps" and any(key in training and choice.value not in USED_BY[key] for key in USED_BY):
            continue
        if not kept.get(choice.key):
            values.setdefault(section, {}).setdefault(name, choice.value)


def lines(config: TrainConfig, images: int) -> Iterator[str]:
    """What is as the preset of `config` has it, and why; then what guides advise, for a run on so many `images`."""
    if (preset := preset_of(config.training)) is None:
        return
    for choice in preset.choices:
        section, name = choice.key.split(".")
        own, called = getattr(getattr(config, section), name), name.replace("_", " ")
        if own == choice.value:
            yield f"{called} {choice.value}: {choice.reason}"
        elif own is not None:
            yield f"{called} {own}: set elsewhere, in place of the {choice.value} of preset {config.training.preset}"
    advice = ""
    if preset.images is not None:
        least, most = preset.images
        advice = f"guides advise {least} {f'to {most}' if most else 'or more'} images, this run has {images:,}; "
    yield f"preset {config.training.preset}: {advice}try the LoRA at a strength of about {STRENGTH}"
