"""Training steps of fluxq and of other programs, each in a process of its own, in turns: CPU time and memory.

    python3 -m benchmarks.peers.steps --device cpu --depth 1 2 --sizes 256 512 --rounds 3 --warm-up 1
    PYTHONPATH=. python3 tests/emulated_gpu/run.py --gpu rtx4090 --skip-copies -- \\
        python -m benchmarks.peers.steps --sd-scripts CHECKOUT --sd-scripts-python PYTHON

On a CPU the step is computed, in one thread. On an emulated GPU the CPU time is what Python and PyTorch need to launch
a step of full size, and nothing is known of the GPU's own time. All programs train the same layers with LoRA of one
rank, over 512 T5 tokens, in batches of 1, with the 8-bit AdamW; every program recomputes every block. The programs'
weights are random, and not the same. sd-scripts runs only where its checkout is given (sd_scripts.py).

Writes peers_<where>_<size>px.json, and a page of the same name. Also measured, with nothing to compare: fluxq as it
trains where memory allows, keeping all that backward needs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.measure import about, write
from benchmarks.peers.worker import PAGEABLE
from benchmarks.placed import optimizer_of
from fluxq.allocator import VARIABLES
from fluxq.bench.timed_step import Setting
from fluxq.bench.timing import spread

PARTS = ("step", "forward", "backward", "update")
TARGET = 0.6
AHEAD = 64  # fluxq computes modulation for so many images at once
COUNTED = ("launches", "waits", "pageable copies", "loaded", "peak", "reserved")
RESIDENT = ("RSS at the start", "RSS loaded", "peak RSS")
MIB = 1 << 20


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder for the JSON and the page")
    made.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    made.add_argument("--sizes", type=int, nargs="+", default=(512,), help="pixels of a side")
    made.add_argument("--depth", type=int, nargs=2, default=(19, 38), help="double and single blocks")
    made.add_argument("--rounds", type=int, default=7, help="counted steps of every program")
    made.add_argument("--warm-up", type=int, default=3, help="steps before them")
    made.add_argument("--pairs-only", action="store_true", help="only what is compared with another program")
    made.add_argument("--tiny", action="store_true", help="the toy model: only to try the script")
    made.add_argument("--sd-scripts", type=Path, help="a checkout of kohya-ss/sd-scripts")
    made.add_argument("--sd-scripts-python", default=sys.executable, help="a Python that has what it needs")
    arguments = made.parse_args()
    device = torch.device(arguments.device)
    os.environ["OMP_NUM_THREADS"] = "1"
    report: dict[str, Any] = {"about": about(device), "emulated": emulated()}
    report["settings"] = {name: value for name, value in vars(arguments).items() if not name.startswith(("sd", "out"))}
    where = f"emulated_{emulated()}" if emulated() else device.type
    for size in arguments.sizes:
        rows = rows_of(arguments, size)
        measure(rows, arguments.rounds, arguments.warm_up)
        report["rows"] = [{k: v for k, v in row.items() if k not in ("python", "checkout")} for row in rows]
        report["ratios"] = ratios(rows)
        path = arguments.out / f"peers_{where}_{size}px.json"
        write(path, report)
        path.with_suffix(".md").write_text(page(report), encoding="utf-8")
        print(page(report), flush=True)


def emulated() -> str | None:
    """The emulated GPU's name, if this runs on one."""
    return os.environ.get("EMULATED_GPU_NAME", "rtx3060") if "EMULATED_GPU_ORDER" in os.environ else None


def rows_of(arguments: argparse.Namespace, size: int) -> list[dict[str, Any]]:
    """What is measured. Rows with the same `pair` are compared: the first is fluxq's."""
    common = {"device": arguments.device, "tiny": arguments.tiny, "depth": arguments.depth, "optimizer": optimizer_of()}
    common |= {"emulated": emulated() is not None, "python": sys.executable}

    def row(name: str, program: str, format: str, policy: str, compute: str = "bf16", **more: Any) -> dict[str, Any]:
        setting = asdict(Setting(format, compute, policy, size))
        return {"name": name, "program": program, "setting": setting, "pair": None} | common | more

    rows = [
        row("fluxq, nf4", "fluxq", "nf4", "recompute", pair="nf4"),
        row("QLoRA recipe, nf4", "recipe", "nf4", "recompute", pair="nf4"),
    ]
    if arguments.sd_scripts:
        theirs = {"checkout": str(arguments.sd_scripts.resolve()), "commit": commit_of(arguments.sd_scripts)}
        theirs |= {"python": arguments.sd_scripts_python}
        rows += [
            row("fluxq, fp8", "fluxq", "fp8", "recompute", pair="fp8"),
            row("sd-scripts, fp8", "sd-scripts", "fp8", "recompute", pair="fp8", **theirs),
        ]
    if not arguments.pairs_only:
        rows.append(row("fluxq, nf4, keep_all", "fluxq", "nf4", "keep_all"))
    if not arguments.pairs_only and arguments.device == "cuda":
        rows.append(row("fluxq, nf4, keep_all, int8_dx", "fluxq", "nf4", "keep_all", compute="int8_dx"))
    return rows


def commit_of(checkout: Path) -> str:
    done = subprocess.run(["git", "-C", checkout, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


class Worker:
    """A process that makes the row's steps (worker.py)."""

    def __init__(self, row: Mapping[str, Any]) -> None:
        environment = {name: value for name, value in os.environ.items() if name not in VARIABLES}
        if row["program"] != "fluxq":  # importing fluxq would set up the allocator, which other programs leave as it is
            environment["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:False"
        command = [row["python"], "-m", "benchmarks.peers.worker", json.dumps(row)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": environment}
        self.process: subprocess.Popen[str] = subprocess.Popen(command, **pipes)
        self.name, self.loaded = row["name"], self._answer()

    def ask(self, question: object) -> dict[str, Any]:
        assert self.process.stdin
        print(question, file=self.process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"the process of {self.name} ended with {self.process.wait()}; its error is above")
        return json.loads(line)

    def close(self) -> None:
        self.process.stdin.close()  # type: ignore[union-attr]
        self.process.wait()


def measure(rows: Sequence[dict[str, Any]], rounds: int, warm_up: int) -> None:
    """Add to every row what was measured: a step of each program, in turns, `rounds` times."""
    workers: list[Worker] = []
    try:
        for row in rows:
            workers.append(Worker(row))
            row["loaded"] = workers[-1].loaded
        for index in range(warm_up):
            for worker in workers:
                worker.ask(index)
        for worker in workers:
            worker.ask("reset")
        steps = [[worker.ask(warm_up + index) for worker in workers] for index in range(rounds)]
        for row, worker, found in zip(rows, workers, zip(*steps, strict=True), strict=True):
            row["counts"] = worker.ask("counts")
            row["cpu_ms"] = {part: spread([step[part] for step in found]) for part in PARTS}
            for part, figures in row["cpu_ms"].items():
                figures["median"] = median(step[part] for step in found)
            row["steps"] = found
            if row["device"] == "cuda" and row["program"] == "fluxq":
                row["ahead_ms"] = worker.ask(10 * AHEAD)["step"] - row["cpu_ms"]["step"]["median"]
    finally:
        for worker in workers:
            worker.close()


def ratios(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """fluxq's CPU time over the other program's of its pair: the median over rounds, and the extremes."""
    found = []
    for pair in dict.fromkeys(row["pair"] for row in rows if row["pair"]):
        ours, theirs = (row for row in rows if row["pair"] == pair)
        for part in PARTS[:3]:
            each = [a[part] / b[part] for a, b in zip(ours["steps"], theirs["steps"], strict=True)]
            row = {"what": f"{ours['name']} / {theirs['name']}", "size": ours["setting"]["resolution"], "part": part}
            found.append(row | {"median": median(each), "least": min(each), "most": max(each)})
    return found


def page(report: Mapping[str, Any]) -> str:
    """The report as Markdown."""
    facts, settings, rows = report["about"], report["settings"], report["rows"]
    emulated, cuda = report["emulated"], settings["device"] == "cuda"
    where = f"an emulated {emulated}: host time only" if emulated else facts["gpu"]
    double, single = settings["depth"]
    columns = ["program", *(f"{part}, CPU ms" for part in PARTS), *(COUNTED if cuda else RESIDENT)]
    lines = [
        f"# Training steps of fluxq and of other programs, {rows[0]['setting']['resolution']} px",
        "",
        f"{double} + {single} blocks, {where}; commit {facts['commit'][:7]}, torch {facts['torch']}, {facts['date']}.",
        f"Median CPU time of {settings['rounds']} steps, in turns; counts are per step, memory in MiB.",
        "",
        *("| " + " | ".join(cells) + " |" for cells in (columns, ["---"] * len(columns))),
        *("| " + " | ".join(cells_of(row, cuda)) + " |" for row in rows),
        "",
        f"fluxq's CPU time over the other's (aim: at most {TARGET} for the step on a GPU), median of the rounds:",
        "",
        *("- {what}, {part}: {median:.2f} ({least:.2f} to {most:.2f})".format(**ratio) for ratio in report["ratios"]),
        "",
        *(line_of(row) for row in rows),
    ]
    return "\n".join(lines) + "\n"


def cells_of(row: Mapping[str, Any], cuda: bool) -> list[str]:
    counts, loaded = row["counts"], row["loaded"]
    cells = [row["name"], *(f"{row['cpu_ms'][part]['median']:,.0f}" for part in PARTS)]
    if cuda:
        cells += [f"{counts.get(name, 0):,.0f}" for name in ("launches", "waits", PAGEABLE)]
        return cells + [f"{n / MIB:,.0f}" for n in (loaded["allocated"], counts["peak"], counts["reserved"])]
    return cells + [f"{n / MIB:,.0f}" for n in (loaded["rss_before"], loaded["rss"], counts["peak_rss"])]


def line_of(row: Mapping[str, Any]) -> str:
    """What a program trains, with which packages, and what its median leaves out."""
    loaded = row["loaded"]
    packages = ", ".join(f"{name} {version}" for name, version in loaded["packages"].items())
    line = f"- {row['name']}: {loaded['trained']:,} weights in {loaded['tensors']} tensors; {packages}"
    if "commit" in row:
        line += f"; commit {row['commit'][:7]}"
    if "ahead_ms" in row:
        line += f"; {row['ahead_ms']:,.0f} ms more in one of {AHEAD} steps, which computes modulation"
    return line + "."


if __name__ == "__main__":
    main()
