"""README names five files that tell the whole method, with their lengths. They stay short, and the lengths true."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
FILES = ("train.py", "flow.py", "model/flux.py", "model/blocks.py", "kernels/lora_linear.py")


def length(path: str) -> int:
    return len((ROOT / "fluxq" / path).read_text(encoding="utf-8").splitlines())


def test_readme_gives_the_length_of_each_file():
    rows = re.findall(r"\| \[fluxq/(\S+)\]\(fluxq/\1\) \| (\d+) \|", README)
    assert dict(rows) == {path: str(length(path)) for path in FILES}
    assert re.search(r"Five files contain the whole method, ([\d,]+) lines in total", README)[1] == f"{total():,}"


def total() -> int:
    return sum(map(length, FILES))


def test_the_five_files_have_at_most_1000_lines():
    assert total() <= 1000


def test_the_loop_is_a_page():
    tree = ast.parse((ROOT / "fluxq" / "train.py").read_text(encoding="utf-8"))
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    for function in (functions["train"], functions["train_in"]):
        assert function.end_lineno - function.lineno + 1 <= 80
        nested = [node for node in ast.walk(function) if isinstance(node, ast.FunctionDef | ast.Lambda)]
        assert nested == [function], "what the loop needs has a name outside it"
    assert any(isinstance(node, ast.For) for node in ast.walk(functions["train_in"])), "the loop"


def test_architecture_names_every_room():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    for path in (ROOT / "fluxq").iterdir():
        if path.suffix == ".py" and path.name != "__init__.py" or (path / "__init__.py").exists():
            assert path.name in text, path.name
