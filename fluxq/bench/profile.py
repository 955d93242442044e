"""`fluxq profile`: memory and speed of every block-swap setting, predicted, and on this machine's GPU also measured.

A row is a number of blocks to swap (sd-scripts' term; N blocks are 2 N streamed units), a format and a resolution. Its
predicted peak is split by owner; its seconds come from the GPU's rates and the ring under a virtual clock, so the GPU
itself is not needed. What is measured are the trainer's own steps, of FLUX.1 dev with random weights (measured.py).
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fluxq.console import console
from fluxq.errors import WrongRequest
from fluxq.formats.atomic import atomic_path
from fluxq.formats.quantized import cache_folder
from fluxq.model import FluxConfig
from fluxq.offload.costs import OWNERS
from fluxq.offload.gpus import GIB, GPU, GPUS, gpu_named, measure
from fluxq.offload.planner import plan, timeline
from fluxq.offload.plans import Pins, Plan
from fluxq.offload.simulation import Timeline

from .measured import measured_row
from .timed_step import Setting, costs_of

SWAPS = (0, 8, 16, 18, 22, 28, 35, 38)
"""Blocks to swap. 38 is all: 76 units."""
ENDLESS = 1 << 60
STALLED = 0.05
"""If a larger share of the step waits for copies, the bus is the bottleneck."""

COLUMNS = "{px:>5} {format:>6} {swap:>5} {resident:>8} |{predicted}"
FIGURES = " {peak:>9} {it_s:>7} {moved:>8} {rate:>6} {stall:>6} {bound:>8}"
NAMES = dict(peak="peak GiB", it_s="it/s", moved="GB/step", rate="GB/s", stall="stall", bound="bound by")


def profile_command(
    gpu: str | None,
    formats: Sequence[str],
    resolutions: Sequence[int],
    compute: str,
    policy: str,
    rank: int,
    batch: int,
    t5_length: int,
    slots: int,
    steps: int,
    weights: str,
    out: Path | None,
) -> dict[str, Any]:
    """Every row. gpu: a name, or None for this machine's, on which `steps` steps of each row are also measured.
    weights: "random", the only kind there is. out: a folder for the plots of peak against speed and of one step.
    """
    device = None if gpu else torch.device("cuda")
    chosen = known_gpu(gpu)
    base = Setting("", compute, policy, 0, batch, rank, t5_length, slots=slots)
    console.print(
        f"PREDICTED for {chosen.name} ({chosen.memory_gib:g} GiB, {chosen.bus_gb_s:g} GB/s, rates {chosen.word}), "
        f"FLUX.1 dev, rank {rank}, batch {batch}, {t5_length} T5 tokens, {compute}, {policy}, {slots} slots; "
        + (f"after the second bar MEASURED, {weights} weights" if device else "nothing here was measured")
    )
    rows, plans = rows_of(chosen, device, base, formats, resolutions, steps)
    answer = {"predicted": True, "measured": device is not None, "gpu": chosen.name, "weights": weights}
    answer |= {"rank": rank, "batch": batch, "t5_length": t5_length, "rows": rows}
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        name = re.sub(r"\W+", "-", chosen.name)
        plot_speeds(rows, chosen, out / f"profile_{name}.png")
        plot_timeline(step_of(plans[-1], rows[-1], chosen, base), plans[-1], chosen, out / f"timeline_{name}.png")
        with atomic_path(out / f"profile_{name}.json") as temporary:
            temporary.write_text(json.dumps(answer, indent=1) + "\n", encoding="utf-8")
    return answer


def known_gpu(name: str | None) -> GPU:
    """The GPU of that name, or this machine's."""
    if name is None:
        if not torch.cuda.is_available():
            raise WrongRequest(f"this machine has no CUDA GPU to measure; name one with --gpu: {', '.join(GPUS)}")
        return measure(cache_folder())
    if (gpu := gpu_named(name)) is None:
        raise WrongRequest(f"unknown GPU {name!r}; known are {', '.join(GPUS)}")
    return gpu


def rows_of(
    gpu: GPU, device: torch.device | None, base: Setting, formats: Sequence[str], resolutions: Sequence[int], steps: int
) -> tuple[list[dict[str, Any]], list[Plan]]:
    """The rows and their plans; each row is printed as soon as it is known. device: where to measure, or None."""
    names = dict(px="px", format="format", swap="swap", resident="resident", predicted=FIGURES.format(**NAMES))
    console.print(COLUMNS.format(**names) + (" |" + FIGURES.format(**NAMES) if device else ""))
    rows, plans = [], []
    for resolution in resolutions:
        for format in formats:
            ran: list[dict[str, Any]] = []
            for swap in SWAPS if format != "bf16" else SWAPS[:1]:  # weights in bf16 are not streamed
                setting = replace(base, format=format, resolution=resolution, blocks_to_swap=swap)
                made = planned(setting, gpu)
                row = predicted_row(made, setting, gpu)
                if device is not None:
                    row["measured"] = measured_row(FluxConfig.dev(), setting, made, device, steps)
                    ran.append(row["measured"])
                    _compare(ran)
                rows.append(row)
                plans.append(made)
                console.print(line_of(row))
    if limited := [row for row in rows if row["bound_by"] == "python"]:
        console.print(
            f"bound by python: {len(limited)} of {len(rows)} steps wait for Python to launch their kernels, for up to "
            f"{max(row['launching_s'] for row in limited):.2f} s (predicted, {gpu.launch_us:.3g} us each); "
            "a faster GPU does not help"
        )
    return rows, plans


def planned(setting: Setting, gpu: GPU) -> Plan:
    """The plan of a row: everything is pinned, and memory is unlimited."""
    s, costs = setting, costs_of(setting, FluxConfig.dev(), gpu)
    slots = s.slots if costs.streams else None
    pins = Pins(blocks_to_swap=s.blocks_to_swap, policy=s.policy, slots=slots, offload=False)
    return plan([costs], gpu, vram=ENDLESS, pins=pins)


def predicted_row(made: Plan, setting: Setting, gpu: GPU) -> dict[str, Any]:
    """The predicted figures of a row."""
    return {
        "resolution": setting.resolution,
        "format": made.format,
        "compute": made.compute,
        "blocks_to_swap": setting.blocks_to_swap,
        "resident_units": len(made.resident),
        "predicted": True,
        "peak_gib": round(made.peak_bytes / GIB, 3),
        "peak_gib_by_owner": {owner: round(made.peak[owner] / GIB, 3) for owner in OWNERS},
        "fits": made.peak_bytes < gpu.vram,
        "it_s": round(1 / made.seconds, 4),
        "gb_moved_per_step": round(made.moved / 1e9, 2),
        "gb_s": round(made.moved / 1e9 / made.seconds, 2),
        "stall": round(made.stall / made.gpu_seconds, 4),
        "launches": made.launches,
        "launching_s": round(made.launching, 4),
        "bound_by": made.bound,
    }


def _compare(ran: list[dict[str, Any]]) -> None:
    """Add to the last row how much of its step it waits, compared with the first, which swaps nothing."""
    first, last = ran[0], ran[-1]
    if "it_s" in first and "it_s" in last:
        last["stall"] = max(0.0, 1 - last["it_s"] / first["it_s"])
        last["bound_by"] = "bus" if last["stall"] > STALLED else "compute"


def line_of(row: dict[str, Any]) -> str:
    swap = "all" if row["blocks_to_swap"] == SWAPS[-1] else row["blocks_to_swap"]
    resident, measured = row["resident_units"], row.get("measured")
    line = COLUMNS.format(
        px=row["resolution"], format=row["format"], swap=swap, resident=resident, predicted=_figures(row, row["fits"])
    )
    if measured is None:
        return line
    return f"{line} |" + (" out of memory" if "out_of_memory" in measured else _figures(measured, True))


def _figures(row: dict[str, Any], fits: bool) -> str:
    """The cells of a row, predicted or measured; "-" for unknown figures."""

    def cell(name: str, form: str) -> str:
        return "-" if row.get(name) is None else format(row[name], form)

    return FIGURES.format(
        peak=cell("peak_gib", ".2f") + (" " if fits else "!"),
        it_s=cell("it_s", ".3f"),
        moved=cell("gb_moved_per_step", ".1f"),
        rate=cell("gb_s", ".1f"),
        stall=cell("stall", ".0%"),
        bound=row.get("bound_by", "-"),
    )


def step_of(made: Plan, row: dict[str, Any], gpu: GPU, base: Setting) -> Timeline:
    """When compute and copies run in one step of a plan: the real ring under a virtual clock."""
    setting = replace(base, format=row["format"], resolution=row["resolution"])
    costs = costs_of(setting, FluxConfig.dev(), gpu)
    return timeline(costs, gpu, made.residency, made.policies, run_ahead=1)


def plot_speeds(rows: Sequence[dict[str, Any]], gpu: GPU, path: Path) -> None:
    """Peak against it/s, one line per format and resolution; measurements are crosses."""
    figure, axes = _figure()
    for format, resolution in dict.fromkeys((r["format"], r["resolution"]) for r in rows):
        own = [r for r in rows if (r["format"], r["resolution"]) == (format, resolution)]
        (line,) = axes.plot(
            [r["peak_gib"] for r in own], [r["it_s"] for r in own], marker="o", label=f"{format}, {resolution} px"
        )
        ran = [r["measured"] for r in own if "peak_gib" in r.get("measured", {})]
        axes.scatter([r["peak_gib"] for r in ran], [r["it_s"] for r in ran], marker="x", color=line.get_color())
    axes.axvline(gpu.memory_gib, color="#999999", linestyle=":", label=f"{gpu.name}'s memory")
    axes.set(
        xlabel="peak GiB (lines predicted, crosses measured)",
        ylabel="it/s (lines predicted, crosses measured)",
        title=f"{gpu.name}: what block swap costs, predicted",
    )
    axes.set_ylim(bottom=0)
    axes.legend()
    _save(figure, path)


def plot_timeline(step: Timeline, made: Plan, gpu: GPU, path: Path) -> None:
    """The timeline of one step: compute above, copies below."""
    figure, axes = _figure()
    end = max(span.end for span in step.spans["compute"])
    for height, (lane, color) in enumerate((("copy", "#c07830"), ("compute", "#1f4e9c"))):
        spans = [(s.start, s.end - s.start) for s in step.spans[lane]]
        axes.broken_barh(spans, (height - 0.35, 0.7), color=color, linewidth=0)
    axes.set(xlabel="seconds (predicted)", xlim=(0, end), yticks=(0, 1), yticklabels=("copies", "compute"))
    axes.set_title(
        f"{gpu.name}, {made.format}, {made.streamed} units through {made.slots} slots: one step, predicted; "
        f"compute waits {step.stall:.0%}",
        fontsize=9,
    )
    _save(figure, path)


def _figure() -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    axes.grid(alpha=0.3)
    return figure, axes


def _save(figure: Any, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    with atomic_path(path) as temporary:
        FigureCanvasAgg(figure).print_png(temporary)
