"""argv -> config -> one function.

Options are the fields of `fluxq.config`; this file only says which sections a command takes. Exit codes: 0 success, 2 a
wrong request (one sentence on stderr), 1 a failure, 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import click

from fluxq.config import DEFAULT_RANK, FORMER_OPTIONS
from fluxq.errors import WrongRequest

from .bench import bench
from .lora import lora
from .options import JSON, as_config, begin, finish, options, read_config

OF_A_STEP = ("--policy", "--ram", "--offload")
OF_STREAMING = ("--resident-units", "--blocks-to-swap", "--slots")
DRAWING = {"--sample-steps": "--steps", "--sample-seed": "--seed", "--sample-every": "", **dict.fromkeys(OF_A_STEP, "")}


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
                "error: the GPU ran out of memory; a smaller --resolution, --batch or --t5-length needs less "
                f"({error})",
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


@click.group(
    cls=Commands,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "max_content_width": 120,
        "token_normalize_func": lambda name: FORMER_OPTIONS.get(name, name),
    },
)
@click.version_option(package_name="fluxq")
def main() -> None:
    """Train LoRAs for FLUX.1 on the GPU you own."""


main.add_command(bench)
main.add_command(lora)


FOLDERS = click.argument("folders", nargs=-1, type=Path, metavar="[FOLDERS]...")


BASE_LORA = click.option(
    "--base-lora",
    "model__base_loras",
    multiple=True,
    metavar="FILE[=STRENGTH]",
    help="LoRA to merge into the frozen transformer before it is quantized; may be given again.",
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
    """Train a LoRA on FOLDERS of images, captions in .txt files beside them."""
    if resume and overwrite:
        raise WrongRequest("--resume goes on with a run and --overwrite replaces it; pass only one of them")
    if resume and not (resume / "config.toml").is_file():
        raise WrongRequest(f"{resume} holds no run to resume (there is no config.toml in it)")
    if folders:
        given["data__folders"] = [{"path": str(folder)} for folder in folders]
    config = read_config(config_file, assignments, given, resume / "config.toml" if resume else None)
    if resume:
        config = dataclasses.replace(config, output=dataclasses.replace(config.output, out=resume))
    begin(as_json)
    from fluxq.train import train as run

    finish(run(config, resume=resume is not None, overwrite=overwrite), as_json)


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
    """Encode the images and captions of FOLDERS ahead of training, or look after the cache."""
    if folders:
        given["data__folders"] = [{"path": str(folder)} for folder in folders]
    config = read_config(config_file, assignments, given)
    begin(as_json)
    from fluxq.commands.cache import cache_command

    finish(cache_command(config, verify, prune, imports), as_json)


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
@click.option("--grid", is_flag=True, help="One labeled sheet a prompt: LoRA files down, strengths across.")
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
    help="Folder for the images.",
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
    """Draw images with the model and LoRAs."""
    config = read_config(config_file, assignments, given)
    begin(as_json)
    from fluxq.commands.sample import sample_command

    finish(sample_command(config, loras, strengths, grid, out), as_json)


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
    begin(as_json, computes=False)
    from fluxq.commands.check import check_command

    answer = check_command(config, paths)
    finish(answer, as_json)
    context.exit(0 if answer["ready"] else 2)


@main.command()
@click.argument("source", type=Path, metavar="SRC")
@click.argument("target", type=Path, metavar="DST")
@as_config("model.format", "How weights are stored.", without="bf16", default="nf4")
@click.option("--report", is_flag=True, help="Also print the error of every type of layer; takes twice the time.")
@click.option("--overwrite", is_flag=True, help="Replace DST.")
@JSON
def quantize(source: Path, target: Path, format: str, report: bool, overwrite: bool, as_json: bool) -> None:
    """Quantize the transformer SRC into DST, once and for all; training does the same by itself, into FLUXQ_CACHE."""
    begin(as_json)
    from fluxq.commands.quantize import quantize_command

    finish(quantize_command(source, target, format, report, overwrite), as_json)


@main.command()
@click.option(
    "--out", type=Path, default=Path("runs/demo"), show_default=True, metavar="DIR", help="Run directory; replaced."
)
@as_config("model.format", "How frozen weights are stored.", default="nf4")
@as_config("model.compute", "How frozen weights are multiplied.", default="bf16")
@JSON
def demo(out: Path, format: str, compute: str, as_json: bool) -> None:
    """Teach the bundled toy model a new creature: cache, quantize, train, sample, in about a minute, without a GPU."""
    begin(as_json)
    from fluxq.commands.demo import demo as run

    finish(run(out, format, compute), as_json)


@main.command()
@click.option(
    "--gpu",
    metavar="NAME",
    help="Predict for this GPU, like rtx3060; an unknown name lists those known. Default: this machine's, which is "
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
    "--resolution",
    "resolutions",
    multiple=True,
    type=click.IntRange(256, 2048),
    default=(512, 768, 1024),
    show_default=True,
    help="Pixels of a side; may be given several times.",
)
@as_config("model.compute", "How frozen weights are multiplied.", default="bf16")
@as_config("memory.policy", "What a block keeps for the backward pass.", default="recompute")
@as_config("lora.rank", "Rank of the LoRA.", default=DEFAULT_RANK)
@as_config("training.batch", "Images a step.", default=1)
@as_config("model.t5_length", "T5 tokens a caption.", default=512)
@as_config("memory.slots", "Slots for streamed units.", default=8)
@click.option("--out", type=Path, metavar="DIR", help="Also write two plots and the rows as JSON there.")
@JSON
def profile(as_json: bool, **given: Any) -> None:
    """Memory and speed of every block-swap setting: predicted for a GPU, which need not be there, and on this
    machine's GPU also measured.
    """
    begin(as_json, computes=given["gpu"] is None)
    from fluxq.bench.profile import profile_command

    finish(profile_command(**given), as_json)
