"""Every kernel compiled ahead of time for every GPU generation, on any machine, and checked against its promises.

    python -m benchmarks.aot [--out benchmarks/results/aot.md] [--json FILE] [--only NAME] [--jobs 2] [--quick]

The cases are those of fluxq/bench: each op runs on `meta` at FLUX.1's shapes, what it launches is recorded
(launches.py), and each distinct launch is compiled once. Triton compiles for a GPU that is not there; the `cuobjdump`
inside its wheel reads registers, stack, shared memory and opcodes of the result. Occupancy is predicted from them.
Exits with 1 if a kernel breaks a promise, and names it. Must run without TRITON_INTERPRET.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch

from benchmarks.accesses import widths
from benchmarks.launches import Launch, recording
from benchmarks.measure import conditions
from benchmarks.promises import Product, Promise, l2_bytes, label, promise
from fluxq.bench.kernel_cases import Layer, layer_shape
from fluxq.bench.memory_bound import RARE_STEPS, RARE_STORAGE, ROWS, STEPS, STORAGE, Sizes
from fluxq.kernels import COMPUTES, FORMATS
from fluxq.kernels import triton as ops
from fluxq.kernels.chunks import FEW_ROWS
from fluxq.kernels.rotation import rotation_block
from fluxq.kernels.triton import table
from fluxq.kernels.triton.shipped import GENERATIONS, SHARED_KIB

GPUS = {80: "A100", 86: "RTX 30", 89: "RTX 40", 90: "H100, H200", 120: "RTX 50"}
SHARED_SM_KIB = {80: 164, 86: 100, 89: 100, 90: 228, 120: 100}
WARPS_SM = {80: 64, 86: 48, 89: 48, 90: 64, 120: 48}


@dataclass
class Report:
    """What became of a launch on one GPU generation."""

    kernel: str
    case: str
    capability: int
    warps: int
    stages: int
    registers: int
    stack: int
    shared: int
    opcodes: dict[str, int]
    widths: dict[str, list[int]]
    occupancy: float
    l2_bytes: float | None = None  # of a product in 8 bits, for each operation
    broken: list[str] = field(default_factory=list)


def kernels() -> set[str]:
    """Every kernel that the Triton backend launches, by Launch.name, found in its source: the functions that say which
    arguments do not specialize them. Others are only called by these.
    """
    found = set()
    for path in (Path(ops.__file__).parent).glob("*.py"):
        text = path.read_text(encoding="utf-8")
        found |= {
            f"{path.stem}.{name}" for name in re.findall(r"^@triton\.jit\(.*\).*\ndef (_\w+)", text, re.MULTILINE)
        }
    return found


def run_cases(generation: int, formats: Sequence[str], device: str = "meta") -> Iterator[Any]:
    """Call every op, on every path and in every form that training uses, as on a GPU of that generation; layers in
    `formats`.
    """
    s = Sizes(torch.device(device))
    for make in (*STEPS.values(), *ROWS.values(), *RARE_STEPS.values()):
        yield make(s).run(ops)
    for make, layer in product(STORAGE.values(), ("mlp.0", "linear2")):
        yield make(s, *layer_shape(s, layer)).run(ops)
    for make in RARE_STORAGE.values():
        yield make(s, *layer_shape(s, "mlp.0")).run(ops)
    computes = [compute for compute in COMPUTES if generation >= 89 or not compute.startswith("fp8")]
    for format, compute in product(formats, computes):
        layer = Layer.random(s, (s.tokens, *layer_shape(s, "mlp.0")), format)
        yield layer.ours(layer.given(compute), compute)
        if compute == "int8_dx":
            rotation = rotation_block(s.width)
            yield layer.ours(layer.given(compute, rotation), compute, rotation=rotation)
        tile = table.SHIPPED["matmul_int8", generation, "large"]
        if compute == "int8_dx" and tile.block_m == 256:  # also the lower tile, for products of few tiles
            with table.using("matmul_int8", table.fitted(tile, 1, 1, 1)):
                yield layer.ours(layer.given(compute), compute)
        if compute == "fp8_dx" and generation >= 120:
            with on_path("matmul_fp8", generation, "triton"):  # also without block scales, in case they are slower
                yield layer.ours(layer.given(compute), compute)
    for format, rank in product(formats, (s.rank, 5)):  # 5: no multiple of 8, read number by number
        layer = Layer.random(replace(s, rank=rank), (s.tokens, *layer_shape(s, "mlp.0")), format)
        yield layer.ours(layer.given())
    for format, rows in product(formats, (s.tokens, 1, 64)):  # also where the table prefers another path
        layer = Layer.random(s, (rows, *layer_shape(s, "modulation")), format)
        with ExitStack() as paths:
            paths.enter_context(on_path(f"lora_linear_{format}", generation, "fused", rows))
            if rows <= FEW_ROWS:
                paths.enter_context(on_path(f"lora_linear_backward_{format}", generation, "fused", rows))
            yield layer.ours(layer.given())


def on_path(op: str, generation: int, path: str, rows: int = 1 << 20) -> Any:
    """Inside, `op` takes that path, in the tiles that the table has for it."""
    key = (op, generation, table.shape_class(op, rows))
    choice = table.SHIPPED.get(key) or table.SHIPPED[op, generation, "large"]
    return table.using(op, replace(choice, path=path))


def launches(generation: int, formats: Sequence[str] = FORMATS) -> dict[str, Launch]:
    """Label -> launch, each distinct one once. Launches that a label does not tell apart get what differs added."""
    with recording(generation) as recorded:
        for _ in run_cases(generation, formats):
            pass
    named: dict[str, Launch] = {}
    for launch in {launch.key: launch for launch in recorded}.values():
        name = label(launch)
        if name in named:
            name += f" ({', '.join(differences(named[name], launch))})"
        named[name] = launch
    return named


def hardest(named: Mapping[str, Launch], generation: int) -> list[str]:
    """One launch of each kernel for each kind of products in it: that from NF4, if there is one, or else the first.
    Kernels without products only for the oldest and the newest GPUs: between them, nothing that they use has changed.
    """
    chosen: dict[Any, str] = {}
    for name in sorted(named, key=lambda name: "nf4" not in name):
        launch = named[name]
        products = tuple(dot.kind for dot in promise(launch).dots)
        if products or generation in (GENERATIONS[0], GENERATIONS[-1]):
            chosen.setdefault((launch.name, products), name)
    return [name for name in named if name in chosen.values()]


def differences(first: Launch, other: Launch) -> list[str]:
    """The arguments by which two launches of a kernel differ."""
    found = []
    for i, name in enumerate(first.kernel.arg_names):
        a, b = ((x.signature[name], x.constants.get(name), x.attributes.get((i,))) for x in (first, other))
        if a != b:
            found.append(f"{name} {b[1] if b[0] == 'constexpr' else b[0]}")
    return found or [f"{other.warps} warps"]


def compiled(name: str, launch: Launch, generation: int, quick: bool = False) -> Report:
    """What the compiler makes of a launch. If `quick`, opcodes are read only where a promise is about them: cuobjdump
    needs as long to start disassembling a kernel as the compiler for all of it, and a spill shows in the stack too.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = launch.kernel.arg_names
    source = ASTSource(
        fn=launch.kernel,
        signature=dict(launch.signature),
        constexprs={(names.index(n),): value for n, value in launch.constants.items()},
        attrs=dict(launch.attributes),
    )
    options = {"num_warps": launch.warps, "num_stages": launch.stages, "maxnreg": launch.registers}
    made = triton.compile(source, target=GPUTarget("cuda", generation, 32), options=options)
    promised = promise(launch)
    usage, opcodes = read_cubin(made.asm["cubin"], not quick or bool(promised.dots) or promised.permutes is not None)
    accessed = widths(made.asm["llir"], [n for n in names if n not in launch.constants])
    report = Report(
        launch.name,
        name,
        generation,
        launch.warps,
        launch.stages,
        usage["REG"],
        usage["STACK"],
        made.metadata.shared,
        dict(sorted(opcodes.items())),
        {n: sorted(bits) for n, bits in accessed.items()},
        occupancy(generation, launch.warps, usage["REG"], made.metadata.shared),
    )
    if launch.name == "matmul_8bit._matmul_8bit":
        report.l2_bytes = l2_bytes(launch.constants["BLOCK_M"], launch.constants["BLOCK_N"])
    report.broken = broken_promises(promised, report)
    return report


def read_cubin(cubin: bytes, disassembled: bool) -> tuple[dict[str, int], Counter[str]]:
    """Registers and the like by cuobjdump's names, and how often each opcode is in the code, if it is disassembled."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    wanted = ["-res-usage", "-sass"] if disassembled else ["-res-usage"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        text = subprocess.run([tool, *wanted, path], capture_output=True, text=True, check=True).stdout
    numbers = {name: int(n) for name, n in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", text)}
    return numbers, Counter(re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?\s*([A-Z][\w.]*)", text, re.MULTILINE))


def occupancy(capability: int, warps: int, registers: int, shared: int) -> float:
    """The share of a multiprocessor's warps that can run at once, predicted from registers and shared memory."""
    per_warp = -(-registers * 32 // 256) * 256
    by_registers = 65536 // max(per_warp * warps, 1)
    by_shared = SHARED_SM_KIB[capability] * 1024 // (shared + 1024)
    blocks = min(by_registers, by_shared, WARPS_SM[capability] // warps)
    return blocks * warps / WARPS_SM[capability]


def broken_promises(promised: Promise, report: Report) -> list[str]:
    """What does not hold, a sentence each."""
    count, broken = total(report.opcodes), []
    if report.stack or count("LDL") or count("STL"):
        broken.append(f"spills: stack {report.stack}, LDL {count('LDL')}, STL {count('STL')}")
    if report.registers > 255:
        broken.append(f"{report.registers} registers")
    if report.shared > SHARED_KIB[report.capability] * 1024:
        broken.append(f"{report.shared / 1024:.0f} KiB of shared memory, {SHARED_KIB[report.capability]} at most")
    if promised.narrow is not None:
        too_narrow = {n: bits for n, bits in report.widths.items() if bits != [128] and n not in promised.narrow}
        broken += [f"{'- and '.join(map(str, bits))}-bit accesses through {n}" for n, bits in too_narrow.items()]
    for opcode, wanted in expected_products(promised.dots, report.capability, report.warps).items():
        unrolled = len(promised.dots) == 1 and count(opcode) and count(opcode) % wanted == 0
        if count(opcode) != wanted and not unrolled:
            broken.append(f"{count(opcode)} {opcode}, not {wanted}")
    if promised.permutes is not None and count("PRMT") > promised.permutes:
        broken.append(f"{count('PRMT')} PRMT, {promised.permutes} at most")
    return broken


def accesses(opcodes: Mapping[str, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """How many loads from global memory there are, of 128 bits and in all; and stores."""
    count = total(opcodes)
    loads, stores = (tuple(count(opcode, part) for part in (".128", "")) for opcode in ("LDG", "STG"))
    copies = tuple(count("LDGSTS", part) for part in (".128", ""))
    return (loads[0] + copies[0], loads[1] + copies[1]), (stores[0], stores[1])


def total(opcodes: Mapping[str, int]) -> Any:
    """count(opcode, part): how many instructions are of that opcode and have that part in their name."""
    return lambda opcode, part="": sum(
        n for name, n in opcodes.items() if (name == opcode or name.startswith(opcode + ".")) and part in name
    )


def expected_products(dots: Sequence[Product], capability: int, warps: int) -> Counter[str]:
    """How many tensor-core instructions of which opcode one warp needs for `dots`.

    One multiplies 16 x 8 x 16 (bf16) or 16 x 8 x 32 (8 bits) for a warp; on sm_90, from 64 rows on, 64 x n x 16 or 32
    for four warps. A warp without a 16 x 8 of its own multiplies what another one does.
    """
    opcode = {"bf16": "HMMA", "int8": "IMMA", "fp8": "QMMA", "fp8 scaled": "QMMA.SF"}
    wanted: Counter[str] = Counter()
    for dot in dots:
        steps = dot.k // (16 if dot.kind == "bf16" else 32)
        if capability == 90 and dot.m >= 64:
            wanted[opcode[dot.kind].replace("MMA", "GMMA")] += -(-dot.m // (64 * (warps // 4))) * steps
        else:
            wanted[opcode[dot.kind]] += -(-dot.m * dot.n // (16 * 8 * warps)) * steps
    return wanted


def table_of(reports: Sequence[Report]) -> str:
    """The reports as a page of markdown."""
    lines = [
        "# Kernels, compiled ahead of time",
        "",
        f"Made at {conditions('torch', 'triton')}. Nothing here was run: registers, shared memory and opcodes are",
        "the compiler's, occupancy is predicted from them. `make aot` writes this page.",
        "",
        "| kernel | GPU | warps | stages | registers | shared KiB | tensor cores | 128-bit loads, stores of all "
        "| bits of narrower ones | PRMT | occupancy (predicted) | L2 bytes an operation |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for r in reports:
        count = total(r.opcodes)
        products = ", ".join(f"{n} {name}" for name, n in r.opcodes.items() if "MMA" in name) or "-"
        wide = ", ".join(f"{wide} of {number}" for wide, number in accesses(r.opcodes))
        narrow = ", ".join(f"{n.removesuffix('_ptr')} {bits[0]}" for n, bits in r.widths.items() if bits[0] < 128)
        lines.append(
            f"| {r.case} | sm_{r.capability} ({GPUS[r.capability]}) | {r.warps} | {r.stages} | {r.registers} "
            f"| {r.shared / 1024:.1f} | {products} | {wide} | {narrow or '-'} | {count('PRMT')} | {r.occupancy:.0%} "
            f"| {'-' if r.l2_bytes is None else f'1/{1 / r.l2_bytes:.0f}'} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="the page to write")
    parser.add_argument("--json", type=Path, help="everything, for programs")
    parser.add_argument("--only", default="", help="kernels whose name contains this")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="one launch of each kernel for each kind of products in it; those without, for two GPUs",
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes that compile")
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        raise SystemExit("TRITON_INTERPRET is set: interpreted kernels cannot be compiled; unset it")
    work = []
    for gpu in GENERATIONS:
        named = launches(gpu, ["nf4"] if arguments.quick else FORMATS)
        chosen = hardest(named, gpu) if arguments.quick else named
        work += [(name, named[name], gpu, arguments.quick) for name in chosen if arguments.only in name]
    reports = []
    for report in compile_all(work, arguments.jobs):
        reports.append(report)
        print(
            f"{report.case} sm_{report.capability}: {report.registers} registers, {report.shared} bytes shared", end=""
        )
        print(f"  BROKEN: {'; '.join(report.broken)}" if report.broken else "", flush=True)
    places = {report.case: i for i, report in reversed([*enumerate(reports)])}
    reports.sort(key=lambda r: (places[r.case], r.capability))  # the GPUs of a kernel one after another
    if arguments.out:
        arguments.out.write_text(table_of(reports), encoding="utf-8")
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(r) for r in reports], indent=1) + "\n", encoding="utf-8")
    if any(r.broken for r in reports):
        raise SystemExit(1)


def compile_all(work: Sequence[tuple[str, Launch, int, bool]], jobs: int) -> Iterator[Report]:
    """Forked processes share `work`; launches cannot be pickled."""
    global _work
    _work = work
    with multiprocessing.get_context("fork").Pool(jobs) as pool:
        yield from pool.imap(_compile, range(len(work)))


_work: Sequence[tuple[str, Launch, int, bool]] = ()


def _compile(index: int) -> Report:
    return compiled(*_work[index])


if __name__ == "__main__":
    main()
