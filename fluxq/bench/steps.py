"""`fluxq bench steps`: how fast this machine trains, in steps and images per second.

The step is the trainer's own (timed_step.py). On a GPU the model is FLUX.1 dev with random weights, placed by the plan
that training would make; on a CPU it is nano.
"""

from __future__ import annotations

import gc
import importlib.metadata
import json
import platform
import re
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fluxq import nano
from fluxq.config import MemoryConfig, ModelConfig
from fluxq.console import console
from fluxq.errors import WrongRequest, is_out_of_memory
from fluxq.formats.atomic import atomic_path
from fluxq.formats.quantized import cache_folder
from fluxq.formats.stream import expect_training
from fluxq.memory.machine import free_gpu_bytes, ram_bytes
from fluxq.memory.placement import SLOTS, blocks_units, parse_bytes, pinned_residents
from fluxq.memory.share import take_share
from fluxq.model import Flux, FluxConfig, add_lora
from fluxq.models.parts import Models
from fluxq.models.tuning import use_tuned
from fluxq.offload import Streams
from fluxq.offload.costs import Costs
from fluxq.offload.gpus import GIB, GPU, measure, with_bus
from fluxq.offload.planner import plan
from fluxq.offload.plans import Pins, Plan, counted

from .random_model import planned_flux
from .timed_step import OPTIMIZER, TARGETS, Setting, costs_of, measure_steps, rates

KIND = "fluxq bench steps"
WORTH = (
    "no CUDA GPU: this measures nano, 2,900 times smaller than FLUX.1; it shows that it works, not how fast GPUs train"
)
COLUMNS = "{px:>5} {batch:>5} {t5:>4} {weights:<13} {keeps:<14} {swap:>6} {it_s:>8} {spread:>13} {images_s:>10} {tflops:>7} {share:>6} {peak:>7} {predicted:>9} {joules:>7}"  # noqa: E501
HEADINGS = dict(
    px="px", batch="batch", t5="T5", weights="weights", keeps="blocks keep", swap="stream", it_s="it/s",
    spread="p10-p90 ms", images_s="images/s", tflops="TFLOP/s", share="share", peak="GiB", predicted="predicted",
    joules="J/step",
)  # fmt: skip


def bench_steps(
    given: dict[str, Any],
    matrix: str | None = None,
    steps: int = 20,
    limit_vram: str | None = None,
    limit_bus: str | None = None,
    out: Path | None = None,
) -> dict[str, Any]:
    """A row per setting. given: fields of Setting; with a `matrix` ("quick", "full") they replace the matrix's own.
    limit_vram ("12GiB") and limit_bus ("12GB/s") imitate a smaller GPU. out: a JSON file for the answer.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    limit = parse_bytes(limit_vram, "--limit-vram")
    wanted = settings(matrix, given, device.type == "cuda")
    gpu, slower = None, 1.0
    if device.type == "cuda":
        gpu = measure(cache_folder())
        use_tuned(device, console.print)
        if limit:
            hold_to(limit, device)
        if limit_bus:
            gpu, slower = on_slower_bus(gpu, limit_bus)
    else:
        if limit or limit_bus:
            raise WrongRequest("--limit-vram and --limit-bus need a CUDA GPU, and this machine has none")
        console.print(WORTH)
    about = about_machine(device, gpu) | {"steps": steps, "limit_vram_bytes": limit, "optimizer": OPTIMIZER}
    about["limit_bus_gb_s"] = gpu.bus_gb_s if gpu and slower > 1 else None
    console.print(COLUMNS.format(**HEADINGS))
    answer: dict[str, Any] = {"kind": KIND, "about": about, "rows": []}
    for setting in wanted:
        answer["rows"].append(row := row_of(setting, device, gpu, steps, limit, slower))
        if len(wanted) == 1 and "not_run" in row:
            raise WrongRequest(row["not_run"])
        console.print(line_of(row))
        if out is not None:
            save(answer, out)
    return answer


def hold_to(limit: int, device: torch.device) -> None:
    """Limit this process to `limit` bytes of the GPU for tensors; CUDA's own come on top."""
    share = limit / torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, share))  # of the current GPU: it refuses a `cuda` without index


def on_slower_bus(gpu: GPU, text: str) -> tuple[GPU, float]:
    """`gpu` behind a bus as slow as "12GB/s", and how often each copy is repeated to imitate it."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:gb/s)?\s*", text.lower())
    if found is None or not 0 < (limit := float(found[1])) < gpu.bus_gb_s:
        raise WrongRequest(f"--limit-bus must be a rate below this machine's {gpu.bus_gb_s:g} GB/s, not {text!r}")
    return with_bus(gpu, limit), gpu.bus_gb_s / limit


class SlowBus:
    """`streams` that repeat each copy `times` times, the last one in part: a slower bus, to test predictions."""

    def __init__(self, streams: Streams, times: float) -> None:
        self._streams, self._times = streams, times

    def copy(self, slot: Tensor, source: Tensor) -> None:
        for _ in range(int(self._times)):
            self._streams.copy(slot, source)
        if part := int(len(source) * (self._times % 1)):
            self._streams.copy(slot, source[:part])

    def __getattr__(self, name: str) -> Any:
        return getattr(self._streams, name)


def save(answer: dict[str, Any], path: Path) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(answer, indent=1) + "\n", encoding="utf-8")


def settings(matrix: str | None, given: dict[str, Any], full_size: bool) -> list[Setting]:
    """The settings to measure: one, or those of a matrix, with the fields in `given` replaced."""
    given = {name: value for name, value in given.items() if value is not None}
    Pins(resident_units=given.get("resident_units"), blocks_to_swap=given.get("blocks_to_swap")).resident(1 << 30)
    if given.get("resolution", 16) % 16:
        raise WrongRequest(f"--resolution must be a multiple of 16, not {given['resolution']}")
    fixed = {"resident_units": None} if "blocks_to_swap" in given else {}
    base = Setting() if full_size else Setting(resolution=nano.SIZE, t5_length=nano.T5_LENGTH)
    chosen = [base] if matrix is None else MATRICES[matrix](base, full_size)
    return list(dict.fromkeys(replace(setting, **fixed, **given) for setting in chosen))


def _quick(base: Setting, full_size: bool) -> list[Setting]:
    """As planned at two resolutions and two batch sizes, and in 8 bits; then all resident, and all streamed."""
    large = replace(base, resolution=1024) if full_size else base
    eight_bits = dict(format="int8", compute="int8_dx")
    return [
        base,
        large,
        replace(base, batch=4),
        replace(base, **eight_bits),
        replace(large, **eight_bits),
        *(replace(base, resident_units=units) for units in (all_units(full_size), 0)),
    ]


def _full(base: Setting, full_size: bool) -> list[Setting]:
    """All useful pairs of format and compute, at three resolutions and two batch sizes; then none, half and all
    streamed.
    """
    pairs = [("nf4", "bf16"), ("nf4", "int8_dx"), ("int8", "bf16"), ("int8", "int8_dx"), ("fp8", "fp8_dx")]
    resolutions = (512, 768, 1024) if full_size else (base.resolution,)
    rows = [
        replace(base, format=f, compute=c, resolution=resolution, batch=b)
        for b, resolution, (f, c) in product((1, 4), resolutions, pairs)
    ]
    every = all_units(full_size)
    return rows + [
        replace(base, format=f, compute=c, resolution=resolution, resident_units=units)
        for resolution, (f, c), units in product(resolutions, (pairs[0], pairs[3]), (every, every // 2, 0))
    ]


def all_units(full_size: bool) -> int:
    return sum(map(len, blocks_units(FluxConfig.dev() if full_size else FluxConfig.nano())))


MATRICES: dict[str, Callable[[Setting, bool], list[Setting]]] = {"quick": _quick, "full": _full}


def row_of(
    setting: Setting, device: torch.device, gpu: GPU | None, steps: int, limit: int | None, slower: float = 1.0
) -> dict[str, Any]:
    """The figures of a setting, or that it ran out of memory or cannot run. gpu: None for nano on the CPU; limit: bytes
    of the GPU; slower: how often each copy is repeated.
    """
    row = asdict(setting)
    try:
        if gpu is None:
            flux, made = nano_flux(setting), None
            costs = costs_of(setting, flux.config, None)
        else:
            costs = costs_of(setting, FluxConfig.dev(), gpu)
            made = planned(setting, costs, gpu, limit)
            bus: dict[str, Any] = {} if slower == 1 else {"through": lambda streams: SlowBus(streams, slower)}
            flux = planned_flux(FluxConfig.dev(), made, setting.rank, device, **bus)
    except (WrongRequest, RuntimeError) as error:
        _release(device)
        return row | failed(error)
    try:
        row |= measure_steps(flux, setting, steps)
    except RuntimeError as error:
        row |= failed(error)
    finally:
        if hasattr(flux.ring, "close"):
            flux.ring.close()  # type: ignore[attr-defined]
        policies = [block.policy for block in flux.blocks]
        del flux
        _release(device)
    row |= {"policies": counted(policies)}
    if made is not None:
        row |= predicted(made)
    if "ms" in row:
        row |= rates(costs, policies, row["ms"]["median"], gpu)
    return row


def failed(error: Exception) -> dict[str, str]:
    """The end of a row that has nothing to time: out of memory, or not supported. Raises any other error."""
    if is_out_of_memory(error):
        return {"out_of_memory": str(error).split(". ")[0]}
    if isinstance(error, WrongRequest):
        return {"not_run": str(error)}
    raise error


def planned(setting: Setting, costs: Costs, gpu: GPU, limit: int | None) -> Plan:
    """The plan that `fluxq train` would make with the same pins. Raises WrongRequest where nothing fits."""
    pins = Pins(
        resident_units=setting.resident_units,
        blocks_to_swap=setting.blocks_to_swap,
        policy=setting.policy,
        slots=setting.slots,
    )
    if limit is None:
        take_share()
    vram = min(limit or 1 << 62, free_gpu_bytes() or gpu.vram)
    return plan([costs], gpu, vram, (ram_bytes() or (0, None))[1], pins)


def nano_flux(setting: Setting) -> Flux:
    """nano with its own weights and LoRA, on the CPU."""
    config = ModelConfig(name="nano", format=setting.format, compute=setting.compute)
    models = Models(config, torch.device("cpu"), notify=lambda line: None)
    wishes = MemoryConfig(resident_units=setting.resident_units, blocks_to_swap=setting.blocks_to_swap)
    flux = models.load_flux(pinned_residents(wishes, models), setting.slots or SLOTS)
    flux.set_policy(setting.policy or "keep_all")
    add_lora(flux, setting.rank, setting.rank, TARGETS)
    expect_training(flux)
    return flux


def predicted(made: Plan) -> dict[str, Any]:
    """The plan's predictions, for comparison with what was measured."""
    return {
        "predicted_peak_gib": made.peak_bytes / GIB,
        "predicted_s": made.seconds,
        "predicted_stall": made.stall / made.gpu_seconds,
        "predicted_launches": made.launches,
        "predicted_launching_s": made.launching,
        "resident": len(made.resident),
        "streamed": made.streamed,
        "slots": made.slots,
        "offload": made.offload,
    }


def about_machine(device: torch.device, gpu: GPU | None) -> dict[str, Any]:
    """Machine, model and versions that the rows were measured with."""
    about: dict[str, Any] = {
        "machine": gpu.name if gpu else f"CPU ({platform.machine()}), nano",
        "model": "FLUX.1 dev, random weights" if gpu else "nano",
        "fluxq": _version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "threads": torch.get_num_threads(),
        "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "targets": TARGETS,
    }
    return about | ({"gpu": asdict(gpu)} if gpu else {})


def _version() -> str | None:
    try:
        return importlib.metadata.version("fluxq")
    except importlib.metadata.PackageNotFoundError:  # a checkout that is not installed
        return None


def line_of(row: dict[str, Any]) -> str:
    """A row of the table."""
    units = row.get("streamed") if "streamed" in row else swapped(row)
    cells = dict(
        px=row["resolution"],
        batch=row["batch"],
        t5=row["t5_length"],
        weights=f"{row['format']} {row['compute']}",
        keeps=", ".join(row.get("policies", {})) or row["policy"] or "-",
        swap=units,
    )
    if "ms" not in row:
        why = "out of memory" if "out_of_memory" in row else f"not run: {row['not_run']}"
        return COLUMNS.split(" {it_s")[0].format(**cells) + f"  {why}"
    number = lambda name, digits: "-" if row.get(name) is None else f"{row[name]:.{digits}f}"  # noqa: E731
    return COLUMNS.format(
        **cells,
        it_s=number("it_s", 3),
        spread=f"{row['ms']['p10']:.0f}-{row['ms']['p90']:.0f}",
        images_s=number("images_s", 3),
        tflops=f"{row['tflops']:.3g}",
        share="-" if row.get("share_of_peak") is None else f"{row['share_of_peak']:.0%}",
        peak=number("peak_gib", 2),
        predicted=number("predicted_peak_gib", 2),
        joules=number("joules", 0),
    ) + ("" if row["ok"] else "  the loss is not finite")


def swapped(row: dict[str, Any]) -> str:
    """What is streamed, for a row without a plan."""
    if row["blocks_to_swap"] is not None:
        return str(2 * row["blocks_to_swap"])
    return "-" if row["resident_units"] is None else f"R{row['resident_units']}"


def _release(device: torch.device) -> None:
    gc.collect()  # the error and what a row held may refer to each other
    if device.type == "cuda":
        torch.cuda.empty_cache()
