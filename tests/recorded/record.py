"""Losses of 50 steps of the toy model, for each compute, format and optimizer, on one thread.

    python tests/recorded/record.py            writes losses.json (`make recorded`)
    python tests/recorded/record.py --print    prints the losses of the fluxq that PYTHONPATH leads to

They hold what a change of code must not change: the numbers. To the bit, they also depend on the CPU and on libraries,
so a record applies where those are the same (`place`). It speaks to fluxq by the command line and log.jsonl, which
hardly change, so that it can also run the fluxq of an earlier commit.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RECORD = HERE / "losses.json"
STEPS = 50
CASES = {  # of compute, format and optimizer
    "bf16 nf4 adamw": "",
    "bf16 nf4 adamw8bit": "",
    "int8 int8 adamw": "",
    "int8_dx nf4 adamw": "",
    "fp8 fp8 adamw": "",
    "fp8_dx bf16 adamw": "--schedule cosine --warmup 5",
}
FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "amx_int8")


def losses() -> dict[str, list[float]]:
    """The loss of every step of each case."""
    import fluxq  # noqa: F401 - before torch, whose allocator it sets up

    import torch  # isort: skip
    from click.testing import CliRunner

    from fluxq.cli import main
    from fluxq.nano import drawing

    torch.set_num_threads(1)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        images = Path(folder) / "images"
        images.mkdir()
        for i, (image, caption) in enumerate(drawing.concept(seed=5, count=4)):
            image.resize((96, 96) if i % 2 else (144, 72)).save(images / f"{i}.png")
            (images / f"{i}.txt").write_text(caption)
        for case, more in CASES.items():
            compute, format, optimizer = case.split()
            run = Path(folder) / case.replace(" ", "-")
            line = f"train {images} --out {run} --cache {folder}/cache --model nano --resolution 32 --rank 24 --lr 1e-3"
            line += f" --steps {STEPS} --compute {compute} --format {format} --optimizer {optimizer} {more}"
            done = CliRunner().invoke(main, line.split(), catch_exceptions=False)
            assert done.exit_code == 0, done.output
            lines = (run / "log.jsonl").read_text().splitlines()
            found[case] = [json.loads(line)["loss"] for line in lines]
    return found


def place() -> dict[str, Any]:
    """What losses depend on to the bit, beside fluxq."""
    import torch

    cpu = dict(line.split(":", 1) for line in cpu_lines() if ":" in line)
    cpu = {key.strip(): value.split() for key, value in cpu.items()}
    return {
        "packages": {name: importlib.metadata.version(name) for name in ("torch", "bitsandbytes", "numpy", "pillow")},
        "capability": torch.backends.cpu.get_cpu_capability(),
        "vendor": " ".join(cpu.get("vendor_id", [])),
        "features": [feature for feature in FEATURES if feature in cpu.get("flags", [])],
        "threads": 1,
    }


def cpu_lines() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().split("\n\n")[0].splitlines() if path.exists() else []


def losses_of(tree: Path) -> dict[str, list[float]]:
    """The losses of the fluxq in the folder `tree`, in a process of its own."""
    environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__).resolve()), "--print"]
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"no losses from {tree}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--print", action="store_true")
    if made.parse_args().print:
        print(json.dumps(losses()))
        return
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=HERE, capture_output=True, text=True, check=False).stdout
    record = {"after": commit.strip(), **place(), "losses": losses_of(HERE.parents[1])}
    RECORD.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
