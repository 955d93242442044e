"""diffusers itself loads both dialects, as they are written by default, and draws what fluxq draws with them.

Its converter for kohya files fixes FLUX.1's real width of 3072, so the model here has it, with one block of each kind.
"""

from __future__ import annotations

import pytest
import torch
from helpers import relative_error

from fluxq.formats.detect import flux_shapes
from fluxq.formats.keys import to_diffusers
from fluxq.formats.lora import load_lora
from fluxq.formats.lora_algebra import Adapter
from fluxq.formats.lora_write import save_lora
from fluxq.model import Flux, FluxConfig
from fluxq.model.embed import image_ids, text_ids
from fluxq.sample import attach

diffusers = pytest.importorskip("diffusers")

CONFIG = FluxConfig(64, 64, 64, 96, 3072, 4.0, 24, 1, 1, (16, 56, 56), 10_000, True, True)
MODULES = [
    key.removesuffix(".weight") for key, shape in flux_shapes(CONFIG).items() if len(shape) == 2 and "_blocks." in key
]
RANK = 4


@pytest.fixture(scope="module")
def models():
    """One model twice: fluxq's, and a diffusers pipeline of nothing but the transformer. The weights are cut from one
    pool of noise, which is fast."""
    pool = torch.randn(70_000_003, generator=torch.Generator().manual_seed(0))
    tensors, start = {}, 0
    for name, shape in flux_shapes(CONFIG).items():
        count = torch.Size(shape).numel()
        start = (start + 1_000_003) % (pool.numel() - count)
        scale = shape[-1] ** -0.5 if len(shape) > 1 else 0.2
        tensors[name] = pool[start : start + count].view(shape) * scale + name.endswith(".scale")
    with torch.device("meta"):
        flux = Flux(CONFIG)
        transformer = diffusers.FluxTransformer2DModel(
            num_layers=1, num_single_layers=1, joint_attention_dim=96, pooled_projection_dim=64, guidance_embeds=True
        )
    flux.load_state_dict(tensors, assign=True)
    transformer.load_state_dict(to_diffusers(tensors, CONFIG), assign=True)
    parts = dict.fromkeys(("scheduler", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    return flux, diffusers.FluxPipeline(**parts, transformer=transformer.requires_grad_(False).eval())


def inputs() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "img": torch.randn(1, 6, 64, generator=generator),
        "img_ids": image_ids(2, 3),
        "txt": torch.randn(1, 3, 96, generator=generator),
        "txt_ids": text_ids(3),
        "timesteps": torch.tensor([0.7]),
        "y": torch.randn(1, 64, generator=generator),
        "guidance": torch.tensor([3.5]),
    }


def their_velocity(pipeline) -> torch.Tensor:
    i = inputs()
    return pipeline.transformer(
        hidden_states=i["img"],
        encoder_hidden_states=i["txt"],
        pooled_projections=i["y"],
        timestep=i["timesteps"],
        img_ids=i["img_ids"],
        txt_ids=i["txt_ids"],
        guidance=i["guidance"],
        return_dict=False,
    )[0]


@pytest.mark.slow
@pytest.mark.parametrize("alpha", [2, 3])  # alpha / rank a power of two, and not
@pytest.mark.parametrize("dialect", ["kohya", "diffusers"])
@torch.no_grad()
def test_diffusers_draws_what_fluxq_draws(tmp_path, models, dialect, alpha):
    flux, pipeline = models
    generator = torch.Generator().manual_seed(alpha)
    adapters = {}
    for module in MODULES:
        out, width = flux_shapes(CONFIG)[f"{module}.weight"]
        down = torch.randn(RANK, width, generator=generator) * width**-0.5
        adapters[module] = Adapter(down, torch.randn(out, RANK, generator=generator) * 0.2, alpha)
    path = tmp_path / "lora.safetensors"
    save_lora(path, adapters, CONFIG, dialect, metadata={"ss_steps": "7"})

    attach(flux, [])
    base = flux(**inputs())
    attach(flux, [(load_lora(path, CONFIG).adapters, 1.0)])
    ours = flux(**inputs())
    assert relative_error(their_velocity(pipeline), base) <= 1e-5
    pipeline.load_lora_weights(path)
    theirs = their_velocity(pipeline)
    pipeline.unload_lora_weights()
    assert (ours - base).norm() > 0.05 * base.norm()
    # diffusers folds kohya's alpha / rank into the bf16 factors: exact for a power of two, else rounded once more
    rounding = 2**-8 if (dialect, alpha) == ("kohya", 3) else 1e-4
    assert relative_error(theirs - base, ours - base) <= rounding
    # and what the file says is what was trained, within bf16's rounding of its two factors
    attach(flux, [(adapters, 1.0)])
    assert relative_error(ours - base, flux(**inputs()) - base) <= 1e-2
