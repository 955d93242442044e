"""The commands: argv -> config -> one function.

Options are the fields of `fluxq.config`; this file only chooses the sections that a command takes. Exit codes: 0
success, 2 a wrong request (one sentence on stderr), 1 a failure, 130 stopped by Ctrl-C, 143 by SIGTERM, 129 by SIGHUP.
"""

from __future__ import annotations

import dataclasses
import errno
import io
import json
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from fluxq.config import DEFAULT_RANK
from fluxq.config_files import FORMER_OPTIONS
from fluxq.errors import GPUFailure, Stopped, WrongRequest, first_line, is_gpu_failure, is_out_of_memory, one_line

from .bench import bench
from .compat import import_, kohya
from .help import SettingsCommand
from .lora import lora
from .options import (
    JSON,
    asked_for,
    begin,
    config_option,
    finish,
    folder_settings,
    options,
    read_config,
    unknown_option,
)

STEP_OPTIONS = ("--policy", "--ram", "--offload")
STREAMING_OPTIONS = ("--resident-units", "--blocks-to-swap", "--slots")
SAMPLING_NAMES = {
    "--sample-steps": "--steps",
    "--sample-seed": "--seed",
    "--sample-every": "",
    **dict.fromkeys(STEP_OPTIONS, ""),
}
SAMPLING_SIZE = "in pixels, a multiple of 16; default: 512, or 768 on a GPU of 12 GiB or more."
SAMPLING_HELPS = {
    "--t5-length": "T5 tokens per prompt: longer prompts are cut, fewer tokens take less time; default: 512 for dev, "
    "256 for schnell.",
    "--format": "How the transformer's weights are stored: nf4 is the smallest (6.3 GiB), int8 and fp8 are more "
    "accurate (11.2 GiB), bf16 is not quantized (22.2 GiB); default: nf4, or that of the quantized file.",
    "--compute": "How the transformer's weights are multiplied: bf16 is the most accurate; int8 and fp8 are faster; "
    "int8_dx and fp8_dx, which differ only in training, sample as int8 and fp8; fp8 needs an RTX 40 or newer, older "
    "GPUs use int8 in its place.",
    "--width": f"Image width {SAMPLING_SIZE}",
    "--height": f"Image height {SAMPLING_SIZE}",
}


FIRST = (
    *("--models", "--trigger", "--preset", "--resolution", "--rank", "--steps", "--lr", "--vram", "--prompt"),
    *("--sample-every", "--out", "--resume", "--config"),
)
EXAMPLES = """\b
Examples:
  fluxq train photos --trigger zqx --models ~/ComfyUI
  fluxq train photos --config configs/12gb.toml --set lora.targets=attention
"""


class Commands(click.Group):
    def invoke(self, ctx: click.Context) -> Any:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")  # a name that the console cannot print ends nothing
        try:
            with ended_by_signals():
                return super().invoke(ctx)
        except click.NoSuchOption as error:
            click.echo(f"error: {unknown_option(error)}", err=True)
            ctx.exit(2)
        except WrongRequest as error:
            click.echo(f"error: {error}", err=True)
            ctx.exit(2)
        except RuntimeError as error:
            if isinstance(error, GPUFailure):
                told = str(error)
            elif is_gpu_failure(error):
                told = f"the GPU failed ({first_line(error)}); start again: what was finished is kept"
            elif is_out_of_memory(error):
                told = f"the GPU ran out of memory; lower --resolution, --batch or --t5-length ({error})"
            else:
                raise
            click.echo(one_line(f"error: {told}"), err=True)
            ctx.exit(1)
        except OSError as error:  # a file that is locked, forbidden, too long in name or on a missing drive
            if error.filename is not None:
                told = f"{error.filename} cannot be used ({error.strerror}); check the path and its permissions"
            elif error.errno == errno.ENOSPC or "temporary directory" in str(error):
                told = f"a disk is full ({error.strerror}); free some space, also for temporary files (TMPDIR)"
            else:
                raise
            click.echo(one_line(f"error: {told}"), err=True)
            ctx.exit(2)
        except KeyboardInterrupt as stop:
            click.echo(one_line(f"stopped{': ' if str(stop) else ''}{stop}"), err=True)
            ctx.exit(stop.exit_code if isinstance(stop, Stopped) else 130)


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """In this context SIGTERM, SIGHUP and a closing Windows console clean up as Ctrl-C does."""
    from fluxq.training.stopping import stop_signals

    def end(number: int, frame: object) -> None:
        raise Stopped(number)

    caught = {}
    if threading.current_thread() is threading.main_thread():
        for number in stop_signals():
            if signal.getsignal(number) is signal.SIG_DFL:  # not Ctrl-C, which Python handles
                caught[number] = signal.signal(number, end)
    try:
        yield
    finally:
        for number, before in caught.items():
            signal.signal(number, before)


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
main.add_command(kohya)
main.add_command(import_)


FOLDERS = click.argument("folders", nargs=-1, type=Path, metavar="[FOLDERS]...")


BASE_LORA = click.option(
    "--base-lora",
    "model__base_loras",
    multiple=True,
    metavar="FILE[=STRENGTH]",
    help="LoRA to merge into the frozen transformer before it is quantized, at this strength (default 1); may be "
    "repeated.",
)


@main.command(cls=SettingsCommand, first=FIRST, epilog=EXAMPLES)
@FOLDERS
@options("model", "data", "lora", "training", "memory", "samples", "output")
@BASE_LORA
@click.option(
    "--prompt",
    "samples__prompts",
    multiple=True,
    metavar="TEXT",
    help="Prompt for previews; may be repeated; default: the triggers, or without any the first three captions.",
)
@click.option(
    "--resume",
    type=Path,
    metavar="RUN",
    help="Continue the run in this directory from its last save, with its settings. Other steps, schedule or learning "
    "rates may be given, and FOLDERS if images or captions changed on purpose.",
)
@click.option("--overwrite", is_flag=True, help="Replace the run in the run directory, if there is one.")
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
    """Train a LoRA on FOLDERS of images.

    To caption photo.jpg, put the text into photo.txt next to it. Images without a caption are trained on the trigger
    word alone. Only FOLDERS and the model files are required; fluxq picks the rest and prints why.
    """
    if resume and overwrite:
        raise WrongRequest("--resume continues a run and --overwrite replaces it; pass only one of them")
    if resume and not (resume / "config.toml").is_file():
        raise WrongRequest(f"{resume} has no run to resume (there is no config.toml in it)")
    saved = resume / "config.toml" if resume else None
    if folders:
        given["data__folders"] = folder_settings(folders, saved, config_file)
    config = read_config(config_file, assignments, given, saved)
    asked = asked_for(config_file, assignments, given)
    if resume:
        if "output.out" in asked and config.output.out and config.output.out.resolve() != resume.resolve():
            raise WrongRequest(
                f"--resume goes on in {resume}, so --out {config.output.out} has no effect; leave it out"
            )
        config = dataclasses.replace(config, output=dataclasses.replace(config.output, out=resume))
    begin(as_json)
    from fluxq.train import train as run

    resumes = resume is not None
    finish(run(config, resumes, overwrite, accepts_data=resumes and bool(folders), asked=asked), as_json)


@main.command()
@click.argument("folder", required=False, metavar="[FOLDER]")
@config_option("training.preset", "What the LoRA teaches, for which it sets what is set in the file.")
@click.option(
    "--trigger", metavar="TEXT", help="The word that will call it in prompts, ideally a made-up one like zqx."
)
@click.option(
    "--models",
    metavar="PATH",
    help="The models: a folder of ComfyUI, Forge or diffusers, a hub id, or nano for the bundled toy; default: the "
    "environment variable FLUXQ_MODELS.",
)
@click.option("--out", metavar="DIR", help="Run directory, for the LoRA and the log; default: runs/TRIGGER.")
@click.option(
    "--file", type=Path, default=Path("my.toml"), show_default=True, metavar="FILE", help="The TOML file to write."
)
@click.option("--overwrite", is_flag=True, help="Replace FILE if it exists.")
@JSON
def init(file: Path, overwrite: bool, as_json: bool, **given: Any) -> None:
    """Write a commented TOML file to train with.

    A terminal asks five questions, or those of them that no option answers. Nothing is trained and nothing is replaced
    unasked.

    Example: fluxq init photos --preset person --trigger zqx --models ~/ComfyUI
    """
    begin(as_json, computes=False)
    from fluxq.commands.init import init_command

    finish(init_command(given, file, overwrite), as_json)


@main.command(cls=SettingsCommand)
@FOLDERS
@options("model", "data", "memory", renamed=dict.fromkeys(STEP_OPTIONS + STREAMING_OPTIONS, ""))
@click.option(
    "--prompt", "samples__prompts", multiple=True, metavar="TEXT", help="Also encode this prompt; may be repeated."
)
@click.option(
    "--import",
    "imports",
    is_flag=True,
    help="First import what sd-scripts (*_flux.npz, *_flux_te.npz) or ai-toolkit (_latent_cache, _t_e_cache) has "
    "encoded for FOLDERS.",
)
@click.option(
    "--verify", is_flag=True, help="Instead of encoding, read every record of the cache and delete damaged ones."
)
@click.option("--prune", is_flag=True, help="Instead of encoding, delete records that no dataset uses any more.")
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
    """Encode images and captions ahead of training.

    Training does this itself for what is missing. With --verify or --prune: check or clean the cache.
    """
    if folders:
        given["data__folders"] = folder_settings(folders, config_file)
    config = read_config(config_file, assignments, given)
    begin(as_json)
    from fluxq.commands.cache import cache_command

    finish(cache_command(config, verify, prune, imports), as_json)


@main.command(cls=SettingsCommand)
@options("model", "samples", "memory", renamed=SAMPLING_NAMES, helps=SAMPLING_HELPS)
@BASE_LORA
@click.option(
    "--prompt",
    "samples__prompts",
    multiple=True,
    metavar="TEXT",
    help="What the image should show; may be repeated, one image each.",
)
@click.option(
    "--lora",
    "loras",
    multiple=True,
    metavar="FILE[=STRENGTH]",
    help="LoRA to apply at this strength, by default 1; may be repeated: all are applied together, or with --grid one "
    "per row.",
)
@click.option(
    "--strength",
    "strengths",
    multiple=True,
    type=float,
    metavar="X",
    help="With --grid: the strength of a column; may be repeated.  [default: 0, 0.5, 1]",
)
@click.option(
    "--grid", is_flag=True, help="One labeled sheet per prompt to compare images: LoRA files down, strengths across."
)
@click.option(
    "--cache",
    "data__cache",
    type=Path,
    metavar="PATH",
    help="Folder for encoded prompts; later commands reuse what is in it.  [default: cache]",
)
@click.option(
    "--out",
    "out",
    type=Path,
    default=Path("samples"),
    show_default=True,
    metavar="DIR",
    help="Folder for the images; existing files are kept.",
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
    """Sample images with the model and LoRAs.

    Example: fluxq sample --models ~/ComfyUI --lora runs/zqx/zqx.safetensors --prompt "a photo of zqx on a beach"
    """
    config = read_config(config_file, assignments, given)
    if strengths and not grid:
        raise WrongRequest("--strength is for --grid; write --lora FILE=STRENGTH, or add --grid")
    begin(as_json)
    from fluxq.commands.sample import sample_command

    asked = asked_for(None, assignments, given)
    finish(sample_command(config, loras, strengths, grid, out, asked), as_json)


@main.command(cls=SettingsCommand)
@click.argument("paths", nargs=-1, type=Path, metavar="[FILE | FOLDERS]...")
@options("model", "data")
@click.option("--verbose", is_flag=True, help="Name every image that a line is about, not only the first three.")
@click.option(
    "--crops", type=Path, metavar="FILE", help="Save a sheet of all images there, with what training would cut off."
)
@JSON
@click.pass_context
def check(
    context: click.Context,
    paths: tuple[Path, ...],
    verbose: bool,
    crops: Path | None,
    config_file: Path | None,
    assignments: tuple[str, ...],
    as_json: bool,
    **given: Any,
) -> None:
    """Show what a file is, or whether a run could start.

    With a model or LoRA FILE, or a folder of models: shows what it is. With FOLDERS of images, or nothing: shows which
    model files a run would use, what it needs and what is missing.

    No model is loaded, nothing is downloaded, and nothing but --crops is written. The exit code is 0 if fluxq can use
    the file or start the run, 2 if not.
    """
    if len(paths) > 1 or any(path.is_dir() for path in paths):
        given["data__folders"] = folder_settings(paths, config_file)
    config = read_config(config_file, assignments, given)
    begin(as_json, computes=False)
    from fluxq.commands.check import check_command

    answer = check_command(config, paths, verbose, crops, asked_for(config_file, assignments, given))
    finish(answer, as_json)
    context.exit(0 if answer["ready"] else 2)


@main.command()
@FOLDERS
@click.option(
    "--model",
    metavar="ID|FOLDER",
    help="Image-to-text model of transformers, as an id on the Hugging Face hub or a folder.  [default: "
    "florence-community/Florence-2-base]",
)
@click.option(
    "--prompt",
    metavar="TEXT",
    help="What to ask the model; for Florence-2 one of its tasks, like <CAPTION>; default: for a paragraph.",
)
@click.option(
    "--max-words", type=click.IntRange(1), metavar="N", help="Shorten captions to whole sentences of at most N words."
)
@click.option(
    "--batch",
    type=click.IntRange(1),
    metavar="N",
    help="Images at a time; halved if GPU memory runs out; default: 8 on a GPU, 1 on a CPU.",
)
@click.option("--overwrite", is_flag=True, help="Also replace captions that are there, after copying them.")
@click.option("--offline", is_flag=True, help="Never download the model: use what is in the hub's cache.")
@click.option(
    "--trigger",
    metavar="TEXT",
    help="The word that calls the concept: it is put in front of the captions that are written or edited, unless they "
    "contain it.",
)
@click.option(
    "--remove",
    multiple=True,
    metavar="PHRASES",
    help='Take these phrases out of all captions, with commas between them, like "red hair, glasses": what no caption '
    "mentions, the trigger learns.",
)
@click.option(
    "--replace",
    nargs=2,
    multiple=True,
    metavar="OLD NEW",
    help="Replace this phrase in all captions; may be repeated.",
)
@click.option("--table", is_flag=True, help="Show the words and phrases that most captions have.")
@click.option("--recursive", is_flag=True, help="Also the images in folders inside FOLDERS.")
@JSON
@click.pass_context
def caption(context: click.Context, folders: tuple[Path, ...], as_json: bool, **given: Any) -> None:
    """Caption images with a model, or edit their captions.

    Writes a text file beside each image that has no caption. Nothing that is there is replaced without --overwrite. If
    it is interrupted, the same command goes on.

    With --remove, --replace or --table no model runs: the captions that are there are edited or counted. Files that
    change are first copied into a folder captions-backup-1 beside them.

    Example: fluxq caption photos --trigger zqx
    """
    begin(as_json, computes=not (given["remove"] or given["replace"] or given["table"]))
    from fluxq.commands.caption import caption_command

    answer = caption_command(folders, **given)
    finish(answer, as_json)
    context.exit(2 if answer.get("unread") or answer.get("speechless") else 0)


@main.command()
@click.argument("source", type=Path, metavar="SRC")
@click.argument("target", type=Path, metavar="DST")
@config_option(
    "model.format",
    "How weights are stored: nf4 is the smallest, int8 and fp8 are nearly twice as large and more accurate.",
    without="bf16",
    default="nf4",
)
@click.option(
    "--report", is_flag=True, help="Also print the relative error of each type of layer; takes twice as long."
)
@click.option("--overwrite", is_flag=True, help="Replace DST if it exists.")
@JSON
def quantize(source: Path, target: Path, format: str, report: bool, overwrite: bool, as_json: bool) -> None:
    """Quantize the transformer SRC into the file DST.

    Optional: training does the same by itself, once, into the folder FLUXQ_CACHE.
    """
    begin(as_json)
    from fluxq.commands.quantize import quantize_command

    finish(quantize_command(source, target, format, report, overwrite), as_json)


@main.command()
@click.option(
    "--out",
    type=Path,
    default=Path("runs/demo"),
    show_default=True,
    metavar="DIR",
    help="Run directory; an earlier demo in it is replaced.",
)
@config_option("model.format", "How frozen weights are stored: nf4 is the smallest.", default="nf4")
@config_option("model.compute", "How frozen weights are multiplied: the 8-bit modes are faster.", default="bf16")
@JSON
def demo(out: Path, format: str, compute: str, as_json: bool) -> None:
    """Train the bundled toy model, without a GPU or downloads.

    Teaches it a new creature through the same code as any run: cache, quantize, train, sample. Takes about two minutes
    on an idle CPU.
    """
    begin(as_json)
    from fluxq.commands.demo import demo as run

    finish(run(out, format, compute), as_json)


@main.command()
@click.option("--schema", is_flag=True, help="Print the JSON schema of config files, for editors and other programs.")
@click.option("--names", is_flag=True, help="Print what other trainers call these settings.")
def settings(schema: bool, names: bool) -> None:
    """List the settings of a run.

    Prints a page in Markdown with the key, option, values and default of each.
    """
    from fluxq.pages import json_schema, names_page, settings_page

    page = json.dumps(json_schema(), indent=1) if schema else names_page() if names else settings_page()
    click.echo(page.rstrip("\n"))


@main.command()
@click.option(
    "--gpu",
    metavar="NAME",
    help="Predict for this GPU, like 3060 or rtx4060ti-8gb, which need not be in this machine; an unknown name prints "
    "the list. Default: this machine's GPU, which is also measured.",
)
@click.option(
    "--weights",
    type=click.Choice(["random"]),
    default="random",
    show_default=True,
    help="Measure FLUX.1-dev with random weights, for which no model file is needed.",
)
@click.option(
    "--steps",
    type=click.IntRange(3),
    default=5,
    show_default=True,
    help="Timed steps per row; more make the figures steadier.",
)
@config_option(
    "model.format",
    "How frozen weights are stored: nf4 is the smallest; may be repeated.",
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
    help="Side of the square images in pixels; higher is slower; may be repeated.",
)
@config_option("model.compute", "How frozen weights are multiplied: the 8-bit modes are faster.", default="bf16")
@config_option(
    "memory.policy",
    "What a block keeps for the backward pass: recompute the least, keep_all the most.",
    default="recompute",
)
@config_option("lora.rank", "Rank of the LoRA; a higher one takes more memory.", default=DEFAULT_RANK)
@config_option("training.batch", "Images per step; more take more memory.", default=1)
@config_option("model.t5_length", "T5 tokens per caption; fewer are faster.", default=512)
@config_option("memory.slots", "GPU buffers for streamed units: more hide transfers better.", default=8)
@click.option("--out", type=Path, metavar="DIR", help="Also write two plots and the rows as JSON to this folder.")
@JSON
def profile(as_json: bool, **given: Any) -> None:
    """Predict the memory use and speed of training on a GPU.

    Prints a row per image size, format and number of blocks streamed from RAM. With --gpu everything is predicted;
    without it, predictions and measurements of this machine's GPU are printed side by side.
    """
    begin(as_json, computes=given["gpu"] is None)
    from fluxq.bench.profile import profile_command

    finish(profile_command(**given), as_json)
