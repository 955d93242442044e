"""`fluxq bench compare`: results of `fluxq bench steps` side by side, and the published speeds of other trainers.

Each line is a setting, each column a machine. The published figures were measured with other settings, listed as far as
they are known: they give a sense of scale, and are not directly comparable.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fluxq.console import console
from fluxq.errors import WrongRequest
from fluxq.formats.atomic import atomic_path
from fluxq.offload.plans import counted

from .steps import KIND

AXES = (
    "model",
    "resolution",
    "batch",
    "t5_length",
    "rank",
    "format",
    "compute",
    "policy",
    "resident_units",
    "blocks_to_swap",
    "slots",
)
"""Rows that agree in these have the same setting."""

NANO, PUBLISHED = "nano", "published by others"

FORMER_KEYS = {"size": "resolution", "pictures_s": "images_s", "card": "gpu"}


@dataclass(frozen=True)
class Anchor:
    """A published speed, in images trained on per second, and what is known of its conditions."""

    trainer: str
    gpu: str
    figure: str
    images_s: float
    conditions: str
    source: str = "published, original not located"


ANCHORS = (
    Anchor("ai-toolkit", "A100", "0.348 it/s", 4 * 0.348, "batch 4; resolution and T5 length not stated"),
    Anchor("ai-toolkit", "H100", "0.454 it/s", 4 * 0.454, "batch 4; resolution and T5 length not stated"),
    Anchor("ai-toolkit", "RTX 4090", "0.438 it/s", 0.438, "batch 1; resolution and T5 length not stated"),
    Anchor("ai-toolkit", "L40S", "0.838 it/s", 0.838, "batch 1; resolution and T5 length not stated"),
    Anchor("ComfyUI-FluxTrainer", "RTX 4090", "2.42 s/it", 1 / 2.42, "768 px; batch not stated, taken as 1"),
    Anchor(
        "HF QLoRA recipe",
        "RTX 4090",
        "0.88 s/image",
        1 / 0.88,
        "512 x 768 px, T5 77, rank 4, attention only",
        "published",
    ),
)


def compare_results(files: Sequence[Path], out: Path | None = None) -> dict[str, Any]:
    """The table as data, and as a PNG into `out`. Raises WrongRequest for a file that `fluxq bench steps` did not
    write.
    """
    loaded = [read(path) for path in files]
    results = dict(zip(names(files, loaded), loaded, strict=True))
    lines = side_by_side(results)
    show(results, lines)
    if out is not None:
        plot(results, lines, out)
    machines = {name: result["about"] for name, result in results.items()}
    return {"machines": machines, "rows": lines, "published": [asdict(anchor) for anchor in ANCHORS]}


def read(path: Path) -> dict[str, Any]:
    """A result, checked so that the code below can rely on its fields."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise WrongRequest(
            f"{path} cannot be read ({error.strerror}); pass files written by fluxq bench steps --out"
        ) from error
    except ValueError:
        result = None
    if isinstance(result, dict):
        _rename_former_keys(result)
    if not (isinstance(result, dict) and result.get("kind") == KIND and _sound(result)):
        raise WrongRequest(f"{path} is not a result of fluxq bench steps; write one with fluxq bench steps --out FILE")
    return result


def _rename_former_keys(result: dict[str, Any]) -> None:
    """Give the keys of an older result their current names."""
    rows = result.get("rows")
    for table in (result.get("about"), *(rows if isinstance(rows, list) else [])):
        for former, current in FORMER_KEYS.items():
            if isinstance(table, dict) and former in table:
                table[current] = table.pop(former)


def _sound(result: dict[str, Any]) -> bool:
    about, rows = result.get("about"), result.get("rows")
    if not (
        isinstance(about, dict)
        and all(isinstance(about.get(name), str) for name in ("machine", "model"))
        and isinstance(rows, list)
    ):
        return False
    numbers = ("it_s", "images_s")
    return all(
        isinstance(row, dict)
        and all(name in row for name in AXES[1:])
        and ("ms" not in row or all(isinstance(row.get(name), int | float) for name in numbers))
        for row in rows
    )


def names(files: Sequence[Path], results: Sequence[dict[str, Any]]) -> list[str]:
    """Each column's heading: the machine, with the file name if two are from one machine."""
    machines = [result["about"]["machine"] for result in results]
    chosen = [m if machines.count(m) == 1 else f"{m} [{p.stem}]" for m, p in zip(machines, files, strict=True)]
    return [n if chosen.count(n) == 1 else f"{n} #{chosen[:i].count(n) + 1}" for i, n in enumerate(chosen)]


def side_by_side(results: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """A line for every setting that any machine has: the setting, and {machine: the figures of its row}."""
    lines: dict[tuple[Any, ...], dict[str, Any]] = {}
    kept = ("it_s", "images_s", "ms", "tflops", "share_of_peak", "peak_gib", "predicted_launching_s")
    kept += ("out_of_memory", "not_run")
    for name, result in results.items():
        for row in ({"model": result["about"]["model"], **row} for row in result["rows"]):
            key = tuple(row[axis] for axis in AXES)
            line = lines.setdefault(key, {axis: row[axis] for axis in AXES} | {"machines": {}})
            line["machines"][name] = {field: row[field] for field in kept if field in row}
    return sorted(
        lines.values(), key=lambda line: (line["model"], line["resolution"], line["batch"], line["t5_length"])
    )


def setting_in_words(line: dict[str, Any]) -> str:
    words = ["nano"] if line["model"] == NANO else []
    words += [f"{line['resolution']} px", f"batch {line['batch']}", f"T5 {line['t5_length']}", f"rank {line['rank']}"]
    words += [f"{line['format']} {line['compute']}", *([line["policy"]] if line["policy"] else [])]
    if line["resident_units"] is not None:
        words.append(f"{line['resident_units']} units resident")
    if line["blocks_to_swap"] is not None:
        words.append(f"{line['blocks_to_swap']} blocks swapped")
    return ", ".join([*words, *([f"{line['slots']} slots"] if line["slots"] else [])])


def cell(figures: dict[str, Any] | None) -> str:
    """A machine's cell in the line of a setting."""
    if figures is None:
        return "-"
    if "images_s" not in figures:
        return "out of memory" if "out_of_memory" in figures else "not run"
    beside = ("{:.1f} GiB", figures.get("peak_gib")), ("Python {:.2f} s", figures.get("predicted_launching_s"))
    words = ", ".join(form.format(value) for form, value in beside if value is not None)
    return f"{figures['images_s']:.3f}" + (f" ({words})" if words else "")


def show(results: dict[str, dict[str, Any]], lines: Sequence[dict[str, Any]]) -> None:
    """Print the table, and the published speeds below it."""
    console.print(
        "images/s; peak GiB if it was measured; how long Python needs to launch a step, predicted: no step is faster"
    )
    _table([["", *results], *([setting_in_words(x), *(cell(x["machines"].get(n)) for n in results)] for x in lines)])
    console.print()
    console.print(f"{PUBLISHED}, not measured here, each under its own conditions; FLUX.1, not nano")
    _table(
        [
            ["", "images/s", "as published", "under", "source"],
            *([f"{a.trainer}, {a.gpu}", f"{a.images_s:.3f}", a.figure, a.conditions, a.source] for a in ANCHORS),
        ]
    )


def _table(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        console.print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())


def plot(results: dict[str, dict[str, Any]], lines: Sequence[dict[str, Any]], path: Path) -> None:
    """Images per second as bars, one color per machine. Published speeds are hatched, and left out if only nano was
    measured.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    bars: list[tuple[str, float, str]] = [
        (setting_in_words(line), line["machines"][name]["images_s"], name)
        for line in lines
        for name in results
        if "images_s" in line["machines"].get(name, {})
    ]
    if any(line["model"] != NANO for line in lines):
        bars += [(f"{a.trainer}, {a.gpu}: {a.conditions}", a.images_s, PUBLISHED) for a in ANCHORS]
    figure = Figure(figsize=(11, 1.5 + 0.24 * len(bars)), layout="constrained")
    axes = figure.add_subplot()
    for series in counted([series for *_, series in bars]):
        own = [(i, value) for i, (_, value, name) in enumerate(bars) if name == series]
        look: dict[str, Any] = {"color": "#dddddd", "hatch": "///"} if series == PUBLISHED else {}
        axes.barh([i for i, _ in own], [value for _, value in own], label=series, **look)
    axes.set(yticks=range(len(bars)), xlabel="images per second", title="LoRA training: longer is faster")
    axes.set_yticklabels([text for text, *_ in bars], fontsize=7)
    axes.invert_yaxis()
    axes.grid(alpha=0.3, axis="x")
    axes.legend(fontsize=8)
    with atomic_path(path) as temporary:
        FigureCanvasAgg(figure).print_png(temporary)
