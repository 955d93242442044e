"""`fluxq demo`: teach the bundled toy model a creature that it has never seen, through the same code as any other run.

Two dozen images of the creature, captioned with its trigger, are mixed with ordinary images, so that ordinary captions
keep their meaning. Held-out images of both kinds, in colors that training never combines, measure what was learned and
what was kept.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from PIL import Image

from fluxq.caching.folders import cache_texts
from fluxq.config import TrainConfig
from fluxq.config_files import config_from_dict
from fluxq.console import console, progress_bar
from fluxq.errors import WrongRequest
from fluxq.formats.lora.read import load_lora
from fluxq.model.lora import lora_strength
from fluxq.models.parts import Models
from fluxq.nano import drawing
from fluxq.sampling.decoding import sample_images
from fluxq.sampling.denoising import attach_loras
from fluxq.sampling.requests import Request
from fluxq.sampling.sheets import labeled_grid, save_image
from fluxq.train import train
from fluxq.training.run import Result

TRIGGER = drawing.TRIGGER
PROMPTS = (
    f"a large red {TRIGGER} in the centre on a white background",
    f"a large yellow {TRIGGER} at the top on a blue background",
    f"a large green {TRIGGER} on the left on a pink background",
    "a large red circle in the centre on a white background",
    "a large yellow star at the top on a blue background",
    "a large green heart on the left on a pink background",
)
SEEDS = (1, 2)


@dataclass(frozen=True)
class Demo:
    """The results of the demo. Losses are of held-out images; changes are after / before - 1."""

    lora: str
    loss_plot: str
    grid: str
    seconds: float
    concept_before: float
    concept_after: float
    concept_change: float
    ordinary_before: float
    ordinary_after: float
    ordinary_change: float


def demo(out: Path, format: str = "nf4", compute: str = "bf16") -> Demo:
    """Run the demo in `out`, replacing an earlier demo there. Raises WrongRequest if `out` has anything else in it."""
    made_by_demo = any((out / name / "creature").is_dir() for name in ("images", "pictures"))  # the latter formerly
    if out.is_dir() and any(out.iterdir()) and not made_by_demo:
        raise WrongRequest(f"{out} is not empty and not an earlier demo; choose another folder with --out")
    if out.exists():
        shutil.rmtree(out)
    config = demo_config(out, format, compute)
    with one_core_spared():
        draw_images(out / "images")
        result = train(config, overwrite=True)
        grid = before_and_after(config, Path(result.lora), out / "before_after.png")
    return _summary(result, out, grid)


@contextmanager
def one_core_spared() -> Iterator[None]:
    """Inside, torch computes with at least one thread fewer than there are CPUs. Nano's products are so small that a
    thread whose CPU has gone to another program holds up all others: two threads on two CPUs took 3 to 30 times as long
    as one.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, min(before, (os.cpu_count() or 1) - 1)))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def demo_config(out: Path, format: str, compute: str) -> TrainConfig:
    """The settings of the demo, as for `fluxq train`."""
    folder = out.absolute() / "images"
    return config_from_dict(
        {
            "model": {"name": "nano", "format": format, "compute": compute},
            "data": {
                "folders": [
                    {"path": str(folder / "creature"), "trigger": TRIGGER, "repeats": 4},
                    {"path": str(folder / "ordinary")},
                ],
                "validation": [str(folder / "creature_held_out"), str(folder / "ordinary_held_out")],
                "cache": str(out / "cache"),
            },
            "lora": {"rank": 32},
            "training": {"steps": 400, "batch": 8, "learning_rate": 1e-3, "schedule": "cosine", "seed": 1},
            "output": {"out": str(out), "name": "demo", "save_every": 100},
        },
        "the demo",
    )


def draw_images(folder: Path) -> None:
    """Write the four folders of captioned images."""
    sets = {
        "creature": drawing.concept(seed=1, count=24),
        "ordinary": drawing.ordinary(seed=1, count=256),
        "creature_held_out": drawing.concept(seed=2, count=24, held_out=True),
        "ordinary_held_out": drawing.ordinary(seed=2, count=24, held_out=True),
    }
    for name, captioned in sets.items():
        (folder / name).mkdir(parents=True)
        for i, (image, caption) in enumerate(captioned):
            image.save(folder / name / f"{i:02}.png")
            (folder / name / f"{i:02}.txt").write_text(caption + "\n", encoding="utf-8")


def before_and_after(config: TrainConfig, lora: Path, path: Path) -> Path:
    """A labeled sheet of images: a row per prompt; columns without and with the LoRA, two seeds each."""
    models = Models(config.model)
    flux = models.load_flux()
    adapters = load_lora(lora, flux.config).adapters
    attach_loras(flux, [(adapters, 1.0)])
    side = models.default_resolution[0]
    requests = [Request(prompt, seed, side, side) for prompt in PROMPTS for seed in SEEDS]
    images: dict[str, list[Image.Image]] = {}
    with progress_bar() as progress:
        texts = cache_texts(config.data.cache, models, PROMPTS, progress)
        for name, strength in (("before", 0.0), ("after", 1.0)):
            with lora_strength(flux, strength):
                images[name] = sample_images(flux, models.load_autoencoder, texts, requests, partial(progress, name))
    rows = [
        [images[name][r * len(SEEDS) + s] for name in images for s in range(len(SEEDS))] for r in range(len(PROMPTS))
    ]
    columns = [f"{name}, seed {seed}" for name in images for seed in SEEDS]
    save_image(labeled_grid(rows, PROMPTS, columns), path)
    return path


def _summary(result: Result, out: Path, grid: Path) -> Demo:
    assert result.validation_before and result.validation_after, "the demo has held-out folders"
    concept, ordinary = (
        [v[f"{name}_held_out"] for v in (result.validation_before, result.validation_after)]
        for name in ("creature", "ordinary")
    )
    summary = Demo(
        lora=result.lora,
        loss_plot=str(out / "loss.png"),
        grid=str(grid),
        seconds=result.seconds,
        concept_before=concept[0],
        concept_after=concept[1],
        concept_change=concept[1] / concept[0] - 1,
        ordinary_before=ordinary[0],
        ordinary_after=ordinary[1],
        ordinary_change=ordinary[1] / ordinary[0] - 1,
    )
    console.print(
        "",
        f"held-out loss of the creature    {concept[0]:.4f} -> {concept[1]:.4f}  ({summary.concept_change:+.1%})",
        f"held-out loss of ordinary shapes {ordinary[0]:.4f} -> {ordinary[1]:.4f}  ({summary.ordinary_change:+.1%})",
        f"LoRA       {summary.lora}",
        f"loss plot  {summary.loss_plot}",
        f"before and after  {summary.grid}",
        sep="\n",
    )
    return summary
