"""Memory-bound ops, the steps of a block and weights changing form: against a clone() of the bytes they must move."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from benchmarks.cases import Case, target
from benchmarks.kernel_rows.setting import BenchSetup
from benchmarks.roofline import predicted_ms
from fluxq.bench.kernel_cases import layer_shape, step_case
from fluxq.bench.memory_bound import STEPS, STORAGE, Step
from fluxq.bench.timing import timed

SHAPES = ("mlp.0", "linear2")


def cases(setting: BenchSetup) -> Iterator[Case]:
    for rows in setting.rows:
        for name, make in STEPS.items():
            yield Case(f"steps: {name}, M {rows}", partial(measure, setting, partial(make, setting.at(rows))))
    for layer in SHAPES:
        for name, make in STORAGE.items():
            made = partial(make, setting.sizes, *layer_shape(setting.sizes, layer))
            yield Case(f"storage: {name}, {layer}", partial(measure, setting, made))


def measure(s: BenchSetup, make: Callable[[], Step]) -> dict[str, Any]:
    case = step_case(make())
    checked = case.check()
    ms = timed({"ours": case.run, "clone": case.against, "plain": case.plain}, s.device, s.seconds)
    return {
        **checked,
        "bytes": case.moved,
        "ms": ms,
        "predicted_ms": predicted_ms(s.ceilings, case.moved),
        "over_plain": ms["plain"]["median"] / ms["ours"]["median"],
        "targets": [target("share of a clone's speed", ">= 0.8", ms["clone"]["median"] / ms["ours"]["median"])],
    }
