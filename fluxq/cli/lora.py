"""`fluxq lora`: argv -> one function."""

from __future__ import annotations

from pathlib import Path

import click

from .options import JSON, begin, finish


@click.group
def lora() -> None:
    """Convert, inspect, resize, merge and extract LoRA files of any program."""


TO = click.option(
    "--to",
    type=click.Choice(["kohya", "diffusers", "comfy", "peft"]),
    default="kohya",
    show_default=True,
    help="For whom: kohya is read by ComfyUI, Forge, sd-scripts and diffusers; diffusers splits fused layers, at one "
    "rank; comfy has the original's names; peft is a folder for PeftModel.",
)
PRECISION = click.option(
    "--precision",
    type=click.Choice(["bf16", "fp16", "fp32"]),
    help="Type of the numbers  [default: as they are in the source]",
)
OVERWRITE = click.option("--overwrite", is_flag=True, help="Replace the file that is to be written.")


@lora.command()
@click.argument("source", type=Path, metavar="SRC")
@click.argument("target", type=Path, metavar="DST")
@TO
@click.option(
    "--rank",
    type=click.IntRange(1),
    metavar="N",
    help="Bring every layer down to this rank, by SVD; default: all is kept, so parts with matrices of their own make "
    "a fused layer of the sum of their ranks.",
)
@PRECISION
@OVERWRITE
@JSON
def convert(
    source: Path, target: Path, to: str, rank: int | None, precision: str | None, overwrite: bool, as_json: bool
) -> None:
    """Write the LoRA SRC, from any program, as DST, for another one. The error is measured and printed."""
    begin(as_json, computes=False)
    from fluxq.commands.lora.convert import convert_command

    finish(convert_command(source, target, to, rank, precision, overwrite), as_json)


@lora.command()
@click.argument("source", type=Path, metavar="SRC")
@click.argument("target", type=Path, metavar="DST")
@click.option("--rank", type=click.IntRange(1), metavar="N", help="Bring every layer down to this rank, by SVD.")
@click.option(
    "--energy",
    type=float,
    metavar="X",
    help="Or keep this share, like 0.95, of each layer's sum of squares, at the least rank that does.",
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
    """Write the LoRA SRC as DST at a lower rank. The error is measured and printed."""
    begin(as_json, computes=False)
    from fluxq.commands.lora.resize import resize_command

    finish(resize_command(source, target, rank, energy, to, precision, overwrite), as_json)


@lora.command()
@click.argument("files", nargs=-1, required=True, metavar="FILE[=STRENGTH]...")
@click.option("--out", type=Path, required=True, metavar="PATH", help="The file to write, or folder where it is one.")
@click.option(
    "--base",
    type=Path,
    metavar="PATH",
    help="Merge into a copy of this transformer, in its own layout and precision; default: into one LoRA.",
)
@click.option(
    "--to",
    type=click.Choice(["kohya", "diffusers", "comfy", "peft"]),
    help="For whom a merged LoRA is written, as in convert  [default: kohya]",
)
@click.option(
    "--rank",
    type=click.IntRange(1),
    metavar="N",
    help="Bring a merged LoRA down to this rank, by SVD; default: the ranks of all add up and nothing is lost.",
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
    """Merge LoRAs, each at its strength, into one LoRA or into a transformer. The error is measured and printed."""
    begin(as_json, computes=False)
    from fluxq.commands.lora.merge import merge_command

    finish(merge_command(files, out, base, to, rank, precision, overwrite), as_json)


@lora.command()
@click.argument("base", type=Path, metavar="BASE")
@click.argument("tuned", type=Path, metavar="TUNED")
@click.argument("target", type=Path, metavar="DST")
@click.option("--rank", type=click.IntRange(1), default=32, show_default=True, metavar="N", help="Rank of every layer.")
@TO
@click.option(
    "--precision",
    type=click.Choice(["bf16", "fp16", "fp32"]),
    default="bf16",
    show_default=True,
    help="Type of the numbers.",
)
@OVERWRITE
@JSON
def extract(
    base: Path, tuned: Path, target: Path, rank: int, to: str, precision: str, overwrite: bool, as_json: bool
) -> None:
    """Write as DST the LoRA that comes nearest to what makes the transformer BASE into TUNED, and print how near."""
    begin(as_json)
    from fluxq.commands.lora.extract import extract_command

    finish(extract_command(base, tuned, target, rank, to, precision, overwrite), as_json)


@lora.command()
@click.argument("file", type=Path, metavar="FILE")
@JSON
def info(file: Path, as_json: bool) -> None:
    """Tell a LoRA's dialect, ranks and norms by layer, metadata and trigger, and which programs will read it."""
    begin(as_json, computes=False)
    from fluxq.commands.lora.info import info_command

    finish(info_command(file), as_json)
