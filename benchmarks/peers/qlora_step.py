"""The whole training step of the published QLoRA recipe: diffusers' FLUX.1 in bitsandbytes' NF4, peft's LoRA in fp32
under bf16 autocast, every block checkpointed.

The recipe is Hugging Face's (blog post flux-qlora, and train_dreambooth_lora_flux_miniature.py in diffusers): all
linear layers in NF4 without double quantization, everything else in fp32 (`prepare_model_for_kbit_training`), and
bitsandbytes' AdamW8bit of as many tensors as there are. Trained layers, images, captions, learning rate and clipping
are fluxq's instead of the recipe's.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.peers import diffusers_blocks, need, peft_lora
from benchmarks.peers.bnb_nf4 import nf4_linear
from fluxq.bench.timed_step import TARGETS, Setting, random_batch
from fluxq.config import TrainingConfig
from fluxq.flow import sample_noise
from fluxq.formats.checkpoint.keys import module_split
from fluxq.formats.checkpoint.shapes import flux_shapes
from fluxq.model import FluxConfig
from fluxq.model.costs import chosen
from fluxq.model.embed import image_ids, pack, text_ids, unpack
from fluxq.training.libraries import library_of
from fluxq.training.timesteps import sample_timesteps


def transformer(config: FluxConfig, rank: int, device: torch.device) -> nn.Module:
    """diffusers' transformer of that size with random weights, ready to train. Raises Skip if a package is missing."""
    need("bitsandbytes"), need("peft")
    with torch.device("meta"):
        model = diffusers_blocks.transformer(config)
    randomize(model, device)
    model.requires_grad_(False)
    model.enable_gradient_checkpointing()
    paths = [name.removesuffix(".weight") for name, shape in flux_shapes(config).items() if len(shape) == 2]
    names = [name for path in chosen(paths, TARGETS) for name, *_ in module_split(path, config)]
    peft_lora.add(model, rank, rank, names, adapters="fp32 under autocast")
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.requires_grad_(True)
    return model.to(device).train()


def randomize(module: nn.Module, device: torch.device) -> None:
    """Give everything below `module` random weights, layer by layer: matrices in NF4, the rest in fp32."""
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            n, k = child.weight.shape
            weight = torch.randn(n, k, device=device, dtype=torch.bfloat16).mul_(k**-0.5)
            layer = nf4_linear(weight, None if child.bias is None else 0.02 * torch.randn(n, device=device))
            setattr(module, name, layer)
        else:
            randomize(child, device)
    for name, parameter in list(module.named_parameters(recurse=False)):
        if parameter.is_meta:
            setattr(module, name, nn.Parameter(torch.ones(parameter.shape, device=device)))


def trainer(model: nn.Module, config: FluxConfig, setting: Setting, optimizer: str) -> Callable[[int], float]:
    """Runs training step `index` and returns its loss, the counterpart of `trainer` in fluxq/bench/timed_step.py."""
    training, parameters = TrainingConfig(), peft_lora.trained(model)
    updates = library_optimizer(optimizer)(
        parameters, lr=library_of(optimizer).default_rate()[0], weight_decay=training.weight_decay
    )
    batch, device, side = random_batch(config, setting), parameters[0].device, setting.resolution // 16
    img_ids, txt_ids = image_ids(side, side, device), text_ids(setting.t5_length, device)
    guidance = torch.full((setting.batch,), training.guidance, device=device) if config.guidance_embed else None

    def loss_of(index: int) -> Tensor:
        noise = sample_noise(batch.latents.shape[1:], training.seed, index, batch.examples)
        t = sample_timesteps(training, index, batch.examples, side**2)
        latents, noise, txt, pooled, t = (x.to(device) for x in (batch.latents, noise, batch.txt, batch.pooled, t))
        mix = t[:, None, None, None]
        with torch.autocast(device.type, torch.bfloat16):
            (out,) = model(
                hidden_states=pack((1 - mix) * latents + mix * noise).bfloat16(),
                encoder_hidden_states=txt,
                pooled_projections=pooled.bfloat16(),
                timestep=t,
                guidance=guidance,
                img_ids=img_ids,
                txt_ids=txt_ids,
                return_dict=False,
            )
        return (unpack(out, 2 * side, 2 * side).float() - (noise - latents)).square().mean()

    def step(index: int) -> float:
        loss = loss_of(index)
        loss.backward()
        float(torch.nn.utils.clip_grad_norm_(parameters, training.clip))
        updates.step()
        updates.zero_grad()
        return float(loss.detach())

    return step


def library_optimizer(name: str) -> type[torch.optim.Optimizer]:
    """The library's optimizer of separate tensors that "adamw" or "adamw8bit" stands for."""
    return torch.optim.AdamW if name == "adamw" else need("bitsandbytes").optim.AdamW8bit
