"""The size budget: code lines per room, against the table in pyproject.toml. `make size` prints it.

A code line has code on it: blank lines, comments and docstrings do not count. A room that grows beyond its row fails
this test; raising the row is a commit of its own that says why.
"""

from __future__ import annotations

import ast
import io
import tokenize
import tomllib
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LIMITS: dict[str, int] = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["fluxq"]["lines"]
NOT_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


def code_lines(source: str) -> int:
    """How many lines of `source` have code on them."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in NOT_CODE:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            lines.difference_update(range(node.lineno, (node.end_lineno or 0) + 1))
    return len(lines)


def room_of(path: Path) -> str:
    """fluxq's rooms are its folders and the files at its top; everything else counts by its top folder."""
    parts = path.relative_to(ROOT).parts
    if parts[0] != "fluxq":
        return parts[0]
    return "/".join(parts[:2]) if len(parts) > 2 else "fluxq/*.py"


def counted() -> Counter[str]:
    rooms = Counter[str]()
    for folder in ("fluxq", "benchmarks", "tests"):
        for path in (ROOT / folder).rglob("*.py"):
            rooms[room_of(path)] += code_lines(path.read_text(encoding="utf-8"))
    return rooms


@pytest.mark.parametrize("room", sorted({*counted(), *LIMITS}))
def test_a_room_keeps_to_its_budget(room):
    assert room in LIMITS, f"{room} has no row in pyproject.toml's [tool.fluxq.lines]"
    lines = counted()[room]
    assert 0 < lines <= LIMITS[room], f"{room} has {lines} code lines, more than the {LIMITS[room]} in pyproject.toml"


def test_only_code_counts():
    assert code_lines('"""Docs.\n\nMore."""\n\nx = """a\nb"""  # why\n\n\n# only a comment\ny = (\n    1\n)\n') == 5


def main() -> None:
    rooms = counted()
    for room in sorted(rooms):
        print(f"{room:<18}{rooms[room]:>7}{LIMITS.get(room, 0):>7}")
    print(f"{'fluxq':<18}{sum(n for room, n in rooms.items() if room.startswith('fluxq')):>7}")


if __name__ == "__main__":
    main()
