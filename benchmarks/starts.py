"""How many steps LoRA's variants need to the held-out loss that plain LoRA ends with: the toy model, five seeds each.

    python3 -m benchmarks.starts --work DIR [--seconds 540] [--out benchmarks/results]

Every run is the same but for its variant and its seed, which draws noise, noise levels, the order of images and the
LoRA. The loss is that of images of the creature which are not trained on, at fixed noise, every EVERY steps. Some of
the variants make larger steps at the same learning rate, so plain LoRA is also run at three times that; LoRA+, whose
authors advise a lower one, at a quarter.
starts.json has every loss. Runs that it has already are not repeated, and after --seconds no further run is started.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.measure import about, write
from fluxq.caching.batches import held_out_batches
from fluxq.config_files import config_from_dict
from fluxq.console import silent
from fluxq.memory.placement import place
from fluxq.memory.retry import OutOfMemoryRetry
from fluxq.models import Models
from fluxq.nano import drawing
from fluxq.train import load_data, load_trainable
from fluxq.training.defaults import resolve
from fluxq.training.initial import prepare
from fluxq.training.objective import Objective
from fluxq.training.optim import optimizer_step
from fluxq.training.run import Run

STEPS, EVERY, RANK, BATCH, HELD_OUT, RATE = 150, 10, 16, 2, 4, 1e-3
SEEDS = range(5)
PLUS = 16  # LoRA+: the learning rate of `up` over that of `down`, as its authors advise
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "LoftQ": {"init": "loftq"},
    "LoRA-GA": {"init": "lora_ga"},
    "LoRA+": {"plus_ratio": PLUS},
    "rsLoRA": {"rank_stabilized": True},
    "plain, 3 x learning rate": {"rate": 3 * RATE},
    "LoRA+, learning rate / 4": {"plus_ratio": PLUS, "rate": RATE / 4},
}


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--work", type=Path, required=True, help="folder for images and their cache")
    made.add_argument("--seconds", type=float, default=math.inf)
    made.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    arguments = made.parse_args()
    until, path = time.monotonic() + arguments.seconds, arguments.out / "starts.json"
    settings = {"steps": STEPS, "every": EVERY, "rank": RANK, "batch": BATCH, "learning_rate": RATE, "format": "nf4"}
    report = json.loads(path.read_text()) if path.exists() else {"settings": settings, "runs": {}}
    if report["settings"] != settings:
        raise SystemExit(f"{path} is of other settings; move it away")
    draw(arguments.work)
    for seed in SEEDS:
        for name in VARIANTS:
            key = f"{name}, seed {seed}"
            if key not in report["runs"] and time.monotonic() < until:
                report["runs"][key] = one_run(arguments.work, VARIANTS[name], seed)
                write(path, {"about": about(torch.device("cpu")), **report})
                print(key, report["runs"][key]["validation"][-1], flush=True)
    print(table(report["runs"]))


def draw(work: Path) -> None:
    """The images of a run, and those that are held out, in folders of `work`."""
    for name, images in (
        ("images", drawing.concept(seed=1, count=24)),
        ("held_out", drawing.concept(seed=2, count=HELD_OUT, held_out=True)),
    ):
        (work / name).mkdir(parents=True, exist_ok=True)
        for i, (image, caption) in enumerate(images):
            image.save(work / name / f"{i:02}.png")
            (work / name / f"{i:02}.txt").write_text(caption)


def one_run(work: Path, variant: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """The held-out loss at the start and every EVERY steps, and what the start took."""
    lora = {key: value for key, value in variant.items() if key != "rate"}
    values = {
        "model": {"name": "nano", "format": "nf4"},
        "data": {"folders": [str(work / "images")], "validation": [str(work / "held_out")], "cache": work / "cache"},
        "lora": {"rank": RANK, **lora},
        "training": {
            "steps": STEPS,
            "batch": BATCH,
            "learning_rate": variant.get("rate", RATE),
            "optimizer": "adamw",
            "seed": seed,
        },
        "output": {"out": work / "run"},
    }
    config = config_from_dict(json.loads(json.dumps(values, default=str)), "this study")
    models = Models(config.model, notify=silent)
    config, scanned = resolve(config, models, silent)
    data, placement = load_data(Run(config), models, scanned, silent), place(config, models, silent)
    trainable = load_trainable(config, models, placement, None, silent)
    objective = Objective(trainable.flux, data.batches, config.training)
    retry = OutOfMemoryRetry(placement, models, trainable.flux, trainable.ahead, silent)
    held_out = [batch for some in data.sets.held_out.values() for batch in held_out_batches(some, data.store, HELD_OUT)]
    began = time.process_time()
    prepare(config, models, objective, retry, trainable.layers, silent)
    result: dict[str, Any] = {"start_cpu_seconds": round(time.process_time() - began, 2)}
    losses = [float(objective.validation(held_out).mean())]
    for step in range(STEPS):
        optimizer_step(trainable.optimizer, objective, step, 1, 1.0, config.training.clip)
        if (step + 1) % EVERY == 0:
            losses.append(float(objective.validation(held_out).mean()))
    return {**result, "validation": [round(loss, 5) for loss in losses]}


def steps_to(losses: Sequence[float], target: float) -> float:
    """The step at which `losses`, one every EVERY steps, first reach `target`, between two of them in proportion."""
    for i, (before, after) in enumerate(zip(losses, losses[1:], strict=False)):
        if after <= target:
            return EVERY * (i + (before - target) / (before - after) if before > after else i + 1)
    return math.inf


def table(runs: Mapping[str, Mapping[str, Any]]) -> str:
    """A row for each variant: medians and ranges over the seeds that all variants have."""
    seeds = [s for s in SEEDS if all(f"{name}, seed {s}" in runs for name in VARIANTS)]
    rows = [
        f"| variant | steps to plain's loss after {STEPS} | final loss | loss at the start | CPU seconds to start |",
        "|---|---|---|---|---|",
    ]
    for name in VARIANTS if seeds else ():
        both = [(runs[f"{name}, seed {s}"], runs[f"plain, seed {s}"]) for s in seeds]
        needed = [steps_to(own["validation"], plain["validation"][-1]) for own, plain in both]
        columns = needed, [o["validation"][-1] for o, _ in both], [o["validation"][0] for o, _ in both]
        seconds = median(o["start_cpu_seconds"] for o, _ in both)
        cells = (spread(columns[0], ".0f"), spread(columns[1], ".4f"), spread(columns[2], ".4f"), f"{seconds:.1f}")
        rows.append(f"| {' | '.join((name, *cells))} |")
    return "\n".join(rows)


def spread(values: Sequence[float], form: str) -> str:
    """Median, and in brackets the smallest and the largest."""
    shown = [format(v, form) if math.isfinite(v) else "never" for v in (median(values), min(values), max(values))]
    return f"{shown[0]} ({shown[1]} to {shown[2]})"


if __name__ == "__main__":
    main()
