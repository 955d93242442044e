"""What waits for memory, steps of a block and weights changing form: against a clone() of the bytes it must move."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import Case, target
from benchmarks.kernel_cases.setting import Setting, twice_rule
from benchmarks.roofline import predicted_ms
from fluxq.bench.kernel_cases import comparable
from fluxq.bench.kernel_steps import STEPS, STORAGE, Sizes, Step
from fluxq.bench.timing import timed
from fluxq.kernels import Activations, NF4Weight, RowScaled, Wants, reference
from fluxq.kernels.rotation import rotate

SHAPES = ("mlp.0", "linear2")


def cases(setting: Setting) -> Iterator[Case]:
    for rows in setting.rows:
        sizes = Sizes(setting.device, rows, setting.width, setting.heads, setting.text, setting.rank)
        for name, make in STEPS.items():
            yield Case(f"steps: {name}, M {rows}", partial(measure_step, setting, partial(make, sizes)))
    sizes = Sizes(setting.device)
    for layer in SHAPES:
        for name, make in STORAGE.items():
            made = partial(make, sizes, *setting.layer(layer))
            yield Case(f"storage: {name}, {layer}", partial(measure_storage, setting, made))


def measure_step(s: Setting, make: Callable[[], Step]) -> dict[str, Any]:
    """Every output by the twice rule, against the reference in fp64."""
    step = make()
    double = {name: t.double() for name, t in step.inputs.items()}

    def run(on: ModuleType) -> Any:
        return step.run(on, on.padding(s.rank) if step.width and step.dtype is None else 0)

    outputs = run(s.ours)
    exact = in_full(step.call(reference, Wants(), double), step, double.get("down"))
    answers = (comparable(found, step.width or None) for found in (outputs, run(reference), exact))
    return row(s, run, step.moved(outputs), twice_rule(*answers))


def in_full(outputs: Any, step: Step, down: Tensor | None) -> Any:
    """Exact outputs beside 8-bit ones: the rows unrounded, rotated where those are; and their product with `down`."""
    if step.dtype is None or isinstance(outputs, Tensor):
        return outputs
    if isinstance(outputs, Activations):
        rows = outputs.x.flatten(0, -2)
        s = None if down is None else rows @ down.t()
        rows = rotate(rows, step.rotation) if step.rotation else rows
        return Activations(outputs.x, rows, rows.new_ones(len(rows)), s)
    return tuple(in_full(part, step, down) for part in outputs)


def measure_storage(s: Setting, make: Callable[[], Step]) -> dict[str, Any]:
    """The matrix before and after it changed its form; NF4's bytes are bitsandbytes', not only close to them."""
    step = make()
    ours, plain = step.run(s.ours), step.run(reference)
    found, theirs = (exact(NF4Weight(*o) if step.op == "nf4_quantize" else comparable(o)[0]) for o in (ours, plain))
    given = exact(next(iter(step.inputs.values())))
    given = rotate(given, step.rotation) if step.rotation else given
    checked = twice_rule([found], [theirs], [given if given.shape == found.shape else given.t()])
    if step.op == "nf4_quantize":
        checked["ok"] = checked["ok"] and all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))
    return row(s, step.run, step.moved(ours), checked)


def exact(weight: Any) -> Tensor:
    """The matrix in fp64: NF4's levels times their scales are exact there."""
    if isinstance(weight, Tensor):
        return weight.double()
    if isinstance(weight, RowScaled):
        return weight.values.double() * weight.scale.double()[:, None]
    levels = torch.tensor(reference.NF4_LEVELS, dtype=torch.float32, device=weight.codes.device).double()
    codes = torch.stack([weight.codes >> 4, weight.codes & 15], -1).flatten(1).long()
    return (levels[codes].view(-1, 64) * weight.absmax.double().view(-1, 1)).view(codes.shape)


def row(s: Setting, run: Callable[[ModuleType], Any], moved: int, checked: dict[str, Any]) -> dict[str, Any]:
    source = torch.empty(moved // 2, dtype=torch.uint8, device=s.device).random_()
    runs = {"ours": partial(run, s.ours), "clone": source.clone, "plain": partial(run, reference)}
    ms = timed(runs, s.device, s.seconds)
    return {
        **checked,
        "bytes": moved,
        "ms": ms,
        "predicted_ms": predicted_ms(s.ceilings, moved),
        "over_plain": ms["plain"]["median"] / ms["ours"]["median"],
        "targets": [target("share of a clone's speed", ">= 0.8", ms["clone"]["median"] / ms["ours"]["median"])],
    }
