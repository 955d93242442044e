"""Imports only go down: the rooms of fluxq and the floors they stand on, as docs/architecture.md draws them."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import fluxq

ROOT = Path(fluxq.__file__).parent
FLOORS = [  # from the ground up; a room may import itself and everything on a lower floor
    {"allocator", "errors", "names", "settings"},
    {"console"},
    {"nano"},
    {"kernels"},
    {"offload"},
    {"model"},
    {"formats"},
    {"data"},
    {"config"},
    {"config_files"},
    {"models", "pages"},
    {"memory", "captioning"},
    {"caching"},
    {"flow"},
    {"sampling"},
    {"training"},
    {"compat"},
    {"train"},
    {"commands", "bench"},
    {"cli"},
    {"__main__"},
]
MODULES = {  # dotted name -> file
    ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(ROOT.rglob("*.py"))
}


def floor(room: str) -> int:
    return next(i for i, rooms in enumerate(FLOORS) if room in rooms)


def room_of(module: str) -> str:
    """The file or folder at the top of fluxq: "fluxq.caching.store" -> "caching"."""
    return module.split(".")[1]


def imports(module: str) -> Iterator[tuple[str, int]]:
    """Every module of fluxq that `module` imports anywhere, also late or for types, and the dots before its name."""
    path = MODULES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, 0) for alias in node.names if alias.name.split(".")[0] == "fluxq")
        elif isinstance(node, ast.ImportFrom):
            up = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*up, *([node.module] if node.module else [])])
            if base.split(".")[0] == "fluxq":
                for alias in node.names:
                    name = f"{base}.{alias.name}"
                    yield (name if name in MODULES else base), node.level


@pytest.mark.parametrize("module", [m for m in MODULES if m != "fluxq"])
def test_imports_only_go_down(module):
    own = room_of(module)
    for imported, dots in imports(module):
        other = room_of(imported)
        assert other == own or floor(other) < floor(own), f"{module} (floor {floor(own)}) imports {imported}"
        assert bool(dots) == (other == own), f"{module}: imports are relative inside a room, else absolute"


def test_every_room_has_a_floor():
    assert {room_of(module) for module in MODULES if module != "fluxq"} == set().union(*FLOORS)


@pytest.mark.slow
def test_no_two_files_import_each_other():
    """Nor in a longer circle. A package's __init__ is its face: it may import what is in it, never the reverse."""
    below = {module: {imported for imported, _ in imports(module)} - {module} for module in MODULES}
    done: set[str] = set()

    def visit(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, " -> ".join([*above[above.index(module) :], module])
        if module not in done:
            for imported in sorted(below[module]):
                visit(imported, (*above, module))
            done.add(module)

    for module in MODULES:
        visit(module, ())


@pytest.mark.slow
def test_importing_fluxq_works_without_triton_bitsandbytes_and_transformers():
    """They are imported where they are used: the package trains without the first, and starts without the others."""
    code = (
        "import sys\n"
        "absent = 'triton', 'bitsandbytes', 'transformers', 'torchao', 'diffusers', 'peft', 'gguf'\n"
        "sys.modules |= dict.fromkeys(absent)\n"
        "import fluxq.train, fluxq.commands.sample, fluxq.commands.demo\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
