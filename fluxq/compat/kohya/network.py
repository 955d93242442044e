"""--network_module and --network_args: which layers of FLUX.1 get a LoRA."""

from __future__ import annotations

import re

from fluxq.formats.lora.keys import matrices
from fluxq.model.config import FluxConfig

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
EXCLUDED = {*TYPES, "train_double_block_indices", "train_single_block_indices"}
"""What is not read beside network_reg_dims."""
INERT = {
    "conv_dim": "FLUX.1 has no convolutions",
    "conv_alpha": "FLUX.1 has no convolutions",
    "verbose": "it prints more",
}
REFUSED = {
    "split_qkv": "it fails in sd-scripts too, and fluxq's LoRA is for q, k and v together",
    "train_t5xxl": "T5-XXL cannot be trained here",
    **dict.fromkeys(("ggpo_beta", "ggpo_sigma"), "fluxq does not perturb gradients"),
    "network_reg_lrs": "all layers have one learning rate",
}


def read_network(setup: Setup) -> None:
    """Set lora.targets, rank, alpha, ranks, alphas, dropouts, plus_ratio and max_norm."""
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
    for name in ("rank_dropout", "module_dropout"):
        setup.set("lora", **{name: _number(setup, name, arguments.pop(name, None))})
    setup.set("lora", inner_dropout=options["network_dropout"], max_norm=options["scale_weight_norms"])
    names = ("loraplus_lr_ratio", "loraplus_unet_lr_ratio", "loraplus_text_encoder_lr_ratio")
    both, *own = (_number(setup, name, arguments.pop(name, None)) for name in names)
    of_flux, of_clip = (ratio or both for ratio in own)
    if of_flux != of_clip and not options["network_train_unet_only"]:
        setup.refuse(
            "network_args", "loraplus: CLIP-L and the transformer have one ratio; add --network_train_unet_only"
        )
    if of_flux == 0:
        setup.refuse(
            "network_args", "loraplus: a ratio of 0 leaves each lora_up at 0, so nothing is learned; leave it out"
        )
    setup.set("lora", plus_ratio=of_flux)
    ranks: list[str] = []
    targets = _targets(setup, arguments, rank, ranks)
    setup.set("lora", rank=rank, alpha=alpha, targets=targets, ranks=ranks)
    if ranks and takes_file:
        setup.refuse(
            "network_args", "ranks of types, inputs and names are not read with --dim_from_weights; leave one out"
        )
    elif ranks:
        setup.set("lora", alphas=[f".*={alpha}"])  # every rank has the same alpha, as there
    if takes_file and not options["network_weights"]:
        setup.refuse("dim_from_weights", "it needs --network_weights")


def _number(setup: Setup, name: str, text: str | None) -> float | None:
    try:
        return None if text is None else float(text)
    except ValueError:
        setup.refuse("network_args", f"{name} must be a number, not {text!r}")
        return None


def _targets(setup: Setup, arguments: dict[str, str], rank: int | None, ranks: list[str]) -> list[str]:
    """The targets; also puts into `ranks` those that differ from `rank`, as lora.ranks has them."""
    if "network_reg_dims" in arguments and arguments.keys() & EXCLUDED:
        setup.refuse("network_args", "network_reg_dims is read without ranks of types and without block indices")
    blocks = {
        "double": _blocks(setup, arguments, "double", DOUBLE),
        "single": _blocks(setup, arguments, "single", SINGLE),
    }
    only = arguments.pop("train_blocks", "all")
    if only not in ("all", "double", "single"):
        setup.refuse("network_args", f"train_blocks must be all, double or single, not {only!r}")
    layers: dict[str, list[str]] = {"double": [], "single": []}
    for name, (kind, expression) in TYPES.items():
        own = _rank(setup, name, arguments.pop(name, None), rank)
        if only in ("all", kind) and own != 0:
            layers[kind].append(expression)
            ranks += [rf"{kind}_blocks\.\d+\.{expression}={own}"] if own != rank else []
    targets = []
    for kind, expressions in layers.items():
        whole = len(expressions) == sum(own == kind for own, _ in TYPES.values())
        if expressions and blocks[kind] != "":
            chosen = ".*" if whole else f"({'|'.join(expressions)})"
            targets.append(rf"{kind}_blocks\.{blocks[kind]}\.{chosen}")
    if (inputs := arguments.pop("in_dims", None)) is not None:
        of_inputs = inputs.strip().removeprefix("[").removesuffix("]").split(",")
        if len(of_inputs) != len(INPUTS):
            setup.refuse("network_args", f"in_dims must be five numbers, not {inputs!r}")
        for expression, text in zip(INPUTS, of_inputs, strict=False):
            if own := _rank(setup, "in_dims", text, rank):
                targets.append(expression)
                ranks += [f"{expression}={own}"] if own != rank else []
    if (named := arguments.pop("network_reg_dims", None)) is not None:
        ranks += _named_ranks(setup, named)
    for name in arguments:
        setup.refuse("network_args", f"{MODULE} has no argument {name}")
    if not targets:
        setup.refuse("network_args", "no layer is left to train")
    return targets


def _rank(setup: Setup, name: str, text: str | None, rank: int | None) -> int | None:
    """The rank `text` of the argument `name`, or `rank` without one; 0 leaves layers out."""
    try:
        return rank if text is None else int(text)
    except ValueError:
        setup.refuse("network_args", f"{name} must be a whole number, not {text!r}")
        return rank


def _named_ranks(setup: Setup, text: str) -> list[str]:
    """lora.ranks for network_reg_dims: REGEX=RANK,..., of which the first that is found in a layer's name counts."""
    rules = [part.rpartition("=") for part in text.split(",")]
    paths: dict[str, list[str]] = {}
    for path in matrices(FluxConfig.dev()):
        if not re.match("(double|single)_blocks", path):
            continue
        name = f"lora_unet_{path.replace('.', '_')}"
        try:
            own = next((rank for regex, _, rank in rules if re.search(regex, name)), None)
        except re.error as error:
            setup.refuse("network_args", f"network_reg_dims: {error}")
            return []
        if own is not None:
            paths.setdefault(own, []).append(re.escape(path))
    if wrong := [rank for _, _, rank in rules if not rank.strip().isdecimal()]:
        setup.refuse("network_args", f"network_reg_dims must be REGEX=RANK, not {wrong[0]!r}")
    return [f"({'|'.join(chosen)})={rank.strip()}" for rank, chosen in paths.items()]


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
