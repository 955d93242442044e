"""Every kernel compiled ahead of time for the GPUs in use, on any machine, and held against what it promised.

    python benchmarks/aot.py [--out benchmarks/results/aot.md] [--json FILE] [--only NAME]

Triton compiles for a GPU that is not there; the `cuobjdump` inside its wheel reads registers, stack, shared memory and
opcodes of the result. Occupancy is predicted from them. The cases lie in benchmarks/aot_cases/, a file a topic; this
must run without TRITON_INTERPRET. Ends with 1 where a case broke a promise, and names it.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT.parent))

from benchmarks.accesses import widths  # noqa: E402  (as a script it has no parent)
from fluxq.kernels.triton.shipped import GENERATIONS as CAPABILITIES  # noqa: E402
from fluxq.kernels.triton.shipped import SHARED_KIB  # noqa: E402

GPUS = {80: "A100", 86: "RTX 30", 89: "RTX 40", 90: "H100, H200", 120: "RTX 50"}
SHARED_SM_KIB = {80: 164, 86: 100, 89: 100, 90: 228, 120: 100}
WARPS_SM = {80: 64, 86: 48, 89: 48, 90: 64, 120: 48}


@dataclass(frozen=True)
class Product:
    """One `tl.dot` of a (m, k) by a (k, n) tile, of numbers of `kind`: "bf16", "int8", "fp8" or "fp8 scaled"."""

    m: int
    n: int
    k: int
    kind: str


@dataclass(frozen=True)
class Case:
    """A kernel at the tile sizes in use, and what is expected of its compilation.

    types: each argument's Triton type ("*bf16", "i32", "fp32"); `constants`: the constexpr arguments. Pointers and the
    integers named in `aligned` are multiples of 16. `registers`: the most that the compiler is told to use (maxnreg).
    `dots`: the products in the code, each as often as it stands there; where there is one, the assembler may unroll the
    loop around it. `narrow`: where the kernel waits for memory, the pointers through which it may move fewer than 128
    bits at a time, since what lies there is a few numbers of each row or block; through every other pointer each access
    is of 128. None: it does not wait for memory. `permutes`: the most byte permutes (PRMT) there may be.
    """

    name: str
    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any] = field(default_factory=dict)
    warps: int = 4
    stages: int = 3
    registers: int | None = None
    aligned: tuple[str, ...] = ()
    capabilities: tuple[int, ...] = CAPABILITIES
    dots: tuple[Product, ...] = ()
    narrow: tuple[str, ...] | None = None
    permutes: int | None = None


@dataclass
class Report:
    """What became of a case on one GPU."""

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
    broken: list[str] = field(default_factory=list)


def compile_case(case: Case, capability: int) -> Report:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = case.kernel.arg_names
    signature = {n: "constexpr" if n in case.constants else case.types[n] for n in names}
    divisible = {(i,) for i, n in enumerate(names) if signature[n].startswith("*") or n in case.aligned}
    source = ASTSource(
        fn=case.kernel,
        signature=signature,
        constexprs={(names.index(n),): v for n, v in case.constants.items()},
        attrs={i: [["tt.divisibility", 16]] for i in divisible},
    )
    options = {"num_warps": case.warps, "num_stages": case.stages, "maxnreg": case.registers}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    usage, opcodes = read_cubin(compiled.asm["cubin"])
    shared = compiled.metadata.shared
    report = Report(
        case.name,
        capability,
        case.warps,
        case.stages,
        usage["REG"],
        usage["STACK"],
        shared,
        dict(sorted(opcodes.items())),
        {
            n: sorted(bits)
            for n, bits in widths(compiled.asm["llir"], [n for n in names if n not in case.constants]).items()
        },
        occupancy(capability, case.warps, usage["REG"], shared),
    )
    unknown = {p.name for p in case.kernel.params if p.do_not_specialize}.intersection(case.aligned)
    report.broken = [f"{name} is aligned, but not specialized" for name in sorted(unknown)]
    report.broken += broken_promises(case, report)
    return report


def read_cubin(cubin: bytes) -> tuple[dict[str, int], Counter[str]]:
    """Registers and the like by cuobjdump's names, and how often each opcode stands in the code."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True).stdout
        code = subprocess.run([tool, "-sass", path], capture_output=True, text=True, check=True).stdout
    numbers = {name: int(n) for name, n in re.findall(r"(\w+):(\d+)", usage)}
    return numbers, Counter(re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?\s*([A-Z][\w.]*)", code, re.MULTILINE))


def occupancy(capability: int, warps: int, registers: int, shared: int) -> float:
    """The share of a multiprocessor's warps that can run at once, predicted from registers and shared memory."""
    per_warp = -(-registers * 32 // 256) * 256
    by_registers = 65536 // max(per_warp * warps, 1)
    by_shared = SHARED_SM_KIB[capability] * 1024 // (shared + 1024)
    blocks = min(by_registers, by_shared, WARPS_SM[capability] // warps)
    return blocks * warps / WARPS_SM[capability]


def broken_promises(case: Case, report: Report) -> list[str]:
    """What does not hold, a sentence each."""
    count, broken = total(report.opcodes), []
    if report.stack or count("LDL") or count("STL"):
        broken.append(f"spills: stack {report.stack}, LDL {count('LDL')}, STL {count('STL')}")
    if report.registers > 255:
        broken.append(f"{report.registers} registers")
    if report.shared > SHARED_KIB[report.capability] * 1024:
        broken.append(f"{report.shared / 1024:.0f} KiB of shared memory, {SHARED_KIB[report.capability]} at most")
    if case.narrow is not None:
        too_narrow = {n: bits for n, bits in report.widths.items() if bits != [128] and n not in case.narrow}
        broken += [f"{'- and '.join(map(str, bits))}-bit accesses through {n}" for n, bits in too_narrow.items()]
    for opcode, wanted in expected_products(case.dots, report.capability, case.warps).items():
        unrolled = len(case.dots) == 1 and count(opcode) and count(opcode) % wanted == 0
        if count(opcode) != wanted and not unrolled:
            broken.append(f"{count(opcode)} {opcode}, not {wanted}")
    if case.permutes is not None and count("PRMT") > case.permutes:
        broken.append(f"{count('PRMT')} PRMT, {case.permutes} at most")
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

    One multiplies 16 x 8 x 16 (bf16) or 16 x 8 x 32 (8 bits) for a warp; on sm_90, where there are 64 rows or more,
    64 x n x 16 or 32 for four warps. Warps that find no 16 x 8 of their own multiply what another does.
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


def cases() -> list[Case]:
    names = sorted(m.name for m in pkgutil.iter_modules([str(ROOT / "aot_cases")]))
    found = [case for name in names for case in importlib.import_module(f"benchmarks.aot_cases.{name}").CASES]
    places = {case.name: i for i, case in reversed([*enumerate(found)])}
    return sorted(found, key=lambda case: places[case.name])  # the GPUs of a kernel one after another


def table(reports: Sequence[Report]) -> str:
    """The reports as a page of markdown."""
    import triton

    lines = [
        "# Kernels, compiled ahead of time",
        "",
        f"Triton {triton.__version__}. Nothing here was run: registers, shared memory and opcodes are the compiler's,",
        "occupancy is predicted from them. `make aot` writes this page.",
        "",
        "| kernel | GPU | warps | stages | registers | shared KiB | tensor cores | 128-bit loads, stores of all "
        "| bits of narrower ones | PRMT | occupancy (predicted) |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for r in reports:
        count = total(r.opcodes)
        products = ", ".join(f"{n} {name}" for name, n in r.opcodes.items() if "MMA" in name) or "-"
        wide = ", ".join(f"{wide} of {number}" for wide, number in accesses(r.opcodes))
        narrow = ", ".join(f"{n.removesuffix('_ptr')} {bits[0]}" for n, bits in r.widths.items() if bits[0] < 128)
        lines.append(
            f"| {r.case} | sm_{r.capability} ({GPUS[r.capability]}) | {r.warps} | {r.stages} | {r.registers} "
            f"| {r.shared / 1024:.1f} | {products} | {wide} | {narrow or '-'} | {count('PRMT')} | {r.occupancy:.0%} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="the page to write")
    parser.add_argument("--json", type=Path, help="everything, for programs")
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        raise SystemExit("TRITON_INTERPRET is set: interpreted kernels cannot be compiled; unset it")
    reports = []
    for case in (c for c in cases() if arguments.only in c.name):
        for capability in case.capabilities:
            report = compile_case(case, capability)
            reports.append(report)
            print(f"{case.name} sm_{capability}: {report.registers} registers, {report.shared} bytes shared", end="")
            print(f"  BROKEN: {'; '.join(report.broken)}" if report.broken else "", flush=True)
    if arguments.out:
        arguments.out.write_text(table(reports), encoding="utf-8")
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(r) for r in reports], indent=1) + "\n", encoding="utf-8")
    if any(r.broken for r in reports):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
