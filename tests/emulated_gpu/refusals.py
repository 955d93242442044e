"""Trains nano once for each call that the driver can refuse: whatever is refused, the LoRA is the same to the bit.

    python tests/emulated_gpu/run.py --compute --no-triton -- python tests/emulated_gpu/refusals.py [KIND ...]

Each allocation, pinning, module and handle of an undisturbed run fails once, in a run of its own, and each allocation
also three times in a row ("oom"): then PyTorch's allocator raises OutOfMemoryError. Kernels of PyTorch count as
modules, as CUDA loads each when it is first launched. Half of the units are streamed, and there is a preview.

Runs are forks of this process, which has imported what they need and has not touched the GPU. `--part 0/4` makes every
fourth of them.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import tempfile
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

import fluxq  # noqa: F401, I001 - before torch, whose allocator it sets up
import emulated
import matplotlib.figure  # noqa: F401 - like the next two, so that not every run imports it
import sentencepiece  # noqa: F401
import torch._dynamo  # noqa: F401
from safetensors.torch import load_file

from fluxq.config_files import config_from_dict
from fluxq.nano import drawing
from fluxq.train import train

KINDS = ("alloc", "oom", "pin", "module", "handle")


@dataclass
class Outcome:
    """lora: its file, or None if the run failed; failure: why. attempts: calls by kind; refused: such as "pin:3"."""

    lora: str | None = None
    failure: str = ""
    notes: list[str] = field(default_factory=list)
    attempts: dict[str, int] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("kinds", nargs="*", metavar="KIND", help=f"of {', '.join(KINDS)}; default: all")
    made.add_argument("--part", default="0/1", metavar="K/N", help="every N-th run from the K-th on")
    made.add_argument("--optimizer", default="adamw8bit")
    arguments = made.parse_args()
    if unknown := [kind for kind in arguments.kinds if kind not in KINDS]:
        made.error(f"KIND must be one of {', '.join(KINDS)}, not {unknown[0]!r}")
    first, stride = map(int, arguments.part.split("/"))
    failed, plan = [], ""
    with tempfile.TemporaryDirectory() as folder:
        draw_images(images := Path(folder) / "images")
        calm = run(images, Path(folder) / "calm", arguments.optimizer, plan)
        if calm.lora is None:
            raise SystemExit(f"nothing was refused, and the run failed: {calm.failure}")
        expected = load_file(calm.lora)
        plans = list(plans_for(calm.attempts, arguments.kinds or KINDS))[first::stride]
        print(f"one run makes {calm.attempts}; {len(plans)} runs are disturbed", flush=True)
        for plan in plans:
            outcome = run(images, Path(folder) / plan, arguments.optimizer, plan)
            why = verdict(outcome, expected)
            print(f"{plan}: {why or 'the same LoRA'}", flush=True)
            if why:
                failed.append(plan)
                print(*outcome.notes, sep="\n", flush=True)
    if failed:
        raise SystemExit(f"{len(failed)} of {len(plans)} refusals change the result: {', '.join(failed)}")
    print(f"the LoRA of each of {len(plans)} runs is that of the undisturbed one")


def draw_images(folder: Path) -> None:
    folder.mkdir()
    for i, (image, caption) in enumerate(drawing.concept(seed=1, count=2)):
        image.save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(caption, encoding="utf-8")


def plans_for(attempts: dict[str, int], kinds: Iterable[str]) -> Iterator[str]:
    """What `emulated.fail` is given, run by run."""
    for kind in kinds:
        for i in range(1, attempts.get("alloc" if kind == "oom" else kind, 0) + 1):
            yield f"alloc:{i}-{i + 2}" if kind == "oom" else f"{kind}:{i}"


def verdict(outcome: Outcome, expected: dict[str, torch.Tensor]) -> str:
    """What is wrong with a disturbed run, or nothing."""
    if outcome.lora is None:
        return outcome.failure
    if not outcome.refused:
        return "nothing was refused"
    found = load_file(outcome.lora)
    same = found.keys() == expected.keys() and all(torch.equal(value, expected[key]) for key, value in found.items())
    return "" if same else "another LoRA"


def run(images: Path, out: Path, optimizer: str, plan: str) -> Outcome:
    """Train in a fork of this process; the calls of `plan` are refused."""
    fork = multiprocessing.get_context("fork")
    results, sender = fork.Pipe(duplex=False)
    child = fork.Process(target=_train, args=(images, out, optimizer, plan, sender))
    child.start()
    sender.close()
    try:
        return results.recv()
    except EOFError:
        return Outcome(failure="the process ended without a word")
    finally:
        child.join()


def _train(images: Path, out: Path, optimizer: str, plan: str, sender: multiprocessing.connection.Connection) -> None:
    for stream in (1, 2):  # PyTorch warns of each refusal
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    outcome = Outcome()
    config = {
        "model": {"name": "nano"},
        "data": {"folders": [str(images)], "cache": str(out / "cache")},
        "memory": {"resident_units": 3, "slots": 2},
        "training": {"steps": 3, "optimizer": optimizer},
        "samples": {"every": 2, "steps": 1},
        "output": {"out": str(out / "run"), "name": "x"},
    }
    if plan:
        emulated.fail(plan)
    try:
        outcome.lora = train(config_from_dict(config, plan), notify=outcome.notes.append).lora
    except Exception:
        outcome.failure = traceback.format_exc()
    report = emulated.report()
    outcome.attempts = {k.removeprefix("attempts: "): n for k, n in report["calls"].items() if k.startswith("attempts")}
    outcome.refused = list(report["notes"].get("failed on purpose", {}))
    sender.send(outcome)


if __name__ == "__main__":
    main()
