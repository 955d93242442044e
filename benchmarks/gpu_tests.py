"""The tests that a GPU decides, file by file: kernels on it instead of in the interpreter, the model, a whole run.

    python3 -m benchmarks.gpu_tests --out DIR [FILE ...]

A file runs in a process of its own: what breaks the GPU's context there breaks nothing else. The row of a file counts
its tests and has what failed, and why others were skipped.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.cases import Case, parser, run_part

ROOT = Path(__file__).parent.parent
LAST = "test_aot.py"
"""Compiles for GPUs that are not there: it may take the time that is left."""


def main() -> None:
    made = parser(__doc__ or "")
    made.add_argument("files", nargs="*", help="default: tests/kernels, the model's tests and tests/test_gpu.py")
    arguments = made.parse_args()

    def prepare(report: dict[str, Any]) -> Iterator[Case]:
        for file in arguments.files or files():
            yield Case(f"tests: {file}", partial(outcome, file, arguments.deadline))

    run_part("tests", arguments, prepare)


def files() -> list[str]:
    kernels = sorted((ROOT / "tests" / "kernels").glob("test_*.py"), key=lambda path: (path.name == LAST, path))
    first = ["tests/test_gpu.py", "tests/model/test_flux.py", "tests/model/test_policies.py"]
    return [*first, *(path.relative_to(ROOT).as_posix() for path in kernels)]


def outcome(file: str, deadline: float) -> dict[str, Any]:
    """What pytest says of the file's tests."""
    environment = os.environ | {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}  # tests ask for deterministic products
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "junit.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", f"--junitxml={path}", file]
        child = subprocess.Popen(command, cwd=ROOT, env=environment)
        code = wait(child, deadline)
        row = counted(path) if path.exists() else {"failed": f"pytest ended with {code} and left no report"}
    if code == 5:  # no test was collected
        return {"skipped": "; ".join(row.get("skips", {})) or "the file has no tests here"}
    return row if "failed" in row else row | {"ok": code == 0, "exit_code": code}


def wait(child: subprocess.Popen[bytes], deadline: float) -> int:
    """Interrupted when time is up, so that it still reports; killed where it does not answer."""
    try:
        return child.wait(max(1.0, deadline - time.time()))
    except subprocess.TimeoutExpired:
        child.send_signal(signal.SIGINT)
    try:
        return child.wait(10)
    except subprocess.TimeoutExpired:
        child.kill()
        return child.wait()


def counted(path: Path) -> dict[str, Any]:
    """passed, failures (name -> message), skips (reason -> how many) and seconds of a JUnit report."""
    passed, failures, skips = 0, {}, Counter()
    root = ElementTree.parse(path).getroot()
    for case in root.iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}"
        bad = [*case.iter("failure"), *case.iter("error")]
        skipped = case.find("skipped")
        if bad:
            failures[name] = ((bad[0].get("message") or "") + "\n" + (bad[0].text or ""))[:3000]
        elif skipped is not None:
            skips[reason(skipped)] += 1
        else:
            passed += 1
    return {"passed": passed, "failures": failures, "skips": dict(skips)}


def reason(skipped: ElementTree.Element) -> str:
    """Why a test, or a whole file, was skipped."""
    message, text = skipped.get("message") or "", skipped.text or ""
    return (
        message
        if message != "collection skipped"
        else text.split("Skipped: ")[-1].removesuffix('")').removesuffix("')")
    )


if __name__ == "__main__":
    main()
