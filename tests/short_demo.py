"""The demo as tests run it: 30 of its 400 steps at twice its learning rate, on a quarter of its ordinary images and as
much less of the creature, a third of its held-out images, and two prompts, sampled in 2 steps.

    [DEMO_STEPS=30] python tests/short_demo.py FOLDER [fluxq demo's options]

Nothing may use the network, start a program or unpickle, and triton is not there. No optimizer may import torch's
compiler, which takes a second.
"""

from __future__ import annotations

import os
import socket
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from fluxq.commands import demo
from fluxq.config import DataConfig, TrainConfig
from fluxq.training.optim import build_optimizer

all_images, whole_config = demo.draw_images, demo.demo_config
MOST = {"creature_held_out": 8, "ordinary_held_out": 8, "ordinary": 64}
"""Images of these folders; 8 are one batch."""


def draw_images(folder: Path) -> None:
    all_images(folder)
    for name, most in MOST.items():
        for path in folder.joinpath(name).iterdir():
            if int(path.stem) >= most:
                path.unlink()


def demo_config(out: Path, format: str, compute: str) -> TrainConfig:
    config = whole_config(out, format, compute)
    # adamw8bit would import bitsandbytes, and takes a fifth of a step on a CPU
    steps = int(os.environ.get("DEMO_STEPS", 30))
    training = replace(config.training, steps=steps, learning_rate=2e-3, optimizer="adamw")
    return replace(config, training=training, data=repeated(config.data, 1))


def repeated(data: DataConfig, times: int) -> DataConfig:
    creature, ordinary = data.folders
    return replace(data, folders=(replace(creature, repeats=times), ordinary))


FORBIDDEN = ("socket.", "subprocess.", "pickle.find_class", "os.system", "os.exec", "os.posix_spawn", "os.fork")
"""What Python's audit events of these begin with. A socket of the machine itself is allowed: signals wake it up."""


TRIED: list[str] = []


def forbid(event: str, arguments: tuple) -> None:
    if event.startswith(FORBIDDEN) and not (event == "socket.__new__" and arguments[1] == socket.AF_UNIX):
        TRIED.append(f"{event} {arguments}")  # a library may catch the error
        raise AssertionError(f"the demo tried {TRIED[-1]}")


if __name__ == "__main__":
    sys.modules["triton"] = None  # the package trains without it
    build_optimizer("adamw8bit", [nn.Parameter(torch.ones(64, 64))], 1e-4, 0.01).step()  # what is not the demo's here
    demo.draw_images, demo.demo_config = draw_images, demo_config
    demo.PROMPTS, demo.Request = demo.PROMPTS[::3], partial(demo.Request, steps=2)
    from fluxq.cli import main

    sys.addaudithook(forbid)
    try:
        main(["demo", "--json", "--out", *sys.argv[1:]])
    finally:
        if TRIED:
            sys.exit(f"the demo tried {TRIED}")
        if "torch._dynamo" in sys.modules:
            sys.exit("torch's compiler was imported")
