"""The edits that the suite is judged by: each changes the text, can be compiled, and is drawn the same again."""

from __future__ import annotations

import ast

from mutation.edits import chosen, edits

SOURCE = '''"""Docs."""


@cached(size=4)
def f(a: int = 3, *, b: float) -> None:
    """Docs, too."""
    if not a and b < 2.5:
        self.x = g("text", b, f"{a + 1}")
    return a - 1 if a is None else b
'''


def test_edits_are_small_wrong_and_all_of_them_valid():
    found = edits("f.py", SOURCE)
    assert [(edit.kind, edit.lines[0], edit.new) for edit in found] == [
        ("constant", 5, "4"),
        ("and/or", 7, "(not a or b < 2.5)"),
        ("negated", 7, "(not (not a and b < 2.5))"),
        ("comparison", 7, "(b <= 2.5)"),
        ("constant", 7, "3.5"),
        ("missing statement", 8, "pass"),
        ("swapped arguments", 8, "g(b, 'text', f'{a + 1}')"),
        ("sign", 9, "(a + 1)"),
        ("constant", 9, "2"),
        ("comparison", 9, "(a is not None)"),
        ("negated", 9, "(not (a is None))"),
    ]
    for edit in found:
        assert ast.dump(ast.parse(edit.applied(SOURCE))) != ast.dump(ast.parse(SOURCE))


def test_the_same_seed_draws_the_same_edits():
    sources = {"f.py": SOURCE, "g.py": "x = 1 + y\n"}
    assert (
        chosen(sources, 5, seed=1) == chosen(dict(reversed(sources.items())), 5, seed=1) != chosen(sources, 5, seed=2)
    )
