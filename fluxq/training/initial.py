"""What is measured before the first step: the int8 layers that rotate their inputs, and where the LoRA starts.

LoftQ (Li et al. 2023, with one round): the LoRA of a layer starts as the best approximation of what quantizing has
taken from its weight. LoRA-GA (Wang, Yu and Li 2024): it starts along the gradient of the weight. In both only what is
trained from there on is the LoRA (fluxq/model/start.py).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from fluxq.config import TrainConfig
from fluxq.console import Notify, plural, progress_bar
from fluxq.data import normal
from fluxq.errors import WrongRequest
from fluxq.formats.checkpoint.source import Source
from fluxq.kernels import dequantize, quantize
from fluxq.memory.retry import OutOfMemoryRetry
from fluxq.model.calibration import calibrate
from fluxq.model.config import FluxConfig
from fluxq.model.linear import Linear
from fluxq.model.lora import lora_layers
from fluxq.model.start import lora_ga, low_rank, sketch_rank, takes_start
from fluxq.models import Models

from .objective import Objective

NOTHING_ROUNDED = (
    "--lora-init loftq corrects the rounding of quantized weights, but this run has them in bf16; pass --format nf4, "
    "int8 or fp8, or leave --lora-init out"
)


def check_init(config: TrainConfig, models: Models) -> None:
    """Raise WrongRequest if the LoRA cannot start as `config` says."""
    init = config.lora.init
    if init != "plain" and config.lora.from_lora is not None:
        raise WrongRequest(f"--lora-init {init} and --from-lora both say how the LoRA starts; leave one of them out")
    without = ("dropout", "rank_dropout", "inner_dropout", "module_dropout", "max_norm")
    if init != "plain" and (more := next((name for name in without if getattr(config.lora, name)), None)):
        raise WrongRequest(
            f"lora.{more} is not for a LoRA that counts from a start; leave it or --lora-init {init} out"
        )
    if init == "loftq" and config.model.format == "bf16":
        raise WrongRequest(NOTHING_ROUNDED)
    if init == "loftq":
        models.require_original()


def prepare(
    config: TrainConfig,
    models: Models,
    objective: Objective,
    retry: OutOfMemoryRetry,
    layers: Mapping[str, Linear],
    notify: Notify,
) -> list[str]:
    """Give the `layers` of a new run their start; returns the int8 layers that rotate their inputs."""
    flux, rotated, began = objective.flux, [], time.perf_counter()
    if config.model.compute.startswith("int8"):
        rotated = retry.run("calibration", partial(calibrate, flux, objective.calibration), training=False)
        notify(f"int8: {plural(len(rotated), 'layer')} with outlier inputs will rotate them before rounding")
    own = started(lora_layers(flux), config.lora.init)
    if config.lora.init == "loftq":
        share = correct_rounding(models, own, config.training.seed)
        what = f"corrects {share:.1%} of the squared error that {models.format} made"
    elif config.lora.init == "lora_ga":
        work = partial(follow_gradients, objective, own, config.lora.init_batches, config.training.seed)
        retry.run("LoRA-GA", work)
        what = f"follows the gradients of {plural(config.lora.init_batches, 'batch')}"
    else:
        return rotated
    rest = len(layers) - len(own)
    others = f"; {plural(rest, 'other layer')} start plain" if rest else ""
    notify(f"LoRA of {plural(len(own), 'layer')} {what} ({time.perf_counter() - began:.1f} s){others}")
    return rotated


def started(layers: Mapping[str, Linear], init: str) -> dict[str, Linear]:
    """Those of the `layers`, which have LoRA, that can have the start that `init` names."""

    def starts(path: str, layer: Linear) -> bool:
        shape = layer.out_features, layer.in_features
        return takes_start(init, path, shape, len(layer.get_parameter("lora_down")))

    return {path: layer for path, layer in layers.items() if starts(path, layer)}


@torch.no_grad()
def empty(layers: Mapping[str, Linear], init: str) -> None:
    """Set the LoRA to zero where it will count from a start."""
    for layer in started(layers, init).values():
        layer.get_parameter("lora_down").zero_()


@torch.no_grad()
def correct_rounding(models: Models, layers: Mapping[str, Linear], seed: int) -> float:
    """Start `layers` as LoftQ does, one after the other; returns the share of the squared error that this corrects.

    Weights are read from the file and quantized again, so none that is streamed has to be on the GPU. Raises
    WrongRequest if nothing was rounded.
    """
    if models.format == "bf16":  # which the plan chose
        raise WrongRequest(NOTHING_ROUNDED)
    source, corrected, whole = models.original(), 0.0, 0.0
    with progress_bar() as show:
        for done, (path, layer) in enumerate(layers.items()):
            error = rounding_error(source, f"{path}.weight", models.format, models.device)
            rank, squares = len(layer.get_parameter("lora_down")), float(error.norm()) ** 2
            down, up, share = low_rank(error, rank, lambda shape, path=path: normal(shape, seed, "loftq", path))
            corrected, whole = corrected + share * squares, whole + squares
            layer.set_start(down, up / layer.lora_scale, corrects=True)
            show("LoftQ", done + 1, len(layers))
    if not whole:
        raise WrongRequest(
            f"--lora-init loftq has nothing to correct: {source.path} already has its weights in {models.format}; "
            "leave it out, or name the file that this one was made from"
        )
    return corrected / whole


def rounding_error(source: Source[FluxConfig], name: str, format: str, device: torch.device) -> Tensor:
    """What storing the matrix `name` (N, K) in `format` takes from it, fp32 on `device`."""
    error = torch.empty(source.shapes[name], device=device)
    for rows in source.bands(name):
        weight = source.get(name, rows).to(device)
        exact, stored = (dequantize(w, torch.float32) for w in (weight, quantize(weight, format)))
        error[rows.start : rows.stop] = exact - stored
    return error


def follow_gradients(objective: Objective, layers: Mapping[str, Linear], batches: int, seed: int) -> None:
    """Start `layers` as LoRA-GA does: along the mean gradient of the first micro-steps, kept as sketches.

    Every layer gets random factors of a higher rank, which change no output, and ordinary backward passes give their
    gradients: two sketches of that of the weight (fluxq/model/start.py). Of nano's gradients, seen once, what starts
    this way can follow 97 % of what is possible at its rank (docs/measurements.md).
    """
    trained = {
        path: (layer.get_parameter("lora_down"), layer.get_parameter("lora_up")) for path, layer in layers.items()
    }
    try:
        for path, layer in layers.items():
            k, n = layer.in_features, layer.out_features
            width = min(sketch_rank(len(trained[path][0])), k, n)
            down, up = (normal(s, seed, "lora_ga", path, p) for s, p in (((width, k), "down"), ((n, width), "up")))
            layer.set_start(down, up)
            layer.lora_down, layer.lora_up = (nn.Parameter(zeros(t.shape, objective.flux.device)) for t in (down, up))
        accumulate_gradients(objective, batches)
        for path, layer in layers.items():
            right, left = layer.get_parameter("lora_down").grad, layer.get_parameter("lora_up").grad
            if right is None or left is None or not (right.isfinite().all() and left.isfinite().all()):
                raise WrongRequest(
                    f"--lora-init lora_ga: the gradient of {path} is not finite in the first {batches} batches; leave "
                    "it out"
                )
            layer.set_start(*lora_ga(left, right, len(trained[path][0])))
            layer.lora_down, layer.lora_up = trained[path]
    finally:
        for path, layer in layers.items():
            layer.lora_down, layer.lora_up = trained[path]


def zeros(shape: Sequence[int], device: torch.device) -> Tensor:
    """fp32 zeros of `shape` that take the memory of one."""
    return torch.zeros((1,) * len(shape), device=device).expand(*shape)


def accumulate_gradients(objective: Objective, batches: int) -> None:
    """Add the mean gradient of the first micro-steps, each weighed by its images, to those of the parameters."""
    with progress_bar() as show:
        for index in range(batches):
            (objective.loss(index) * (objective.share(index) / batches)).backward()
            show("LoRA-GA", index + 1, batches)
