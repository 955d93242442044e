"""`fluxq profile`: memory and speed of every block-swap setting, predicted for a card that need not be there.

A row is a number of blocks to swap (sd-scripts' word; 2 N units are streamed), a format and a picture size; its peak
is split by owner, its seconds come from the card's rates and a simulation of the ring. Nothing here is measured, and
every output says so.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fluxq.errors import WrongRequest
from fluxq.formats.files import atomic_path
from fluxq.model import FluxConfig
from fluxq.model.costs import flux_costs
from fluxq.offload.cards import CARDS, GIB, Card
from fluxq.offload.clock import Timeline, run_steps
from fluxq.offload.costs import OWNERS, Costs
from fluxq.offload.planner import block_seconds, plan
from fluxq.offload.plans import Pins, Plan
from fluxq.offload.schedule import Schedule
from fluxq.report import console

SWAPS = (0, 8, 16, 18, 22, 28, 35, 38)
"""Blocks to swap. 38 is all: 76 units."""
ENDLESS = 1 << 60
COLUMNS = "{px:>5} {format:>6} {swap:>5} {resident:>8} {peak:>9} {it_s:>7} {moved:>8} {stall:>6} {bound:>8}"


def profile_command(
    card: str,
    formats: Sequence[str],
    sizes: Sequence[int],
    compute: str,
    policy: str,
    rank: int,
    batch: int,
    t5_length: int,
    slots: int,
    out: Path | None,
) -> dict[str, Any]:
    """Every row; `out`: a folder for the peak-against-speed plot and the timeline of one step."""
    if card not in CARDS:
        raise WrongRequest(f"no card {card!r} is known; there are {', '.join(CARDS)}")
    chosen, rows, plans = CARDS[card], [], []
    console.print(
        f"PREDICTED for {card} ({chosen.memory_gib:g} GiB, {chosen.bus_gb_s:g} GB/s), FLUX.1 dev, rank {rank}, batch "
        f"{batch}, {t5_length} T5 tokens, {compute}, {policy}, {slots} slots; nothing here was measured"
    )
    names = dict(px="px", format="format", swap="swap", resident="resident", peak="peak GiB", it_s="it/s")
    console.print(COLUMNS.format(**names, moved="GB/step", stall="stall", bound="bound by"))
    for size in sizes:
        for format in formats:
            costs = flux_costs(
                FluxConfig.dev(), format, compute, rank, "attention+mlp", batch, (size // 16) ** 2, t5_length
            )
            for swap in SWAPS:
                pins = Pins(blocks_to_swap=swap, policy=policy, slots=slots, offload=False)
                found = plan([costs], chosen, vram=ENDLESS, pins=pins)
                rows.append(row_of(found, size, swap, chosen))
                plans.append((costs, found))
                console.print(line_of(rows[-1]))
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        plot_speeds(rows, card, out / f"profile_{card}.png")
        costs, streamed = plans[-1]
        plot_timeline(timeline(costs, streamed, chosen), streamed, card, out / f"timeline_{card}.png")
        with atomic_path(out / f"profile_{card}.json") as temporary:
            temporary.write_text(json.dumps({"predicted": True, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    return {"predicted": True, "card": card, "rank": rank, "batch": batch, "t5_length": t5_length, "rows": rows}


def row_of(found: Plan, size: int, swap: int, card: Card) -> dict[str, Any]:
    """The figures of a row, all predicted."""
    return {
        "size": size,
        "format": found.format,
        "compute": found.compute,
        "blocks_to_swap": swap,
        "resident_units": len(found.resident),
        "peak_gib": round(found.peak_bytes / GIB, 3),
        "peak_gib_by_owner": {owner: round(found.peak[owner] / GIB, 3) for owner in OWNERS},
        "fits": found.peak_bytes < card.vram,
        "it_s": round(1 / found.seconds, 4),
        "gb_moved_per_step": round(found.moved / 1e9, 2),
        "stall": round(found.stall / found.seconds, 4),
        "bound_by": found.bound,
    }


def line_of(row: dict[str, Any]) -> str:
    swap = "all" if row["blocks_to_swap"] == SWAPS[-1] else row["blocks_to_swap"]
    return COLUMNS.format(
        px=row["size"],
        format=row["format"],
        swap=swap,
        resident=row["resident_units"],
        peak=f"{row['peak_gib']:.2f}{' ' if row['fits'] else '!'}",
        it_s=f"{row['it_s']:.3f}",
        moved=f"{row['gb_moved_per_step']:.1f}",
        stall=f"{row['stall']:.0%}",
        bound=row["bound_by"],
    )


def timeline(costs: Costs, found: Plan, card: Card) -> Timeline:
    """What compute and copies do in one step of a plan, by the shipped ring under the virtual clock."""
    _, forward, backward = block_seconds(costs, card)
    schedule = Schedule(tuple(b.units for b in costs.blocks), frozenset(found.resident), max(2, found.slots))
    back = {i: backward[i][policy] for i, policy in enumerate(found.policies) if policy}
    tail = card.seconds(costs.outside)
    return run_steps(schedule, costs.units, forward, back, lambda n: n / (card.bus_gb_s * 1e9), tail=tail, run_ahead=1)


def plot_speeds(rows: Sequence[dict[str, Any]], card: str, path: Path) -> None:
    """Peak against it/s, a line for each format and size."""
    figure, axes = _figure()
    for format, size in dict.fromkeys((r["format"], r["size"]) for r in rows):
        own = [r for r in rows if (r["format"], r["size"]) == (format, size)]
        axes.plot([r["peak_gib"] for r in own], [r["it_s"] for r in own], marker="o", label=f"{format}, {size} px")
    axes.axvline(CARDS[card].memory_gib, color="#999999", linestyle=":", label=f"{card}'s memory")
    axes.set(
        xlabel="peak GiB (predicted)", ylabel="it/s (predicted)", title=f"{card}: what block swap costs, predicted"
    )
    axes.set_ylim(bottom=0)
    axes.legend()
    _save(figure, path)


def plot_timeline(step: Timeline, found: Plan, card: str, path: Path) -> None:
    """The lanes of one step: compute above, copies below."""
    figure, axes = _figure()
    for height, (lane, color) in enumerate((("copy", "#c07830"), ("compute", "#1f4e9c"))):
        spans = [(s.start, s.end - s.start) for s in step.spans[lane]]
        axes.broken_barh(spans, (height - 0.35, 0.7), color=color, linewidth=0)
    axes.set(xlabel="seconds (predicted)", xlim=(0, step.seconds), yticks=(0, 1), yticklabels=("copies", "compute"))
    axes.set_title(
        f"{card}, {found.format}, {found.streamed} units through {found.slots} slots: one step, predicted; "
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
