"""What the planner chooses for common GPUs: writes benchmarks/results/plans.md. Nothing in it is measured.

python -m benchmarks.plans [--out FILE]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.measure import conditions
from fluxq.errors import WrongRequest
from fluxq.kernels.chunks import chunk_of
from fluxq.model import FluxConfig
from fluxq.model.costs import flux_costs
from fluxq.offload.costs import OWNERS, Costs
from fluxq.offload.gpus import GIB, GPUS
from fluxq.offload.launches import LAUNCH_US
from fluxq.offload.planner import STEP_MARGIN, least, plan
from fluxq.offload.plans import Pins, Plan, counted

SIZES = (512, 768, 1024)
TEXT, RANK = 512, 16
ROWS = (  # GPU, GiB of RAM
    ("rtx3070", 16),
    ("rtx4060", 16),
    ("rtx3080", 24),
    ("rtx3060", 24),
    ("rtx4070", 24),
    ("rtx4060ti", 32),
    ("rtx5060ti", 32),
    ("rtx4080", 32),
    ("rtx5080", 32),
    ("rtx3090", 32),
    ("rtx4090", 32),
)
FORMATS, COMPUTES = ("nf4", "int8", "bf16"), ("bf16", "int8")
LARGEST = "h200"

Tables = dict[tuple[int, int, str, str], Costs]
"""(compute capability, pixels, format, compute) -> costs."""

HEADER = f"""# Plans, predicted

What fluxq's planner chooses for FLUX.1 dev, one image per step, {TEXT} T5 tokens, LoRA of rank {RANK} on attention and
MLP, adamw8bit, in nf4, int8 or bf16: the most accurate of the fastest. **Every figure is predicted, none is measured**:
bytes by the planner's own count, seconds from the GPUs' nominal rates and assumed efficiencies (fluxq/offload/gpus.py).
Each GPU is in the widest slot it can use and has RAM of common size. What the allocator reserves, which is more than
what is alive, stays {STEP_MARGIN / GIB:.2f} GiB below its memory; its segments can grow (Linux). `make plans` writes
this page. Made at {{conditions}}.

units: resident + streamed through slots; of equally fast plans the one that copies least is taken, as long as it leaves
a tenth of the memory free. host: the inputs of blocks are stored in RAM. Peak: bytes alive, and reserved by the
allocator. waits: the share of the step in which compute waits for copies, by the ring under a virtual clock, including
the passes that compute modulation ahead. Python: seconds in which it launches the step's kernels, at {LAUNCH_US:g} us
each (fluxq/offload/launches.py); no step is faster.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "plans.md")
    out = parser.parse_args().out
    gpus = {GPUS[name].capability: GPUS[name] for name in (*(name for name, _ in ROWS), LARGEST)}
    tables = {
        (capability, size, format, compute): flux_costs(
            FluxConfig.dev(),
            format,
            compute,
            RANK,
            img_tokens=(size // 16) ** 2,
            txt_tokens=TEXT,
            chunk=chunk_of(capability),
            library=gpu.library,
        )
        for capability, gpu in gpus.items()
        for size in SIZES
        for format in FORMATS
        for compute in COMPUTES
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(
        "\n".join([HEADER.format(conditions=conditions("torch")), *section(tables), *smallest(tables), ""]),
        encoding="utf-8",
    )


def section(tables: Tables) -> list[str]:
    """One table per compute."""
    lines = []
    for compute in COMPUTES:
        lines += [f"## Multiplied in {compute}", ""]
        lines += [
            "| GPU | GiB | px | format | units | blocks keep | host | peak GiB | RAM GiB | s/step | waits | Python |"
        ]
        lines += ["|---" * 12 + "|"]
        for name, ram in ROWS:
            for size in SIZES:
                costs = [tables[GPUS[name].capability, size, format, compute] for format in FORMATS]
                try:
                    cells = row(plan(costs, GPUS[name], ram=ram * GIB))
                except WrongRequest as error:
                    cells = str(error)
                lines.append(f"| {name} | {GPUS[name].memory_gib:g} | {size} | {cells} |")
        lines.append("")
    return lines


def row(found: Plan) -> str:
    kept = ", ".join(f"{n} {name}" for name, n in counted(found.policies).items())
    units = f"{len(found.resident)} + {found.streamed} in {found.slots}"
    cells = [
        found.format,
        units,
        kept,
        "yes" if found.offload else "",
        f"{found.peak_bytes / GIB:.1f}, {found.reserved / GIB:.1f}",
    ]
    cells += [
        f"{found.host / GIB:.1f}",
        f"{found.seconds:.2f}",
        f"{found.stall / found.gpu_seconds:.0%}",
        f"{found.launching:.2f}",
    ]
    return " | ".join(cells)


def smallest(tables: Tables) -> list[str]:
    """The least GPU memory that each resolution needs, and its owners."""
    capability = GPUS[LARGEST].capability
    about = "nf4 multiplied in bf16, all units streamed through 8 slots. Aims for a GPU, with recompute: at 1024 px at "
    about += "most 4.6 GiB, 3.2 with inputs on the host; at 512 px 3.0 and 2.5."
    lines = ["## The least of a GPU, GiB", "", about, ""]
    lines += [f"| px | policy | host | {' | '.join(OWNERS)} | together |", "|---|---|---|" + "---|" * 7]
    for size in SIZES:
        costs = tables[capability, size, "nf4", "bf16"]
        for policy, offload in (("recompute", True), ("recompute", False), ("keep_all", False)):
            pins = Pins(policy=policy, offload=offload, resident_units=0, slots=8)
            found = plan([costs], GPUS[LARGEST], pins=pins)
            cells = " | ".join(f"{found.peak[owner] / GIB:.2f}" for owner in OWNERS)
            lines.append(f"| {size} | {policy} | {'yes' if offload else ''} | {cells} | {found.peak_bytes / GIB:.2f} |")
    needed = ", ".join(
        f"{size} px {least(tables[capability, size, 'nf4', 'bf16'], margin=0) / GIB:.2f}" for size in SIZES
    )
    return [*lines, "", f"The least that any plan needs, with as few slots as it can: {needed}."]


if __name__ == "__main__":
    main()
