"""The memory table: full-size training steps and sampling on the emulated GPU, beside what fluxq predicts.

    python3 -m benchmarks.emulated [--seconds 280] [--only TEXT] [--page]
    python3 -m benchmarks.emulated --check NAME      some rows; nothing is written
    python3 -m benchmarks.emulated --row NAME        one row, on the GPU of this process

`python3` has a torch built for CUDA. Every row runs in a process of its own, whose allocator is empty, under
tests/emulated_gpu/run.py. Rows that results/emulated_memory.json lacks, or has from another commit, are measured;
`--seconds` starts no more after that time, and the next call goes on. Then results/emulated.md is written: its
predictions are those of the code at hand. The exit code is 1 if a row is missing, or further off than allowed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch

from benchmarks.measure import commit, version
from benchmarks.placed import RANK, T5_LENGTH
from fluxq.bench.measured import measured_row
from fluxq.bench.random_model import planned_flux, random_flux
from fluxq.bench.timed_step import OPTIMIZER, WARM_UP, Setting, trainer
from fluxq.caching.store import Text
from fluxq.formats.atomic import atomic_path
from fluxq.formats.stream import expect_sampling
from fluxq.kernels.chunks import chunk_of
from fluxq.memory import phases
from fluxq.memory.machine import free_gpu_bytes
from fluxq.memory.placement import candidates
from fluxq.memory.share import take_share
from fluxq.model import Flux, FluxConfig
from fluxq.model.blocks import Scale
from fluxq.model.costs import flux_costs
from fluxq.model.lora import lora_layers
from fluxq.offload import footprint, spread
from fluxq.offload.costs import Costs
from fluxq.offload.gpus import GIB, GPUS
from fluxq.offload.planner import plan
from fluxq.offload.plans import Pins, Plan, counted
from fluxq.sampling.denoising import denoise
from fluxq.sampling.requests import Request

ROOT, RESULTS = Path(__file__).parent.parent, Path(__file__).parent / "results"
ROWS_FILE, PAGE = RESULTS / "emulated_memory.json", RESULTS / "emulated.md"
PACKAGES = ("torch", "triton", "bitsandbytes")
EMULATED = {80: "a100", 86: "rtx3060", 89: "rtx4090", 90: "h100", 120: "rtx5090"}
"""Compute capability -> the emulated GPU that has it."""
USABLE = 0.98
"""Of a GPU's nominal memory, what its driver reports: 11.76 GiB of an RTX 3060's 12."""
ALIVE, RESERVED = 0.015, 0.05
"""How far what is alive may be from what is predicted, and what is predicted from what is reserved."""


@dataclass(frozen=True)
class Row:
    """What one row measures. format: None for the one that `fluxq train` would choose; vram: GiB that the plan is made
    for, by default what is free; total: GiB of the GPU, by default its own; grows: the allocator's segments can grow;
    images: that many are sampled instead of a step, in a process of their own or, as `previews`, by a run that trains.
    """

    gpu: str
    resolution: int
    format: str | None
    compute: str
    policy: str | None = None
    vram: float | None = None
    total: float | None = None
    resident: int | None = None
    slots: int | None = None
    offload: bool | None = None
    batch: int = 1
    images: int = 0
    previews: bool = False
    grows: bool = True

    @property
    def name(self) -> str:
        words = [self.gpu, f"{self.resolution} px", f"{self.format or 'chosen'} {self.compute}"]
        words += [f"batch {self.batch}"] if self.batch > 1 else []
        words += [f"{self.images} {'previews' if self.previews else 'images'}"] if self.images else []
        words += [self.policy] if self.policy else []
        words += [f"{self.resident} + {self.slots}"] if self.slots else []
        words += [f"for {self.vram:g} GiB"] if self.vram else []
        words += [f"of {self.total:g} GiB"] if self.total else []
        return ", ".join([*words, "grows" if self.grows else "fixed"])

    @property
    def setting(self) -> Setting:
        return Setting(self.format or "", self.compute, self.policy, self.resolution, self.batch, RANK, T5_LENGTH)


PAIRS = (("nf4", "bf16"), ("nf4", "int8_dx"), ("int8", "int8_dx"))
CHOSEN = (None, "bf16")
"""As `fluxq train` stores and multiplies weights unless it is told."""
BOTH = (True, False)


def _roomy() -> Iterator[Row]:
    """Plans for smaller GPUs, and pinned policies, on a GPU with memory to spare."""
    for grows in BOTH:
        spare = partial(Row, "rtx3060", total=24, grows=grows)
        planned = [
            *product((1024,), (12, 8, 6), PAIRS),
            *product((1024,), (16,), PAIRS),
            *product((512,), (12,), PAIRS),
        ]
        for size, vram, pair in [*planned, *product((768,), (12,), PAIRS[:2]), (512, 7.5, PAIRS[2])]:
            yield spare(size, *pair, vram=vram)
        for policy in ("recompute", "keep_attention", "keep_qkv", "keep_all8"):
            yield spare(1024, "nf4", "bf16", policy, resident=0, slots=8, offload=False)
        yield spare(512, "nf4", "bf16", "keep_all", resident=0, slots=8, offload=False)


def _batches() -> Iterator[Row]:
    """More rows than one image of 1024 px has."""
    for grows in BOTH:
        large = partial(Row, "rtx3060", total=24, grows=grows)
        yield large(1024, "nf4", "bf16", vram=16, batch=2)
        yield large(1024, "nf4", "int8_dx", vram=16, batch=2)
        yield large(512, "int8", "int8_dx", vram=16, batch=4)
        yield large(1024, "nf4", "bf16", "recompute", resident=0, slots=4, offload=False, batch=4)


def _default() -> Iterator[Row]:
    """What is planned for a GPU by default; on Windows segments are fixed."""
    sizes = (("rtx3060", None), ("rtx4060ti", None), ("rtx3060", 8), ("rtx3060", 6))
    for grows, pair, (gpu, total) in product(BOTH, PAIRS, sizes):
        yield Row(gpu, 1024, *pair, total=total, grows=grows)
    for name, size in product(GPUS, (512, 768, 1024)):
        if size != 1024 or name not in ("rtx3060", "rtx4060ti"):
            yield Row(name, size, *PAIRS[0])
    for name, size in product(GPUS, (512, 768, 1024)):
        yield Row(name, size, *CHOSEN)
    for gpu, total in (*sizes, ("rtx3070", None), ("rtx4070", None), ("rtx5080", None)):
        yield Row(gpu, 1024, *CHOSEN, total=total, grows=False)


def _sampling() -> Iterator[Row]:
    for grows in BOTH:
        yield Row("rtx3060", 1024, "nf4", "bf16", images=1, grows=grows)
        yield Row("rtx3060", 1024, "nf4", "bf16", images=1, total=6, grows=grows)
        yield Row("rtx3060", 512, "nf4", "int8", images=4, total=8, grows=grows)
        yield Row("rtx4060ti", 1536, "int8", "bf16", images=2, grows=grows)
        yield Row("rtx3060", 512, "nf4", "bf16", images=1, total=6, grows=grows)
        yield Row("rtx3060", 1024, "nf4", "bf16", images=2, previews=True, grows=grows)
        yield Row("rtx3060", 512, "nf4", "bf16", images=2, previews=True, total=8, grows=grows)


SECTIONS = {"roomy": _roomy, "batches": _batches, "default": _default, "sampling": _sampling}
ROWS = {row.name: row for rows in SECTIONS.values() for row in rows()}


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--page", action="store_true", help="measure nothing; only write the page")
    made.add_argument("--seconds", type=float, default=float("inf"), help="start no row after this time")
    made.add_argument("--only", default="", help="only rows with this in their name")
    made.add_argument("--list", action="store_true", help="only print the names of the rows")
    made.add_argument("--check", nargs="+", choices=ROWS, metavar="NAME", help="measure these rows and write nothing")
    made.add_argument("--row", choices=ROWS, metavar="NAME", help="print one row, measured in this process")
    arguments = made.parse_args()
    if arguments.row:
        row = ROWS[arguments.row]
        print(json.dumps((measure_sampling if row.images else measure)(row)))
        return
    if arguments.list:
        print("\n".join(ROWS))
        return
    if arguments.check:
        _, wrong = page({n: {"commit": "HEAD"} | in_its_own_process(ROWS[n]) for n in arguments.check}, versions())
        print("\n".join(wrong))
        raise SystemExit(bool(wrong))
    rows, own, start = read(), commit()[:10], time.time()
    missing = [n for n in ROWS if arguments.only in n and rows.get(n, {}).get("commit") != own]
    for name in () if arguments.page else missing:
        if time.time() - start > arguments.seconds:
            break
        rows[name] = {"commit": own} | in_its_own_process(ROWS[name])
        rows = {each: rows[each] for each in ROWS if each in rows}  # in the table's order, without former rows
        write(ROWS_FILE, json.dumps({"versions": versions(), "rows": rows}, indent=1) + "\n")
        print(name, {k: v for k, v in rows[name].items() if k.endswith("_gib") or k == "failed"}, flush=True)
    text, wrong = page(rows, read("versions"))
    write(PAGE, text)
    wrong += [f"{name}: not measured" for name in ROWS if name not in rows]
    print("\n".join(wrong))
    raise SystemExit(bool(wrong))


def read(what: str = "rows") -> dict[str, Any]:
    """What was measured: the `rows`, or the `versions` that they were measured with."""
    return json.loads(ROWS_FILE.read_text(encoding="utf-8"))[what] if ROWS_FILE.exists() else {}


def write(path: Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def versions() -> dict[str, str | None]:
    return {"python": sys.version.split()[0]} | {package: version(package) for package in PACKAGES}


def in_its_own_process(row: Row) -> dict[str, Any]:
    """The row, or its exit code."""
    known = GPUS[row.gpu]
    total = int(1024 * USABLE * (row.total or known.memory_gib))
    command = [sys.executable, str(ROOT / "tests/emulated_gpu/run.py"), "--gpu", EMULATED[known.capability]]
    command += ["--total", str(total), "--skip-copies", "--", sys.executable, "-m", "benchmarks.emulated"]
    settings = {"PYTHONPATH": str(ROOT), "PYTORCH_ALLOC_CONF": f"expandable_segments:{row.grows}"}
    settings |= {"OMP_NUM_THREADS": "1", "EMULATED_GPU_PYTHON": sys.executable}
    done = subprocess.run(
        [*command, "--row", row.name], stdout=subprocess.PIPE, text=True, check=False, env=os.environ | settings
    )
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {"failed": done.returncode}


def measure(row: Row) -> dict[str, Any]:
    """The plan of a training step, its peak, what the allocator reserved and refused, and which code ran."""
    made, device = planned(row), torch.device("cuda")
    with watched() as ran:
        found = measured_row(FluxConfig.dev(), row.setting, made, device, 1)
    if "peak_gib" not in found:
        return choices(made) | found
    figures = {name: found[name] for name in ("peak_gib", "reserved_gib", "peak_gib_by_owner")}
    return choices(made) | figures | allocator() | ran()


def planned(row: Row) -> Plan:
    if not row.vram:
        take_share()
    pins = Pins(None, None, row.resident, None, row.policy, row.slots, row.offload)
    vram = int(row.vram * GIB) if row.vram else free_gpu_bytes()
    formats = [row.format] if row.format else candidates(row.compute)
    tables = [costs_of(replace(row, format=format)) for format in formats]
    return plan(tables, GPUS[row.gpu], 1 << 60 if row.policy else vram, pins=pins)


def costs_of(row: Row, batch: int | None = None) -> Costs:
    assert row.format is not None
    gpu = GPUS[row.gpu]
    of_gpu = chunk_of(gpu.capability), gpu.library
    return _costs(row.format, row.compute, batch or row.batch, row.resolution, *of_gpu, row.grows)


@cache
def _costs(format: str, compute: str, batch: int, resolution: int, chunk: int, library: int, grows: bool) -> Costs:
    tokens = (resolution // 16) ** 2
    shape = dict(batch=batch, img_tokens=tokens, txt_tokens=T5_LENGTH, optimizer=OPTIMIZER)
    return flux_costs(FluxConfig.dev(), format, compute, RANK, **shape, chunk=chunk, library=library, expandable=grows)


def choices(made: Plan) -> dict[str, Any]:
    return {
        "format": made.format,
        "resident": len(made.resident),
        "slots": made.slots,
        "offload": made.offload,
        "look_ahead": made.look_ahead,
        "policies": made.policies,
    }


def allocator() -> dict[str, Any]:
    """What was refused; and what was free in the end, without torch."""
    stats, free = torch.cuda.memory_stats(), free_gpu_bytes() or 0
    held = torch.cuda.memory_allocated()
    return {"retries": stats["num_alloc_retries"], "refused": stats["num_ooms"], "free_gib": (free + held) / GIB}


class watched:
    """Inside, sees which code runs; as a function, says so."""

    def __enter__(self) -> watched:
        import emulated  # there is one on the emulated GPU only

        from fluxq.kernels import triton

        # no kernel fills the scales, and zeros cannot be divided out
        self._ones = patch.object(Scale, "is_invertible", property(lambda scale: True))
        self._report, self._inputs, backward = emulated.report, list[bool](), triton.qk_norm_rope_backward

        def seen(*arguments: Any) -> Any:
            self._inputs.append(arguments[-1] is not None)
            return backward(*arguments)

        self._backward = patch.object(triton, "qk_norm_rope_backward", seen)
        self._ones.start(), self._backward.start()
        emulated.reset()
        return self

    def __exit__(self, *_: object) -> None:
        self._ones.stop(), self._backward.stop()

    def __call__(self) -> dict[str, Any]:
        """norms: gradients of norms that were computed from q and k, and from qkv; launches of flash attention, and of
        products in 8 bits.
        """
        kernels = self._report()["kernels"]
        launches = lambda name: sum(n for kernel, n in kernels.items() if name in kernel)  # noqa: E731
        norms = [self._inputs.count(False), self._inputs.count(True)]
        return {"norms": norms, "flash": launches("flash_fwd"), "eight_bits": launches("triton _matmul_8bit")}


def measure_sampling(row: Row) -> dict[str, Any]:
    """The peak of denoising, of `fluxq sample` or of previews after training steps."""
    device, size = torch.device("cuda"), row.resolution
    requests = [Request("x", seed, size, size, steps=2) for seed in range(row.images)]
    texts = {"x": Text(torch.zeros(T5_LENGTH, 4096, dtype=torch.bfloat16), torch.zeros(768), "x", 5, False)}
    with watched():
        flux, tokens, found = (training if row.previews else placed_to_sample)(row, device)
        before = torch.cuda.memory_reserved() if row.previews else 0
        torch.cuda.reset_peak_memory_stats()
        denoise(flux, texts, requests, tokens=tokens)
    peak, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    return found | {"peak_gib": peak / GIB, "reserved_gib": reserved / GIB, "step_gib": before / GIB} | allocator()


LORA_BYTES = 4 * 56_033_280
"""Of LoRA of rank 16 on attention and MLP, in fp32."""


def placed_to_sample(row: Row, device: torch.device) -> tuple[Flux, int, dict[str, Any]]:
    take_share()
    costs = sampled_costs(row)
    budget = (free_gpu_bytes() or 0) - phases.SAMPLING_MARGIN - phases.unused_beyond(tokens_of(row))
    placed = phases.sampling_residents(costs, LORA_BYTES, budget)
    assert placed is not None and row.format is not None
    flux = random_flux(FluxConfig.dev(), row.format, device, RANK, *placed)
    flux.set_compute(row.compute)
    expect_sampling(flux)
    assert sum(p.nbytes for layer in lora_layers(flux).values() for p in layer.parameters()) == LORA_BYTES
    units = None if placed[0] is None else len(placed[0])
    return flux, phases.TOKENS_PER_BATCH, {"resident": units, "slots": placed[1]}


def sampled_costs(row: Row) -> Costs:
    """As `place_sampling` has them."""
    return costs_of(row, max(1, min(row.images, phases.TOKENS_PER_BATCH // tokens_of(row))))


def tokens_of(row: Row) -> int:
    return (row.resolution // 16) ** 2 + T5_LENGTH


def training(row: Row, device: torch.device) -> tuple[Flux, int, dict[str, Any]]:
    """A run after some steps, with its optimizer's state; as many tokens at once as `preview_limits` allows."""
    made = planned(row)
    flux = planned_flux(FluxConfig.dev(), made, RANK, device)
    step = trainer(flux, row.setting)
    for index in range(WARM_UP):
        step(index)
    flux.trainer = step  # type: ignore[assignment] - the optimizer stays alive
    return flux, min(row.batch * tokens_of(row), phases.TOKENS_PER_BATCH), choices(made)


class Predicted(NamedTuple):
    """GiB alive at the peak, and reserved."""

    peak: float
    reserved: float


def predicted(row: Row, found: dict[str, Any]) -> Predicted:
    """Of the plan that was measured, by the code at hand."""
    costs = costs_of(replace(row, format=row.format or found["format"]))
    residency = residency_of(costs, found)
    peak = sum(footprint.peak_by_owner(costs, found["policies"], found["offload"], residency).values())
    return Predicted(peak / GIB, footprint.reserved(costs, residency, peak - footprint.fixed(costs, residency)) / GIB)


def residency_of(costs: Costs, found: dict[str, Any]) -> footprint.Residency:
    resident = spread([block.units for block in costs.blocks], found["resident"])
    return footprint.Residency(found["slots"], tuple(u for u in costs.units if u in resident), found["look_ahead"])


def page(rows: dict[str, dict[str, Any]], made_with: Mapping[str, str | None]) -> tuple[str, list[str]]:
    """The page, and what is wrong with the rows."""
    commits = " and ".join(dict.fromkeys(row["commit"] for row in rows.values()))
    conditions = f"Commit {commits}; " + ", ".join(f"{name} {number}" for name, number in made_with.items())
    wrong, lines = list[str](), [HEADER.format(conditions=conditions, count=len(rows), all=len(ROWS))]
    for section, (title, about) in ABOUT.items():
        own = [(row, rows[row.name]) for row in SECTIONS[section]() if row.name in rows]
        wrong += [f"{row.name}: failed" for row, found in own if "failed" in found]
        own = [(row, found) for row, found in own if "failed" not in found]
        heads, cells, judge = (
            (SAMPLING_HEADS, sampling_cells, wrong_sampling) if section == "sampling" else (HEADS, cells_of, wrong_step)
        )
        lines += [f"## {title}", "", about, "", *markdown(heads, (cells(*each) for each in own)), ""]
        wrong += [f"{row.name}: {what}" for row, found in own for what in judge(row, found)]
    return "\n".join(lines), wrong


def markdown(heads: Sequence[str], lines: Iterable[Sequence[object]]) -> list[str]:
    return [f"| {' | '.join(map(str, row))} |" for row in (heads, ["---"] * len(heads), *lines)]


def cells_of(row: Row, found: dict[str, Any]) -> list[object]:
    kept = ", ".join(f"{n} {name}" for name, n in counted(found["policies"]).items())
    first = [
        row.gpu + (f", {row.total:g} GiB" if row.total and not (row.vram or row.policy) else ""),
        row.resolution,
        row.batch,
    ]
    weights = f"{row.format} {row.compute}" if row.format else f"{found['format']} {row.compute}, chosen"
    first = ["grows" if row.grows else "fixed", *first, weights]
    first += [f"{found['resident']} + {found['slots']}", kept, "yes" * found["offload"]]
    if "peak_gib" not in found:
        return [*first, *["out of memory"] * 6, "", ""]
    want, peak, reserved = predicted(row, found), found["peak_gib"], found["reserved_gib"]
    figures = [f"{want.peak:.2f}", f"{peak:.2f}", f"{peak / want.peak - 1:+.1%}"]
    figures += [f"{want.reserved:.2f}", f"{reserved:.2f}", f"{want.reserved / reserved - 1:+.1%}"]
    return [*first, *figures, f"{found['free_gib']:.2f}", found["retries"]]


def wrong_step(row: Row, found: dict[str, Any]) -> Iterator[str]:
    if "peak_gib" not in found:
        yield "out of memory"
        return
    want, peak, reserved = predicted(row, found), found["peak_gib"], found["reserved_gib"]
    if abs(peak / want.peak - 1) > ALIVE:
        yield f"{peak:.3f} GiB alive, {want.peak:.3f} predicted"
    if abs(want.reserved / reserved - 1) > RESERVED:
        yield f"{reserved:.3f} GiB reserved, {want.reserved:.3f} predicted"
    if found["refused"] or found["retries"]:
        yield f"{found['refused']} allocations refused, {found['retries']} tried again"
    if not found["norms"][0] or found["norms"][1]:
        yield f"{found['norms']} gradients of norms were computed from q and k, and from qkv"
    again = sum(policy == "recompute" for policy in found["policies"])
    if found["flash"] % (len(found["policies"]) + again) or not found["flash"]:
        yield f"flash attention ran {found['flash']} times"
    if (row.compute == "bf16") != (not found["eight_bits"]):
        yield f"{found['eight_bits']} products ran in 8 bits"


def sampling_cells(row: Row, found: dict[str, Any]) -> list[object]:
    want, peak, reserved = predicted_sampling(row, found), found["peak_gib"], found["reserved_gib"]
    gpu = row.gpu + (f", {row.total:g} GiB" if row.total else "")
    units = "all" if found["resident"] is None else f"{found['resident']} + {found['slots']}"
    first = ["grows" if row.grows else "fixed", gpu, row.resolution, f"{row.format} {row.compute}"]
    first += [f"{row.images} {'previews' if row.previews else 'images' if row.images > 1 else 'image'}", units]
    more = reserved - (found["step_gib"] or want)
    figures = [f"{want:.2f}", f"{peak:.2f}", f"{peak / want - 1:+.1%}", f"{reserved:.2f}", f"{more:.2f}"]
    return [*first, *figures, f"{found['free_gib']:.2f}"]


def predicted_sampling(row: Row, found: dict[str, Any]) -> float:
    """GiB alive while it denoises."""
    if row.previews:
        costs = costs_of(row)
        return (footprint.fixed(costs, residency_of(costs, found)) + max(b.forward_peak for b in costs.blocks)) / GIB
    costs = sampled_costs(row)
    if found["resident"] is None:
        everything = sum(costs.units.values()) + sum(costs.ahead.values())
        return (phases.forward_bytes(costs) + LORA_BYTES + everything) / GIB
    return phases.least_sampling_bytes(costs, LORA_BYTES, found["slots"], found["resident"]) / GIB


def wrong_sampling(row: Row, found: dict[str, Any]) -> Iterator[str]:
    want, unused = predicted_sampling(row, found), phases.UNUSED + phases.unused_beyond(tokens_of(row))
    if found["peak_gib"] > (most := predicted(row, found).peak if row.previews else (1 + ALIVE) * want):
        yield f"{found['peak_gib']:.3f} GiB alive, {most:.3f} allowed"
    allowed = found["step_gib"] or want + unused / GIB
    if found["reserved_gib"] > allowed:
        yield f"{found['reserved_gib']:.3f} GiB reserved, {allowed:.3f} allowed"
    if found["refused"] or found["retries"]:
        yield f"{found['refused']} allocations refused, {found['retries']} tried again"


HEADS = ["segments", "GPU", "px", "batch", "weights", "units", "blocks keep", "host", "predicted", "measured", ""]
HEADS += ["predicted", "measured", "", "free", "retries"]
SAMPLING_HEADS = ["segments", "GPU", "px", "weights", "what", "units", "predicted", "measured", "", "reserved", "more"]
SAMPLING_HEADS += ["free"]

HEADER = """# Predicted and measured memory, GiB

FLUX.1 dev, 512 T5 tokens, LoRA of rank 16 on attention and MLP, adamw8bit. **No GPU was used**: torch's CUDA build and
its real caching allocator ran against an emulated driver, without computing anything. What is allocated is exact;
nothing here is a time. `make emulated-memory` measures four steps a row, each row in a process of its own, and writes
this page.

{conditions}; {count} of {all} rows.

segments: whether those of the allocator can grow (fluxq/allocator.py); on Windows they cannot. units: resident + slots.
Predicted and measured first are bytes alive at the peak, then what the allocator reserved; the columns after them are
measured over predicted for bytes alive, within 1.5 %, and predicted over measured for what is reserved, within 5 %. All
steps took the gradient of the norms from q and k, and ran flash attention; those in 8 bits, and no others, multiplied
in 8 bits. Bytes alive include cuBLAS's workspaces. free: what torch could have had.
"""
ABOUT = {
    "roomy": (
        "With memory to spare",
        "What the allocator reserves if nothing makes it give back: plans for 6 to 16 GiB, and policies, with 24 GiB.",
    ),
    "batches": ("Of more than one image", "More rows than the 4,608 of one image of 1024 px, also with 24 GiB."),
    "default": (
        "As planned by default",
        """\
0.3 GiB are taken for the driver; torch is held to 0.4 GiB less than what is free. chosen: the format is the one that
`fluxq train` would choose by the GPU's nominal rates, with as much RAM as it wants.""",
    ),
    "sampling": (
        "Sampling",
        """\
Denoising, by `fluxq sample` and as previews of a run that trains; decoding is left out, since cuDNN does not run here.
Predicted and measured are bytes alive, within 1.5 %, and for previews less than a step has. more: what was reserved
beyond what is predicted, or for previews beyond what the steps before them had reserved.""",
    ),
}


if __name__ == "__main__":
    main()
