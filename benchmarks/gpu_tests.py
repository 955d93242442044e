"""The tests that need a GPU, file by file: kernels (instead of in the interpreter), the model, a whole run.

    python3 -m benchmarks.gpu_tests --out DIR [--jobs 4] [FILE ...]

Each file runs in its own process, so that a broken GPU context affects no other file. A file's row counts its tests and
lists failures and reasons for skips. The tests of streaming run a second time with PyTorch's sanitizer, which looks for
accesses that no event orders.
"""

from __future__ import annotations

import atexit
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.cases import Case, parser, run_part

ROOT = Path(__file__).parent.parent
FIRST = (
    "tests/test_gpu.py",
    "tests/kernels/test_whole_model.py",
    "tests/kernels/test_lora_linear.py",
    "tests/kernels/test_nf4.py",
    "tests/model/test_policies.py",
    "tests/model/test_flux.py",
)
SANITIZER = " under the sanitizer"
SANITIZED = f"tests/test_gpu.py{SANITIZER}"
STREAMING = "False-2-pinned or wait_on_the_host"
"""Its tests that copy units and block inputs on streams of their own. The sanitizer sees no copies of other threads."""
LAST = ("tests/kernels/test_compiles.py", "tests/kernels/test_aot.py")
"""They compile for other GPUs, and may take the time that is left."""


def main() -> None:
    made = parser(__doc__ or "")
    made.add_argument("files", nargs="*", help="default: tests/kernels, the model's tests and tests/test_gpu.py")
    made.add_argument("--jobs", type=int, default=max(1, min(4, (os.cpu_count() or 1) // 4)), help="files at a time")
    arguments = made.parse_args()

    def prepare(report: dict[str, Any]) -> Iterator[Case]:
        names = {file: f"tests: {file}" for file in arguments.files or files()}
        done = {row["case"] for row in report["rows"]}
        wanted = [f for f, name in names.items() if name not in done and re.search(arguments.only, name)]
        runs = Runs(wanted, arguments.jobs, arguments.deadline)
        for file, name in names.items():
            yield Case(name, partial(runs.outcome, file))

    run_part("tests", arguments, prepare)


def files() -> list[str]:
    """The most important files first, in case time runs out."""
    kernels = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "tests" / "kernels").glob("test_*.py"))
    return [*FIRST, *(file for file in kernels if file not in FIRST + LAST), SANITIZED, *LAST]


class Runs:
    """Test files, each in its own process, `jobs` at a time: they spend most of their time on the CPU, importing and
    compiling. They start in order.
    """

    def __init__(self, files: Sequence[str], jobs: int, deadline: float) -> None:
        self._waiting, self._jobs, self._deadline = list(files), jobs, deadline
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._folder = tempfile.TemporaryDirectory()
        threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs))} if jobs > 1 else {}
        deterministic = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}  # tests ask for deterministic products
        self._environment = os.environ | threads | deterministic
        atexit.register(self._stop)

    def outcome(self, file: str) -> dict[str, Any]:
        """The file's row, from pytest's report."""
        while file not in self._running:
            self._start()
        self._fill()
        code = wait(self._running[file], self._deadline)
        del self._running[file]
        self._fill()
        path = self._report(file)
        row = counted(path) if path.exists() else {"failed": f"pytest ended with {code} and left no report"}
        if code == 5:  # no test was collected
            return {"skipped": "; ".join(row.get("skips", {})) or "the file has no tests here"}
        return row if "failed" in row else row | {"ok": code == 0, "exit_code": code}

    def _fill(self) -> None:
        while self._waiting and sum(child.poll() is None for child in self._running.values()) < self._jobs:
            self._start()

    def _start(self) -> None:
        file = self._waiting.pop(0)
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", f"--junitxml={self._report(file)}"]
        environment = self._environment
        if file == SANITIZED:
            command += ["-k", STREAMING]
            environment = environment | {"TORCH_CUDA_SANITIZER": "1"}
        command.append(file.removesuffix(SANITIZER))
        self._running[file] = subprocess.Popen(command, cwd=ROOT, env=environment)

    def _report(self, file: str) -> Path:
        return Path(self._folder.name) / f"{re.sub('[/ ]', '-', file)}.xml"

    def _stop(self) -> None:
        for child in self._running.values():
            child.kill()


def wait(child: subprocess.Popen[bytes], deadline: float) -> int:
    """Wait; when time is up, interrupt the child so that it still reports, and kill it if it does not answer."""
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
