"""`fluxq bench`: argv -> one function."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .options import JSON, begin, config_option, finish


@click.group
def bench() -> None:
    """Measure speed on this machine."""


@bench.command()
@click.option(
    "--tune",
    is_flag=True,
    help="Try other tile sizes and keep the faster ones; later runs on this GPU use them. Needs a CUDA GPU and Triton.",
)
@JSON
def kernels(tune: bool, as_json: bool) -> None:
    """Time the linear layer's kernels at FLUX.1's shapes.

    Prints milliseconds, TFLOP/s, and how many times as fast as a plain 16-bit matrix product each kernel is (a kernel
    that is limited by memory: as fast as a copy of the same bytes).
    """
    begin(as_json)
    from fluxq.bench.kernels import bench_kernels

    finish(bench_kernels(tune), as_json)


@bench.command()
@click.option(
    "--matrix",
    type=click.Choice(["quick", "full"]),
    help="Measure a fixed list of settings instead of one; options given here override the list's own.",
)
@config_option("model.format", "How frozen weights are stored: nf4 is the smallest, bf16 the largest.  [default: nf4]")
@config_option(
    "model.compute", "How frozen weights are multiplied: the 8-bit modes are faster, _dx the fastest.  [default: bf16]"
)
@config_option(
    "memory.policy",
    "What a block keeps for the backward pass: recompute the least, keep_all the most; default: chosen to fit.",
)
@click.option(
    "--resolution",
    type=click.IntRange(32, 2048),
    help="Side of the square images in pixels, a multiple of 16.  [default: 512; 96 on a CPU]",
)
@config_option("training.batch", "Images per step; more take more memory.  [default: 1]")
@config_option("lora.rank", "Rank of the LoRA; a higher one takes more memory.  [default: 16]")
@config_option("model.t5_length", "T5 tokens per caption; fewer are faster.  [default: 512; 32 on a CPU]")
@config_option(
    "memory.resident_units",
    "How many of the 76 units of weights stay on the GPU, the rest is streamed from RAM; default: chosen to fit.",
)
@config_option(
    "memory.blocks_to_swap",
    "Stream this many blocks (2 units each) from RAM, as in sd-scripts; default: chosen to fit.",
)
@config_option(
    "memory.slots", "GPU buffers for streamed units: more of them hide transfers better; default: chosen to fit."
)
@click.option(
    "--steps",
    type=click.IntRange(3),
    default=20,
    show_default=True,
    help="Timed steps per setting; more make the figures steadier.",
)
@click.option(
    "--limit-vram",
    metavar="TEXT",
    help="Use no more GPU memory than this, like 12GiB, to imitate a smaller GPU; default: no limit.",
)
@click.option(
    "--limit-bus",
    metavar="TEXT",
    help="Imitate a slower bus between RAM and GPU, like 12GB/s, by repeating copies; default: no limit.",
)
@click.option("--out", type=Path, metavar="FILE", help="Also write the result to this file as JSON, for bench compare.")
@JSON
def steps(
    matrix: str | None,
    steps: int,
    limit_vram: str | None,
    limit_bus: str | None,
    out: Path | None,
    as_json: bool,
    **given: Any,
) -> None:
    """Time training steps of full-size FLUX.1-dev.

    Prints it/s, images/s, TFLOP/s, peak memory and energy. The weights are random, so nothing is downloaded. Without
    a GPU, the bundled toy model is measured instead.
    """
    begin(as_json)
    from fluxq.bench.steps import bench_steps

    finish(bench_steps(given, matrix, steps, limit_vram, limit_bus, out), as_json)


@bench.command()
@click.argument("files", nargs=-1, required=True, type=Path, metavar="FILES...")
@click.option("--out", type=Path, metavar="FILE", help="Also save a plot to this PNG file.")
@JSON
def compare(files: tuple[Path, ...], out: Path | None, as_json: bool) -> None:
    """Compare results of bench steps with published speeds.

    FILES are what bench steps --out wrote. The published speeds are those of other trainers.
    """
    begin(as_json, computes=False)
    from fluxq.bench.compare import compare_results

    finish(compare_results(files, out), as_json)
