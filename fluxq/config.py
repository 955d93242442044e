"""What a run is told: frozen dataclasses, read from TOML, command-line options and `--set section.key=value`.

Every field carries its help text and, where it has one, its command-line option, so that the dataclasses are the only
list of options there is. Unknown keys are refused with the nearest known one.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import os
import sys
import tomllib
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fluxq.errors import WrongRequest


def option(
    default: Any,
    help: str,
    flag: str | None = None,
    choices: tuple[str, ...] = (),
    least: float | None = None,
    most: float = math.inf,
) -> Any:
    """A field with its help text, its command-line option, and the values it may take or the least of them."""
    return field(
        default=default, metadata={"help": help, "flag": flag, "choices": choices, "least": least, "most": most}
    )


@dataclass(frozen=True)
class ModelConfig:
    """[model] Which files, and how the frozen weights are held."""

    name: str | None = option(
        None, "'nano' for the bundled toy model, in place of the four files", "--model", ("nano",)
    )
    models: Path | None = option(
        None,
        "where parts that are not named are looked for: a ComfyUI, Forge, diffusers or other folder, an all-in-one "
        "file, or a hub id such as black-forest-labs/FLUX.1-dev; default: the environment's FLUXQ_MODELS",
        "--models",
    )
    flux: Path | None = option(None, "the transformer: a .safetensors file, diffusers folder or hub id", "--flux")
    ae: Path | None = option(None, "the autoencoder: ae.safetensors, a diffusers folder or hub id", "--ae")
    clip_l: Path | None = option(
        None, "the CLIP-L text encoder: clip_l.safetensors, a diffusers folder or hub id", "--clip-l"
    )
    t5xxl: Path | None = option(
        None, "the T5-XXL text encoder: t5xxl_fp16.safetensors, a diffusers folder or hub id", "--t5xxl"
    )
    clip_tokenizer: Path | None = option(None, "CLIP's tokenizer: a folder with vocab.json; default: searched for")
    t5_tokenizer: Path | None = option(
        None, "T5's tokenizer: spiece.model, tokenizer.json or a GGUF T5; default: searched for"
    )
    t5_length: int | None = option(
        None,
        "T5 tokens a caption, longer ones are cut; default: 512 dev, 256 schnell",
        "--t5-length",
        least=2,
        most=512,
    )
    format: str | None = option(
        None,
        "how frozen weights are stored: nf4 is the leanest; default: on a GPU the most faithful that trains as fast, "
        "else nf4",
        "--format",
        ("nf4", "fp8", "int8", "bf16"),
    )
    compute: str = option(
        "bf16",
        "how frozen weights are multiplied: int8 and fp8 are faster, with the gradient in bf16; _dx: in 8 bits as well",
        "--compute",
        ("bf16", "int8", "int8_dx", "fp8", "fp8_dx"),
    )
    base_loras: tuple[str, ...] = option((), "LoRAs to merge into the frozen transformer, as FILE or FILE=STRENGTH")
    ae_band: int | None = option(
        None,
        "rows of the autoencoder's feature maps that are worked on at a time: the same result in less memory, slower; "
        "default: all",
        "--ae-band",
        least=1,
    )


@dataclass(frozen=True)
class FolderConfig:
    """[[data.folders]] One folder of images."""

    path: Path
    repeats: int = option(1, "how often each image is seen in an epoch", least=1)
    trigger: str | None = option(None, "word that calls the concept; put in front of captions that lack it")


@dataclass(frozen=True)
class DataConfig:
    """[data] Images, and the shapes they are trained at."""

    folders: tuple[FolderConfig, ...] = option((), "folders of images")
    validation: tuple[FolderConfig, ...] = option(
        (), "folders of held-out images; their loss is measured at start and end"
    )
    trigger: str | None = option(None, "word that calls the concept, for every folder without its own", "--trigger")
    resolution: int | None = option(
        None,
        "pixels: images are resized to an area of resolution x resolution; default: by the GPU",
        "--resolution",
        least=16,
    )
    step: int = option(16, "pixels: sides of buckets are multiples of this", least=16)
    min_side: int | None = option(None, "pixels: shortest side of a bucket; default: half of resolution", least=16)
    max_side: int | None = option(None, "pixels: longest side of a bucket; default: twice resolution", least=16)
    upscale: bool = option(True, "enlarge images smaller than their bucket; with false they get a smaller bucket")
    skip_bad: bool = option(False, "leave out images that cannot be read, and list them", "--skip-bad")
    cache: Path = option(Path("cache"), "folder where encoded images and captions are kept", "--cache")


DEFAULT_RANK, DEFAULT_TARGETS = 16, ("attention+mlp",)  # where neither the user nor a LoRA to start from says


@dataclass(frozen=True)
class LoraConfig:
    """[lora] What is trained."""

    rank: int | None = option(
        None,
        "rank of the LoRA; file size and trainable weights grow with it; default: 16, or that of --from-lora",
        "--rank",
        least=1,
    )
    alpha: float | None = option(
        None, "the LoRA is scaled by alpha / rank; default: rank, or as in --from-lora", "--alpha", least=1e-09
    )
    targets: tuple[str, ...] | None = option(
        None,
        "attention, attention+mlp, all, or regular expressions on layer paths; default: attention+mlp, or what "
        "--from-lora adapts",
    )
    from_lora: Path | None = option(
        None, "start from this LoRA, of any program, in place of one that does nothing yet", "--from-lora"
    )
    text_encoder: str | None = option(
        None,
        "train this text encoder too: captions are then encoded anew in every step; default: none",
        "--text-encoder",
        ("clip_l", "t5xxl"),
    )
    file_format: str = option(
        "kohya",
        "names in the LoRA: kohya loads everywhere; peft writes folders, <name>.peft, for PeftModel",
        "--lora-format",
        ("kohya", "diffusers", "comfy", "peft"),
    )


@dataclass(frozen=True)
class TrainingConfig:
    """[training] The loop."""

    steps: int | None = option(None, "optimizer steps; default: 100 an image, 1,000 to 3,000", "--steps", least=1)
    batch: int = option(1, "images a forward pass", "--batch", least=1)
    accumulate: int = option(1, "forward passes an optimizer step", "--accumulate", least=1)
    learning_rate: float = option(1e-4, "learning rate", "--lr", least=0)
    text_learning_rate: float | None = option(
        None, "learning rate of --text-encoder; default: half of --lr", "--text-lr", least=0
    )
    optimizer: str = option(
        "adamw8bit", "adamw8bit keeps its state in 2 bytes a weight, adamw in 8", "--optimizer", ("adamw", "adamw8bit")
    )
    weight_decay: float = option(0.01, "weight decay of the optimizer", least=0)
    schedule: str = option("constant", "learning rate over time", "--schedule", ("constant", "linear", "cosine"))
    warmup: int = option(0, "steps over which the learning rate rises linearly", "--warmup", least=0)
    clip: float = option(1.0, "largest norm of the gradient; 0: no limit", least=0)
    timesteps: str = option("shift", "how t is drawn", "--timesteps", ("uniform", "sigmoid", "shift", "flux_shift"))
    shift: float = option(3.1582, "for timesteps = shift: more of them near noise above 1", least=0.001)
    guidance: float = option(1.0, "guidance that dev is told while it trains", least=0)
    seed: int = option(42, "names every random draw of the run", "--seed")


@dataclass(frozen=True)
class MemoryConfig:
    """[memory] What a run may use, and what it keeps where."""

    vram: str | None = option(None, "memory of the GPU to use, like 12GiB; default: what is free", "--vram")
    ram: str | None = option(None, "memory of the host to use, like 24GiB; default: what is free", "--ram")
    policy: str | None = option(
        None,
        "what a block keeps for the backward pass, from least memory to least work; default: as fits",
        "--policy",
        ("recompute", "keep_attention", "keep_qkv", "keep_all8", "keep_all"),
    )
    resident_units: int | None = option(
        None,
        "how many of FLUX.1's 76 units of weights stay on the GPU, the others are streamed; default: as fits",
        "--resident-units",
        least=0,
    )
    blocks_to_swap: int | None = option(
        None, "N blocks, 2 N units, are streamed: sd-scripts' way to say it", "--blocks-to-swap", least=0
    )
    slots: int | None = option(
        None, "places on the GPU for streamed units; more hide copies better; default: as fits", "--slots", least=2
    )
    offload: bool | None = option(
        None,
        "inputs of blocks wait in host memory for the backward pass: less of the GPU, more copies; default: as fits",
        "--offload",
    )


@dataclass(frozen=True)
class SamplesConfig:
    """[samples] Images made with the model."""

    prompts: tuple[str, ...] = option((), "what to draw; while training: the trigger or a few captions")
    every: int = option(0, "previews every so many steps, and at the end; 0: none", "--sample-every", least=0)
    width: int | None = option(None, "pixels; default: the training size", "--width", least=16)
    height: int | None = option(None, "pixels; default: the training size", "--height", least=16)
    steps: int = option(20, "Euler steps an image", "--sample-steps", least=1)
    guidance: float = option(3.5, "guidance that dev is told", "--guidance", least=0)
    cfg: float = option(1.0, "strength of true classifier-free guidance; above 1 doubles the time", "--cfg", least=1)
    negative: str = option("", "negative prompt, used where cfg is above 1", "--negative")
    seed: int = option(42, "seed of the first image; the next one's is one higher", "--sample-seed")


@dataclass(frozen=True)
class OutputConfig:
    """[output] Where results go."""

    out: Path | None = option(None, "run directory; default: runs/<name>", "--out")
    name: str | None = option(None, "name of the LoRA file; default: the trigger, or the first folder's name", "--name")
    save_every: int = option(
        250, "steps between saves of LoRA and resumable state; 0: at the end only", "--save-every", least=0
    )
    keep: int = option(0, "how many of the LoRAs saved on the way to keep, the newest; 0: all", "--keep", least=0)
    plot_seconds: float = option(20.0, "seconds between updates of loss.png", least=0)


@dataclass(frozen=True)
class TrainConfig:
    """All of a run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    samples: SamplesConfig = field(default_factory=SamplesConfig)
    output: OutputConfig = field(default_factory=OutputConfig)


FORMER_KEYS = {
    "data.size": "data.resolution",
    "training.rate": "training.learning_rate",
    "training.text_rate": "training.text_learning_rate",
}
"""Names that keys had before; config files, saved runs and --set may still use them."""

FORMER_OPTIONS = {"size": "resolution", "rate": "lr", "text-rate": "text-lr", "card": "gpu"}
"""The same for command-line options, without their dashes."""


def current_names(values: Mapping[str, Any], source: str) -> dict[str, Any]:
    """A copy of a config's tables in which each former key has its current name."""
    renamed = {name: dict(table) if isinstance(table, Mapping) else table for name, table in values.items()}
    for former, current in FORMER_KEYS.items():
        (section, old), new = former.split("."), current.split(".")[1]
        table = renamed.get(section)
        if isinstance(table, dict) and old in table:
            if new in table:
                raise WrongRequest(f"{source}: {former} is the former name of {current}; keep only one of them")
            table[new] = table.pop(old)
    return renamed


def config_from_dict(values: Mapping[str, Any], source: str, cls: type = TrainConfig, prefix: str = "") -> Any:
    """A `cls` with `values`; WrongRequest names unknown keys (and the nearest known one) and values of the wrong
    type.
    """
    if not isinstance(values, Mapping):
        raise WrongRequest(f"{source}: {prefix.rstrip('.') or 'the file'} must be a table, not {values!r}")
    if cls is TrainConfig:
        values = current_names(values, source)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    for key in values:
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1) or difflib.get_close_matches(key, fields, n=1, cutoff=0)
            raise WrongRequest(f"unknown key '{prefix}{key}' in {source}; did you mean '{prefix}{near[0]}'?")
    read = {k: _typed(v, hints[k], f"{prefix}{k}", source, fields[k].metadata) for k, v in values.items()}
    missing = [n for n, f in fields.items() if n not in read and f.default is f.default_factory is dataclasses.MISSING]
    if missing:
        raise WrongRequest(f"{source}: {prefix}{missing[0]} is missing")
    return cls(**read)


def _typed(value: Any, hint: Any, key: str, source: str, allowed: Mapping[str, Any]) -> Any:
    """`value`, as TOML gives it, as the type `hint` says."""
    if isinstance(hint, types.UnionType):
        if value is None:
            return None
        hint = next(h for h in typing.get_args(hint) if h is not type(None))
    if typing.get_origin(hint) is tuple:
        items = value if isinstance(value, list | tuple) else [value]
        return tuple(
            _typed(item, typing.get_args(hint)[0], f"{key}.{i}", source, allowed) for i, item in enumerate(items)
        )
    if dataclasses.is_dataclass(hint):
        if hint is FolderConfig and isinstance(value, str):
            value = {"path": value}
        return config_from_dict(value, source, typing.cast(type, hint), f"{key}.")
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if hint is Path and isinstance(value, str):
        if "\0" in value:
            raise WrongRequest(f"{source}: {key} must be a path, not {value!r}")
        value = Path(os.path.expanduser(value))
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise WrongRequest(f"{source}: {key} must be {_NAMES[hint]}, not {value!r}")
    choices, least = allowed.get("choices", ()), allowed.get("least")
    if choices and value not in choices:
        raise WrongRequest(f"{source}: {key} must be one of {', '.join(choices)}, not {value!r}")
    if least is not None and not least <= value <= min(allowed["most"], sys.float_info.max):
        most = f" and at most {allowed['most']}" if allowed["most"] < math.inf else ""
        raise WrongRequest(f"{source}: {key} must be at least {least}{most}, not {value!r}")
    return value


def file_and_strength(text: str) -> tuple[Path, float]:
    """ "FILE" or "FILE=STRENGTH" of a LoRA. Raises WrongRequest where the strength is no number."""
    path, equals, number = text.rpartition("=")
    if not equals or Path(text).exists():
        return Path(text), 1.0
    try:
        strength = float(number)
    except ValueError:
        strength = math.nan
    if not math.isfinite(strength):
        raise WrongRequest(f"the strength in {text} is no number; write FILE=0.8")
    return Path(path), strength


_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text", Path: "a path"}


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file; WrongRequest where it is missing or malformed (with the line)."""
    try:
        return current_names(tomllib.loads(path.read_text(encoding="utf-8-sig")), str(path))
    except OSError as error:
        raise WrongRequest(f"the config file {path} cannot be read ({error.strerror})") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise WrongRequest(f"{path} is no valid TOML: {error}") from error


def set_values(values: dict[str, Any], assignments: tuple[str, ...]) -> None:
    """Put `--set section.key=value` assignments into `values`; a value is TOML, or plain text where it is no TOML."""
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        *sections, key = FORMER_KEYS.get(path.strip(), path.strip()).split(".")
        if not equals or not key:
            raise WrongRequest(f"--set wants section.key=value, not {assignment!r}")
        try:
            value = tomllib.loads(f"v = {text.strip()}")["v"]
        except tomllib.TOMLDecodeError:
            value = text.strip()
        table = values
        for section in sections:
            table = table.setdefault(section, {})
            if not isinstance(table, dict):
                raise WrongRequest(f"--set {path}: {section} is a value, not a section")
        table[key] = value


def to_toml(config: TrainConfig) -> str:
    """`config` as TOML that reads back to an equal one; fields that are None are left out."""
    lines: list[str] = []
    for section in dataclasses.fields(config):
        values = getattr(config, section.name)
        lines.append(f"[{section.name}]")
        lines += [
            f"{f.name} = {_toml(v)}" for f in dataclasses.fields(values) if (v := getattr(values, f.name)) is not None
        ]
        lines.append("")
    return "\n".join(lines)


def _toml(value: Any) -> str:
    if dataclasses.is_dataclass(value):
        pairs = [(f.name, getattr(value, f.name)) for f in dataclasses.fields(value)]
        return "{ " + ", ".join(f"{name} = {_toml(v)}" for name, v in pairs if v is not None) + " }"
    if isinstance(value, tuple):
        return "[" + ", ".join(map(_toml, value)) + "]"
    text = json.dumps(str(value) if isinstance(value, Path) else value, ensure_ascii=False)
    return text.replace("\x7f", "\\u007f")  # the one character that JSON leaves as it is and TOML does not allow
