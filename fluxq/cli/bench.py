"""`fluxq bench`: argv -> one function."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .options import JSON, as_config, begin, finish


@click.group
def bench() -> None:
    """Measure speed on this machine."""


@bench.command()
@click.option("--tune", is_flag=True, help="Try what is worth trying, and keep what is faster for this GPU.")
@JSON
def kernels(tune: bool, as_json: bool) -> None:
    """The linear layer's kernels at FLUX's shapes: milliseconds, TFLOP/s, and a plain 16-bit product's time over it."""
    begin(as_json)
    from fluxq.bench.kernels import bench_kernels

    finish(bench_kernels(tune), as_json)


@bench.command()
@click.option(
    "--matrix",
    type=click.Choice(["quick", "full"]),
    help="A fixed list of settings in place of one; options that are given replace its own.",
)
@as_config("model.format", "How frozen weights are stored  [default: nf4]")
@as_config("model.compute", "How frozen weights are multiplied  [default: bf16]")
@as_config("memory.policy", "What a block keeps for the backward pass; default: as fits.")
@click.option("--resolution", type=click.IntRange(32, 2048), help="Pixels of a side  [default: 512; on a CPU 96]")
@as_config("training.batch", "Images a step  [default: 1]")
@as_config("lora.rank", "Rank of the LoRA  [default: 16]")
@as_config("model.t5_length", "T5 tokens a caption  [default: 512; on a CPU 32]")
@as_config(
    "memory.resident_units",
    "How many of the 76 units of weights stay on the GPU, the others are streamed; default: as fits.",
)
@as_config("memory.blocks_to_swap", "N blocks, 2 N units, are streamed: sd-scripts' way to say it; default: as fits.")
@as_config("memory.slots", "Places on the GPU for streamed units; default: as fits.")
@click.option("--steps", type=click.IntRange(3), default=20, show_default=True, help="Timed steps a setting.")
@click.option("--limit-vram", metavar="TEXT", help="Have no more of the GPU than this, like 12GiB.")
@click.option("--limit-bus", metavar="TEXT", help="Imitate a slower bus, like 12GB/s, by repeating copies.")
@click.option("--out", type=Path, metavar="FILE", help="Also write the result there as JSON, for bench compare.")
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
    """Training steps of full-size FLUX.1 dev with random weights: it/s, images/s, TFLOP/s, peak memory, energy.

    Nothing is downloaded. Without a GPU the bundled toy is measured in its place.
    """
    begin(as_json)
    from fluxq.bench.steps import bench_steps

    finish(bench_steps(given, matrix, steps, limit_vram, limit_bus, out), as_json)


@bench.command()
@click.argument("files", nargs=-1, required=True, type=Path, metavar="FILES...")
@click.option("--out", type=Path, metavar="FILE", help="Also draw a plot there, as PNG.")
@JSON
def compare(files: tuple[Path, ...], out: Path | None, as_json: bool) -> None:
    """Results of bench steps side by side, with the published speeds of other trainers beside them."""
    begin(as_json, computes=False)
    from fluxq.bench.compare import compare_results

    finish(compare_results(files, out), as_json)
