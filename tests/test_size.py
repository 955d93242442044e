"""The size budget: code lines per room, against the table in pyproject.toml. `make size` prints it.

A code line has code on it: blank lines, comments and docstrings do not count. A room that grows beyond its row fails
this test; raising the row is a commit of its own that says why.
"""

from __future__ import annotations

import io
import tokenize
import tomllib
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LIMITS: dict[str, int] = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["fluxq"]["lines"]
BREAKS = {tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
NOT_CODE = {*BREAKS, tokenize.COMMENT, tokenize.NL, tokenize.ENDMARKER}


def code_lines(source: str) -> int:
    """How many lines of `source` have code on them."""
    lines: set[int] = set()
    tokens = [
        t
        for t in tokenize.generate_tokens(io.StringIO(source).readline)
        if t.type not in (tokenize.NL, tokenize.COMMENT)
    ]
    for before, token, after in zip([None, *tokens], tokens, tokens[1:], strict=False):
        docstring = (
            token.type == tokenize.STRING and after.type == tokenize.NEWLINE and (not before or before.type in BREAKS)
        )
        if token.type not in NOT_CODE and not docstring:
            lines.update(range(token.start[0], token.end[0] + 1))
    return len(lines)


def room_of(path: Path) -> str:
    """fluxq's rooms are its folders and the files at its top; everything else counts by its top folder."""
    parts = path.relative_to(ROOT).parts
    if parts[0] != "fluxq":
        return parts[0]
    return "/".join(parts[:2]) if len(parts) > 2 else "fluxq/*.py"


def rooms() -> dict[str, list[Path]]:
    """Every room's files."""
    found = defaultdict(list)
    for folder in ("fluxq", "benchmarks", "tests"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            found[room_of(path)].append(path)
    return found


def lines_of(paths: list[Path]) -> int:
    return sum(code_lines(path.read_text(encoding="utf-8")) for path in paths)


@pytest.mark.slow
@pytest.mark.parametrize("room", sorted({*rooms(), *LIMITS}))
def test_a_room_keeps_to_its_budget(room):
    assert room in LIMITS, f"{room} has no row in pyproject.toml's [tool.fluxq.lines]"
    lines = lines_of(rooms().get(room, []))
    assert 0 < lines <= LIMITS[room], f"{room} has {lines} code lines, more than the {LIMITS[room]} in pyproject.toml"


def test_only_code_counts():
    assert code_lines('"""Docs.\n\nMore."""\n\nx = """a\nb"""  # why\n\n\n# only a comment\ny = (\n    1\n)\n') == 5


def main() -> None:
    lines = {room: lines_of(paths) for room, paths in sorted(rooms().items())}
    for room, count in lines.items():
        print(f"{room:<18}{count:>7}{LIMITS.get(room, 0):>7}")
    print(f"{'fluxq':<18}{sum(count for room, count in lines.items() if room.startswith('fluxq')):>7}")


if __name__ == "__main__":
    main()
