"""`make gpu`: all parts, the most valuable first, within one time for all of them.

    python3 -m benchmarks.session --out DIR [--minutes 9] [PART ...]
    python3 -m benchmarks.session --device cpu --tiny --out DIR          only tries the scripts out

A part may take its share of the time that is left when it starts, what its last case takes beyond that included. What
it does not need goes to the parts behind it, and none of these can take anything from those before. Every part writes
one JSON file, row by row, so what was measured before an interruption is there. A part that is named alone has all the
time.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

GRACE = 20.0
"""Seconds that a part's last case may take beyond the part's time before it is stopped."""
START = 10.0
"""Seconds that a part needs to import torch and to open the card; with less left than that it is not started."""
RESERVE = 10.0
"""Seconds for what no part's clock sees: processes that start and end."""


@dataclass(frozen=True)
class Part:
    """A script of this folder, what it may take of nine minutes, of other times as much in proportion, and its
    options.
    """

    name: str
    module: str
    seconds: float
    options: tuple[str, ...] = ()


PARTS = (
    Part("tests", "gpu_tests", 140),
    Part("steps", "gpu", 130, ("--vram=12GiB", "--policy", "planned", "recompute", "--sizes", "512", "1024")),
    Part("streaming", "streaming", 70),
    Part("peaks", "peaks", 60),
    Part("host", "host", 40),
    Part("kernels", "kernels", 60),
    Part("blocks", "blocks", 40),
)


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(p.name for p in PARTS)}; default: all")
    made.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder for the JSON files")
    made.add_argument("--minutes", type=float, default=9.0, help="time for all parts together")
    made.add_argument("--device", default="cuda", help="cpu tries the scripts out, with --tiny")
    made.add_argument("--tiny", action="store_true", help="small shapes: numbers that mean nothing")
    arguments = made.parse_args()
    names = [part.name for part in PARTS]
    if unknown := [name for name in arguments.parts if name not in names]:
        made.error(f"there is no part {unknown[0]!r}; there are {', '.join(names)}")
    chosen = [part for part in PARTS if not arguments.parts or part.name in arguments.parts]
    shared = [f"--out={arguments.out}", f"--device={arguments.device}", *(["--tiny"] if arguments.tiny else [])]
    raise SystemExit(run(chosen, shared, 60 * arguments.minutes))


def run(parts: list[Part], shared: list[str], seconds: float) -> int:
    """Run `parts` in turn, done in `seconds` altogether; 1 where one of them failed."""
    end, failed = time.time() + seconds - RESERVE, False
    for index, part in enumerate(parts):
        left = end - time.time()
        allowed = left * part.seconds / sum(p.seconds for p in parts[index:]) - GRACE
        if allowed < START:
            print(f"{part.name}: not started, {max(left, 0):.0f} s are left", flush=True)
            failed = True
            continue
        began = time.time()
        command = [sys.executable, "-m", f"benchmarks.{part.module}", *part.options, *shared]
        code = subprocess.run([*command, f"--deadline={began + allowed}"], check=False).returncode
        print(f"{part.name}: {time.time() - began:.0f} s of {allowed:.0f} s, exit code {code}", flush=True)
        failed |= code != 0
    return int(failed)


if __name__ == "__main__":
    main()
