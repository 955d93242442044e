"""--network_module and --network_args: which layers of FLUX.1 get a LoRA."""

from __future__ import annotations

import re

from .setup import Setup

MODULE, PRINTED = "networks.lora_flux", "networks.lora"
DOUBLE, SINGLE = 19, 38
"""Blocks of FLUX.1."""
TYPES = {
    "img_attn_dim": ("double", r"img_attn\.(qkv|proj)"),
    "txt_attn_dim": ("double", r"txt_attn\.(qkv|proj)"),
    "img_mlp_dim": ("double", r"img_mlp\.[02]"),
    "txt_mlp_dim": ("double", r"txt_mlp\.[02]"),
    "img_mod_dim": ("double", r"img_mod\.lin"),
    "txt_mod_dim": ("double", r"txt_mod\.lin"),
    "single_dim": ("single", r"linear[12]"),
    "single_mod_dim": ("single", r"modulation\.lin"),
}
"""Argument -> the kind of block and the layers in it. Together they are all that sd-scripts trains by default."""
INPUTS = ("img_in", r"time_in\.(in|out)_layer", r"vector_in\.(in|out)_layer", r"guidance_in\.(in|out)_layer", "txt_in")
"""The layers of in_dims, in its order."""
INERT = {
    "conv_dim": "FLUX.1 has no convolutions",
    "conv_alpha": "FLUX.1 has no convolutions",
    "verbose": "it prints more",
}
REFUSED = {
    "split_qkv": "it fails in sd-scripts too, and fluxq's LoRA is for q, k and v together",
    "train_t5xxl": "T5-XXL cannot be trained here",
    **dict.fromkeys(("rank_dropout", "module_dropout"), "fluxq's LoRA has no dropout"),
    **dict.fromkeys(("ggpo_beta", "ggpo_sigma"), "fluxq does not perturb gradients"),
    **dict.fromkeys(("network_reg_dims", "network_reg_lrs"), "all layers have one rank and one learning rate"),
    **dict.fromkeys(
        ("loraplus_lr_ratio", "loraplus_unet_lr_ratio", "loraplus_text_encoder_lr_ratio"),
        "both matrices of a LoRA have one learning rate",
    ),
}


def read_network(setup: Setup) -> None:
    """Set lora.targets, lora.rank and lora.alpha."""
    options, module = setup.options, setup.options["network_module"]
    if module == PRINTED:
        setup.note(
            "network_module", f"{PRINTED} is for Stable Diffusion; taken for {MODULE}, as the FLUX.1 guide means"
        )
    elif module != MODULE:
        setup.refuse("network_module", f"{module} is not read; only {MODULE} is" if module else f"give {MODULE}")
    arguments: dict[str, str] = {}
    for argument in options["network_args"] or []:
        name, equals, value = argument.partition("=")
        if not equals:
            setup.refuse("network_args", f"{argument!r} must be NAME=VALUE")
        elif name in INERT:
            setup.note("network_args", f"{name} has no effect: {INERT[name]}")
        elif name in REFUSED and value.lower() not in ("false", "none", "0", ""):
            setup.refuse("network_args", f"{name}: {REFUSED[name]}")
        elif name not in REFUSED:
            arguments[name] = value
    takes_file = bool(options["dim_from_weights"])
    rank = None if takes_file else 4 if options["network_dim"] is None else options["network_dim"]
    alpha = None if takes_file else float(options["network_alpha"] or 0) or float(rank or 0)
    setup.set("lora", rank=rank, alpha=alpha, targets=_targets(setup, arguments, rank))
    if takes_file and not options["network_weights"]:
        setup.refuse("dim_from_weights", "it needs --network_weights")


def _targets(setup: Setup, arguments: dict[str, str], rank: int | None) -> list[str]:
    blocks = {
        "double": _blocks(setup, arguments, "double", DOUBLE),
        "single": _blocks(setup, arguments, "single", SINGLE),
    }
    only = arguments.pop("train_blocks", "all")
    if only not in ("all", "double", "single"):
        setup.refuse("network_args", f"train_blocks must be all, double or single, not {only!r}")
    layers: dict[str, list[str]] = {"double": [], "single": []}
    for name, (kind, expression) in TYPES.items():
        if only in ("all", kind) and _trains(setup, name, arguments.pop(name, None), rank):
            layers[kind].append(expression)
    targets = []
    for kind, expressions in layers.items():
        whole = len(expressions) == sum(own == kind for own, _ in TYPES.values())
        if expressions and blocks[kind] != "":
            chosen = ".*" if whole else f"({'|'.join(expressions)})"
            targets.append(rf"{kind}_blocks\.{blocks[kind]}\.{chosen}")
    if (inputs := arguments.pop("in_dims", None)) is not None:
        ranks = inputs.strip().removeprefix("[").removesuffix("]").split(",")
        if len(ranks) != len(INPUTS):
            setup.refuse("network_args", f"in_dims must be five numbers, not {inputs!r}")
        targets += [e for e, own in zip(INPUTS, ranks, strict=False) if _trains(setup, "in_dims", own, rank)]
    for name in arguments:
        setup.refuse("network_args", f"{MODULE} has no argument {name}")
    if not targets:
        setup.refuse("network_args", "no layer is left to train")
    return targets


def _trains(setup: Setup, name: str, text: str | None, rank: int | None) -> bool:
    """Whether layers with the rank `text` of the argument `name` are trained: 0 leaves them out."""
    try:
        own = rank if text is None else int(text)
    except ValueError:
        setup.refuse("network_args", f"{name} must be a whole number, not {text!r}")
        return True
    if own and own != rank:
        setup.refuse("network_args", f"{name}={own}: all layers have one rank, --network_dim {rank}, or 0")
    return own != 0


def _blocks(setup: Setup, arguments: dict[str, str], kind: str, count: int) -> str:
    r"""An expression for the numbers of the blocks that are chosen, like (0|1|4); \d+ for all, "" for none."""
    text = arguments.pop(f"train_{kind}_block_indices", "all")
    chosen: set[int] = set(range(count) if text == "all" else ())
    for part in text.split(",") if text not in ("all", "none", "") else ():
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if not first <= last < count:
            setup.refuse("network_args", f"train_{kind}_block_indices: {part!r} is not among 0 to {count - 1}")
        chosen |= set(range(first, min(last, count - 1) + 1))
    return r"\d+" if len(chosen) == count else f"({'|'.join(map(str, sorted(chosen)))})" if chosen else ""
