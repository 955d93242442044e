"""The memory-bound steps of a block, forward and backward: against a clone() of the bytes that they must move."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import Case, target
from benchmarks.kernel_cases.setting import Setting, comparable, nbytes, tensors, twice_rule
from benchmarks.roofline import predicted_ms
from fluxq.kernels import Activations, Wants, reference
from fluxq.timing import timed


@dataclass(frozen=True)
class Step:
    """One op on fixed inputs: `run(ops, wants, inputs)`. `width`: that of its Activations, without room.

    `feeds`: the op gives a linear layer its input, so that what the layer wants is part of the case.
    """

    inputs: dict[str, Tensor]
    run: Callable[[ModuleType, Wants, dict[str, Tensor]], Any]
    width: int = 0
    feeds: bool = False


def modulate(s: Setting, rows: int) -> Step:
    given = {"x": s.randn(1, rows, s.width), "shift": s.randn(1, 1, s.width), "scale": s.randn(1, 1, s.width)}
    return Step(given, lambda ops, wants, i: ops.modulate(i["x"], i["shift"], i["scale"], wants), s.width, True)


def modulate_backward(s: Setting, rows: int) -> Step:
    given = {"dy": s.randn(1, rows, s.width), "x": s.randn(1, rows, s.width), "scale": s.randn(1, 1, s.width)}
    return Step(given, lambda ops, _, i: ops.modulate_backward(i["dy"], i["x"], i["scale"], False))


def gated_add(s: Setting, rows: int) -> Step:
    given = {"residual": s.randn(1, rows, s.width), "gate": s.randn(1, 1, s.width), "y": s.randn(1, rows, s.width)}
    return Step(given, lambda ops, _, i: ops.gated_add(i["residual"], i["gate"], i["y"]))


def gated_add_backward(s: Setting, rows: int) -> Step:
    given = {"dout": s.randn(1, rows, s.width), "gate": s.randn(1, 1, s.width)}
    return Step(given, lambda ops, _, i: ops.gated_add_backward(i["dout"], i["gate"], None))


def gated_add_modulate(s: Setting, rows: int) -> Step:
    given = {"residual": s.randn(1, rows, s.width), "y": s.randn(1, rows, s.width)}
    given |= {name: s.randn(1, 1, s.width) for name in ("gate", "shift", "scale")}

    def run(ops: ModuleType, wants: Wants, i: dict[str, Tensor]) -> Any:
        return ops.gated_add_modulate(i["residual"], i["gate"], i["y"], i["shift"], i["scale"], wants)

    return Step(given, run, s.width, True)


def gated_add_modulate_backward(s: Setting, rows: int) -> Step:
    given = {name: s.randn(1, rows, s.width) for name in ("dx", "dy", "x")}
    given |= {name: s.randn(1, 1, s.width) for name in ("gate", "scale")}

    def run(ops: ModuleType, _: Wants, i: dict[str, Tensor]) -> Any:
        return ops.gated_add_modulate_backward(i["dx"], i["dy"], i["x"], i["gate"], None, i["scale"], False)

    return Step(given, run)


def lengths(s: Setting, rows: int, streams: int) -> list[int]:
    return [rows] if streams == 1 else [s.text, rows - s.text]


def qk_inputs(s: Setting, rows: int, streams: int) -> dict[str, Tensor]:
    """qkv and norm scales of each stream, and the joint angles."""
    head = s.width // s.heads
    angles = torch.rand(1, 1, rows, head // 2, device=s.device) * 6
    given = {"cos": angles.cos(), "sin": angles.sin()}
    for i, length in enumerate(lengths(s, rows, streams)):
        given[f"qkv{i}"] = s.randn(1, length, 3 * s.width)
        given |= {f"q_scale{i}": 1 + s.randn(head, std=0.1), f"k_scale{i}": 1 + s.randn(head, std=0.1)}
    return given


def qk_norm_rope(s: Setting, rows: int, streams: int) -> Step:
    def run(ops: ModuleType, _: Wants, i: dict[str, Tensor]) -> Any:
        joined = [(i[f"qkv{n}"], i[f"q_scale{n}"], i[f"k_scale{n}"]) for n in range(streams)]
        return ops.qk_norm_rope(joined, i["cos"], i["sin"])

    return Step(qk_inputs(s, rows, streams), run)


def qk_norm_rope_backward(s: Setting, rows: int, streams: int) -> Step:
    made = qk_norm_rope(s, rows, streams)
    q, k, _, rstd = made.run(reference, Wants(), made.inputs)
    given = {name: t for name, t in made.inputs.items() if not name.startswith("qkv")}
    given |= {"q": q, "k": k, "rstd": rstd} | {
        f"d{n}": s.randn(*q.transpose(1, 2).shape).transpose(1, 2) for n in "qkv"
    }

    def run(ops: ModuleType, _: Wants, i: dict[str, Tensor]) -> Any:
        scales = [(i[f"q_scale{n}"], i[f"k_scale{n}"]) for n in range(streams)]
        grads, kept = (i["dq"], i["dk"], i["dv"]), (i["q"], i["k"], i["rstd"])
        return ops.qk_norm_rope_backward(*grads, *kept, scales, lengths(s, rows, streams), i["cos"], i["sin"], None)

    return Step(given, run)


def gelu_tanh(s: Setting, rows: int, beside: bool) -> Step:
    given = {"h": s.randn(1, rows, 4 * s.width)} | ({"beside": s.randn(1, rows, s.width)} if beside else {})
    width = (5 if beside else 4) * s.width
    return Step(given, lambda ops, wants, i: ops.gelu_tanh(i["h"], i.get("beside"), wants), width, True)


def gelu_tanh_backward(s: Setting, rows: int) -> Step:
    given = {"dy": s.randn(1, rows, 4 * s.width), "h": s.randn(1, rows, 4 * s.width)}
    return Step(given, lambda ops, _, i: ops.gelu_tanh_backward(i["dy"], i["h"]))


STEPS: dict[str, Callable[[Setting, int], Step]] = {
    "modulate": modulate,
    "modulate_backward": modulate_backward,
    "gated_add": gated_add,
    "gated_add_backward": gated_add_backward,
    "gated_add_modulate": gated_add_modulate,
    "gated_add_modulate_backward": gated_add_modulate_backward,
    "qk_norm_rope, one stream": partial(qk_norm_rope, streams=1),
    "qk_norm_rope, two streams": partial(qk_norm_rope, streams=2),
    "qk_norm_rope_backward, one stream": partial(qk_norm_rope_backward, streams=1),
    "qk_norm_rope_backward, two streams": partial(qk_norm_rope_backward, streams=2),
    "gelu_tanh": partial(gelu_tanh, beside=False),
    "gelu_tanh, attention beside": partial(gelu_tanh, beside=True),
    "gelu_tanh_backward": gelu_tanh_backward,
}
FEEDING = [name for name in STEPS if "backward" not in name and name.startswith(("modulate", "gated_add_m", "gelu"))]


def cases(setting: Setting) -> Iterator[Case]:
    for rows in setting.rows:
        for name, make in STEPS.items():
            yield Case(f"steps: {name}, M {rows}", partial(measure, setting, make, rows, None))
        for name in FEEDING:
            for dtype in (torch.int8, torch.float8_e4m3fn):
                bits = "int8" if dtype == torch.int8 else "fp8"
                yield Case(f"steps: {name} for {bits}, M {rows}", partial(measure, setting, STEPS[name], rows, dtype))


def measure(setting: Setting, make: Callable[[Setting, int], Step], rows: int, dtype: torch.dtype | None) -> dict:
    step, ours = make(setting, rows), setting.ours
    if dtype is not None:
        down = setting.randn(setting.rank, step.width, std=step.width**-0.5)
        step = replace(step, inputs={**step.inputs, "down": down})

    def run(ops: ModuleType, inputs: dict[str, Tensor]) -> Any:
        room = ops.room(setting.rank) if step.feeds and dtype is None else 0
        return step.run(ops, Wants(room, dtype, inputs.get("down")), inputs)

    outputs = run(ours, step.inputs)
    moved = nbytes([*step.inputs.values()]) + sum(
        nbytes([t]) * (step.width / t.shape[-1] if step.width and t.ndim == 3 and t.shape[-1] > step.width else 1)
        for t in tensors(outputs)
    )
    double = {name: t.double() for name, t in step.inputs.items()}
    exact = in_full(step.run(reference, Wants(), double), double.get("down"))
    checked = twice_rule(
        comparable(outputs, step.width),
        comparable(run(reference, step.inputs), step.width),
        comparable(exact, step.width),
    )
    del outputs, double, exact
    source = torch.empty(int(moved) // 2, dtype=torch.uint8, device=setting.device).random_()
    ms = timed(
        {
            "ours": lambda: run(ours, step.inputs),
            "clone": source.clone,
            "plain": lambda: run(reference, step.inputs),
        },
        setting.device,
        setting.seconds,
    )
    share = ms["clone"]["median"] / ms["ours"]["median"]
    return {
        **checked,
        "bytes": int(moved),
        "ms": ms,
        "predicted_ms": predicted_ms(setting.ceilings, moved),
        "over_plain": ms["plain"]["median"] / ms["ours"]["median"],
        "targets": [target("share of a clone's speed", ">= 0.8", share)],
    }


def in_full(outputs: Any, down: Tensor | None) -> Any:
    """Exact outputs beside 8-bit ones: the rows unrounded, and their product with `down`."""
    if down is None or isinstance(outputs, Tensor):
        return outputs
    if isinstance(outputs, Activations):
        rows = outputs.x.flatten(0, -2)
        return Activations(outputs.x, rows, rows.new_ones(len(rows)), rows @ down.t())
    return tuple(in_full(part, down) for part in outputs)
