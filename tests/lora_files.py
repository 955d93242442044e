"""LoRA files of every dialect, written here by hand from the key tables of the programs that write them."""

from __future__ import annotations

import json

import torch
from torch import Tensor

from fluxq.model.config import FluxConfig

CONFIG = FluxConfig.nano()
WIDTH, MLP = 192, 768

# BFL module -> its diffusers modules and their rows, as facts from the two model files, and (out, in)
MODULES = {
    "double_blocks.0.img_attn.qkv": (
        {
            "transformer_blocks.0.attn.to_q": 192,
            "transformer_blocks.0.attn.to_k": 192,
            "transformer_blocks.0.attn.to_v": 192,
        },
        (576, 192),
    ),
    "double_blocks.1.txt_attn.qkv": (
        {
            "transformer_blocks.1.attn.add_q_proj": 192,
            "transformer_blocks.1.attn.add_k_proj": 192,
            "transformer_blocks.1.attn.add_v_proj": 192,
        },
        (576, 192),
    ),
    "double_blocks.0.img_attn.proj": ({"transformer_blocks.0.attn.to_out.0": 192}, (192, 192)),
    "double_blocks.1.txt_attn.proj": ({"transformer_blocks.1.attn.to_add_out": 192}, (192, 192)),
    "double_blocks.0.img_mlp.0": ({"transformer_blocks.0.ff.net.0.proj": 768}, (768, 192)),
    "double_blocks.0.txt_mlp.2": ({"transformer_blocks.0.ff_context.net.2": 192}, (192, 768)),
    "double_blocks.1.img_mod.lin": ({"transformer_blocks.1.norm1.linear": 1152}, (1152, 192)),
    "double_blocks.1.txt_mod.lin": ({"transformer_blocks.1.norm1_context.linear": 1152}, (1152, 192)),
    "single_blocks.1.linear1": (
        {
            "single_transformer_blocks.1.attn.to_q": 192,
            "single_transformer_blocks.1.attn.to_k": 192,
            "single_transformer_blocks.1.attn.to_v": 192,
            "single_transformer_blocks.1.proj_mlp": 768,
        },
        (1344, 192),
    ),
    "single_blocks.0.linear2": ({"single_transformer_blocks.0.proj_out": 192}, (192, 960)),
    "single_blocks.1.modulation.lin": ({"single_transformer_blocks.1.norm.linear": 576}, (576, 192)),
    "txt_in": ({"context_embedder": 192}, (192, 128)),
    "time_in.out_layer": ({"time_text_embed.timestep_embedder.linear_2": 192}, (192, 192)),
    "final_layer.linear": ({"proj_out": 64}, (64, 192)),
    "final_layer.adaLN_modulation.1": ({"norm_out.linear": 384}, (384, 192)),
}
ATTENTION = {m: v for m, v in MODULES.items() if "attn" in m or "linear1" in m or "linear2" in m}
RANK, ALPHA = 4, 2.6


def pair(out: int, inputs: int, rank: int = RANK) -> tuple[Tensor, Tensor]:
    return torch.randn(rank, inputs), torch.randn(out, rank)


def fused(prefix: str, flat: bool, down: str, up: str, alpha: bool):
    """A file with the original's modules; returns its tensors and what each module's weight changes by."""
    tensors, changes = {}, {}
    for module, (_, (out, inputs)) in MODULES.items():
        name = prefix + (module.replace(".", "_") if flat else module)
        a, b = pair(out, inputs)
        tensors |= {f"{name}{down}": a, f"{name}{up}": b}
        tensors |= {f"{name}.alpha": torch.tensor(ALPHA)} if alpha else {}
        changes[module] = (ALPHA / RANK if alpha else 1.0) * b.double() @ a.double()
    return tensors, changes


def split(prefix: str, flat: bool, down: str, up: str, alpha: bool, scale=1.0, shared=False):
    """A file with diffusers' modules, each with a LoRA of its own, or all of one original module with the same down."""
    tensors, changes = {}, {}
    for module, (pieces, (_, inputs)) in MODULES.items():
        deltas, common = [], torch.randn(RANK, inputs)
        for piece, rows in pieces.items():
            name = prefix + (piece.replace(".", "_") if flat else piece)
            a, b = pair(rows, inputs)
            a = common if shared else a
            tensors |= {f"{name}{down}": a, f"{name}{up}": b}
            tensors |= {f"{name}.alpha": torch.tensor(ALPHA)} if alpha else {}
            deltas.append((ALPHA / RANK if alpha else scale) * b.double() @ a.double())
        changes[module] = torch.cat(deltas)
        if "adaLN" in module:  # diffusers has scale before shift
            changes[module] = changes[module].roll(192, 0)
    return tensors, changes


def xlabs():
    """x-flux: attention of every block; in single blocks only the rows of q, k and v."""
    tensors, changes = {}, {}
    table = {
        "double_blocks.1.processor.qkv_lora1": ("double_blocks.1.img_attn.qkv", 576, 192, 576),
        "double_blocks.1.processor.proj_lora1": ("double_blocks.1.img_attn.proj", 192, 192, 192),
        "double_blocks.1.processor.qkv_lora2": ("double_blocks.1.txt_attn.qkv", 576, 192, 576),
        "double_blocks.1.processor.proj_lora2": ("double_blocks.1.txt_attn.proj", 192, 192, 192),
        "single_blocks.0.processor.qkv_lora": ("single_blocks.0.linear1", 576, 192, 1344),
        "single_blocks.0.processor.proj_lora": ("single_blocks.0.linear2", 192, 960, 192),
    }
    for name, (module, rows, inputs, out) in table.items():
        a, b = pair(rows, inputs)
        tensors |= {f"{name}.down.weight": a, f"{name}.up.weight": b}
        changes[module] = torch.zeros(out, inputs, dtype=torch.float64)
        changes[module][:rows] = b.double() @ a.double()
    return tensors, changes


AB, DOWN_UP = (".lora_A.weight", ".lora_B.weight"), (".lora_down.weight", ".lora_up.weight")
WRITERS = {
    "kohya": lambda: (*fused("lora_unet_", True, *DOWN_UP, True), {}),
    "kohya without alpha": lambda: (*fused("lora_unet_", True, *DOWN_UP, False), {}),
    "comfy A/B": lambda: (*fused("diffusion_model.", False, *AB, True), {}),
    "comfy A/B without alpha": lambda: (*fused("diffusion_model.", False, *AB, False), {}),
    "comfy down/up": lambda: (*fused("diffusion_model.", False, *DOWN_UP, True), {}),
    "OneTrainer original": lambda: (*fused("", False, *AB, True), {}),
    "fal Kontext": lambda: (*fused("base_model.model.", False, *AB, False), {}),
    "ai-toolkit": lambda: (*split("transformer.", False, *AB, False), {}),
    "ai-toolkit, one down": lambda: (*split("transformer.", False, *AB, False, shared=True), {}),
    "diffusers with alpha": lambda: (*split("transformer.", False, *AB, True), {}),
    "diffusers with metadata": lambda: (
        *split("transformer.", False, *AB, False, scale=ALPHA / RANK),
        {"lora_adapter_metadata": json.dumps({"transformer.r": RANK, "transformer.lora_alpha": ALPHA})},
    ),
    "diffusers down/up": lambda: (*split("transformer.", False, *DOWN_UP, True), {}),
    "DiffSynth default": lambda: (*split("", False, ".lora_A.default.weight", ".lora_B.default.weight", False), {}),
    "DiffSynth": lambda: (*split("", False, *AB, False), {}),
    "OneTrainer legacy": lambda: (*split("lora_transformer_", True, *DOWN_UP, True), {}),
    "SimpleTuner lycoris": lambda: (*split("lycoris_", True, *DOWN_UP, True), {}),
    "XLabs": lambda: (*xlabs(), {}),
}
