"""The trials: an undisturbed run of nano, and a run for each of its calls that fails, or at which the process ends.

run.py starts this program, with the shim. Runs are forks of it, so it imports what they need.
"""

from __future__ import annotations

import argparse
import errno
import os
import random
import re
import shlex
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from functools import partial
from pathlib import Path

import bitsandbytes  # noqa: F401 - like the other imports that nothing here uses, so that not every fork imports it
import folders
import matplotlib.backends.backend_agg  # noqa: F401
import matplotlib.figure  # noqa: F401
import sentencepiece  # noqa: F401
import strace
import transformers  # noqa: F401
from shim import EXIT_CODE, Fault, Outcome, forked
from table import HOWS, ROOT, Table, commit

import fluxq.commands.cache
import fluxq.train  # noqa: F401
from fluxq.cli import main
from fluxq.formats import atomic
from fluxq.nano import drawing

MODEL = "--model nano --cache cache"
TARGETS = r"'lora.targets=.*1\.(img_attn\.qkv|linear1)'"  # some have their optimizer state in 8 bits, some in 32
TRAINING = f"--set {TARGETS} --accumulate 2 --optimizer adamw8bit --steps 3 --save-every 1 --keep 1"
PREVIEWS = "--sample-every 3 --sample-steps 1"
COMMANDS = {
    "cache": f"cache photos {MODEL}",
    "train": f"train photos {MODEL} --out runs/x {TRAINING} {PREVIEWS}",
    "resume": "train --resume runs/x --steps 4",
}
ERRORS = (errno.ENOSPC, errno.EIO, errno.EACCES)


@dataclass(frozen=True)
class Trial:
    """The `number`-th call of a command, from 1, and whether it fails or the process ends there."""

    command: str
    number: int
    how: str

    def __str__(self) -> str:
        how = errno.errorcode[self.error] if self.error else "exit"
        return f"{self.command} {self.number} {how}"

    @property
    def error(self) -> int:
        return ERRORS[self.number % len(ERRORS)] if self.how == "fails" else 0


class Calm:
    """The undisturbed run: each command in turn, in `root`, and copies of that folder before and after each."""

    def __init__(self, scratch: Path) -> None:
        self.root, self.copies = scratch / "root", scratch / "copies"
        self.calls: dict[str, list[str]] = {}  # command -> "KIND PATH" of each call
        self.contents: dict[str, folders.Contents] = {}
        draw_images(self.root / "photos")
        (self.root / "tmp").mkdir()
        self._keep("")
        replaced = scratch / "versions"
        for command in COMMANDS:
            calls = scratch / f"{command}.calls"
            outcome = forked(partial(invoke, COMMANDS[command], replaced / command), self.root, calls=calls)
            if outcome.code or outcome.fired:
                raise SystemExit(f"{command} fails undisturbed, with {outcome.code}:\n{outcome.output}")
            self.calls[command] = calls.read_text().splitlines()
            self._keep(command)
        between = (folders.contents(folder) for folder in sorted(replaced.glob("*/*")))
        self.known = folders.versions(*self.contents.values(), *between)

    def _keep(self, name: str) -> None:
        shutil.copytree(self.root, self.copies / f"after {name}")
        self.contents[name] = folders.contents(self.root)

    def restore(self, command: str) -> None:
        """Put the folder back to what it is before `command`."""
        names = ["", *COMMANDS]
        shutil.rmtree(self.root)
        shutil.copytree(self.copies / f"after {names[names.index(command) - 1]}", self.root)

    def call(self, trial: Trial) -> str:
        """What `trial` disturbs, like "fsync runs/x/log.jsonl"."""
        return self.calls[trial.command][trial.number - 1].replace(f"{self.root}/", "")

    def trials(self) -> Iterator[Trial]:
        for command, calls in self.calls.items():
            for number in range(1, len(calls) + 1):
                yield from (Trial(command, number, how) for how in HOWS)


def draw_images(folder: Path) -> None:
    """Two, for two buckets."""
    folder.mkdir(parents=True)
    for i, (image, caption) in enumerate(drawing.concept(seed=1, count=2)):
        image.crop((0, 0, 96, 96 - 32 * i)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(caption, encoding="utf-8")


def invoke(arguments: str, versions: Path | None = None) -> None:
    """The command, as a shell runs it. Every file that it replaces atomically is copied to `versions`, if given."""
    if versions:
        keep_versions(versions)
    main(shlex.split(arguments), prog_name="fluxq")


def keep_versions(versions: Path) -> None:
    """Copy each new version of a file below the current folder to versions/<its number>/<its path>."""
    real = atomic._replace

    def replace(temporary: Path, path: Path) -> None:
        number = len([*versions.glob("*")])
        copy = versions / str(number) / os.path.relpath(path)
        copy.parent.mkdir(parents=True)
        shutil.copyfile(temporary, copy)
        real(temporary, path)

    atomic._replace = replace


def attempt(calm: Calm, trial: Trial, show: bool = False) -> tuple[str, str]:
    """(how the run got to its end, what is wrong or nothing) of one disturbed run."""
    calm.restore(trial.command)
    expected, command = calm.contents[trial.command], COMMANDS[trial.command]
    disturbed = forked(partial(invoke, command), calm.root, Fault(trial.number, trial.error))
    outcomes = [disturbed]
    problems = list(folders.unsound(calm.root, calm.known, ended=trial.how == "ends"))
    if not disturbed.fired:
        problems.append("the fault did not come")
    elif trial.how == "ends" and disturbed.code != EXIT_CODE:
        problems.append(f"exit code {disturbed.code} instead of that of the fault")
    way = "went on"
    if disturbed.code:
        way, again = recovered(calm, command)
        outcomes += again
    for outcome in outcomes:
        problems += complaints(outcome, may_end=outcome is disturbed and trial.how == "ends")
    if not problems:
        output = "".join(outcome.output for outcome in outcomes)
        may_stay = calm.call(trial).removeprefix("unlink ") if trial.error else ""  # what could not be deleted
        problems += folders.differences(calm.root, expected, output, may_stay)
    if show:
        for outcome in outcomes:
            print(f"--- exit code {outcome.code}", outcome.output, sep="\n")
    return way, "; ".join(problems)


def recovered(calm: Calm, command: str) -> tuple[str, list[Outcome]]:
    """The same command, and if it is refused what its message says: --resume, or --overwrite. Returns which it was."""
    ways = {
        "again": (command, ""),
        "resumed": ("train --resume runs/x", "continue it with fluxq train --resume runs/x"),
        "started over": (f"{command} --overwrite", "start it again with --overwrite"),
    }
    outcomes: list[Outcome] = []
    for way, (arguments, advice) in ways.items():
        if outcomes and not (outcomes[-1].code == 2 and advice in outcomes[-1].output):
            break
        outcomes.append(forked(partial(invoke, arguments), calm.root))
        if not outcomes[-1].code:
            return way, outcomes
    return "lost", outcomes


def complaints(outcome: Outcome, may_end: bool) -> Iterator[str]:
    """What a command must not do: only 0, and 2 with one sentence, are right."""
    if "Traceback" in outcome.output:
        yield f"a traceback, {outcome.output.strip().splitlines()[-1]}"
    elif outcome.code == 2 and len(re.findall("^error: ", outcome.output, re.MULTILINE)) != 1:
        yield "exit code 2 without a sentence"
    elif outcome.code not in (0, 2) and not may_end:
        yield f"exit code {outcome.code}"


def run() -> None:
    made = argparse.ArgumentParser(prog="tests/faults/run.py")
    made.add_argument(
        "trials", nargs="*", metavar="TRIAL", help='such as "train 37 EIO": only these, with their output'
    )
    made.add_argument("--seconds", type=float, default=float("inf"), help="begin no run after that time")
    made.add_argument("--draw", metavar="HASH", nargs="?", const=commit(), help="an order by commit; default: HEAD")
    made.add_argument("--strace", action="store_true", help="only count, with strace too")
    made.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    arguments, began = made.parse_args(), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="faults-") as scratch:
        os.environ |= {"FLUXQ_CACHE": f"{scratch}/root/quantized", "TMPDIR": f"{scratch}/root/tmp"}
        tempfile.tempdir = None  # it was looked up before
        calm = Calm(Path(scratch).resolve())
        kinds = {command: [call.split()[0] for call in calls] for command, calls in calm.calls.items()}
        print(f"an undisturbed run makes {dict(Counter(sum(kinds.values(), [])))}", flush=True)
        trials, table = list(calm.trials()), Table(arguments.out, kinds)
        if arguments.strace:
            table.data["strace"] = {}
            calm.restore("cache")
            for command, words in COMMANDS.items():
                call = [sys.executable, "-m", "fluxq", *shlex.split(words)]
                environment = os.environ | {"TMPDIR": scratch}  # which importing torch uses; forks have imported it
                table.data["strace"][command] = strace.counted(call, calm.root, environment)
            table.save()
            trials = []
        elif arguments.trials:
            trials = [trial for trial in trials if str(trial) in arguments.trials]
        elif arguments.draw:
            random.Random(arguments.draw).shuffle(trials)
        else:
            trials = [trial for trial in trials if not table[astuple(trial)]]
        tried, lost = 0, 0
        for trial in trials:
            if time.monotonic() - began > arguments.seconds:
                break
            way, problem = attempt(calm, trial, show=bool(arguments.trials))
            tried, lost = tried + 1, lost + bool(problem)
            table[astuple(trial)] = "lost" if problem else way
            if problem or arguments.trials:
                print(f"{trial} ({calm.call(trial)}): {way}; {problem or 'nothing is lost'}", flush=True)
            if problem:
                table.data["problems"][str(trial)] = f"{calm.call(trial)}: {problem}"
            if not arguments.trials and not arguments.draw:
                table.save()
    print(f"{tried:,} of {len(trials):,} faults tried, {tried - lost:,} recovered, {lost:,} lost")
    raise SystemExit(bool(lost))


if __name__ == "__main__":
    run()
