"""`make gpu`: all parts within one time limit, the most important first.

    python3 -m benchmarks.session --out DIR [--minutes 9] [PART ...]
    python3 -m benchmarks.session --device cpu --tiny --out DIR          only to try the scripts

Each part may use its share of the time that is left when it starts, including what its last case takes beyond that.
Unused time goes to later parts. Every part writes one JSON file, row by row, so an interruption loses little. A part
that is named alone has all the time.
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
"""Seconds to import torch and to open the GPU; with less time left a part is not started."""
RESERVE = 10.0
"""Seconds for what no part's clock counts: processes starting and ending."""


@dataclass(frozen=True)
class Part:
    """A script of this folder with its options. seconds: its share of nine minutes; other limits scale it."""

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
    made.add_argument("--device", default="cuda", help="cpu: only to try the scripts, with --tiny")
    made.add_argument("--tiny", action="store_true", help="small shapes: measures nothing")
    arguments = made.parse_args()
    names = [part.name for part in PARTS]
    if unknown := [name for name in arguments.parts if name not in names]:
        made.error(f"there is no part {unknown[0]!r}; there are {', '.join(names)}")
    chosen = [part for part in PARTS if not arguments.parts or part.name in arguments.parts]
    shared = [f"--out={arguments.out}", f"--device={arguments.device}", *(["--tiny"] if arguments.tiny else [])]
    raise SystemExit(run(chosen, shared, 60 * arguments.minutes))


def run(parts: list[Part], shared: list[str], seconds: float) -> int:
    """Run `parts` one after another within `seconds` in total; returns 1 if one of them failed."""
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
