"""diffusers itself loads both dialects, and its output moves by exactly what the adapters say.

Its converter for kohya files fixes FLUX.1's real width of 3072, so the model here has it, with one block of each kind.
"""

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel

from fluxq.formats.detect import flux_shapes
from fluxq.formats.keys import to_diffusers
from fluxq.formats.lora import Adapter, save_lora
from fluxq.model.config import FluxConfig

CONFIG = FluxConfig(64, 64, 64, 96, 3072, 4.0, 24, 1, 1, (16, 56, 56), 10_000, True, True)
MODULES = [
    key.removesuffix(".weight") for key, shape in flux_shapes(CONFIG).items() if len(shape) == 2 and "_blocks." in key
]
RANK = 4


@pytest.fixture(scope="module")
def pipeline() -> FluxPipeline:
    """A pipeline of nothing but a transformer with random weights, which are cut from one pool of noise (fast)."""
    with torch.device("meta"):
        transformer = FluxTransformer2DModel(
            num_layers=1, num_single_layers=1, joint_attention_dim=96, pooled_projection_dim=64, guidance_embeds=True
        )
    pool = torch.randn(60_000_003, generator=torch.Generator().manual_seed(0))
    tensors, start = {}, 0
    for name, tensor in transformer.state_dict().items():
        count = tensor.numel()
        start = (start + 1_000_003) % (pool.numel() - count)
        scale = tensor.shape[-1] ** -0.5 if tensor.ndim > 1 else 0.2
        tensors[name] = pool[start : start + count].view(tensor.shape) * scale + (".attn.norm_" in name)
    transformer.load_state_dict(tensors, assign=True)
    parts = dict.fromkeys(("scheduler", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    return FluxPipeline(**parts, transformer=transformer.requires_grad_(False).eval())


def velocity(transformer: FluxTransformer2DModel) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    ids = torch.zeros(6, 3)
    ids[:, 1:] = torch.tensor([[row, column] for row in range(2) for column in range(3)])
    return transformer(
        hidden_states=torch.randn(1, 6, 64, generator=generator),
        encoder_hidden_states=torch.randn(1, 3, 96, generator=generator),
        pooled_projections=torch.randn(1, 64, generator=generator),
        timestep=torch.tensor([0.7]),
        img_ids=ids,
        txt_ids=torch.zeros(3, 3),
        guidance=torch.tensor([3.5]),
        return_dict=False,
    )[0]


@torch.no_grad()
def add_to_weights(transformer: FluxTransformer2DModel, adapters: dict[str, Adapter], sign: int) -> None:
    parameters = dict(transformer.named_parameters())
    for module, adapter in adapters.items():
        delta = adapter.up @ adapter.down * (sign * adapter.alpha / RANK)
        for name, piece in to_diffusers({f"{module}.weight": delta}, CONFIG).items():
            parameters[name] += piece


@pytest.mark.slow
@pytest.mark.parametrize("alpha", [2, 3])
@torch.no_grad()
def test_diffusers_applies_both_dialects_exactly(tmp_path, pipeline, alpha):
    generator = torch.Generator().manual_seed(alpha)
    adapters = {}
    for module in MODULES:
        out, inputs = flux_shapes(CONFIG)[f"{module}.weight"]
        down = torch.randn(RANK, inputs, generator=generator) * inputs**-0.5
        adapters[module] = Adapter(down, torch.randn(out, RANK, generator=generator) * 0.2, alpha)

    base = velocity(pipeline.transformer)
    add_to_weights(pipeline.transformer, adapters, +1)
    wanted = velocity(pipeline.transformer) - base
    add_to_weights(pipeline.transformer, adapters, -1)
    base = velocity(pipeline.transformer)
    assert wanted.norm() > 0.05 * base.norm()

    for dialect in ("kohya", "diffusers"):
        save_lora(tmp_path / f"{dialect}.safetensors", adapters, CONFIG, dialect, torch.float32, {"ss_steps": "7"})
        pipeline.load_lora_weights(tmp_path / f"{dialect}.safetensors")
        moved = velocity(pipeline.transformer) - base
        pipeline.unload_lora_weights()
        assert (moved - wanted).norm() <= 2e-5 * wanted.norm(), dialect
