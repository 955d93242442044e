"""A workflow of ComfyUI-FluxTrainer -> fluxq's settings, by way of the options of sd-scripts that its nodes set.

Read in kijai/ComfyUI-FluxTrainer at 639b3e80ba66e42605a34f393b576cd489e06734 (nodes.py). Both forms of a workflow are
read: that of ComfyUI's editor, where values are listed in the order of WIDGETS, and that of its API.
"""

from __future__ import annotations

import difflib
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fluxq.config import TrainConfig
from fluxq.errors import WrongRequest

from .imported import Imported, printable, shown
from .kohya.command import read_command
from .kohya.mapping import read_options
from .kohya.network import MODULE
from .kohya.table import BY_NAME, TABLE

OPTIMIZER = "max_grad_norm lr_scheduler lr_warmup_steps lr_scheduler_num_cycles lr_scheduler_power"
INIT, ADD, GENERAL, SETTINGS = (
    "InitFluxLoRATraining",
    "TrainDatasetAdd",
    "TrainDatasetGeneralConfig",
    "FluxTrainValidationSettings",
)
WIDGETS = {
    "FluxTrainModelSelect": "transformer vae clip_l t5 lora_path",
    GENERAL: "color_aug flip_aug shuffle_caption caption_dropout_rate alpha_mask reset_on_queue caption_extension",
    "TrainDatasetRegularization": "dataset_path class_tokens num_repeats",
    ADD: "width height batch_size dataset_path class_tokens enable_bucket bucket_no_upscale num_repeats "
    "min_bucket_reso max_bucket_reso",
    "OptimizerConfig": f"optimizer_type {OPTIMIZER} min_snr_gamma extra_optimizer_args",
    "OptimizerConfigAdafactor": f"{OPTIMIZER} relative_step scale_parameter warmup_init clip_threshold min_snr_gamma "
    "extra_optimizer_args",
    "OptimizerConfigProdigy": f"{OPTIMIZER} weight_decay decouple use_bias_correction min_snr_gamma "
    "extra_optimizer_args",
    "FluxTrainerLossConfig": "loss_type huber_schedule huber_c huber_scale",
    INIT: "output_name output_dir network_dim network_alpha learning_rate max_train_steps apply_t5_attn_mask "
    "cache_latents cache_text_encoder_outputs blocks_to_swap weighting_scheme logit_mean logit_std mode_scale "
    "timestep_sampling sigmoid_scale model_prediction_type guidance_scale discrete_flow_shift highvram fp8_base "
    "gradient_dtype save_dtype attention_mode sample_prompts additional_args train_text_encoder clip_l_lr T5_lr "
    "gradient_checkpointing",
    "FluxTrainLoop": "steps",
    "FluxTrainAndValidateLoop": "validate_at_steps save_at_steps",
    "FluxTrainSave": "save_state copy_to_comfy_lora_folder",
    "FluxTrainEnd": "save_state",
    "FluxTrainValidate": "",
    SETTINGS: "steps width height guidance_scale seed control_after_generate shift base_shift max_shift",
    "VisualizeLoss": "plot_style window_size normalize_y width height log_scale",
}
"""Node -> its values, in their order."""
OTHERS = ("FluxTrainBlockSelect", "FluxTrainResume", "TrainNetworkConfig", "OptimizerConfigProdigyPlusScheduleFree")
"""Nodes that may be joined to the trainer and are refused."""
NODE_ARGUMENTS = ("relative_step", "scale_parameter", "warmup_init", "clip_threshold", "weight_decay", "decouple")
IGNORED = {
    "VisualizeLoss": "fluxq draws loss.png",
    "reset_on_queue": "nothing is queued",
    "copy_to_comfy_lora_folder": "copy the LoRA when it is done",
    "save_state": "the state is saved with every LoRA",
    "control_after_generate": "nothing is queued",
    "cache_latents": "images are always encoded ahead and kept",
    "cache_text_encoder_outputs": "captions are always encoded ahead and kept",
    "gradient_dtype": "fluxq computes in bf16, with LoRA weights in fp32",
    "attention_mode": "attention is always fused",
    "gradient_checkpointing": "fluxq recomputes or keeps what fits into the GPU's memory",
    "min_snr_gamma": "it has no effect on FLUX.1 there either",
    "T5_lr": "T5-XXL is not trained",
}
"""Nodes and values that become nothing."""
TO = {
    "transformer": "model.flux",
    "vae": "model.ae",
    "clip_l": "model.clip_l",
    "t5": "model.t5xxl",
    "lora_path": "lora.from_lora",
    "save_dtype": "output.name",
    "train_text_encoder": "lora.text_encoder",
    "clip_l_lr": "training.text_learning_rate",
    "extra_optimizer_args": "training.optimizer_args",
    **dict.fromkeys((*NODE_ARGUMENTS, "use_bias_correction"), "training.optimizer_args"),
    "additional_args": "what fluxq kohya --lint says of it",
    "steps": "training.steps, output.save_every, samples.every",
    "save_at_steps": "output.save_every",
    "validate_at_steps": "samples.every",
}
"""Values that are not called like sd-scripts' options -> settings."""
SHIFTS = {"shift": True, "base_shift": 0.5, "max_shift": 1.15}


@dataclass
class Node:
    """links: input -> the id of the node that it comes from, ones that only pass it on left out. muted: its kind, if it
    is muted or bypassed; then it passes on its first input.
    """

    id: str
    kind: str
    values: dict[str, Any] = field(default_factory=dict)
    links: dict[str, str] = field(default_factory=dict)
    muted: str = ""


def read_workflow(document: Mapping[str, Any], places: Sequence[tuple[str, str]] = ()) -> Imported:
    """The settings of a workflow, `document` as JSON has it.

    places: (how paths of another machine begin, what to put there instead). Raises WrongRequest for a workflow without
    a trainer of LoRAs of FLUX.1, or with several.
    """
    nodes = _nodes(document)
    trainers = [node for node in nodes.values() if node.kind == INIT]
    if len(trainers) != 1:
        raise WrongRequest(f"the workflow has {len(trainers)} nodes {INIT} that are not muted; one is read")
    (trainer,) = trainers
    options, origins = _options(nodes, trainer)
    sets, datasets = _datasets(nodes, trainer)
    options["dataset_config"] = sets
    loops, total = _loops(nodes, trainer)
    if total and total < options["max_train_steps"]:
        options["max_train_steps"] = total
        origins["max_train_steps"] = f"FluxTrainLoop.steps: {total} in all"
    try:
        read = read_options(options, places)
    except OverflowError as error:
        raise WrongRequest(f"a number in this workflow cannot be one: {error}") from error
    found = Imported(options, places, read.setup.values, missing=read.setup.missing, program="ComfyUI-FluxTrainer")
    for node in [node for node in nodes.values() if node.kind in OTHERS]:
        found.refuse(node.kind, "this node is not read; take it out")
    for reason in (reason for reason in read.reasons if not reason.startswith("not on this")):
        found.refuse(*reason.split(": ", 1))
    for row in sorted(TABLE, key=lambda row: row.name not in origins):  # what a node sets says more than a default
        for key in row.to.split(", "):
            found.sources.setdefault(key, origins.get(row.name) or f"{row.name}, as FluxTrainer has it by default")
    found.sources |= dict.fromkeys(
        ("data.step", "data.upscale", "data.min_side", "data.max_side"), f"{ADD}, its buckets"
    )
    found.sources.setdefault("training.weight_decay", "that of the optimizer, or its default")
    usual, set_here = TrainConfig(), {key for row in TABLE if row.name in origins for key in row.to.split(", ")}
    for section, values in found.values.items():  # what is as usual here and there is left out
        for key in [key for key in values if f"{section}.{key}" not in set_here and key != "folders"]:
            if values[key] == getattr(getattr(usual, section), key) or values[key] == []:
                del values[key]
    for i, folder in enumerate(read.setup.values.get("data", {}).get("folders", ())):
        found.sources |= {f"data.folders.{i}.{key}": datasets[i] for key in folder}
    _points(found, nodes, trainer, loops, total or options["max_train_steps"])
    for node in nodes.values():
        _lines(found, node)
    found.lines += [f"{name}: {text}" for name, text in dict.fromkeys(read.setup.notes)]
    return found


def _nodes(document: Mapping[str, Any]) -> dict[str, Node]:
    """Every node, of either form."""
    editor, links = (_dicts(document.get("nodes")), document.get("links"))
    nodes: dict[str, Node] = {}
    joined = {str(link[0]): str(link[1]) for link in links or () if isinstance(link, list) and len(link) > 4}
    for raw in editor:
        node, given = Node(str(raw.get("id")), str(raw.get("type"))), raw.get("widgets_values")
        given = given if isinstance(given, list | dict) else []
        names = WIDGETS.get(node.kind, "").split() or [str(i) for i in range(len(given))]
        names += [f"value {i + 1}" for i in range(len(names), len(given))]  # of another version of the node
        node.values = dict(given) if isinstance(given, dict) else dict(zip(names, given, strict=False))
        for slot in _dicts(raw.get("inputs")):
            if str(slot.get("link")) in joined:
                node.links[str(slot.get("name"))] = joined[str(slot["link"])]
        if raw.get("mode", 0) in (2, 4):
            node.kind, node.muted, node.values = "Reroute", node.kind, {}
        nodes[node.id] = node
    for id, raw in document.items() if not editor else ():
        inputs = raw.get("inputs") if isinstance(raw, Mapping) else None
        if isinstance(raw, Mapping) and isinstance(inputs, Mapping):
            links = {str(k): str(v[0]) for k, v in inputs.items() if isinstance(v, list) and len(v) == 2}
            values = {str(k): v for k, v in inputs.items() if k not in links}
            nodes[str(id)] = Node(str(id), str(raw.get("class_type")), values, links)
    sets = {str(n.values.get("0")): n for n in nodes.values() if n.kind == "SetNode"}
    for node in nodes.values():
        node.links = {name: _source(id, nodes, sets) for name, id in node.links.items()}
        for name in [name for name, id in node.links.items() if name in WIDGETS.get(node.kind, "").split()]:
            far = nodes.get(node.links[name])
            text = next((v for v in far.values.values() if isinstance(v, str)), None) if far else None
            node.values |= {} if text is None else {name: text}
    return nodes


def _dicts(value: Any) -> list[dict[str, Any]]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _source(id: str, nodes: Mapping[str, Node], sets: Mapping[str, Node]) -> str:
    """The node behind `id` that makes the value: not a Reroute, or a GetNode or SetNode."""
    for _ in range(len(nodes)):
        node = nodes.get(id)
        if node is not None and node.kind == "GetNode":
            node = sets.get(str(node.values.get("0")))
        if node is None or node.kind not in ("Reroute", "SetNode") or not node.links:
            break
        id = next(iter(node.links.values()))
    return id


def _joined(nodes: Mapping[str, Node], node: Node, name: str) -> Node:
    """The node that input `name` comes from; an empty one if there is none."""
    return nodes.get(node.links.get(name, ""), Node("", ""))


def _options(nodes: Mapping[str, Node], trainer: Node) -> tuple[dict[str, Any], dict[str, str]]:
    """sd-scripts' options as the node sets them, and where those come from that are not its defaults."""
    model, optimizer = _joined(nodes, trainer, "flux_models"), _joined(nodes, trainer, "optimizer_settings")
    own, loss = trainer.values, _joined(nodes, trainer, "loss_args")
    origins: dict[str, str] = {}
    try:
        options = read_command(shlex.split(str(own.get("additional_args") or "")))
    except ValueError as error:
        raise WrongRequest(f"{INIT}.additional_args cannot be read: {error}") from error
    options |= {"seed": 42, "loss_type": "l2", "t5xxl_max_token_length": 512, "network_module": MODULE}
    options |= {"network_train_unet_only": own.get("train_text_encoder", "disabled") == "disabled"}
    if not options["network_train_unet_only"]:
        options["text_encoder_lr"] = [own.get("clip_l_lr", 0)]
        if "T5" in str(own["train_text_encoder"]):
            options["network_args"] = ["train_t5xxl=True"]
    options["cpu_offload_checkpointing"] = own.get("gradient_checkpointing") == "enabled_with_cpu_offloading"
    options["optimizer_type"] = optimizer.kind.removeprefix("OptimizerConfig").lower() or None
    names = {"transformer": "pretrained_model_name_or_path", "vae": "ae", "t5": "t5xxl", "lora_path": "network_weights"}
    for node in (model, optimizer, loss, trainer):
        for name, value in node.values.items():
            option = names.get(name, name)
            if option in BY_NAME and name not in IGNORED and option != "sample_prompts" and value not in (None, ""):
                options[option] = value
                origins[option] = f"{node.kind}.{name}: {shown(value)}"
    if str(options["optimizer_type"]).upper() == "CAME":
        options["optimizer_type"] = "pytorch_optimizer.CAME"
    options["blocks_to_swap"] = options["blocks_to_swap"] or None
    extra = str(optimizer.values.get("extra_optimizer_args") or "").split("|")
    given = [f"{n}={optimizer.values[n]}" for n in (*NODE_ARGUMENTS, "use_bias_correction") if n in optimizer.values]
    options["optimizer_args"] = [*given, *(text.strip() for text in extra if text.strip())]
    dtype = own.get("save_dtype", "bf16")
    options["output_name"] = f"{own.get('output_name', 'flux_lora')}_rank{options['network_dim']}_{dtype}"
    if not isinstance(options["max_train_steps"], int):
        raise WrongRequest(f"{INIT}.max_train_steps must be a whole number")
    return options, origins


def _datasets(nodes: Mapping[str, Node], trainer: Node) -> tuple[dict[str, Any], list[str]]:
    """A dataset config of sd-scripts, and the node of each of its subsets."""
    sets: list[dict[str, Any]] = []
    names: list[str] = []
    node = _joined(nodes, trainer, "dataset")
    while node.kind == ADD and len(sets) < len(nodes):
        parts = [(node, False), (_joined(nodes, node, "regularization"), True)]
        subsets = [
            {"image_dir": part.values.get("dataset_path", ""), "num_repeats": part.values.get("num_repeats", 1)}
            | ({"class_tokens": part.values["class_tokens"]} if part.values.get("class_tokens") else {})
            | ({"is_reg": True} if is_reg else {})
            for part, is_reg in parts
            if part.kind
        ]
        keys = ("batch_size", "enable_bucket", "bucket_no_upscale", "min_bucket_reso", "max_bucket_reso")
        own = {key: node.values[key] for key in keys if key in node.values}
        size = [node.values.get("width", 1024), node.values.get("height", 1024)]
        sets.insert(0, {"resolution": size, **own, "subsets": subsets})
        names[:0] = [f"{part.kind} {part.id}" for part, _ in parts if part.kind]
        node = _joined(nodes, node, "dataset_config")
    if node.kind != GENERAL or not sets:
        raise WrongRequest(f"the {INIT} of this workflow is not joined to {ADD} and {GENERAL}")
    general = {name: value for name, value in node.values.items() if name not in ("alpha_mask", "reset_on_queue")}
    general = {"keep_tokens_separator": "|||", "caption_extension": ".txt", **general}
    if node.values.get("alpha_mask"):
        for subset in (subset for one in sets for subset in one["subsets"]):
            subset["alpha_mask"] = True
    return {"general": general, "datasets": sets}, names


def _loops(nodes: Mapping[str, Node], trainer: Node) -> tuple[dict[str, int], int]:
    """Node -> the steps that are done when it is through, for all behind the trainer; and the steps in all."""
    done = {trainer.id: 0}
    for _ in nodes:
        for node in nodes.values():
            before = node.links.get("network_trainer", "")
            steps = node.values.get("steps", 1) if node.kind == "FluxTrainLoop" else 0
            if before in done and node.id not in done:
                done[node.id] = done[before] + (steps if isinstance(steps, int) else 0)
    return done, max(done.values())


def _points(found: Imported, nodes: Mapping[str, Node], trainer: Node, done: Mapping[str, int], total: int) -> None:
    """Set when LoRAs are saved and previews are sampled, and how."""
    every: dict[str, int] = {}
    for kind, name in (("Save", "save_at_steps"), ("Validate", "validate_at_steps")):
        at = sorted({done[n.id] for n in nodes.values() if n.kind == f"FluxTrain{kind}" and n.id in done})
        loops = [n.values.get(name, 250) for n in nodes.values() if n.kind == "FluxTrainAndValidateLoop"]
        every[kind] = math.gcd(*(step for step in at if step < total), *(n for n in loops if isinstance(n, int)))
        every[kind] = every[kind] or (total if at and kind == "Validate" else 0)
        if every[kind] and not loops and at[:-1] != list(range(every[kind], at[-1], every[kind])):
            found.note(f"FluxTrain{kind}", f"at steps {', '.join(map(str, at))} there; every {every[kind]} steps here")
    found.put("output.save_every", every["Save"], "where FluxTrainSave is between the loops")
    prompts = [text.strip() for text in str(trainer.values.get("sample_prompts") or "").split("|") if text.strip()]
    if not every["Validate"] or not prompts:
        return
    found.put("samples.every", every["Validate"], "where FluxTrainValidate is between the loops")
    found.put("samples.prompts", prompts, f"{INIT}.sample_prompts")
    settings = next((n for n in nodes.values() if n.kind == SETTINGS), Node("", SETTINGS))
    for key, name, default in (
        *(("width", "width", 512), ("height", "height", 512), ("steps", "steps", 20)),
        *(("guidance", "guidance_scale", 3.5), ("seed", "seed", 42)),
    ):
        value = settings.values.get(name, default)
        value = value // 16 * 16 if key in ("width", "height") and isinstance(value, int) else value
        found.put(f"samples.{key}", value, f"{SETTINGS}.{name}: {shown(value)}")
    if any(settings.values.get(name, usual) != usual for name, usual in SHIFTS.items()):
        found.refuse(f"{SETTINGS}.shift", "fluxq samples with FLUX.1-dev's shift, 0.5 to 1.15")


def _lines(found: Imported, node: Node) -> None:
    """Say what becomes of a node's values."""
    if node.kind not in WIDGETS or node.kind in IGNORED:
        why = "it is muted" if node.muted else IGNORED.get(node.kind, "it trains nothing")
        found.lines.append(printable(f"{node.muted or node.kind} {node.id}: ignored: {why}"))
        return
    if node.kind in ("FluxTrainSave", "FluxTrainValidate"):
        to = "output.save_every" if node.kind == "FluxTrainSave" else "samples.every"
        found.lines.append(f"{node.kind} {printable(node.id)} becomes {to}")
    known = WIDGETS[node.kind].split()
    for name, value in node.values.items():
        label = f"{node.kind}.{printable(name)} {shown(value)}"
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            found.refuse(label, f"the node has no such value{f'; did you mean {near[0]}?' if near else ''}")
        elif name in IGNORED:
            found.lines.append(f"{label}: ignored: {IGNORED[name]}")
        else:
            row, to = BY_NAME.get(name), TO.get(name, "")
            if row and row.ignored and not to:
                found.lines.append(f"{label}: ignored: {row.ignored}")
                continue
            of_data = node.kind in (ADD, GENERAL, "TrainDatasetRegularization")
            to = "data.folders" if of_data else "samples" if node.kind == SETTINGS else to or (row.to if row else "")
            found.lines.append(f"{label} becomes {to or 'samples.prompts'}")
