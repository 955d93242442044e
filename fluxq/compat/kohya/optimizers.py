"""--optimizer_type and --lr_scheduler: whose class it is here, and what its library does by default."""

from __future__ import annotations

import ast
from typing import Any

from .setup import Setup

OPTIMIZERS: dict[str, tuple[str, float, dict[str, Any]]] = {
    "adamw": ("adamw", 0.01, {}),
    "adamw8bit": ("adamw8bit", 0.01, {}),
    "lion8bit": ("lion8bit", 0.0, {}),
    "prodigy": ("prodigy", 0.0, {}),
    "lion": ("lion_pytorch.Lion", 0.0, {}),
    "pagedadamw8bit": ("bitsandbytes.optim.PagedAdamW8bit", 0.01, {}),
    "pagedadamw": ("bitsandbytes.optim.PagedAdamW", 0.01, {}),
    "pagedadamw32bit": ("bitsandbytes.optim.PagedAdamW32bit", 0.01, {}),
    "pagedlion8bit": ("bitsandbytes.optim.PagedLion8bit", 0.0, {}),
    "ademamix8bit": ("bitsandbytes.optim.AdEMAMix8bit", 0.01, {}),
    "pagedademamix8bit": ("bitsandbytes.optim.PagedAdEMAMix8bit", 0.01, {}),
    "sgdnesterov": ("torch.optim.SGD", 0.0, {"nesterov": True, "momentum": 0.9}),
    "sgdnesterov8bit": ("bitsandbytes.optim.SGD8bit", 0.0, {"nesterov": True, "momentum": 0.9}),
    **{
        f"{kind}ScheduleFree".lower(): (f"schedulefree.{kind}ScheduleFree", 0.0, {})
        for kind in ("AdamW", "RAdam", "SGD")
    },
    "adafactor": ("adafactor", 0.0, {"scale_parameter": True}),
    "dadaptation": ("dadaptation.experimental.DAdaptAdamPreprint", 0.0, {}),
    "dadaptadampreprint": ("dadaptation.experimental.DAdaptAdamPreprint", 0.0, {}),
    "dadaptadagrad": ("dadaptation.DAdaptAdaGrad", 0.0, {}),
    "dadaptadam": ("dadaptation.DAdaptAdam", 0.0, {}),
    "dadaptadan": ("dadaptation.DAdaptAdan", 0.0, {}),
    "dadaptadanip": ("dadaptation.experimental.DAdaptAdanIP", 0.0, {}),
    "dadaptlion": ("dadaptation.DAdaptLion", 0.0, {}),
    "dadaptsgd": ("dadaptation.DAdaptSGD", 0.0, {}),
}
"""Name there, in lower case -> name here, the weight decay and the arguments that its library or sd-scripts sets."""
RENAMED = {"decouple": "weight_decouple", "use_bias_correction": "bias_correction"}
"""Arguments of Prodigy in the library of sd-scripts -> in that of fluxq."""


def read_optimizer(setup: Setup) -> None:
    """Set training.optimizer, optimizer_args, weight_decay, clip and both learning rates."""
    options = setup.options
    name = options["optimizer_type"] or ""
    for flag, meant in (("use_8bit_adam", "AdamW8bit"), ("use_lion_optimizer", "Lion")):
        if options[flag] and name:
            setup.refuse(flag, f"it contradicts --optimizer_type {name}; keep one of them")
        name = meant if options[flag] else name
    if options["use_8bit_adam"] and options["use_lion_optimizer"]:
        setup.refuse("use_lion_optimizer", "it contradicts --use_8bit_adam; keep one of them")
    arguments: dict[str, Any] = {}
    for argument in options["optimizer_args"] or []:
        key, _, text = argument.partition("=")
        try:
            arguments[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            setup.refuse("optimizer_args", f"{argument!r} must be NAME=VALUE, with a number, True or a tuple")
    kind = (name or "AdamW").lower()
    path = name if "." in name else f"torch.optim.{name}"
    ours, decay, fixed = OPTIMIZERS.get(kind, (path, 0.0, {}))
    if kind not in OPTIMIZERS and "weight_decay" not in arguments:
        setup.note("optimizer_type", f"{ours} gets a weight decay of 0; --optimizer_args weight_decay=X sets another")
    if kind == "adafactor":
        if arguments.pop("relative_step", True) or arguments.pop("warmup_init", False):
            setup.refuse(
                "optimizer_type", "Adafactor with a learning rate of its own is not read; add relative_step=False"
            )
        arguments.pop("warmup_init", None)
    if kind == "prodigy":
        arguments = {RENAMED.get(key, key): value for key, value in arguments.items()}
    decay = arguments.pop("weight_decay", decay)
    given = [f"{key}={value!r}" for key, value in {**fixed, **arguments}.items()]
    rate = options["learning_rate"] if options["unet_lr"] is None else options["unet_lr"]
    setup.set("training", optimizer=ours, optimizer_args=given, weight_decay=float(decay), learning_rate=rate)
    setup.set("training", clip=options["max_grad_norm"])
    text_rates = options["text_encoder_lr"] or [options["learning_rate"]]
    if not options["network_train_unet_only"] and text_rates[0]:
        setup.set("lora", text_encoder="clip_l")
        setup.set("training", text_learning_rate=text_rates[0])
        setup.note(
            "network_train_unet_only",
            "without it CLIP-L is trained too, as in sd-scripts, which is slower; FLUX.1 LoRAs rarely need that",
        )


def read_schedule(setup: Setup) -> None:
    """Set training.schedule and what it needs."""
    options, name = setup.options, setup.options["lr_scheduler"]
    warmup, decay = float(options["lr_warmup_steps"]), float(options["lr_decay_steps"])
    if (options["optimizer_type"] or "").lower().endswith("schedulefree"):
        if name != "constant" or warmup:
            setup.note("lr_scheduler", "it has no effect with an optimizer without a schedule, as in sd-scripts")
        return
    if decay and name != "warmup_stable_decay":
        setup.note("lr_decay_steps", "it has no effect, since it is for warmup_stable_decay, as in sd-scripts")
    kinds = {kind: kind for kind in ("constant", "linear", "cosine", "polynomial", "inverse_sqrt")}
    kinds |= {"constant_with_warmup": "constant", "cosine_with_restarts": "cosine", "cosine_with_min_lr": "cosine"}
    kinds |= {"warmup_stable_decay": "wsd" if decay else "constant"}
    if (ours := kinds.get(name)) is None:
        setup.refuse("lr_scheduler", f"{name} is not read; use one of {', '.join(kinds)}")
        return
    if name == "constant" and warmup:
        setup.refuse("lr_warmup_steps", "--lr_scheduler constant takes none; use constant_with_warmup")
    setup.set("training", schedule=ours, warmup=warmup)
    if name == "cosine_with_restarts":
        setup.set("training", schedule_cycles=options["lr_scheduler_num_cycles"])
    elif name == "polynomial":
        setup.set("training", schedule_power=float(options["lr_scheduler_power"]))
    elif name == "cosine_with_min_lr":
        setup.set("training", schedule_floor=options["lr_scheduler_min_lr_ratio"])
        if options["lr_scheduler_num_cycles"] != 1:
            setup.refuse("lr_scheduler_num_cycles", "cosine_with_min_lr is read with one cycle only")
    elif ours == "wsd":
        setup.set("training", schedule_decay=_decay(setup, warmup, decay))
        setup.set("training", schedule_floor=options["lr_scheduler_min_lr_ratio"])
        setup.note("lr_scheduler", "the learning rate falls along a line at the end; in sd-scripts along a cosine")
        if options["lr_scheduler_num_cycles"] != 1:
            setup.refuse("lr_scheduler_num_cycles", "warmup_stable_decay is read with one cycle only")


def _decay(setup: Setup, warmup: float, decay: float) -> float | None:
    """`decay`, steps or below 1 a share of all steps, as a share of the steps after the warm-up."""
    by_epochs = setup.options["max_train_epochs"] is not None
    steps = 1 if by_epochs else setup.options["max_train_steps"]
    if by_epochs and max(warmup, decay) >= 1:
        setup.refuse("lr_decay_steps", "with --max_train_epochs, give it and --lr_warmup_steps as shares of all steps")
        return None
    falls, rises = (part * steps if part < 1 else part for part in (decay, warmup))
    if rises >= steps or falls + rises > steps:
        setup.refuse("lr_decay_steps", "it and --lr_warmup_steps do not fit into all steps")
        return None
    return falls / (steps - rises)
