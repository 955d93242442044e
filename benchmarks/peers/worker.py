"""One program in a process of its own, which makes a training step whenever it is told to: see steps.py.

Started with a row as JSON. Reads the number of a step per line and answers with a line of JSON: first what was loaded,
then the step's CPU time. "reset" starts to count anew, "counts" asks what was counted since.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.measure import version
from fluxq.bench.timed_step import Setting
from fluxq.model import FluxConfig

Step = Callable[[int], float | None]
WAITS = ("device synchronizations", "stream synchronizations", "event synchronizations")
PAGEABLE = "pageable copies to the GPU"


def build(row: dict[str, Any], device: torch.device) -> tuple[Step, list[nn.Parameter]]:
    """The step of the row's program, and what it trains."""
    setting = Setting(**row["setting"])
    config = FluxConfig.nano() if row["tiny"] else FluxConfig.dev()
    config = replace(config, depth=row["depth"][0], depth_single_blocks=row["depth"][1])
    if row["program"] == "sd-scripts":
        from benchmarks.peers import sd_scripts

        return sd_scripts.trainer(Path(row["checkout"]), setting)
    if row["program"] == "recipe":
        from benchmarks.peers import peft_lora, qlora_step

        model = qlora_step.transformer(config, setting.rank, device)
        return qlora_step.trainer(model, config, setting, row["optimizer"]), peft_lora.trained(model)
    return fluxq(setting, config, device, row["optimizer"], row["emulated"])


def fluxq(
    setting: Setting, config: FluxConfig, device: torch.device, optimizer: str, emulated: bool
) -> tuple[Step, list[nn.Parameter]]:
    """fluxq's step with all weights on the device. Unlike that of timed_step.py it does not wait for its own end."""
    from benchmarks.placed import planned
    from fluxq.bench.random_model import planned_flux
    from fluxq.bench.timed_step import SameBatch, random_batch
    from fluxq.config import TrainingConfig
    from fluxq.model.blocks import Scale
    from fluxq.training.libraries import library_of
    from fluxq.training.objective import Objective
    from fluxq.training.optim import build_optimizer, optimizer_step

    if emulated:  # zeros, where no kernel runs; training finds scales around 1
        Scale.is_invertible = property(lambda self: True)  # type: ignore[assignment, method-assign]
    made = planned(setting, config, device, optimizer, blocks_to_swap=0, offload=False)
    flux, training = planned_flux(config, made, setting.rank, device), TrainingConfig(batch=setting.batch)
    parameters = list(flux.parameters())
    updates = build_optimizer(optimizer, parameters, library_of(optimizer).default_rate()[0], training.weight_decay)
    objective = Objective(flux, SameBatch(random_batch(config, setting), setting.resolution), training)
    return lambda index: optimizer_step(updates, objective, index, 1, 1.0, training.clip)[0], parameters


class Clock:
    """CPU milliseconds of a step, all threads together, split by the program's call of `Tensor.backward`."""

    def __init__(self, step: Step) -> None:
        self.step, self.marks, plain = step, [], torch.Tensor.backward

        def marked(*arguments: Any, **options: Any) -> None:
            self.marks.append(time.process_time())
            plain(*arguments, **options)
            self.marks.append(time.process_time())

        torch.Tensor.backward = marked  # type: ignore[method-assign]

    def __call__(self, index: int) -> dict[str, float]:
        self.marks[:] = [time.process_time()]
        loss = self.step(index)
        start, forward, backward, end = *self.marks, time.process_time()
        parts = {"forward": forward - start, "backward": backward - forward, "update": end - backward}
        return {"loss": loss, "step": 1e3 * (end - start)} | {name: 1e3 * s for name, s in parts.items()}


class Counts:
    """Peak memory since `reset`; on an emulated GPU also what each step did to it."""

    def __init__(self, device: torch.device, emulated: bool) -> None:
        self.cuda, self.gpu = device.type == "cuda", None
        if emulated:
            import emulated as gpu  # type: ignore[import-not-found] - tests/emulated_gpu/site

            self.gpu = gpu

    def reset(self) -> dict[str, Any]:
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM becomes VmRSS
        if self.gpu:
            self.gpu.reset()
        return self.memory()

    def memory(self) -> dict[str, int]:
        found = {"rss": resident("VmRSS"), "peak_rss": resident("VmHWM")}
        if self.cuda:
            found |= {"allocated": torch.cuda.memory_allocated(), "peak": torch.cuda.max_memory_allocated()}
            found |= {"reserved": torch.cuda.max_memory_reserved()}
        return found

    def read(self, steps: int) -> dict[str, Any]:
        report = self.gpu.report() if self.gpu else {}
        return self.memory() | (per_step(report, steps) if report else {})


def per_step(report: dict[str, Any], steps: int) -> dict[str, float]:
    """Of the emulated GPU's report: launches, waits and copies of one step."""
    calls, copies, sizes = report["calls"], report["copies"], report["bytes"]
    found = {"launches": report["launches"], "waits": sum(calls.get(name, 0) for name in WAITS)}
    found |= {PAGEABLE: calls.get(PAGEABLE, 0)}
    found |= {f"copies, {way}": copies[way] for way in ("host to GPU", "GPU to host")}
    found |= {f"bytes, {way}": sizes[way] for way in ("host to GPU", "GPU to host")}
    return {name: count / steps for name, count in found.items()}


def resident(field: str, status: str | None = None) -> int:
    """Bytes of VmRSS (now) or VmHWM (the most so far) of this process."""
    status = status or Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"^{field}:\s+(\d+) kB$", status, re.MULTILINE)[1])  # type: ignore[index]


def main() -> None:
    row = json.loads(sys.argv[1])
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what a library prints is not an answer
    device = torch.device(row["device"])
    torch.manual_seed(0), torch.set_num_threads(1)
    counts, before, counted = Counts(device, row["emulated"]), resident("VmRSS"), 0
    step, parameters = build(row, device)
    clock, packages = Clock(step), ("torch", "diffusers", "peft", "bitsandbytes", "accelerate", "transformers")
    loaded = {
        "trained": sum(p.numel() for p in parameters),
        "tensors": len(parameters),
        "rss_before": before,
        "packages": {name: version(name) for name in packages},
    }
    print(json.dumps(loaded | counts.memory()), file=answers)
    for line in map(str.strip, sys.stdin):
        if line == "reset":
            answer, counted = counts.reset(), 0
        elif line == "counts":
            answer = counts.read(counted)
        else:
            answer, counted = clock(int(line)), counted + 1
        print(json.dumps(answer), file=answers)


if __name__ == "__main__":
    main()
