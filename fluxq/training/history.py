"""This machine's last runs: how long a step took and how much memory it needed, so that a run which became slower or
bigger is noticed.

They are in runs.json in fluxq's cache folder, the last KEPT of each kind. Runs are of one kind if GPU, model,
resolution, rank, plan and whatever else decides a step's work are the same.
"""

from __future__ import annotations

import importlib.metadata
import json
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from statistics import median
from typing import Any

import torch
from filelock import FileLock, Timeout

from fluxq.config import TrainConfig
from fluxq.console import pace
from fluxq.errors import WrongRequest
from fluxq.formats.atomic import atomic_path
from fluxq.formats.checkpoint.files import MALFORMED
from fluxq.formats.quantized import cache_folder
from fluxq.memory.conditions import nvidia_smi
from fluxq.memory.placement import Placement, largest_batch
from fluxq.models.parts import Models

STEPS, WARMING = 50, 10
"""A run, or the part of it that a process made, has at least so many steps, else it is neither compared nor kept; the
first of them, which load kernels, do not count.
"""

KEPT, KINDS = 5, 200
WORSE = 1.2


def kind_of(config: TrainConfig, models: Models, placement: Placement) -> str:
    """What runs must share to be compared."""
    lora, training, on_gpu = config.lora, config.training, models.device.type == "cuda"
    policies = placement.policies
    names = ("ranks", "double_blocks", "single_blocks", "drops")
    variants = [f"{name} {value}" for name in names if (value := getattr(lora, name))]
    variants += [
        name for name, on in ((lora.init, lora.init != "plain"), ("ema", lora.ema), ("norm", lora.max_norm)) if on
    ]
    return json.dumps(
        {
            "on": torch.cuda.get_device_name(models.device) if on_gpu else f"CPU, {torch.get_num_threads()} threads",
            "model": "nano" if models.is_nano else models.variant,
            "format": [models.format, models.compute],
            "sizes": [*largest_batch(config, models), models.text_tokens, training.accumulate],
            "lora": [lora.rank, lora.targets, lora.text_encoder, training.optimizer, *variants],
            "passes": 1 if training.preserve_class is None else 3,
            "resident": placement.resident and len(placement.resident),
            "plan": [placement.slots, policies if isinstance(policies, str) else list(policies), placement.offload],
        },
        default=str,
    )


def summary(records: Sequence[Mapping]) -> dict[str, Any] | None:
    """What is kept of the steps in `records`; None if they are too few."""
    if len(records) < STEPS:
        return None
    peaks = [r["peak_bytes"] for r in records if r.get("peak_bytes")]
    return {
        "seconds": median(r["seconds"] for r in records[WARMING:]),
        "peak_bytes": max(peaks, default=None),
        "date": time.strftime("%Y-%m-%d"),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    found = {}
    for package in ("fluxq", "torch", "triton"):
        with suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    if torch.cuda.is_available() and (driver := nvidia_smi(["driver_version"])):
        found["driver"] = driver[0]
    return found


def compared(now: Mapping[str, Any], before: Sequence[Mapping[str, Any]]) -> str | None:
    """The line about a run that is WORSE than the median of those `before` it; None if it is not."""
    found = []
    for key, worse, shown in (("seconds", "slower", pace), ("peak_bytes", "bigger", _gib)):
        values = [run[key] for run in before if run.get(key)]
        if values and now[key] and now[key] > WORSE * (usual := median(values)):
            found.append(f"{now[key] / usual - 1:.0%} {worse} ({shown(now[key])}, not {shown(usual)})")
    if not found:
        return None
    last = before[-1]
    names = sorted({*now["versions"], *last["versions"]})
    old, new = ({name: each["versions"].get(name, "none") for name in names} for each in (last, now))
    changed = [f"{name} {old[name]} -> {new[name]}" for name in names if old[name] != new[name]]
    of = (
        f"the median of this machine's last {len(before)} like it" if len(before) > 1 else "this machine's last like it"
    )
    since = (
        f"since {last['date']}: {', '.join(changed)}" if changed else f"{', '.join(names)} are those of {last['date']}"
    )
    return f"this run is {' and '.join(found)} than {of}; {since}"


def _gib(nbytes: float) -> str:
    return f"{nbytes / 2**30:.1f} GiB"


class History:
    """The last runs of one kind."""

    def __init__(self, kind: str) -> None:
        self.kind, self.path = kind, cache_folder() / "runs.json"

    def runs(self) -> list[dict[str, Any]]:
        """The oldest first."""
        return self._read().get(self.kind, [])

    def add(self, run: Mapping[str, Any]) -> None:
        """Keep `run`. If that is not possible, nothing happens: it is only for a later run's comparison."""
        with suppress(OSError, WrongRequest, Timeout, NotImplementedError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{self.path}.lock", timeout=5), atomic_path(self.path) as temporary:
                kinds = self._read()
                runs = [*kinds.pop(self.kind, []), dict(run)][-KEPT:]
                latest = dict(list(kinds.items())[-(KINDS - 1) :]) | {self.kind: runs}
                temporary.write_text(json.dumps(latest, indent=1) + "\n", encoding="utf-8")

    def _read(self) -> dict[str, list[dict[str, Any]]]:
        """Everything in the file that is as it should be: it may be damaged, or of another version."""
        with suppress(OSError, *MALFORMED):
            found = json.loads(self.path.read_text(encoding="utf-8"))
            kinds = found.items() if isinstance(found, dict) else ()
            return {
                kind: kept for kind, runs in kinds if isinstance(runs, list) and (kept := list(filter(_sound, runs)))
            }
        return {}


def _sound(run: Any) -> bool:
    """Whether `run` can be compared, and printed."""
    with suppress(*MALFORMED):
        numbers = run["seconds"], run["peak_bytes"] or 0
        texts = [run["date"], *run["versions"], *run["versions"].values()]
        return all(type(n) in (int, float) and 0 <= n < 1e30 for n in numbers) and all(
            type(text) is str and text.isprintable() and len(text) < 100 for text in texts
        )
    return False
