"""Imports only go down: the floors of the house, as README.md draws them."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import fluxq

ROOT = Path(fluxq.__file__).parent
FLOORS = [  # from the ground up; what stands on one floor may import its own folder and everything below
    {"allocator", "errors", "quiet", "machine"},
    {"kernels"},
    {"offload"},
    {"model"},
    {"formats"},
    {"data"},
    {"nano", "config", "flow", "optim", "state", "report", "hub"},
    {"tuning", "timing", "random_model", "kernel_steps", "options"},
    {"models", "timed_step", "from_lora"},
    {"memory", "kernel_cases", "measured_row"},
    {"defaults"},
    {"run", "turns", "room", "check_file"},
    {"cache", "check", "lora", "quantize", "bench_kernels", "bench_steps", "profile"},
    {"sample", "bench_compare"},
    {"train"},
    {"demo"},
    {"cli_bench", "cli_lora"},
    {"cli"},
]
MODULES = sorted(ROOT.rglob("*.py"))


def part(module: str) -> str | None:
    """The file or folder of fluxq that a dotted name lies in: "fluxq.data.store" -> "data"."""
    pieces = module.split(".")
    return pieces[1] if pieces[0] == "fluxq" and len(pieces) > 1 else None


def floor(name: str) -> int:
    return next(i for i, names in enumerate(FLOORS) if name in names)


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_only_go_down(path):
    own = path.relative_to(ROOT).with_suffix("").parts[0]
    if own == "__init__":
        return
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.ImportFrom) and not node.level:
            names = [f"{node.module}.{alias.name}" if node.module == "fluxq" else node.module for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for imported in {part(name) for name in names if name} - {None, own}:
            assert floor(imported) < floor(own), (
                f"{own} (floor {floor(own)}) imports {imported} (floor {floor(imported)})"
            )


def test_every_part_has_a_floor():
    parts = {p.relative_to(ROOT).with_suffix("").parts[0] for p in MODULES} - {"__init__"}
    assert parts == set().union(*FLOORS)


def test_importing_fluxq_works_without_triton_bitsandbytes_and_transformers():
    """They are imported where they are used: the package trains without the first, and starts without the others."""
    code = (
        "import sys\n"
        "absent = 'triton', 'bitsandbytes', 'transformers', 'torchao', 'diffusers', 'peft', 'gguf'\n"
        "sys.modules |= dict.fromkeys(absent)\n"
        "import fluxq.train, fluxq.sample, fluxq.demo\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
