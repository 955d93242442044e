"""diffusers' blocks with bitsandbytes' NF4 and peft's LoRA, given the weights and the LoRA of one of our blocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from benchmarks.peers import need, peft_lora
from benchmarks.peers.bnb_nf4 import quantize_linears
from fluxq.formats.checkpoint.keys import module_split, to_diffusers
from fluxq.model import FluxConfig
from fluxq.model.linear import Linear

Run = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(img, txt, vec, cos, sin) -> (img, txt), separate for either kind of block."""


def transformer(config: FluxConfig) -> nn.Module:
    """diffusers' transformer of these sizes, fresh from the constructor. Raises Skip without diffusers."""
    models = need("diffusers.models.transformers.transformer_flux")
    return models.FluxTransformer2DModel(
        in_channels=config.in_channels,
        num_layers=config.depth,
        num_single_layers=config.depth_single_blocks,
        attention_head_dim=config.head_dim,
        num_attention_heads=config.num_heads,
        joint_attention_dim=config.context_in_dim,
        pooled_projection_dim=config.vec_in_dim,
        guidance_embeds=config.guidance_embed,
        axes_dims_rope=config.axes_dim,
    )


def twin(
    kind: str, config: FluxConfig, tensors: Mapping[str, Tensor], layers: Mapping[str, Linear]
) -> tuple[nn.Module, Run]:
    """diffusers' first block of that kind ("double", "single"), and a function that calls it with our inputs.

    tensors: original name -> bf16 tensor; layers: path -> our layer, for layers with LoRA.
    """
    models = need("diffusers.models.transformers.transformer_flux")
    made = models.FluxTransformerBlock if kind == "double" else models.FluxSingleTransformerBlock
    own = {name: t for name, t in tensors.items() if name.startswith(f"{kind}_blocks.0.")}
    device = next(iter(own.values())).device
    with torch.device(device):
        block = made(config.hidden_size, config.num_heads, config.head_dim).to(torch.bfloat16).requires_grad_(False)
    block.load_state_dict({name.split(".", 2)[2]: t for name, t in to_diffusers(own, config).items()})
    quantize_linears(block)
    pieces = [
        (name.split(".", 2)[2], start, stop, layer)
        for path, layer in layers.items()
        if path.startswith(f"{kind}_blocks.0.")
        for name, start, stop in module_split(path, config)
    ]
    rank, scale = pieces[0][3].get_parameter("lora_down").shape[0], pieces[0][3].lora_scale
    peft_lora.add(block, rank, scale * rank, [name for name, *_ in pieces])
    block.to(device)
    for name, start, stop, layer in pieces:
        down, up = layer.get_parameter("lora_down"), layer.get_parameter("lora_up")
        peft_lora.fill(block.get_submodule(name), down, up[start:stop])

    return block, caller(block)


def caller(block: Callable[..., tuple[Tensor, Tensor]]) -> Run:
    """`block`, plain or compiled, called with our inputs."""

    def run(img: Tensor, txt: Tensor, vec: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        angles = tuple(t[0, 0].repeat_interleave(2, -1) for t in (cos, sin))  # (L, D/H)
        txt, img = block(hidden_states=img, encoder_hidden_states=txt, temb=vec, image_rotary_emb=angles)
        return img, txt

    return run
