"""argv -> config -> one function.

Options are the fields of `fluxq.config`; this file only says which sections a command takes. Exit codes: 0 success, 2 a
wrong request (one sentence on stderr), 1 a failure, 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from fluxq.config import DEFAULT_RANK, TrainConfig, config_from_dict, read_toml, set_values
from fluxq.errors import WrongRequest

SECTIONS = {f.name: typing.get_type_hints(TrainConfig)[f.name] for f in dataclasses.fields(TrainConfig)}

OF_A_STEP = ("--policy", "--ram", "--offload")
OF_STREAMING = ("--resident-units", "--blocks-to-swap", "--slots")
DRAWING = {"--sample-steps": "--steps", "--sample-seed": "--seed", "--sample-every": "", **dict.fromkeys(OF_A_STEP, "")}


def options(*sections: str, renamed: dict[str, str] | None = None) -> Callable:
    """The command-line options of these sections of the config, and --config and --set for everything else in them.

    `renamed` gives an option another name in this command, or none.
    """

    def decorate(command: Callable) -> Callable:
        command = click.option(
            "--set", "assignments", multiple=True, metavar="SECTION.KEY=VALUE", help="Set any key of the config file."
        )(command)
        command = click.option(
            "--config", "config_file", type=Path, metavar="FILE", help="Read settings from a TOML file."
        )(command)
        for section in reversed(sections):
            hints = typing.get_type_hints(SECTIONS[section])
            for field in reversed(dataclasses.fields(SECTIONS[section])):
                flag = field.metadata.get("flag") or ""
                flag = (renamed or {}).get(flag, flag)
                if flag:
                    command = _option(flag, f"{section}.{field.name}", field, hints[field.name])(command)
        return command

    return decorate


def _option(flag: str, key: str, field: dataclasses.Field, hint: Any) -> Callable:
    """One click option for a config field. Left out on the command line it is None, so that files and defaults
    count.
    """
    kinds = [h for h in typing.get_args(hint) if h is not type(None)] or [hint]
    default = "" if field.default is None or field.default is False else f"  [default: {field.default}]"
    name = key.replace(".", "__")
    if kinds[0] is bool:
        return click.option(flag, name, is_flag=True, default=None, help=field.metadata["help"] + default)
    kind: Any = click.Choice(field.metadata["choices"]) if field.metadata["choices"] else kinds[0]
    metavar = None if field.metadata["choices"] else {int: "N", float: "X", str: "TEXT", Path: "PATH"}[kinds[0]]
    return click.option(flag, name, type=kind, metavar=metavar, help=field.metadata["help"] + default)


def as_config(key: str, help: str, name: str = "", without: str = "", **more: Any) -> Callable:
    """An option that takes what the config's `key`, like "model.format", takes, `without` one of its choices. `name` is
    that of the argument, by default the field's; `more` goes to click.
    """
    section, _, field = key.partition(".")
    allowed = next(f for f in dataclasses.fields(SECTIONS[section]) if f.name == field).metadata
    if allowed["choices"]:
        kind: click.ParamType = click.Choice([choice for choice in allowed["choices"] if choice != without])
    else:
        kind = click.IntRange(allowed["least"], None if allowed["most"] == math.inf else allowed["most"])
    shown = more.get("default") is not None
    return click.option(allowed["flag"], name or field, type=kind, show_default=shown, help=help, **more)


def read_config(
    config_file: Path | None, assignments: tuple[str, ...], given: dict[str, Any], base: Path | None = None
) -> TrainConfig:
    """Defaults, then `base` (the config of a run to resume), then the file, then options, then --set."""
    values: dict[str, Any] = read_toml(base) if base else {}
    config_from_dict(values, str(base))
    if config_file:
        source = str(config_file)
        for section, table in read_toml(config_file).items():
            old = values.get(section)
            values[section] = {**old, **table} if isinstance(old, dict) and isinstance(table, dict) else table
        config_from_dict(values, source)
    for key, value in given.items():
        section, _, name = key.partition("__")
        if value is not None and value != ():
            table = values.setdefault(section, {})
            table[name] = value
    set_values(values, assignments)
    return config_from_dict(values, "the command line")


class Commands(click.Group):
    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except WrongRequest as error:
            click.echo(f"error: {error}", err=True)
            ctx.exit(2)
        except RuntimeError as error:
            if type(error).__name__ != "OutOfMemoryError":  # torch's, without importing torch here
                raise
            click.echo(
                f"error: the card ran out of memory; a smaller --size, --batch or --t5-length needs less ({error})",
                err=True,
            )
            ctx.exit(1)
        except OSError as error:  # a file or folder that is locked, closed to us, too long a name, on a drive that went
            if error.filename is None:
                raise
            click.echo(
                f"error: {error.filename} cannot be used ({error.strerror}); check the path and its permissions",
                err=True,
            )
            ctx.exit(2)
        except KeyboardInterrupt as stop:
            click.echo(f"stopped{': ' if str(stop) else ''}{stop}", err=True)
            ctx.exit(130)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(package_name="fluxq")
def main() -> None:
    """Train LoRAs for FLUX.1 on the card you own."""


FOLDERS = click.argument("folders", nargs=-1, type=Path, metavar="[FOLDERS]...")
JSON = click.option(
    "--json", "as_json", is_flag=True, help="Print the result as one line of JSON on stdout; the rest goes to stderr."
)


BASE_LORA = click.option(
    "--base-lora",
    "model__base_loras",
    multiple=True,
    metavar="FILE[=STRENGTH]",
    help="LoRA to merge into the frozen transformer before it is quantised; may be given again.",
)


@main.command()
@FOLDERS
@options("model", "data", "lora", "training", "memory", "samples", "output")
@BASE_LORA
@click.option(
    "--prompt", "samples__prompts", multiple=True, metavar="TEXT", help="Prompt of a preview; may be given again."
)
@click.option("--resume", type=Path, metavar="RUN", help="Go on with the run in this directory, with its settings.")
@click.option("--overwrite", is_flag=True, help="Replace the run that the run directory holds.")
@JSON
def train(
    folders: tuple[Path, ...],
    config_file: Path | None,
    assignments: tuple[str, ...],
    resume: Path | None,
    overwrite: bool,
    as_json: bool,
    **given: Any,
) -> None:
    """Train a LoRA on FOLDERS of pictures, captions in .txt files beside them."""
    if resume and overwrite:
        raise WrongRequest("--resume goes on with a run and --overwrite replaces it; pass only one of them")
    if resume and not (resume / "config.toml").is_file():
        raise WrongRequest(f"{resume} holds no run to resume (there is no config.toml in it)")
    if folders:
        given["data__folders"] = [{"path": str(folder)} for folder in folders]
    config = read_config(config_file, assignments, given, resume / "config.toml" if resume else None)
    if resume:
        config = dataclasses.replace(config, output=dataclasses.replace(config.output, out=resume))
    _begin(as_json)
    from fluxq.train import train as run

    _print(run(config, resume=resume is not None, overwrite=overwrite), as_json)


@main.command()
@FOLDERS
@options("model", "data", "memory", renamed=dict.fromkeys(OF_A_STEP + OF_STREAMING, ""))
@click.option(
    "--prompt", "samples__prompts", multiple=True, metavar="TEXT", help="Also encode this prompt; may be given again."
)
@click.option(
    "--import",
    "imports",
    is_flag=True,
    help="First take what sd-scripts (*_flux.npz, *_flux_te.npz) or ai-toolkit (_latent_cache, _t_e_cache) encoded of "
    "FOLDERS.",
)
@click.option("--verify", is_flag=True, help="Instead: read every record of the cache and delete damaged ones.")
@click.option("--prune", is_flag=True, help="Instead: delete records that no dataset uses any more.")
@JSON
def cache(
    folders: tuple[Path, ...],
    config_file: Path | None,
    assignments: tuple[str, ...],
    imports: bool,
    verify: bool,
    prune: bool,
    as_json: bool,
    **given: Any,
) -> None:
    """Encode the pictures and captions of FOLDERS ahead of training, or look after the cache."""
    if folders:
        given["data__folders"] = [{"path": str(folder)} for folder in folders]
    config = read_config(config_file, assignments, given)
    _begin(as_json)
    from fluxq.cache import cache_command

    _print(cache_command(config, verify, prune, imports), as_json)


@main.command()
@options("model", "samples", "memory", renamed=DRAWING)
@BASE_LORA
@click.option("--prompt", "samples__prompts", multiple=True, metavar="TEXT", help="What to draw; may be given again.")
@click.option(
    "--lora",
    "loras",
    multiple=True,
    metavar="FILE[=STRENGTH]",
    help="LoRA to apply; with --grid one a row; may be given again.",
)
@click.option(
    "--strength", "strengths", multiple=True, type=float, metavar="X", help="With --grid: a column; may be given again."
)
@click.option("--grid", is_flag=True, help="One labelled sheet a prompt: LoRA files down, strengths across.")
@click.option(
    "--cache", "data__cache", type=Path, metavar="PATH", help="Where encoded prompts are kept  [default: cache]"
)
@click.option(
    "--out",
    "out",
    type=Path,
    default=Path("samples"),
    show_default=True,
    metavar="DIR",
    help="Folder for the pictures.",
)
@JSON
def sample(
    config_file: Path | None,
    assignments: tuple[str, ...],
    loras: tuple[str, ...],
    strengths: tuple[float, ...],
    grid: bool,
    out: Path,
    as_json: bool,
    **given: Any,
) -> None:
    """Draw pictures with the model and LoRAs."""
    config = read_config(config_file, assignments, given)
    _begin(as_json)
    from fluxq.sample import sample_command

    _print(sample_command(config, loras, strengths, grid, out), as_json)


@main.command()
@click.argument("paths", nargs=-1, type=Path, metavar="[FILE | FOLDERS]...")
@options("model", "data")
@JSON
@click.pass_context
def check(
    context: click.Context,
    paths: tuple[Path, ...],
    config_file: Path | None,
    assignments: tuple[str, ...],
    as_json: bool,
    **given: Any,
) -> None:
    """Tell what a model FILE, or a folder of them, is, or whether a run on FOLDERS could start: which file serves which
    part, and what is missing.

    Nothing is loaded, fetched or written. Exit code 0: a run could start, 2: not, and why.
    """
    if len(paths) > 1 or any(path.is_dir() for path in paths):
        given["data__folders"] = [{"path": str(path)} for path in paths]
    config = read_config(config_file, assignments, given)
    _begin(as_json, computes=False)
    from fluxq.check import check_command

    answer = check_command(config, paths)
    _print(answer, as_json)
    context.exit(0 if answer["ready"] else 2)


@main.command()
@click.argument("source", type=Path, metavar="SRC")
@click.argument("target", type=Path, metavar="DST")
@as_config("model.format", "How weights are stored.", without="bf16", default="nf4")
@click.option("--report", is_flag=True, help="Also print the error of every type of layer; takes twice the time.")
@click.option("--overwrite", is_flag=True, help="Replace DST.")
@JSON
def quantize(source: Path, target: Path, format: str, report: bool, overwrite: bool, as_json: bool) -> None:
    """Quantise the transformer SRC into DST, once and for all; training does the same by itself, into FLUXQ_CACHE."""
    _begin(as_json)
    from fluxq.quantize import quantize_command

    _print(quantize_command(source, target, format, report, overwrite), as_json)


@main.command()
@click.option(
    "--out", type=Path, default=Path("runs/demo"), show_default=True, metavar="DIR", help="Run directory; replaced."
)
@as_config("model.format", "How frozen weights are stored.", default="nf4")
@as_config("model.compute", "How frozen weights are multiplied.", default="bf16")
@JSON
def demo(out: Path, format: str, compute: str, as_json: bool) -> None:
    """Teach the bundled toy model a new creature: cache, quantise, train, sample, in about a minute, without a GPU."""
    _begin(as_json)
    from fluxq.demo import demo as run

    _print(run(out, format, compute), as_json)


@main.command()
@click.option(
    "--card",
    metavar="NAME",
    help="Predict for this card, like rtx3060; an unknown name lists those known. Default: this machine's, which is "
    "measured too.",
)
@click.option(
    "--weights",
    type=click.Choice(["random"]),
    default="random",
    show_default=True,
    help="What is measured: FLUX.1 dev with weights drawn at random as they are stored; no file is needed.",
)
@click.option("--steps", type=click.IntRange(3), default=5, show_default=True, help="Timed steps a row.")
@as_config(
    "model.format",
    "How frozen weights are stored; may be given several times.",
    "formats",
    multiple=True,
    default=("nf4", "int8"),
)
@click.option(
    "--size",
    "sizes",
    multiple=True,
    type=click.IntRange(256, 2048),
    default=(512, 768, 1024),
    show_default=True,
    help="Pixels of a side; may be given several times.",
)
@as_config("model.compute", "How frozen weights are multiplied.", default="bf16")
@as_config("memory.policy", "What a block keeps for the backward pass.", default="recompute")
@as_config("lora.rank", "Rank of the LoRA.", default=DEFAULT_RANK)
@as_config("training.batch", "Pictures a step.", default=1)
@as_config("model.t5_length", "T5 tokens a caption.", default=512)
@as_config("memory.slots", "Slots for streamed units.", default=8)
@click.option("--out", type=Path, metavar="DIR", help="Also write two plots and the rows as JSON there.")
@JSON
def profile(as_json: bool, **given: Any) -> None:
    """Memory and speed of every block-swap setting: predicted for a card, which need not be there, and on this
    machine's card also measured.
    """
    _begin(as_json, computes=given["card"] is None)
    from fluxq.profile import profile_command

    _print(profile_command(**given), as_json)


@main.group(cls=click.Group)
def bench() -> None:
    """Measure speed on this machine."""


@bench.command()
@click.option("--tune", is_flag=True, help="Try what is worth trying, and keep what is faster for this card.")
@JSON
def kernels(tune: bool, as_json: bool) -> None:
    """The linear layer's kernels at FLUX's shapes: milliseconds, TFLOP/s, and a plain 16-bit product's time over it."""
    _begin(as_json)
    from fluxq.bench_kernels import bench_kernels

    _print(bench_kernels(tune), as_json)


@bench.command()
@click.option(
    "--matrix",
    type=click.Choice(["quick", "full"]),
    help="A fixed list of settings in place of one; options that are given replace its own.",
)
@as_config("model.format", "How frozen weights are stored  [default: nf4]")
@as_config("model.compute", "How frozen weights are multiplied  [default: bf16]")
@as_config("memory.policy", "What a block keeps for the backward pass; default: as fits.")
@click.option("--size", type=click.IntRange(32, 2048), help="Pixels of a side  [default: 512; on a processor 96]")
@as_config("training.batch", "Pictures a step  [default: 1]")
@as_config("lora.rank", "Rank of the LoRA  [default: 16]")
@as_config("model.t5_length", "T5 tokens a caption  [default: 512; on a processor 32]")
@as_config(
    "memory.resident_units",
    "How many of the 76 units of weights stay on the card, the others are streamed; default: as fits.",
)
@as_config("memory.blocks_to_swap", "N blocks, 2 N units, are streamed: sd-scripts' way to say it; default: as fits.")
@as_config("memory.slots", "Places on the card for streamed units; default: as fits.")
@click.option("--steps", type=click.IntRange(3), default=20, show_default=True, help="Timed steps a setting.")
@click.option("--limit-vram", metavar="TEXT", help="Have no more of the card than this, like 12GiB.")
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
    """Training steps of full-size FLUX.1 dev with random weights: it/s, pictures/s, TFLOP/s, peak memory, energy.

    Nothing is downloaded. Without a card the bundled toy is measured in its place.
    """
    _begin(as_json)
    from fluxq.bench_steps import bench_steps

    _print(bench_steps(given, matrix, steps, limit_vram, limit_bus, out), as_json)


@bench.command()
@click.argument("files", nargs=-1, required=True, type=Path, metavar="FILES...")
@click.option("--out", type=Path, metavar="FILE", help="Also draw a plot there, as PNG.")
@JSON
def compare(files: tuple[Path, ...], out: Path | None, as_json: bool) -> None:
    """Results of bench steps side by side, with the published speeds of other trainers beside them."""
    _begin(as_json, computes=False)
    from fluxq.bench_compare import compare_results

    _print(compare_results(files, out), as_json)


@main.group(cls=click.Group)
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
    _begin(as_json, computes=False)
    from fluxq.lora.convert import convert_command

    _print(convert_command(source, target, to, rank, precision, overwrite), as_json)


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
    _begin(as_json, computes=False)
    from fluxq.lora.convert import resize_command

    _print(resize_command(source, target, rank, energy, to, precision, overwrite), as_json)


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
    _begin(as_json, computes=False)
    from fluxq.lora.merge import merge_command

    _print(merge_command(files, out, base, to, rank, precision, overwrite), as_json)


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
    _begin(as_json)
    from fluxq.lora.extract import extract_command

    _print(extract_command(base, tuned, target, rank, to, precision, overwrite), as_json)


@lora.command()
@click.argument("file", type=Path, metavar="FILE")
@JSON
def info(file: Path, as_json: bool) -> None:
    """Tell a LoRA's dialect, ranks and norms by layer, metadata and trigger, and which programs will read it."""
    _begin(as_json, computes=False)
    from fluxq.lora.info import info_command

    _print(info_command(file), as_json)


def _begin(as_json: bool, computes: bool = True) -> None:
    """Say first, on stderr, what the user of this machine should know; raise WrongRequest where the command `computes`
    and the card cannot. With --json, everything meant for people goes to stderr.
    """
    from fluxq.machine import notes, obstacle, read_machine
    from fluxq.report import console

    console.stderr = as_json
    machine = read_machine()
    for note in notes(machine):
        click.echo(f"note: {note}", err=True)
    if computes and (problem := obstacle(machine)):
        raise WrongRequest(problem)


def _print(result: Any, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(result if isinstance(result, dict) else dataclasses.asdict(result)))


if __name__ == "__main__":
    sys.exit(main())
