"""`fluxq lora`: argv -> one function."""

from __future__ import annotations

from pathlib import Path

import click

from .options import JSON, begin, finish


@click.group
def lora() -> None:
    """Convert, inspect, resize, merge and extract LoRA files.

    They may come from any program.
    """


TO = click.option(
    "--to",
    type=click.Choice(["kohya", "diffusers", "comfy", "peft"]),
    default="kohya",
    show_default=True,
    help="Target program: kohya loads in ComfyUI, Forge, sd-scripts and diffusers; diffusers splits fused layers and "
    "gives all layers one rank; comfy uses the original model's names; peft writes a folder for PeftModel.",
)
PRECISION = click.option(
    "--precision",
    type=click.Choice(["bf16", "fp16", "fp32"]),
    help="Number type of the file: bf16 and fp16 halve the size of fp32.  [default: as in the source]",
)
OVERWRITE = click.option("--overwrite", is_flag=True, help="Replace the output file if it exists.")


@lora.command()
@click.argument("source", type=Path, metavar="SRC")
@click.argument("target", type=Path, metavar="DST")
@TO
@click.option(
    "--rank",
    type=click.IntRange(1),
    metavar="N",
    help="Reduce every layer to this rank, by SVD; default: keep everything; a fused layer made from separate "
    "parts then has the sum of their ranks.",
)
@PRECISION
@OVERWRITE
@JSON
def convert(
    source: Path, target: Path, to: str, rank: int | None, precision: str | None, overwrite: bool, as_json: bool
) -> None:
    """Write the LoRA SRC as DST for another program.

    SRC may come from any program. The error of the conversion is measured and printed.
    """
    begin(as_json, computes=False)
    from fluxq.commands.lora.convert import convert_command

    finish(convert_command(source, target, to, rank, precision, overwrite), as_json)


@lora.command()
@click.argument("source", type=Path, metavar="SRC")
@click.argument("target", type=Path, metavar="DST")
@click.option("--rank", type=click.IntRange(1), metavar="N", help="Reduce every layer to this rank, by SVD.")
@click.option(
    "--energy",
    type=float,
    metavar="X",
    help="Or keep this share of each layer's sum of squares, like 0.95, at the lowest rank that does.",
)
@TO
@PRECISION
@OVERWRITE
@JSON
def resize(
    source: Path,
    target: Path,
    rank: int | None,
    energy: float | None,
    to: str,
    precision: str | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Write the LoRA SRC as DST at a lower rank.

    Give --rank or --energy. The error is measured and printed.
    """
    begin(as_json, computes=False)
    from fluxq.commands.lora.resize import resize_command

    finish(resize_command(source, target, rank, energy, to, precision, overwrite), as_json)


@lora.command()
@click.argument("files", nargs=-1, required=True, metavar="FILE[=STRENGTH]...")
@click.option(
    "--out",
    type=Path,
    required=True,
    metavar="PATH",
    help="The file to write; a folder for --to peft or a --base in shards.",
)
@click.option(
    "--base",
    type=Path,
    metavar="PATH",
    help="Merge into a copy of this transformer, keeping its layout and precision; default: merge into one LoRA.",
)
@click.option(
    "--to",
    type=click.Choice(["kohya", "diffusers", "comfy", "peft"]),
    help="Which program a merged LoRA is for, as in fluxq lora convert.  [default: kohya]",
)
@click.option(
    "--rank",
    type=click.IntRange(1),
    metavar="N",
    help="Reduce a merged LoRA to this rank, by SVD; default: ranks add up and nothing is lost.",
)
@PRECISION
@OVERWRITE
@JSON
def merge(
    files: tuple[str, ...],
    out: Path,
    base: Path | None,
    to: str | None,
    rank: int | None,
    precision: str | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Merge LoRAs into one LoRA or into a transformer.

    Each LoRA is applied at its STRENGTH, by default 1. The error is measured and printed.
    """
    begin(as_json, computes=False)
    from fluxq.commands.lora.merge import merge_command

    finish(merge_command(files, out, base, to, rank, precision, overwrite), as_json)


@lora.command()
@click.argument("base", type=Path, metavar="BASE")
@click.argument("tuned", type=Path, metavar="TUNED")
@click.argument("target", type=Path, metavar="DST")
@click.option(
    "--rank",
    type=click.IntRange(1),
    default=32,
    show_default=True,
    metavar="N",
    help="Rank of every layer; a higher one comes nearer to TUNED, in a larger file.",
)
@TO
@click.option(
    "--precision",
    type=click.Choice(["bf16", "fp16", "fp32"]),
    default="bf16",
    show_default=True,
    help="Number type of the file: bf16 and fp16 halve the size of fp32.",
)
@OVERWRITE
@JSON
def extract(
    base: Path, tuned: Path, target: Path, rank: int, to: str, precision: str, overwrite: bool, as_json: bool
) -> None:
    """Extract a LoRA from a finetuned transformer.

    Writes DST, the LoRA that best turns the transformer BASE into its finetune TUNED, and prints how much of the
    difference it misses.
    """
    begin(as_json)
    from fluxq.commands.lora.extract import extract_command

    finish(extract_command(base, tuned, target, rank, to, precision, overwrite), as_json)


@lora.command()
@click.argument("file", type=Path, metavar="FILE")
@JSON
def info(file: Path, as_json: bool) -> None:
    """Show what is in a LoRA file and which programs read it.

    Prints its dialect, ranks and norms by layer, metadata and trigger.
    """
    begin(as_json, computes=False)
    from fluxq.commands.lora.info import info_command

    finish(info_command(file), as_json)
