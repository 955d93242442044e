"""A job of ai-toolkit -> fluxq's settings: what table.py says, done, and a line about each key of the file."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fluxq.data.captions import TEXT_SUFFIXES
from fluxq.errors import WrongRequest
from fluxq.flow import resolution_shift
from fluxq.formats.lora.keys import matrices, split_rows
from fluxq.model.config import FluxConfig
from fluxq.models.hub import hub_id

from ..imported import Imported, flattened, printable, shown
from .table import BY_NAME, Row

TRAINERS = ("sd_trainer", "diffusion_trainer", "ui_trainer")
"""The types of a process that train LoRAs of images."""
FORMATS = {"qfloat8": "fp8", "float8": "fp8", "qint8": "int8", "int8": "int8", "uint8": "int8"}
FOUR_BITS = ("qint4", "int4", "uint4", "nf4")
OPTIMIZERS: dict[str, tuple[str, float, dict[str, Any]]] = {
    "adamw": ("adamw", 0.01, {"eps": 1e-6}),
    "adamw8": ("adamw8bit", 0.0, {"eps": 1e-6}),
    "adamw8bit": ("adamw8bit", 0.01, {"eps": 1e-6}),
    "lion8bit": ("lion8bit", 0.0, {}),
    "lion": ("lion_pytorch.Lion", 0.0, {}),
    "adam": ("torch.optim.Adam", 0.0, {"eps": 1e-6}),
    "ademamix8bit": ("bitsandbytes.optim.AdEMAMix8bit", 0.01, {"eps": 1e-6}),
    "prodigy": ("prodigy", 0.0, {"eps": 1e-6}),
    "prodigy8bit": ("prodigy", 0.0, {"eps": 1e-6}),
    "adafactor": ("adafactor", 0.0, {}),
}
"""Name there -> the name here, the weight decay and the arguments that it has there by default."""
LOSSES = {"mse": "l2", "mae": "l1"}
WHOLE = ("train.optimizer_params", "train.lr_scheduler_params", "model.model_kwargs")


class Job(Imported):
    """A job that is being read. options: the keys of its process, flat, like "train.lr"."""

    def get(self, name: str) -> Any:
        """The value of a key, or its default in ai-toolkit."""
        value = self.options.get(name)
        return BY_NAME[name].default if value is None else value

    def where(self, *names: str) -> str:
        """What a setting comes from: these keys as the file has them, or the default of the first."""
        given = [f"{name}: {shown(self.options[name])}" for name in names if self.options.get(name) is not None]
        return ", ".join(given) or f"{names[0]}: {shown(BY_NAME[names[0]].default)}, the default of ai-toolkit"

    def copy(self, key: str, *names: str) -> None:
        """Set `key` to the first of these keys that the file has, or to its default."""
        name = next((name for name in names if self.options.get(name) is not None), names[0])
        self.put(key, self.get(name), self.where(name))

    def one_of(self, name: str, known: Mapping[str, Any]) -> Any:
        value = self.get(name)
        if not isinstance(value, str) or value not in known:
            self.refuse(name, f"{shown(value)} is not read; use one of {', '.join(known)}")
            return None
        return known[value]


def read_job(document: Any, places: Sequence[tuple[str, str]] = ()) -> Imported:
    """The settings of a job, `document` as YAML or JSON has it.

    places: (how paths of another machine begin, what to put there instead). Raises WrongRequest for what is not
    a job of a trainer of LoRAs.
    """
    config = document.get("config") if isinstance(document, Mapping) else None
    processes = config.get("process") if isinstance(config, Mapping) else None
    if not isinstance(config, Mapping) or not isinstance(processes, list) or not processes:
        raise WrongRequest("it has no config.process, so it is not a job of ai-toolkit")
    process = processes[0]
    if len(processes) > 1 or not isinstance(process, Mapping) or process.get("type") not in TRAINERS:
        kinds = ", ".join(shown(p.get("type") if isinstance(p, Mapping) else p) for p in processes)
        raise WrongRequest(f"the processes of this job are {kinds}; one {' or '.join(TRAINERS)} is read")
    name = str(config.get("name") or "")
    process = _named(process, name)
    datasets = process.get("datasets")
    own = {str(key): value for key, value in process.items() if key != "datasets"}
    job = Job(options={"name": name, **flattened(own, whole=WHOLE)}, places=places, program="ai-toolkit")
    if not isinstance(datasets, list) or not datasets or not all(isinstance(d, Mapping) for d in datasets):
        raise WrongRequest("the job has no datasets; each needs a folder_path")
    for key in (k for k in config if k not in ("name", "process")):
        job.lines.append(f"config.{printable(str(key))}: unknown, so it has no effect here")
    for read in (_model, _network, _training, _optimizer, _schedule, _timesteps, _samples, _output):
        read(job)
    _datasets(job, datasets)
    _metadata(job, _named(document.get("meta"), name))
    for key, value in job.options.items():
        _line(job, key, key, value)
    job.lines += [f"{name}: {text}" for name, text in dict.fromkeys(job.notes)]
    return job


def _named(value: Any, name: str) -> Any:
    """`value` with the job's name in place of [name]."""
    if isinstance(value, Mapping):
        return {key: _named(item, name) for key, item in value.items()}
    if isinstance(value, list):
        return [_named(item, name) for item in value]
    return value.replace("[name]", name) if isinstance(value, str) else value


def _line(job: Job, key: str, label: str, value: Any) -> None:
    """Say what becomes of a key of the file, and refuse what its row refuses."""
    row, label = BY_NAME.get(key), printable(label)
    if row is None and value in (None, {}, []):
        job.lines.append(f"{label}: empty, so it has no effect")
    elif row is None:
        near = difflib.get_close_matches(key, BY_NAME, n=1)
        job.refuse(label, f"ai-toolkit has no such key{f'; did you mean {near[0]}?' if near else ''}")
    elif row.refused and not row.is_default(value):
        job.refuse(label, row.refused)
    elif row.refused:
        job.lines.append(f"{label} {shown(value)}: no effect, as by default")
    elif row.ignored:
        job.lines.append(f"{label} {shown(value)}: ignored: {row.ignored}")
    else:
        job.lines.append(f"{label} {shown(value)} becomes {row.to}")


def _model(job: Job) -> None:
    arch, path = job.get("model.arch"), job.get("model.name_or_path")
    if arch not in (None, "flux") or not (arch or job.get("model.is_flux")):
        job.refuse("model.arch", f"{shown(arch)} is another model; fluxq trains flux, FLUX.1 dev and schnell")
    if not path:
        job.refuse("model.name_or_path", "it is required")
    for name, key in (("name_or_path", "models"), ("vae_path", "ae")):
        job.put(f"model.{key}", _path(job, job.get(f"model.{name}")), job.where(f"model.{name}"))
    if lora := job.get("model.lora_path"):
        job.put("model.base_loras", [f"{job.path(str(lora))}=1"], job.where("model.lora_path"))
    job.copy("model.text_mask", "model.attn_masking")
    if job.get("model.quantize"):
        kinds = {**FORMATS, **dict.fromkeys(FOUR_BITS, "nf4")}
        job.put("model.format", job.one_of("model.qtype", kinds), job.where("model.qtype", "model.quantize"))
    else:
        job.note("model.quantize", "without it fluxq picks the format that fits the GPU; set model.format to choose")


def _path(job: Job, value: Any) -> str | None:
    """A file or folder of this machine, or a hub id."""
    is_id = (
        isinstance(value, str)
        and len(value) < 200
        and hub_id(Path(value))
        and not any(value.startswith(old) for old, _ in job.places)
    )
    return str(value) if is_id else job.path(str(value) if value else None)


def _network(job: Job) -> None:
    if not any(name.startswith("network.") for name in job.options):
        job.refuse("network", "without it ai-toolkit trains the whole model; fluxq trains LoRAs")
    elif job.get("network.type") != "lora":
        job.refuse("network.type", f"{shown(job.get('network.type'))} is not read; fluxq trains lora")
    names = ("network.rank", "network.linear")
    job.copy("lora.rank", *names)
    rank = job.values["lora"]["rank"]
    job.put("lora.alpha", rank, f"{job.sources['lora.rank']}; ai-toolkit's alpha is the rank for FLUX.1")
    only, but = (job.get(f"network.network_kwargs.{name}_if_contains") or [] for name in ("only", "ignore"))
    source = "all layers of blocks, as ai-toolkit trains them"
    if only or but:
        source = job.where("network.network_kwargs.only_if_contains", "network.network_kwargs.ignore_if_contains")
    job.put("lora.targets", _targets(job, _texts(only), _texts(but)), source)
    if dropout := job.get("network.dropout"):
        job.put("lora.inner_dropout", dropout, job.where("network.dropout"))
    if lora := job.get("network.pretrained_lora_path"):
        job.put("lora.from_lora", job.path(str(lora)), job.where("network.pretrained_lora_path"))
    job.put("lora.file_format", "diffusers", "the names of layers that ai-toolkit writes")
    if job.get("train.ema_config.use_ema"):
        decay = job.get("train.ema_config.ema_decay")
        job.put("lora.ema", 0.999 if decay is None else decay, job.where("train.ema_config.ema_decay"))
        job.note("train.ema_config.use_ema", "the average is saved beside the LoRA, as NAME-ema, not in its place")
    for name in job.options:
        if name.startswith("network.network_kwargs.") and name not in BY_NAME:
            job.refuse(name, "only only_if_contains and ignore_if_contains are read")


def _texts(value: Any) -> list[str]:
    return [str(item) for item in (value if isinstance(value, list) else [value])]


def _targets(job: Job, only: list[str], but: list[str]) -> list[str]:
    """Expressions for the layers of blocks whose name in diffusers has one of `only` in it, and none of `but`."""
    if not (only or but):
        return [r"(double|single)_blocks\..*"]
    blocks: dict[str, list[str]] = {}
    config = FluxConfig.dev()
    for path in matrices(config):
        if not (match := re.fullmatch(r"((?:double|single)_blocks)\.(\d+)\.(.+)", path)):
            continue
        names = [f"transformer.{name}" for name in split_rows(path, config)]
        chosen = [
            (not only or any(word.replace("$$", ".") in name for word in only))
            and not any(word.replace("$$", ".") in name for word in but)
            for name in names
        ]
        if any(chosen) and not all(chosen):
            parts = ", ".join(name for name, is_in in zip(names, chosen, strict=True) if is_in)
            job.refuse("network.network_kwargs", f"fluxq trains {path} as a whole, not {parts} alone")
            return []
        if all(chosen):
            blocks.setdefault(f"{match[1]}|{match[3]}", []).append(match[2])
    if not blocks:
        job.refuse("network.network_kwargs", "no layer is left to train")
    counts = {"double_blocks": config.depth, "single_blocks": config.depth_single_blocks}
    found: dict[str, list[str]] = {}
    for key, numbers in blocks.items():
        kind, layer = key.split("|")
        index = r"\d+" if len(numbers) == counts[kind] else f"({'|'.join(numbers)})"
        found.setdefault(rf"{kind}\.{index}", []).append(re.escape(layer))
    return [rf"{block}\.({'|'.join(layers)})" for block, layers in found.items()]


def _training(job: Job) -> None:
    job.copy("training.steps", "train.steps")
    job.copy("training.batch", "train.batch_size")
    job.copy("training.accumulate", "train.gradient_accumulation")
    job.copy("training.clip", "train.max_grad_norm")
    job.copy("training.guidance", "train.cfg_scale")
    job.put("training.seed", job.get("training_seed"), job.where("training_seed"))
    job.put("training.loss", job.one_of("train.loss_type", LOSSES), job.where("train.loss_type"))
    if job.get("train.diff_output_preservation"):
        names = ("train.diff_output_preservation_class", "train.diff_output_preservation")
        job.put("training.preserve_class", job.get(names[0]), job.where(*names))
        job.copy("training.preserve_weight", "train.diff_output_preservation_multiplier")


def _optimizer(job: Job) -> None:
    name, arguments = str(job.get("train.optimizer")).lower(), job.get("train.optimizer_params") or {}
    if name not in OPTIMIZERS or not isinstance(arguments, Mapping):
        job.refuse("train.optimizer", f"{shown(name)} is not read; use one of {', '.join(OPTIMIZERS)}")
        return
    ours, decay, fixed = OPTIMIZERS[name]
    rate, source = job.get("train.unet_lr" if job.options.get("train.unet_lr") else "train.lr"), "train.lr"
    source = job.where("train.unet_lr" if job.options.get("train.unet_lr") else "train.lr")
    if ours == "prodigy" and isinstance(rate, int | float) and rate < 0.1:
        rate, source = 1.0, f"{source}, which ai-toolkit takes for 1 with {name}"
    given = {key: value for key, value in {**fixed, **arguments}.items() if key != "weight_decay"}
    if name == "adafactor":
        for key in ("relative_step", "warmup_init"):
            if given.pop(key, False):
                job.refuse("train.optimizer_params", f"{key} sets learning rates of its own, which is not read")
        given.setdefault("scale_parameter", False)
    if name == "prodigy8bit":
        job.note("train.optimizer", "prodigy8bit becomes prodigy, with its state in 32 bits")
    job.put("training.optimizer", ours, job.where("train.optimizer"))
    job.put("training.learning_rate", rate, source)
    params = job.where("train.optimizer_params") if arguments else f"as {name} has by default in ai-toolkit"
    job.put("training.weight_decay", arguments.get("weight_decay", decay), params)
    if given:
        job.put("training.optimizer_args", [f"{key}={value!r}" for key, value in given.items()], params)


def _schedule(job: Job) -> None:
    name, arguments = job.get("train.lr_scheduler"), job.get("train.lr_scheduler_params") or {}
    kinds = {"constant": "constant", "constant_with_warmup": "constant", "cosine": "cosine"}
    ours = job.one_of("train.lr_scheduler", {**kinds, "cosine_with_restarts": "cosine"})
    arguments = dict(arguments) if isinstance(arguments, Mapping) else {"": arguments}
    job.put("training.schedule", ours, job.where("train.lr_scheduler"))
    if name == "constant_with_warmup":
        warmup = arguments.pop("num_warmup_steps", 1000)
        job.put("training.warmup", warmup, job.where("train.lr_scheduler_params", "train.lr_scheduler"))
    rate = job.values.get("training", {}).get("learning_rate")
    floor = arguments.pop("eta_min", 0) if ours == "cosine" else 0
    if floor and isinstance(floor, int | float) and isinstance(rate, int | float) and rate:
        job.put("training.schedule_floor", floor / rate, job.where("train.lr_scheduler_params"))
    if arguments:
        job.refuse("train.lr_scheduler_params", f"{', '.join(map(str, arguments))} with {shown(name)} is not read")


def _timesteps(job: Job) -> None:
    kinds = {"sigmoid": "sigmoid", "linear": "uniform", "shift": "sigma", "flux_shift": "sigma"}
    kind = job.one_of("train.timestep_type", kinds)
    job.put("training.timesteps", kind, job.where("train.timestep_type"))
    for key, name in (("max_timestep", "min_denoising_steps"), ("min_timestep", "max_denoising_steps")):
        step = job.get(f"train.{name}")  # counted from noise to image
        if isinstance(step, int) and 0 < step < 999:
            if kind != "uniform":
                job.refuse(f"train.{name}", "it is read with timestep_type: linear only")
            job.put(f"training.{key}", 1 - step / 1000, job.where(f"train.{name}"))


def _samples(job: Job) -> None:
    samples = job.get("sample.samples")
    items = [{"prompt": text} for text in _texts(job.get("sample.prompts") or [])] if samples is None else samples
    items = [item for item in items if isinstance(item, Mapping)] if isinstance(items, list) else []
    trigger, prompts = str(job.get("trigger_word") or ""), []
    for item in items:
        text, *flags = str(item.get("prompt") or "").split("--")
        prompts.append(text.strip().replace("[trigger]", trigger))
        own = [f"--{flag.strip()}" for flag in flags] + [f"{k}: {shown(item[k])}" for k in item if k != "prompt"]
        if own:
            job.note("sample.prompts", f"{printable(', '.join(own))} of a prompt is left out: all share size and seed")
    if not prompts or job.get("train.disable_sampling"):
        return
    job.put("samples.prompts", prompts, job.where("sample.samples" if samples is not None else "sample.prompts")[:80])
    for key, name in (("every", "sample_every"), ("guidance", "guidance_scale"), ("steps", "sample_steps")):
        job.copy(f"samples.{key}", f"sample.{name}")
    for key in ("width", "height", "seed"):
        job.copy(f"samples.{key}", f"sample.{key}")
    if not job.get("sample.walk_seed") and len(prompts) > 1:
        job.note("sample.walk_seed", "without it all previews have one seed in ai-toolkit; here each adds 1")


def _output(job: Job) -> None:
    name = job.get("name")
    if not name:
        job.refuse("config.name", "it is required")
    folder = job.mapped(str(job.get("training_folder"))).replace("\\", "/").rstrip("/")
    job.put("output.out", f"{folder}/{name}", f"{job.where('training_folder')}, {job.where('name')}")
    job.copy("output.name", "name")
    job.copy("output.save_every", "save.save_every")
    job.copy("output.keep", "save.max_step_saves_to_keep")


def _metadata(job: Job, meta: Any) -> None:
    if isinstance(meta, Mapping) and meta:
        found = [f"{key}={value}" for key, value in flattened(meta).items() if value is not None]
        job.put("output.metadata", found, "meta")
        job.lines.append("meta becomes output.metadata")


def _datasets(job: Job, datasets: list[Mapping[str, Any]]) -> None:
    folders: list[dict[str, Any]] = []
    steps = [d.get("bucket_tolerance") or BY_NAME["datasets.bucket_tolerance"].default for d in datasets]
    job.put("data.trigger", job.get("trigger_word"), job.where("trigger_word"))
    if any(step != steps[0] for step in steps):
        job.refuse("datasets.bucket_tolerance", "all datasets must have the same")
    job.put("data.step", steps[0], "datasets.bucket_tolerance: what sides of buckets are multiples of")
    job.put("data.upscale", False, "ai-toolkit does not enlarge images")
    if dropout := job.get("train.prompt_dropout_prob"):
        job.put("data.caption_dropout", dropout, job.where("train.prompt_dropout_prob"))
    for i, given in enumerate(datasets):
        folder: dict[str, Any] = {}
        for key, value in given.items():
            row = BY_NAME.get(f"datasets.{key}") or Row("")
            _line(job, f"datasets.{key}", f"datasets.{i}.{key}", value)
            if row.to.startswith("data.folders.") and value is not None:
                name = row.to.removeprefix("data.folders.")
                folder[name] = value
                job.sources[f"data.folders.{i}.{name}"] = f"{key}: {shown(value)}"
        folders.append(_folder(job, i, given, folder))
    job.set("data", folders=folders)
    if job.get("train.timestep_type") in ("shift", "flux_shift"):
        sides = [side for d in datasets for side in _sides(d) if isinstance(side, int)]
        shift = resolution_shift((max(sides, default=512) // 16) ** 2)
        job.put("training.shift", round(shift, 4), f"the shift of {max(sides, default=512)} pixels")
        if len(set(sides)) > 1:
            job.note("train.timestep_type", "fluxq has one shift, that of the largest resolution, for all of them")


def _sides(dataset: Mapping[str, Any]) -> list[Any]:
    resolution = dataset.get("resolution") or BY_NAME["datasets.resolution"].default
    return resolution if isinstance(resolution, list) else [resolution]


def _folder(job: Job, i: int, given: Mapping[str, Any], folder: dict[str, Any]) -> dict[str, Any]:
    """A dataset's `folder` with what is not copied as it is."""
    path = given.get("folder_path") or given.get("dataset_path")
    if not path:
        job.refuse(f"datasets.{i}.folder_path", "it is required")
    sides = _sides(given)
    folder |= {"path": job.path(str(path or "")) or "", "resolution": sides}
    if len(sides) == 2 and all(isinstance(side, int) for side in sides):
        folder["resolution"] = [[side, side] for side in sides]  # two numbers alone are a width and a height
    folder = {key: value for key, value in folder.items() if value != ""}
    mask = given.get("mask_path") or (given.get("alpha_mask") and "alpha")
    if mask:
        folder |= {"masks": mask if mask == "alpha" else job.path(str(mask)), "mask_normalize": True}
        job.sources[f"data.folders.{i}.mask_normalize"] = "ai-toolkit divides masks by their mean"
    else:
        folder = {key: value for key, value in folder.items() if key not in ("masks", "mask_outside")}
    if folder.get("regularization"):
        folder["prior_weight"] = job.get("train.reg_weight")
        job.sources[f"data.folders.{i}.prior_weight"] = job.where("train.reg_weight")
        if not given.get("trigger_word"):  # captions of the class stay without that of the job
            folder["trigger"] = ""
            job.sources[f"data.folders.{i}.trigger"] = "is_reg: ai-toolkit puts no trigger in front there"
    suffix = str(given.get("caption_ext") or given.get("caption_type") or "txt")
    if f".{suffix.removeprefix('.')}" not in TEXT_SUFFIXES:
        job.refuse(f"datasets.{i}.caption_ext", f"captions are read from {' and '.join(TEXT_SUFFIXES)}")
    job.sources.setdefault(f"data.folders.{i}.resolution", job.where("datasets.resolution"))
    if folder.get("caption_dropout") and (given.get("trigger_word") or job.get("trigger_word")):
        job.note(
            f"datasets.{i}.caption_dropout_rate", "ai-toolkit keeps the trigger in dropped captions; fluxq does not"
        )
    return folder
