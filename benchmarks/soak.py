"""A long run of the toy model, watched from outside: does anything grow with the number of steps?

    python3 -m benchmarks.soak --work DIR [--steps 20000] [--resume] [--out benchmarks/results]

`fluxq train` runs in a process of its own, with previews and saves, on one thread. Every second its resident memory,
open files, threads and CPU time are read from /proc (Linux) into DIR/samples.jsonl. soak.json compares the first tenth
of the steps with the last. CPU time does not count what other programs use or how long the process is stopped, so a
busy machine may pause it (SIGSTOP). But a step takes more CPU time while other programs use the same caches, so during
the last tenth a new run is started beside the old one, and the CPU time of their steps is what counts. With --resume, a
run that was ended goes on. Only a run of one process shows what grows, so the report says how many there were.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.measure import about, write
from fluxq.nano import drawing

INTERVAL = 1.0
"""Seconds between two samples."""
TICKS = os.sysconf("SC_CLK_TCK")
SETTINGS = (
    "--model nano --format bf16 --optimizer adamw8bit --rank 4 --resolution 32 --save-every 250 --sample-every 500 "
    "--sample-steps 2 --set output.keep=2 --set lora.targets=['single_blocks.1.linear.']"
)
SAME = {"rss_bytes": 0.02, "open_files": 0.02, "threads": 0.02, "cpu_seconds_a_step": 0.05}
"""What may differ between the first tenth and the last."""
NEW_STEPS = 0.025
"""So much of the steps a new run does before it is compared with the old one: its first plot and preview load code."""


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--work", type=Path, required=True, help="folder of the run")
    made.add_argument("--steps", type=int, default=20_000)
    made.add_argument("--resume", action="store_true", help="go on with the run in --work")
    made.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    arguments = made.parse_args()
    work, run = arguments.work, arguments.work / "run"
    if not arguments.resume:
        draw(work / "PHOTOS")
        (work / "samples.jsonl").unlink(missing_ok=True)
    shutil.rmtree(work / "new", ignore_errors=True)
    with contextlib.ExitStack() as stack, (work / "samples.jsonl").open("a") as samples:
        old, new = stack.enter_context(started(work, run, arguments.steps, arguments.resume)), None
        while old.poll() is None:
            time.sleep(INTERVAL)
            for process, folder in ((old, run), (new, work / "new")):
                if process and (sample := read(process.pid, folder / "log.jsonl")):
                    print(json.dumps(sample | {"new": process is new, "at": time.time()}), file=samples, flush=True)
                    if new is None and sample["step"] > 0.9 * arguments.steps:
                        new = stack.enter_context(started(work, work / "new", arguments.steps))
    if old.returncode:
        raise SystemExit(old.returncode)
    lines = (work / "samples.jsonl").read_text().splitlines()
    compared = report([json.loads(line) for line in lines], arguments.steps)
    write(arguments.out / "soak.json", {"about": about(torch.device("cpu")), "settings": SETTINGS, **compared})
    for name, row in compared["tenths"].items():
        print(f"{name:<24}{row['first']:>16,.4f}{row['last']:>16,.4f}{row['change']:>+9.2%}")
    rows = dict(compared["tenths"])
    if "cpu_seconds_beside_new" in rows:
        del rows["cpu_seconds_a_step"]  # it depends on what else ran
    if grown := [name for name, row in rows.items() if abs(row["change"]) > row["allowed"]]:
        raise SystemExit(f"more than allowed: {', '.join(grown)}")


@contextlib.contextmanager
def started(work: Path, run: Path, steps: int, resume: bool = False) -> Iterator[subprocess.Popen]:
    """A process that trains in `run`; it is killed at the end."""
    first = [str(work / "PHOTOS"), "--out", str(run), "--cache", str(work / "cache"), *SETTINGS.split()]
    command = [sys.executable, "-m", "fluxq", "train", *(["--resume", str(run)] if resume else first)]
    with (work / "output.txt").open("ab") as output:
        process = subprocess.Popen(
            [*command, "--steps", str(steps)], stdout=output, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def draw(folder: Path) -> None:
    """Eight captioned images in two buckets."""
    folder.mkdir(parents=True)
    for i, (image, caption) in enumerate(drawing.concept(seed=5, count=8)):
        image.resize((96, 96) if i % 2 else (144, 72)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(caption)


def read(pid: int, log: Path) -> dict[str, Any] | None:
    """What process `pid` uses now, and the last step in its log; None before the first step and after the end."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 2000))
            step = json.loads(file.read().splitlines()[-1])["step"]
        proc = Path("/proc") / str(pid)
        stat = (proc / "stat").read_text().rpartition(")")[2].split()
        resident = int((proc / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        files, threads = len(list((proc / "fd").iterdir())), len(list((proc / "task").iterdir()))
    except (OSError, IndexError, ValueError, KeyError):  # gone, or a line that is not a step
        return None
    cpu = (int(stat[11]) + int(stat[12])) / TICKS
    return dict(process=pid, step=step, cpu=cpu, rss_bytes=resident, open_files=files, threads=threads)


def report(samples: Sequence[Mapping[str, Any]], steps: int) -> dict[str, Any]:
    """Medians over the first and the last tenth of `steps`; the last step is left out, as the process ends there.

    "cpu_seconds_beside_new": the CPU time of a step of a new run and of the old one, while both were running.
    """
    new = [s for s in samples if s.get("new") and s["step"] > NEW_STEPS * steps]
    samples = [s for s in samples if not s.get("new")]
    ends = [[s for s in samples if low * steps < s["step"] < high * steps] for low, high in ((0, 0.1), (0.9, 1))]
    if min(map(len, ends)) < 2:
        raise SystemExit("the run was too short to compare its ends")
    tenths = {}
    for name, allowed in SAME.items():
        first, last = (cpu_a_step(part) if name.startswith("cpu") else median(s[name] for s in part) for part in ends)
        tenths[name] = changed(first, last, allowed)
    if len(new) > 1:
        old = [s for s in samples if new[0]["at"] <= s["at"] <= new[-1]["at"] and s["step"] < steps]
        beside = changed(cpu_a_step(new), cpu_a_step(old), SAME["cpu_seconds_a_step"])
        tenths["cpu_seconds_beside_new"] = beside | {"new_steps": [new[0]["step"], new[-1]["step"]]}
    return {"steps": steps, "processes": len({s["process"] for s in samples}), "tenths": tenths}


def changed(first: float, last: float, allowed: float) -> dict[str, Any]:
    change = last / first - 1 if first else math.inf if last else 0.0  # CPU time below a tick of the clock is 0
    return dict(first=first, last=last, change=change, allowed=allowed)


def cpu_a_step(samples: Sequence[Mapping[str, Any]]) -> float:
    """Seconds of CPU time, of those that one process made."""
    pairs = [(a, b) for a, b in zip(samples, samples[1:], strict=False) if a["process"] == b["process"]]
    return sum(b["cpu"] - a["cpu"] for a, b in pairs) / max(1, sum(b["step"] - a["step"] for a, b in pairs))


if __name__ == "__main__":
    main()
