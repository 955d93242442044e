"""Small wrong edits of a Python file, as a tired programmer makes them. A test suite that misses one has a hole there.

Each edit replaces one expression or statement in the text: a comparison or a sign is flipped, a number is one off, a
condition is negated, a `not` is gone, `and` is `or`, two arguments are swapped, a statement is missing. Annotations,
decorators and text are left alone.
"""

from __future__ import annotations

import ast
import copy
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

COMPARISONS = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
}  # fmt: skip
SIGNS = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.FloorDiv: ast.Mult}  # / joins paths too
SKIPPED = {"annotation", "returns", "decorator_list"}


@dataclass(frozen=True)
class Edit:
    """Bytes `start` to `end` of the file become `new`. lines: the first and the last of the statement."""

    path: str
    place: str  # line:column
    kind: str
    start: int
    end: int
    old: str
    new: str
    lines: tuple[int, int]

    def applied(self, source: str) -> str:
        text = source.encode()
        return (text[: self.start] + self.new.encode() + text[self.end :]).decode()

    def __str__(self) -> str:
        old, new = (" ".join(text.split()) for text in (self.old, self.new))
        return f"{self.path}:{self.place} {self.kind}: {old} -> {new}"


def chosen(sources: Mapping[str, str], count: int, seed: int) -> list[Edit]:
    """`count` edits out of all of `sources` (path -> text), the same for the same seed."""
    everything = [edit for path, source in sorted(sources.items()) for edit in edits(path, source)]
    return random.Random(seed).sample(everything, min(count, len(everything)))


def edits(path: str, source: str) -> list[Edit]:
    """Every edit of a file, in the order of the text."""
    text = source.encode()
    starts = [0]
    for line in text.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    found = []
    for node, kind, new, statement in _changes(ast.parse(source)):
        start, end = (starts[row - 1] + column for row, column in _span(node))
        body = getattr(statement, "body", None)
        last = body[0].lineno - 1 if isinstance(body, list) else statement.end_lineno
        lines = (statement.lineno, max(statement.lineno, last))
        place = f"{node.lineno}:{node.col_offset + 1}"
        found.append(Edit(path, place, kind, start, end, text[start:end].decode(), new, lines))
    return sorted(found, key=lambda edit: (edit.start, edit.end, edit.kind))


def _span(node: Any) -> tuple[tuple[int, int], tuple[int, int]]:
    return (node.lineno, node.col_offset), (node.end_lineno, node.end_col_offset)


def _changes(tree: ast.AST) -> Iterator[tuple[Any, str, str, Any]]:
    """(node, kind, its new text, the statement it is in)."""
    waiting: list[tuple[ast.AST, Any]] = [(tree, None)]
    while waiting:
        node, statement = waiting.pop()
        if isinstance(node, ast.stmt):
            statement = node
            if _can_be_missing(node):
                yield node, "missing statement", "pass", statement
        elif isinstance(node, ast.expr):
            for kind, new in _wrong(node):
                yield node, kind, new, statement
        for condition in _conditions(node):
            if isinstance(condition, ast.UnaryOp) and isinstance(condition.op, ast.Not):
                yield condition, "no not", ast.unparse(condition.operand), statement or condition
            else:
                yield condition, "negated", f"(not ({ast.unparse(condition)}))", statement or condition
        for name, value in ast.iter_fields(node):
            children = value if isinstance(value, list) else [value]
            if name not in SKIPPED:
                waiting += [(c, statement) for c in children if isinstance(c, ast.AST) and not _is_text(c)]


def _is_text(node: ast.AST) -> bool:
    text = isinstance(node, ast.Constant) and isinstance(node.value, str | bytes)
    return text or isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Expr) and _is_text(node.value))


def _can_be_missing(node: ast.stmt) -> bool:
    """Calls, raises, and assignments to anything but a local name, which would be missed at its next use."""
    if isinstance(node, ast.Assign):
        return not all(isinstance(name, ast.Name) for target in node.targets for name in _parts(target))
    if isinstance(node, ast.Expr):
        return isinstance(node.value, ast.Call)
    return isinstance(node, ast.AugAssign | ast.Raise)


def _parts(target: ast.expr) -> list[ast.expr]:
    return target.elts if isinstance(target, ast.Tuple | ast.List) else [target]


def _conditions(node: ast.AST) -> list[ast.expr]:
    if isinstance(node, ast.If | ast.While | ast.IfExp):
        return [node.test]
    return node.ifs if isinstance(node, ast.comprehension) else []


def _wrong(node: ast.expr) -> Iterator[tuple[str, str]]:
    other: Any = copy.deepcopy(node)
    if isinstance(node, ast.Compare) and len(node.ops) == 1:
        other.ops = [COMPARISONS[type(node.ops[0])]()]
        yield "comparison", f"({ast.unparse(other)})"
    elif isinstance(node, ast.BinOp) and type(node.op) in SIGNS:
        other.op = SIGNS[type(node.op)]()
        yield "sign", f"({ast.unparse(other)})"
    elif isinstance(node, ast.BoolOp):
        other.op = ast.Or() if isinstance(node.op, ast.And) else ast.And()
        yield "and/or", f"({ast.unparse(other)})"
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool | int | float):
        value = node.value
        yield "constant", repr(not value if isinstance(value, bool) else value + 1)
    elif isinstance(node, ast.Call) and len(node.args) > 1:
        first, second, *rest = node.args
        if not any(isinstance(a, ast.Starred) for a in (first, second)) and ast.dump(first) != ast.dump(second):
            other.args = [second, first, *rest]
            yield "swapped arguments", ast.unparse(other)
