"""The results in JSON, and as a page beside it."""

from __future__ import annotations

import json
import subprocess
from collections import Counter
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
HOWS = ("fails", "ends")
WAYS = ("went on", "again", "resumed", "started over", "lost")
"""How a disturbed run got to its end: by itself, with the same command, --resume or --overwrite; or it did not."""


def commit() -> str:
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "no commit"


def source() -> str:
    """A digest of what decides the results."""
    digest = sha256()
    for folder, pattern in (("fluxq", "**/*.py"), ("tests/faults", "*.py"), ("tests/faults", "*.c")):
        for path in sorted((ROOT / folder).glob(pattern)):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


class Table:
    """faults.json and faults.md in `folder`. What is there is gone on with, if it is of this source and these calls.

    kinds: command -> the kind of each of its calls.
    """

    def __init__(self, folder: Path, kinds: Mapping[str, Sequence[str]]) -> None:
        self.json, self.page = folder / "faults.json", folder / "faults.md"
        self.data = {"commit": commit(), "source": source(), "strace": {}, "problems": {}}
        self.data["calls"] = {command: [[kind, "", ""] for kind in of] for command, of in kinds.items()}
        before = json.loads(self.json.read_text()) if self.json.exists() else {"source": "", "calls": {}}
        calls = {command: [row[0] for row in rows] for command, rows in before["calls"].items()}
        if (before["source"], calls) == (self.data["source"], kinds):
            self.data = before

    def __getitem__(self, place: tuple[str, int, str]) -> str:
        """One of WAYS, or nothing if the call `place`, (command, number from 1, one of HOWS), was not tried."""
        command, number, how = place
        return self.data["calls"][command][number - 1][1 + HOWS.index(how)]

    def __setitem__(self, place: tuple[str, int, str], way: str) -> None:
        command, number, how = place
        self.data["calls"][command][number - 1][1 + HOWS.index(how)] = way

    def save(self) -> None:
        head = json.dumps({key: value for key, value in self.data.items() if key != "calls"}, indent=1)
        commands = [
            f"  {json.dumps(command)}: [\n" + ",\n".join(f"   {json.dumps(row)}" for row in rows) + "\n  ]"
            for command, rows in self.data["calls"].items()
        ]
        self.json.write_text(head[:-2] + ',\n "calls": {\n' + ",\n".join(commands) + "\n }\n}\n")
        self.page.write_text(page(self.data))


def page(data: dict) -> str:
    lines = [
        "# Every operation fails once",
        "",
        f"`make faults` at {data['commit'][:12]}. tests/faults/README.md says what is tried and what has to hold.",
        "",
        "| command | call | calls | fault | tried | went on | same command | --resume | --overwrite | lost |",
        "|---|---|---:|---|---:|---:|---:|---:|---:|---:|",
    ]
    total: Counter[str] = Counter()
    for command, rows in data["calls"].items():
        for kind in sorted({row[0] for row in rows}):
            for i, how in enumerate(HOWS, start=1):
                found = Counter(row[i] for row in rows if row[0] == kind and row[i])
                total += found
                cells = [command, kind, sum(row[0] == kind for row in rows), how, found.total()]
                lines.append("| " + " | ".join(map(str, [*cells, *(found[way] for way in WAYS)])) + " |")
    calls = sum(map(len, data["calls"].values()))
    tried, lost = total.total(), total["lost"]
    lines += ["", f"{calls:,} calls; {2 * calls:,} faults, {tried:,} tried, {tried - lost:,} recovered, {lost:,} lost."]
    if data["strace"]:
        counts = {command: dict(Counter(row[0] for row in rows)) for command, rows in data["calls"].items()}
        same = "the same calls" if counts == data["strace"] else f"others: {data['strace']}"
        lines[-1] += f" strace counts {same}."
    lines += ["", *(f"- {trial}: {problem}" for trial, problem in data["problems"].items())] if data["problems"] else []
    return "\n".join(lines) + "\n"
