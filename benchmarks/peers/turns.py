"""Programs that take turns, one step each: a busy machine, or a slower clock, meets all of them alike.

Each program runs in a process of its own, so its peak memory is its own too. It builds its model and calls
`Turn.begin` before every step. Orders come to it as lines on standard input. Its answers are lines of JSON on what was
its standard output; whatever else it prints goes to standard error.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from fluxq.bench.timing import spread

STEP, RESET, REPORT = "step", "reset", "report"


class Counters(Protocol):
    """What is counted beside CPU time: from the last reset to the report."""

    def reset(self) -> None: ...
    def report(self) -> dict[str, Any]: ...


class Turn:
    """The program's side. Made before anything is printed."""

    def __init__(self) -> None:
        self._answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)
        self._marks: list[tuple[str, float]] | None = None

    def begin(self, counters: Counters, **facts: Any) -> None:
        """End the step before this one, if any, and return when the next may begin. facts: recorded the first time.

        Raises SystemExit when there is no further step.
        """
        if self._marks is None:
            self.answer(**facts)
        else:
            self.mark(STEP)
            self.answer(**parts_of(self._marks))
        for order in sys.stdin:
            if order.strip() == STEP:
                self._marks = [("", time.process_time())]
                return
            if order.strip() == RESET:
                counters.reset()
                self.answer()
            else:
                self.answer(**counters.report())
        raise SystemExit

    def mark(self, name: str) -> None:
        """The part `name` of the step ends here."""
        if self._marks:
            self._marks.append((name, time.process_time()))

    def answer(self, **facts: Any) -> None:
        print(json.dumps(facts), file=self._answers, flush=True)


def parts_of(marks: Sequence[tuple[str, float]]) -> dict[str, float]:
    """Milliseconds of CPU time, of all threads: of each marked part, and under STEP of all parts together."""
    parts = {name: 1e3 * (end - start) for (_, start), (name, end) in zip(marks, marks[1:], strict=False)}
    return parts | {STEP: 1e3 * (marks[-1][1] - marks[0][1])}


def alternate(
    commands: Mapping[str, Sequence[str]], environments: Mapping[str, Mapping[str, str]], warm_up: int, rounds: int
) -> list[dict[str, Any]]:
    """A row for each of the programs `commands`: its facts, its counters' report over `rounds` steps, and the spread of
    its CPU time. The first `warm_up` rounds are not counted.

    environments: variables of a program in addition to this process's. A program that cannot run has a row that says
    why, under "skipped" or "failed", and the others go on.
    """
    programs = {name: Program(command, environments.get(name, {})) for name, command in commands.items()}
    rows = {name: {"case": name, **program.hear()} for name, program in programs.items()}
    times: dict[str, list[dict[str, float]]] = {name: [] for name in programs}

    def each(order: str, use: Callable[[str, dict[str, Any]], Any] = lambda name, answer: None) -> None:
        for name, program in programs.items():
            if not stopped(rows[name]):
                answer = program.ask(order)
                rows[name] |= answer if stopped(answer) else {}
                use(name, answer)

    try:
        for _ in range(warm_up):
            each(STEP)
        each(RESET)
        for _ in range(rounds):
            each(STEP, lambda name, answer: times[name].append(answer))
        each(REPORT, lambda name, answer: rows[name].update(answer))
    finally:
        for program in programs.values():
            program.end()
    for name, row in rows.items():
        if not stopped(row):
            row["cpu_ms"] = {part: spread([each[part] for each in times[name]]) for part in times[name][0]}
    return list(rows.values())


def stopped(row: Mapping[str, Any]) -> bool:
    return "skipped" in row or "failed" in row


class Program:
    """The other side of a `Turn`. One that is built is waited for, so no two are built at the same time."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._process: Any = subprocess.Popen(command, env=os.environ | dict(environment), **pipes)
        self._first = self._answer()

    def hear(self) -> dict[str, Any]:
        """The first answer."""
        return self._first

    def ask(self, order: str) -> dict[str, Any]:
        try:
            print(order, file=self._process.stdin, flush=True)
        except BrokenPipeError:
            pass  # its end is told by what it does not answer
        return self._answer()

    def end(self) -> None:
        self._process.stdin.close()
        self._process.wait()

    def _answer(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        return json.loads(line) if line else {"failed": f"its process ended with {self._process.wait()}"}
