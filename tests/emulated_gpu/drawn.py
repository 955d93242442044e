"""As much of what the emulated GPU shows as fits into three minutes, drawn by commit: in time, all of it is checked.

    python tests/emulated_gpu/drawn.py [--commit HASH] [--seconds 170] [--list]

Drawn from are the emulated GPU's own tests, the tests that need a GPU (with copies as late as CUDA allows and as early,
and `--races`), rows of the memory table, whose figures are compared with what was predicted, rows of the host table,
which must count what the table says, every Triton kernel once on one GPU, and a few refused calls. Every item has a
known cost, and no more are drawn than fit into `--seconds` of one core; nothing is stopped or fails for being slow.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from run import default_python

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
START = 8.0
"""Seconds until the first test of a process runs."""
SECONDS = {
    "test_streaming_differs_no_more_than_two_runs_do": 80.0,
    "test_inputs_that_wait_on_the_host_change_nothing": 105.0,
}
"""What a test takes on one core of a server, with what it sets up, if that is more than OWN or OTHER."""
OWN, OTHER, ROW, KERNELS, REFUSALS = 8.0, 6.0, 16.0, 20.0, 30.0
TESTED = ("late", "early", "own")
"""What pytest runs, all that is drawn in one process."""
KINDS = (*TESTED, "memory", "host", "kernels", "refusals")
GPUS = ("a100", "rtx3060", "rtx4090", "h100", "rtx5090")
PARTS = 30
"""In so many parts, the runs with refused calls are three each."""
TESTS = {"own": ["tests/emulated_gpu/test_emulated_gpu.py"], "gpu": ["tests/test_gpu.py", "tests/test_allocator.py"]}


@dataclass(frozen=True)
class Item:
    kind: str
    name: str
    seconds: float


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--commit", default=head(), help="what the draw is made by; default: HEAD")
    made.add_argument("--seconds", type=float, default=170.0, help="of one core; default: %(default).0f")
    made.add_argument("--list", action="store_true", help="run nothing")
    arguments = made.parse_args()
    chosen = draw(list(items()), arguments.commit, arguments.seconds)
    print(f"drawn by {arguments.commit[:12]}:", *(f"{i.kind} {i.name}" for i in chosen), sep="\n  ", flush=True)
    if arguments.list:
        return
    failed = [kind for kind in KINDS if not run(kind, [item.name for item in chosen if item.kind == kind])]
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


def head() -> str:
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "no commit"


def draw(items: Sequence[Item], commit: str, seconds: float) -> list[Item]:
    """Those that fit into the time, in an order that the commit decides, one of each kind in turn."""
    turns = []
    for kind in KINDS:
        own = sorted((item for item in items if item.kind == kind), key=lambda item: digest(commit, kind, item.name))
        turns += [(turn, digest(commit, kind), item) for turn, item in enumerate(own)]
    chosen: list[Item] = []
    for _, _, item in sorted(turns, key=lambda each: each[:2]):
        begins = START if item.kind in TESTED and all(other.kind != item.kind for other in chosen) else 0.0
        if begins + item.seconds <= seconds:
            seconds -= begins + item.seconds
            chosen.append(item)
    return chosen


def digest(*words: str) -> str:
    return hashlib.sha256(" ".join(words).encode()).hexdigest()


def items() -> Iterator[Item]:
    for name in collected(TESTS["own"]):
        yield Item("own", name, cost(name, OWN))
    for name in collected(["-m", "gpu", *TESTS["gpu"]]):
        yield from (Item(kind, name, cost(name, OTHER)) for kind in ("late", "early"))
    for name in printed(["-m", "benchmarks.emulated", "--list"]):
        yield Item("memory", name, ROW)
    for name in printed(["-m", "benchmarks.emulated_host", "--list"]):
        yield Item("host", name, ROW)
    yield from (Item("kernels", gpu, KERNELS) for gpu in GPUS)
    yield from (Item("refusals", f"{part}/{PARTS}", REFUSALS) for part in range(PARTS))


def cost(name: str, otherwise: float) -> float:
    return SECONDS.get(name.partition("::")[2].partition("[")[0], otherwise)


def collected(what: Sequence[str]) -> list[str]:
    """The names of these tests."""
    return [line for line in printed(["-m", "pytest", "--collect-only", "-q", *what]) if "::" in line]


def printed(arguments: Sequence[str]) -> list[str]:
    """The lines that a Python with these arguments prints."""
    command = [default_python(), *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"nothing to draw from:\n{done.stdout}{done.stderr}")
    return done.stdout.splitlines()


def run(kind: str, names: Sequence[str]) -> bool:
    """Whether all of them passed."""
    if not names:
        return True
    if kind in ALONE:
        return not any(ALONE[kind](name) for name in names)
    if kind == "memory":
        check = [default_python(), "-m", "benchmarks.emulated", "--check", *names]
        return not subprocess.run(check, cwd=ROOT, env=environment(), check=False).returncode
    pytest = ["-m", "pytest", "-q", *names]
    if kind == "own":
        return not subprocess.run([default_python(), *pytest], cwd=ROOT, env=environment(), check=False).returncode
    order = ["--early"] if kind == "early" else []
    return not emulated(["--compute", "--races", "--no-triton", *order], pytest)


def host_row(name: str) -> int:
    check = ["-m", "benchmarks.emulated_host", "--check", name]
    return emulated(["--gpu", name.partition(",")[0], "--skip-copies"], check)


def kernels(gpu: str) -> int:
    return emulated(["--gpu", gpu], [str(HERE / "kernels.py")])


def refusals(part: str) -> int:
    return emulated(["--compute", "--no-triton"], [str(HERE / "refusals.py"), "--part", part])


ALONE = {"host": host_row, "kernels": kernels, "refusals": refusals}
"""What runs each item in a process of its own, and returns the exit code."""


def emulated(options: Sequence[str], arguments: Sequence[str]) -> int:
    """The exit code of a Python with these arguments on the emulated GPU."""
    command = [sys.executable, str(HERE / "run.py"), *options, "--", "python", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment(), check=False).returncode


def environment() -> dict[str, str]:
    return {"OMP_NUM_THREADS": "1"} | os.environ | {"PYTHONPATH": str(ROOT)}


if __name__ == "__main__":
    main()
