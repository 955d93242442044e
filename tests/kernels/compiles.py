"""Counts what a GPU would compile over a training's image sizes and ranks, without a GPU.

    python tests/kernels/compiles.py

Every case of fluxq/bench, every layer and a small FLUX run on `meta` at each size and rank; Triton derives from the
arguments under which key it would look for the compiled kernel, and the keys are counted (benchmarks/launches.py).
Prints {launch: growth} as JSON: by how many times the keys of one size and rank grow over all of them.
"""

from __future__ import annotations

import json
import os
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial
from itertools import product
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)
sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from helpers import randomize, tiny_config

from benchmarks.launches import recording
from fluxq.bench.kernel_cases import Layer, layer_shape
from fluxq.bench.memory_bound import RARE_STEPS, ROWS, STEPS, Sizes
from fluxq.kernels import COMPUTES, FORMATS, Activations, quantize
from fluxq.kernels import triton as ops
from fluxq.kernels.triton import table
from fluxq.model import Flux, add_lora
from fluxq.model.embed import image_ids, text_ids
from fluxq.model.linear import Linear

GPU = 89
META = torch.device("meta")
RANKS = (4, 16, 32, 100)
TEXT = 512
SIZES = ((544, 1088), (560, 1056), (576, 1024), (592, 992), (640, 928), (736, 800))
"""Buckets around 768 x 768. Their tokens are multiples of 8, of 2, of 256, of 2, of 16 and of 4; one leaves one row."""

Call = Callable[[], object]


def calls(tokens: int, rank: int) -> Iterator[tuple[str, Call]]:
    """By name, every call of an op at that number of tokens (text and image) and that rank of LoRA."""
    s = Sizes(META, tokens, text=TEXT, rank=rank)
    for name, make in {**STEPS, **ROWS, **RARE_STEPS}.items():
        yield name, lambda make=make: make(s).run(ops)
    for format, compute in product(FORMATS, COMPUTES):
        yield f"layer, {format}, {compute}", partial(train_layer, s, tokens, format, compute)
    for format in FORMATS:
        yield f"layer, {format}, few rows", partial(train_layer, s, tokens % 64 + 1, format, "bf16")
        yield f"layer, {format}, fused", partial(fused_layer, s, format)
    for policy, compute in (("recompute", "bf16"), ("keep_all8", "int8_dx"), ("keep_all8", "fp8")):
        yield f"flux, {policy}, {compute}", partial(train_flux, policy, compute, (tokens - TEXT) // 8, rank)


def train_layer(s: Sizes, rows: int, format: str, compute: str) -> None:
    """Forward and backward, with 8-bit rows from the op before and without."""
    layer = Layer.random(s, (rows, *layer_shape(s, "mlp.0")), format)
    layer.ours(layer.given(compute), compute)
    layer.ours(Activations(layer.x), compute)


def fused_layer(s: Sizes, format: str) -> None:
    op = f"lora_linear_{format}"
    with table.using(op, replace(table.SHIPPED[op, GPU, "large"], path="fused")):
        train_layer(s, s.tokens, format, "bf16")


@cache
def small_flux(policy: str, compute: str, rank: int) -> Flux:
    made = randomize(Flux(tiny_config(depth=1, depth_single_blocks=1)))
    add_lora(made, rank=rank, alpha=rank, targets="all")
    for module in made.modules():
        if isinstance(module, Linear):
            module.store(quantize(module.weight, "nf4" if module.in_features % 64 == 0 else "bf16"))
    made.set_policy(policy)
    made.set_compute(compute)
    for module in made.modules():
        getattr(module, "is_invertible", None)  # read from the scales, which `meta` has not
    return made.to(META)


def train_flux(policy: str, compute: str, tokens: int, rank: int) -> None:
    """Forward and backward of a small FLUX in NF4, with an eighth of the tokens."""
    flux, text = small_flux(policy, compute, rank), TEXT // 8
    with META:
        img, txt, vec = (torch.empty(1, *shape, dtype=torch.bfloat16) for shape in ((tokens, 16), (text, 40), (24,)))
        ids = image_ids(1, tokens).to(META), text_ids(text).to(META)
        out = flux(img, ids[0], txt, ids[1], torch.ones(1), vec, torch.ones(1))
        torch.autograd.grad(out, list(flux.parameters()), torch.ones_like(out))


def count() -> dict[str, int]:
    """How many times as many keys all sizes have as one, by call and kernel. Sizes take the ranks in turn."""
    keys: dict[str, dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
    with recording(GPU) as launches:
        for i, (width, height) in enumerate(SIZES):
            for name, call in calls(TEXT + width * height // 256, RANKS[i % len(RANKS)]):
                launches.clear()
                call()
                for launch in launches:
                    keys[f"{name}: {launch.name}"][i].add(launch.key)
    return {name: growth(found) for name, found in keys.items()}


def growth(found: dict[int, set[str]]) -> int:
    together = len(set().union(*found.values()))
    return -(-together // max(map(len, found.values())))


if __name__ == "__main__":
    print(json.dumps(count()))
