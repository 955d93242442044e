"""Do the tests notice when the code is wrong? 200 small wrong edits (edits.py), drawn by a seed; each is tried alone.

    python tests/mutation/run.py map --work DIR       which lines each test runs, and how long it takes
    python tests/mutation/run.py try --work DIR       the edits, one by one
    python tests/mutation/run.py table --work DIR     how many were caught; writes benchmarks/results/mutation.json

Every edit is made in a copy of the tree, and only tests that run its lines are run: the quickest first, until one fails
or they have used --cpu seconds. A test that needs ten times its usual time, as in an endless loop, has failed too.
`map` and `try` go on where they were stopped (--seconds), and several may run at once. Each test process is forked from
one that has imported torch and other libraries, but nothing of fluxq. Linux only.
"""

from __future__ import annotations

import argparse
import atexit
import compileall
import contextlib
import importlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from edits import Edit, chosen

ROOT = Path(__file__).resolve().parents[2]
SOURCES = (
    "fluxq/train.py", "fluxq/offload/ring.py", "fluxq/training/state.py", "fluxq/training/optim.py",
    "fluxq/caching/store.py", "fluxq/caching/batches.py",
)  # fmt: skip
TESTS = (
    "tests/offload/test_ring.py", "tests/offload/test_schedule.py", "tests/training", "tests/caching/test_batches.py",
    "tests/caching/test_store.py", "tests/caching/test_build.py", "tests/caching/test_import_foreign.py",
    "tests/commands/test_cache.py", "tests/memory/test_retry.py", "tests/test_train.py",
)  # fmt: skip
LIBRARIES = (
    "bitsandbytes", "click", "filelock", "matplotlib.figure", "matplotlib.backends.backend_agg", "PIL.Image", "rich",
    "safetensors.torch", "tokenizers",
)  # fmt: skip
SEED, COUNT = 13, 200


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("what", choices=("map", "try", "table"))
    made.add_argument("--work", type=Path, required=True, help="folder for the copy and what is known so far")
    made.add_argument("--seconds", type=float, default=3600, help="stop after about as long")
    made.add_argument("--cpu", type=float, default=60, help="of tests for one edit; default: %(default).0f")
    made.add_argument("--file", action="append", choices=SOURCES, help="only the edits of this file; default: all")
    made.add_argument("--again", action="store_true", help="try the edits that survived once more")
    arguments = made.parse_args()
    work = arguments.work.resolve()
    sources = {path: (ROOT / path).read_text() for path in SOURCES}
    edits = chosen(sources, COUNT, SEED)
    if arguments.what == "map":
        tree, end = copied(work), time.monotonic() + arguments.seconds
        for path in test_files():
            if not (known := work / "map" / f"{path.replace('/', '.')}.json").exists() and time.monotonic() < end:
                known.parent.mkdir(parents=True, exist_ok=True)
                status, seconds = forked(tree, lambda path=path, known=known: mapped(path, known), 600, tree / "output")
                print(f"{path} {status or 'passed'} in {seconds:.0f} s", flush=True)
    elif arguments.what == "try":
        tree, end = copied(work), time.monotonic() + arguments.seconds
        some = [edit for edit in edits if edit.path in (arguments.file or SOURCES)]
        try_all(some, sources, tree, work, end, arguments.cpu, arguments.again)
    else:
        table(edits, results(work))


def copied(work: Path) -> Path:
    """A copy of the tracked files, without what Python has compiled of SOURCES; and the libraries are imported."""
    work.mkdir(parents=True, exist_ok=True)
    tree = Path(tempfile.mkdtemp(prefix="tree-", dir=work))
    atexit.register(shutil.rmtree, tree, ignore_errors=True)
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tree / name)
    if (ROOT / ".venv").exists():
        (tree / ".venv").symlink_to((ROOT / ".venv").resolve())
    os.environ |= {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
    compileall.compile_dir(tree / "fluxq", quiet=1)
    os.environ["PYTHONDONTWRITEBYTECODE"], sys.dont_write_bytecode = "1", True
    for path in SOURCES:
        for compiled in (tree / path).parent.glob(f"__pycache__/{Path(path).stem}.*"):
            compiled.unlink()
    for name in LIBRARIES:
        importlib.import_module(name)
    return tree


def forked(tree: Path, work: Callable[[], int], seconds: float, output: Path) -> tuple[str, float]:
    """Do `work` in a child in `tree`: what went wrong ("" if it returned 0), and its CPU seconds with its children."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    child = os.fork()
    if not child:
        os.setsid()
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        os.chdir(tree)
        resource.setrlimit(resource.RLIMIT_CPU, (int(seconds) + 1, int(seconds) + 5))
        resource.setrlimit(resource.RLIMIT_AS, (24 << 30, 24 << 30))
        sys.path.insert(0, str(tree))
        os._exit(work())
    began = time.monotonic()
    while not (ended := os.waitpid(child, os.WNOHANG))[0]:
        if time.monotonic() - began > 3 * seconds + 30:  # it waits for what does not come
            os.killpg(child, signal.SIGKILL)
        time.sleep(0.02)
    status = ended[1]
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # what tests have left running
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    if os.WIFSIGNALED(status):
        return "too slow" if os.WTERMSIG(status) in (signal.SIGKILL, signal.SIGXCPU) else "crash", used
    return {0: "", 5: "no tests"}.get(os.WEXITSTATUS(status), "failed"), used


def test_files() -> list[str]:
    found = []
    for name in TESTS:
        path = ROOT / name
        found += sorted(path.glob("test_*.py")) if path.is_dir() else [path]
    return [str(path.relative_to(ROOT)) for path in found]


class Map:
    """A plugin of pytest: the lines of SOURCES that each test runs, and its CPU seconds."""

    def __init__(self) -> None:
        self.tests: dict[str, dict[str, Any]] = {}
        self.failed: set[str] = set()
        self.files = {str(Path.cwd() / path): path for path in SOURCES}

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        lines: set[tuple[str, int]] = set()

        def trace(frame: Any, event: str, argument: object) -> Any:
            if (path := self.files.get(frame.f_code.co_filename)) is None:
                return None
            lines.add((path, frame.f_lineno))
            return trace

        began = cpu()
        threading.settrace(trace)
        sys.settrace(trace)
        yield
        sys.settrace(None)
        threading.settrace(None)  # type: ignore[arg-type]
        hit: dict[str, list[int]] = {}
        for path, line in sorted(lines):
            hit.setdefault(path, []).append(line)
        self.tests[item.nodeid] = {"cpu": round(cpu() - began, 3), "lines": hit}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failed.add(report.nodeid)


def cpu() -> float:
    uses = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(use.ru_utime + use.ru_stime for use in uses)


def mapped(path: str, known: Path) -> int:
    plugin = Map()
    code = pytest.main(["-q", "-p", "no:xdist", path], plugins=[plugin])
    tests = {name: test for name, test in plugin.tests.items() if name not in plugin.failed}
    known.write_text(json.dumps(tests))
    return int(code)


class Only:
    """A plugin of pytest: only these tests, in this order."""

    def __init__(self, names: Sequence[str]) -> None:
        self.place = {name: place for place, name in enumerate(names)}

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = sorted((i for i in items if i.nodeid in self.place), key=lambda item: self.place[item.nodeid])


def tried(names: Sequence[str]) -> int:
    files = list(dict.fromkeys(name.split("::")[0] for name in names))
    return int(pytest.main(["-x", "-q", "-p", "no:xdist", "--tb=line", *files], plugins=[Only(names)]))


def tests_of(edit: Edit, known: Mapping[str, Any], cpu: float) -> tuple[list[str], float]:
    """The tests that run the lines of `edit`, quickest first, of at most `cpu` seconds; and their seconds.

    Lines that no test is known to run are run by imports: then these are the tests that run the file.
    """
    low, high = edit.lines
    run = [n for n, t in known.items() if any(low <= line <= high for line in t["lines"].get(edit.path, ()))]
    run = sorted(run or [n for n, t in known.items() if edit.path in t["lines"]], key=lambda name: known[name]["cpu"])
    names, used = [], 0.0
    for name in run:
        if used + known[name]["cpu"] <= cpu or not names:
            names.append(name)
            used += known[name]["cpu"]
    return names, used


def try_all(
    edits: Sequence[Edit], sources: Mapping[str, str], tree: Path, work: Path, end: float, cpu: float, again: bool
) -> None:
    known = {name: t for path in (work / "map").glob("*.json") for name, t in json.loads(path.read_text()).items()}
    survived = {name for name, row in results(work).items() if row["result"] == "survived"} if again else set()
    for number, edit in enumerate(edits):
        if time.monotonic() > end or str(edit) in results(work).keys() - survived:
            continue
        (tree / edit.path).write_text(edit.applied(sources[edit.path]))
        names, usual = tests_of(edit, known, cpu)
        result, seconds = forked(tree, lambda names=names: tried(names), 10 * usual + 20, tree / "output")
        (tree / edit.path).write_text(sources[edit.path])
        failing = [line for line in (tree / "output").read_text(errors="replace").splitlines() if line[:6] == "FAILED"]
        row = {"edit": str(edit), "result": result or "survived", "tests": len(names), "cpu": round(seconds, 1)}
        row |= {"by": failing[0].split()[1]} if failing else {}
        with (work / "results.jsonl").open("a") as file:
            print(json.dumps(row), file=file)
        print(f"{number:3} {row['result']:<9}{seconds:6.1f} s  {edit}", flush=True)


def results(work: Path) -> dict[str, dict[str, Any]]:
    """What is known of each edit; the last word counts."""
    path = work / "results.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {row["edit"]: row for row in rows}


def table(edits: Sequence[Edit], done: Mapping[str, Mapping[str, Any]]) -> None:
    rows = [done[str(edit)] for edit in edits if str(edit) in done]
    survived = [row for row in rows if row["result"] == "survived"]
    print(
        f"{len(rows)} of {len(edits)} tried, {len(rows) - len(survived)} caught ({1 - len(survived) / len(rows):.1%})"
    )
    for row in survived:
        print(f"  {row['tests']:3} tests  {row['edit']}")
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False).stdout
    report = {"commit": commit.strip(), "seed": SEED, "tried": len(rows), "caught": len(rows) - len(survived)}
    report["rows"] = [{key: row[key] for key in ("edit", "result", "by") if key in row} for row in rows]
    (ROOT / "benchmarks" / "results" / "mutation.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
