"""sd-scripts' options -> fluxq's settings: what table.py says, done. What is said of each option is the lint."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fluxq.config import TrainConfig
from fluxq.config_files import config_from_dict
from fluxq.errors import WrongRequest
from fluxq.training.defaults import check_variants
from fluxq.training.losses import HUBER
from fluxq.training.timesteps import SHIFTED, SIGMOIDS

from .dataset import prepared
from .folders import read_folders
from .network import read_network
from .objective import loss_settings, sampling_mode
from .optimizers import read_optimizer, read_schedule
from .prompts import read_prompts
from .setup import Setup
from .table import BY_NAME, FLAG, TABLE, Row, steps_or_share

UNUSUAL = {
    "timestep_sampling": "FLUX.1 is usually trained with shift and --discrete_flow_shift 3.1582",
    "model_prediction_type": "it compares an image with a velocity; raw compares velocities",
    "guidance_scale": "1 is usual for training; previews have their own",
}
"""Options whose default in sd-scripts is wrong for FLUX.1 -> what to use instead."""


@dataclass(frozen=True)
class Read:
    """config: fluxq's settings, None if something is refused. lines: what becomes of each option, the lint. refused:
    the reasons, as one sentence, or "". setup: what was read.
    """

    config: TrainConfig | None
    lines: list[str]
    reasons: list[str]
    setup: Setup

    @property
    def refused(self) -> str:
        return "; ".join(self.reasons)


def read_options(options: Mapping[str, Any], places: Sequence[tuple[str, str]] = ()) -> Read:
    """fluxq's settings for `options`, which are as `read_command` gives them.

    places: (how paths of another machine begin, what to put there instead). Raises WrongRequest for files that cannot
    be read and for values that fluxq does not take.
    """
    setup = Setup(prepared(options), places)
    if isinstance(rate := options["text_encoder_lr"], int | float):
        setup.options["text_encoder_lr"] = [rate]
    for row in TABLE:
        _check_type(row, options[row.name])
        if row.refused and options[row.name] != row.default and options[row.name] is not None:
            setup.refuse(row.name, row.refused)
    _read_model(setup)
    read_network(setup)
    _read_objective(setup)
    read_optimizer(setup)
    read_schedule(setup)
    _read_length(setup)
    _read_output(setup)
    _read_samples(setup)
    read_folders(setup)
    refused = [f"--{name}: {text}" for name, text in dict.fromkeys(setup.refused)]
    if setup.missing:
        refused.append(f"not on this machine: {', '.join(setup.missing)}; --map OLD=NEW replaces how paths begin")
    config = None if refused else config_from_dict(setup.values, "sd-scripts' options")
    if config:
        try:
            check_variants(config.lora, config.training)
        except WrongRequest as error:
            config, refused = None, [f"--optimizer_type: {error}"]
    return Read(config, [*lint(options, setup), *(f"refused: {text}" for text in refused)], refused, setup)


def _check_type(row: Row, value: Any) -> None:
    """Raise WrongRequest if a value, of a config file, has a wrong type: sd-scripts would fail later."""
    kinds = {int: (int,), float: (int, float), steps_or_share: (int, float), FLAG: (bool,)}.get(row.kind, (str, Path))
    items = value if isinstance(value, list) else [value]
    fits = all(isinstance(v, kinds) and (row.kind is FLAG or not isinstance(v, bool)) for v in items)
    if row.name == "dataset_config" and isinstance(value, Mapping):
        return
    is_single = row.name == "text_encoder_lr" and not isinstance(value, list)
    if value is not None and not (fits and (isinstance(value, list) == row.many or is_single)):
        raise WrongRequest(f"--{row.name} cannot be {value!r}; write it as on the command line")


def lint(options: Mapping[str, Any], setup: Setup) -> list[str]:
    """A line for each option that is not as by default, and for each default that is wrong for FLUX.1."""
    lines = []
    for row in TABLE:
        value = options[row.name]
        said = [text for name, text in dict.fromkeys(setup.notes) if name == row.name]
        if value != row.default and not row.refused:
            what = f"ignored: {row.ignored}" if row.ignored else f"becomes {_settings(row.to, setup)}"
            lines.append(f"--{row.name} {_shown(value)}{what}")
        elif row.name in UNUSUAL:
            lines.append(f"--{row.name} {_shown(value)}kept, but {UNUSUAL[row.name]}")
        lines += [f"--{row.name}: {text}" for text in said]
    for name in options.keys() - BY_NAME:
        near = difflib.get_close_matches(name, BY_NAME, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        lines.append(f"{name} of the config file is unknown, so sd-scripts leaves it out too{hint}")
    return lines


def _settings(keys: str, setup: Setup) -> str:
    """The keys of a row, each with its value if that is short."""
    found = []
    for key in keys.split(", "):
        section, _, name = key.partition(".")
        value = setup.values.get(section, {}).get(name, "")
        found.append(f"{key} = {value}" if isinstance(value, bool | int | float | str) and value != "" else key)
    return ", ".join(found)


def _shown(value: Any) -> str:
    text = " ".join(map(str, value)) if isinstance(value, list) else "" if value is True else str(value)
    return f"{text} " if text else ""


def _read_model(setup: Setup) -> None:
    options = setup.options
    for name, key in (
        ("pretrained_model_name_or_path", "flux"),
        ("clip_l", "clip_l"),
        ("t5xxl", "t5xxl"),
        ("ae", "ae"),
    ):
        if not options[name]:
            setup.refuse(name, "it is required")
        setup.set("model", **{key: setup.path(options[name])})
    setup.set("model", t5_length=options["t5xxl_max_token_length"], text_mask=options["apply_t5_attn_mask"])
    if options["fp8_base"] or options["fp8_base_unet"]:
        setup.set("model", format="fp8")
    multipliers, weights = options["base_weights_multiplier"] or [], options["base_weights"] or []
    if len(multipliers) > len(weights):
        setup.refuse("base_weights_multiplier", "there are more of them than of --base_weights")
    strengths = [*multipliers, *[1.0] * len(weights)]
    loras = [f"{setup.path(file)}={strength:g}" for file, strength in zip(weights, strengths, strict=False)]
    setup.set("model", base_loras=loras)
    setup.set("lora", from_lora=setup.path(options["network_weights"]))
    swapped = 18 if options["split_mode"] and options["blocks_to_swap"] is None else options["blocks_to_swap"]
    setup.set("memory", blocks_to_swap=swapped or None)
    if swapped and options["cpu_offload_checkpointing"]:
        setup.refuse("cpu_offload_checkpointing", "it contradicts --blocks_to_swap; keep one of them")


def _read_objective(setup: Setup) -> None:
    options, mode = setup.options, sampling_mode(setup.options)
    kind, prediction = options["loss_type"], options["model_prediction_type"]
    scheme = options["weighting_scheme"]
    used = {
        "shift": options["discrete_flow_shift"] if mode in SHIFTED else None,
        "sigmoid_scale": options["sigmoid_scale"] if mode in SIGMOIDS else None,
        "logit_mean": options["logit_mean"] if mode == "logit_normal" else None,
        "logit_std": options["logit_std"] if mode == "logit_normal" else None,
        "mode_scale": options["mode_scale"] if mode == "mode" else None,
    }
    weighed = prediction == "sigma_scaled" and scheme in ("sigma_sqrt", "cosmap")
    setup.set("training", timesteps=mode, prediction=prediction, weighting=scheme if weighed else "none", **used)
    if scheme != "uniform" and not weighed and mode != scheme:
        setup.note(
            "weighting_scheme", "it has no effect with these modes of timesteps and prediction, as in sd-scripts"
        )
    if kind in HUBER:
        settings = loss_settings(options)
        setup.set("training", huber_c=settings.huber_c, huber_schedule=settings.huber_schedule)
        setup.set("training", huber_scale=settings.huber_scale)
    setup.set("training", loss=kind, guidance=options["guidance_scale"], input_noise=options["ip_noise_gamma"] or 0.0)
    setup.set("training", input_noise_random=options["ip_noise_gamma_random_strength"])


def _read_length(setup: Setup) -> None:
    options = setup.options
    if options["max_train_epochs"] is not None:
        setup.set("training", epochs=options["max_train_epochs"])
    else:
        setup.set("training", steps=options["max_train_steps"])
    setup.set("training", batch=options["train_batch_size"], accumulate=options["gradient_accumulation_steps"])
    setup.set("training", seed=options["seed"])


def _read_output(setup: Setup) -> None:
    options, name = setup.options, setup.options["output_name"] or "last"
    setup.set("output", out=options["output_dir"] and setup.mapped(str(options["output_dir"])), name=name, save_every=0)
    said = {"ss_training_comment": options["training_comment"]}
    for row in TABLE:
        if row.name.startswith("metadata_") and not row.ignored:
            said[row.name.replace("metadata_", "modelspec.", 1)] = options[row.name]
    setup.set("output", metadata=[f"{key}={value}" for key, value in said.items() if value is not None])
    epochs, steps = options["save_every_n_epochs"], options["save_every_n_steps"]
    if options["save_n_epoch_ratio"]:
        if options["max_train_epochs"] is None:
            setup.refuse("save_n_epoch_ratio", "it needs --max_train_epochs")
        else:
            epochs = options["max_train_epochs"] // options["save_n_epoch_ratio"] or 1
    if epochs and steps:
        setup.refuse("save_every_n_steps", "LoRAs are saved by steps or by epochs; keep one of them")
    if epochs:
        setup.set("output", save_every_epochs=epochs, numbering="epoch", keep=options["save_last_n_epochs"])
    elif steps:
        last = options["save_last_n_steps"]
        setup.set("output", save_every=steps, keep=last and last // steps + 1)


def _read_samples(setup: Setup) -> None:
    options = setup.options
    steps, epochs = options["sample_every_n_steps"] or 0, options["sample_every_n_epochs"] or 0
    if max(steps, epochs) <= 0 or not options["sample_prompts"]:
        return
    path = Path(setup.path(options["sample_prompts"]) or "")
    prompts = read_prompts(path) if path.exists() else []
    if not prompts:
        setup.refuse("sample_prompts", "it has no prompt")
        return
    setup.set("samples", **({"every_epochs": epochs} if epochs > 0 else {"every": steps}))
    first = prompts[0]
    setup.set(
        "samples",
        prompts=[prompt.get("prompt", "") for prompt in prompts],
        width=max(64, first.get("width", 512) // 16 * 16),
        height=max(64, first.get("height", 512) // 16 * 16),
        steps=first.get("sample_steps", 20),
        guidance=float(first.get("guidance_scale", 3.5)),
        cfg=max(1.0, float(first.get("scale", 1.0))),
        negative=first.get("negative_prompt", ""),
        seed=first.get("seed"),
    )
    if any({**prompt, "prompt": ""} != {**first, "prompt": ""} for prompt in prompts):
        setup.note(
            "sample_prompts", "previews share size, steps, guidance and seed: those of the first prompt are taken"
        )
