"""Runs a part of `make gpu` case by case: each result is saved at once, and a failing case does not affect the others.

The cases run in a worker process. If a case breaks the GPU's context or kills the process, a new worker continues with
the next case. If time runs out, the remaining cases are recorded as skipped.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import about, nvidia_smi, result_path, write
from benchmarks.session import GRACE

GO_ON = 75
"""The exit code of a worker whose GPU no longer answers: the remaining cases need a new one."""


class Skip(Exception):
    """The case cannot run here; the text says why."""


@dataclass(frozen=True)
class Case:
    """`measure` checks, then times, and returns the row; its `ok` is False if the check failed."""

    name: str
    measure: Callable[[], dict[str, Any]]


def parser(text: str) -> argparse.ArgumentParser:
    """A parser with the options of every part."""
    made = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder for the JSON file")
    made.add_argument("--device", default="cuda", help="cpu: only to try the script, with --tiny")
    made.add_argument("--tiny", action="store_true", help="small shapes: runs in seconds, measures nothing")
    made.add_argument("--only", default="", help="run cases whose name matches this regular expression")
    made.add_argument("--minutes", type=float, default=8.5, help="time limit; cases that would start later are skipped")
    made.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    made.add_argument("--deadline", type=float, default=0.0, help=argparse.SUPPRESS)
    return made


def run_part(part: str, arguments: argparse.Namespace, prepare: Callable[[dict[str, Any]], Iterable[Case]]) -> None:
    """Run the cases of `prepare(report)`, which may add facts about all of them to the report.

    Exits the program, with 1 if a case failed.
    """
    if arguments.worker is not None:
        raise SystemExit(_work(arguments, prepare))
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no CUDA GPU was found; nothing was measured")
    path = result_path(arguments.out, part, device)
    settings = {name: value for name, value in vars(arguments).items() if name not in ("worker", "deadline", "out")}
    write(path, {"part": part, "about": None, "settings": settings, "rows": []})
    module = sys.modules["__main__"].__spec__
    command = [sys.executable, *(["-m", module.name] if module else sys.argv[:1]), *sys.argv[1:]]
    seconds = arguments.deadline - time.time() if arguments.deadline else 60 * arguments.minutes
    raise SystemExit(supervise(path, seconds, command))


def supervise(path: Path, seconds: float, command: list[str], grace: float = GRACE) -> int:
    """Start workers until all cases are done or time is up, and return the exit code. A worker still running after
    `grace` more seconds is killed.
    """
    deadline, broken = time.time() + seconds, None
    while True:
        child = subprocess.Popen([*command, f"--worker={path}", f"--deadline={deadline}"])
        try:
            child.wait(max(0.0, deadline + grace - time.time()))
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
        report = json.loads(path.read_text(encoding="utf-8"))
        running = report.pop("running", None)
        if running is not None:
            why = "out of time, and stopped" if time.time() > deadline else f"its process ended with {child.returncode}"
            report["rows"].append({"case": running, "failed": why})
        elif child.returncode not in (0, GO_ON):
            broken = report["failed"] = f"the process ended with {child.returncode} outside any case"
        through = child.returncode == 0 or broken is not None or time.time() > deadline
        if through:
            report["summary"] = summary(report["rows"])
        write(path, report)
        if through:
            print(f"{path}: {report['summary']}", flush=True)
            return int(broken is not None or report["summary"]["failed"] > 0)


def summary(rows: list[dict[str, Any]]) -> dict[str, int]:
    """Counts: cases, failed ones (also by their check), skipped ones, targets met and missed."""
    targets = [target["met"] for row in rows for target in row.get("targets", [])]
    return {
        "cases": len(rows),
        "failed": sum("failed" in row or row.get("ok") is False for row in rows),
        "skipped": sum("skipped" in row for row in rows),
        "targets_met": targets.count(True),
        "targets_missed": targets.count(False),
    }


def _work(arguments: argparse.Namespace, prepare: Callable[[dict[str, Any]], Iterable[Case]]) -> int:
    path, device = arguments.worker, torch.device(arguments.device)
    report = json.loads(path.read_text(encoding="utf-8"))
    report["about"] = report["about"] or about(device)
    cases = [case for case in prepare(report) if re.search(arguments.only, case.name)]
    done = {row["case"] for row in report["rows"]}
    for case in (c for c in cases if c.name not in done):
        if time.time() > arguments.deadline:
            row = {"skipped": "out of time"}
        else:
            write(path, report | {"running": case.name})
            began = time.monotonic()
            row = _measured(case)
            row["seconds"] = round(time.monotonic() - began, 2)
        report["rows"].append({"case": case.name, **row})
        write(path, report)
        print(f"{case.name}: {in_words(row)}", flush=True)
        if "failed" in row or "out_of_memory" in row:
            gc.collect()  # the error and what the case held may refer to each other
        if device.type == "cuda":
            if "failed" in row and not _answers(device):
                return GO_ON
            torch.cuda.empty_cache()
    if device.type == "cuda":
        report["nvidia_smi_after"] = nvidia_smi()
        write(path, report)
    return 0


def _measured(case: Case) -> dict[str, Any]:
    try:
        return dict(case.measure())
    except Skip as reason:
        return {"skipped": str(reason)}
    except Exception as error:  # the other cases shall still run
        return {"failed": f"{type(error).__name__}: {error}"[:2000]}


def _answers(device: torch.device) -> bool:
    try:
        torch.zeros(1, device=device).add_(1).item()
    except RuntimeError:
        return False
    return True


def in_words(row: dict[str, Any]) -> str:
    """A row as part of a line."""
    if "skipped" in row or "failed" in row:
        return f"skipped, {row['skipped']}" if "skipped" in row else f"FAILED, {row['failed'].splitlines()[0]}"
    words = [] if row.get("ok", True) else ["WRONG"]
    words += [f"{name} {ms['median']:.3f} ms" for name, ms in row.get("ms", {}).items()]
    if "passed" in row:
        words.append(f"{row['passed']} passed, {len(row['failures'])} failed, {sum(row['skips'].values())} skipped")
    if "out_of_memory" in row:
        words.append("out of memory")
    if isinstance(row.get("peak_bytes"), int):
        words.append(f"peak {row['peak_bytes'] / 2**30:.2f} GiB")
    words += [f"{t['what']} {t['reached']:.3g} (wanted {t['wanted']})" for t in row.get("targets", [])]
    return ", ".join(words) or "done"


def last_only(make: Callable[..., Any]) -> Callable[..., Any]:
    """`make` with a cache of one entry, which is freed before the next is made: each may fill a GPU. `forget()` frees
    it at once.
    """
    kept: dict[tuple[Any, ...], Any] = {}

    def remembering(*key: Any) -> Any:
        if key not in kept:
            kept.clear()
            kept[key] = make(*key)
        return kept[key]

    remembering.forget = kept.clear
    return remembering


def target(what: str, wanted: str, reached: float, applies: bool = True) -> dict[str, Any]:
    """A figure with its target, such as ">= 0.8" or "<= 1.08". If the target does not apply, `met` is None."""
    relation, bound = wanted.split()
    met = (reached >= float(bound)) if relation == ">=" else (reached <= float(bound))
    return {"what": what, "wanted": wanted, "reached": reached, "met": met if applies else None}
