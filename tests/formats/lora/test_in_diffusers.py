"""diffusers and peft load the files written for them, and sample the same images as fluxq.

diffusers' converter for kohya files assumes FLUX.1's width of 3072, so the model has it, with one block of each kind.
"""

from __future__ import annotations

import copy
import re

import pytest
import torch
from helpers import Lazy, relative_error

from fluxq import nano
from fluxq.formats.checkpoint.keys import to_diffusers
from fluxq.formats.checkpoint.shapes import flux_shapes
from fluxq.formats.checkpoint.source import open_clip
from fluxq.formats.load import load_clip
from fluxq.formats.lora.algebra import Adapter
from fluxq.formats.lora.read import load_lora
from fluxq.formats.lora.write import save_lora
from fluxq.model import Flux, FluxConfig, add_lora
from fluxq.model.clip import CLIP_TARGETS
from fluxq.model.embed import image_ids, text_ids
from fluxq.sampling.denoising import attach_loras
from fluxq.training.run import adapters_of

diffusers = Lazy("diffusers")
peft = Lazy("peft")
transformers = Lazy("transformers")

CONFIG = FluxConfig(64, 64, 64, 96, 3072, 4.0, 24, 1, 1, (16, 56, 56), 10_000, True, True)
MODULES = [
    key.removesuffix(".weight") for key, shape in flux_shapes(CONFIG).items() if len(shape) == 2 and "_blocks." in key
]
RANK = 4


@pytest.fixture(scope="module")
def models():
    """The same model as fluxq's and as a diffusers pipeline with only the transformer.

    The weights are slices of one tensor of noise, which is fast.
    """
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


@pytest.fixture(scope="module")
@torch.no_grad()
def base(models) -> torch.Tensor:
    """What both give without a LoRA."""
    flux, pipeline = models
    attach_loras(flux, [])
    velocity = flux(**inputs())
    assert relative_error(their_velocity(pipeline), velocity) <= 1e-5
    return velocity


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


def velocity_with(pipeline, path, dialect) -> torch.Tensor:
    """diffusers' result with the LoRA at `path`, which is unloaded afterwards."""
    if dialect == "peft":
        wrapped = peft.PeftModel.from_pretrained(pipeline.transformer, path)
        velocity = their_velocity(pipeline)
        pipeline.transformer = wrapped.unload()
        return velocity
    pipeline.load_lora_weights(path)
    velocity = their_velocity(pipeline)
    pipeline.unload_lora_weights()
    return velocity


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dialect", "alpha", "ranks"),  # alpha / rank a power of two, and not; one rank, and several
    [
        *[("kohya", 2, 1), ("kohya", 3, 1), ("diffusers", 3, 1), ("comfy", 3, 1), ("peft", 3, 1)],
        *[("kohya", 3, 4), ("diffusers", 3, 4), ("comfy", 3, 4), ("peft", 3, 4)],
    ],
)
@torch.no_grad()
def test_diffusers_samples_the_same_as_fluxq(tmp_path, models, base, dialect, alpha, ranks):
    flux, pipeline = models
    generator = torch.Generator().manual_seed(alpha)
    adapters = {}
    for i, module in enumerate(MODULES):
        (out, width), rank = flux_shapes(CONFIG)[f"{module}.weight"], RANK + i % ranks
        down = torch.randn(rank, width, generator=generator) * width**-0.5
        adapters[module] = Adapter(down, torch.randn(out, rank, generator=generator) * 0.2, alpha)
    path = tmp_path / "lora.safetensors"
    save_lora(path, adapters, CONFIG, dialect, metadata={"ss_steps": "7"})

    attach_loras(flux, [(load_lora(path, CONFIG).adapters, 1.0)])
    ours = flux(**inputs())
    theirs = velocity_with(pipeline, path, dialect)
    assert (ours - base).norm() > 0.05 * base.norm()
    # diffusers folds kohya's alpha / rank into the bf16 factors: exact for a power of two, else rounded once more
    rounding = 2**-8 if alpha == 3 and dialect in ("kohya", "comfy") else 1e-4
    assert relative_error(theirs - base, ours - base) <= rounding
    # and what the file says is what was trained, within bf16's rounding of its two factors
    attach_loras(flux, [(adapters, 1.0)])
    assert relative_error(ours - base, flux(**inputs()) - base) <= 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("dialect", ["kohya", "diffusers", "comfy", "peft"])
@torch.no_grad()
def test_what_peft_trained_is_the_same_in_every_dialect(tmp_path, models, base, dialect):
    """fluxq reads and writes an adapter saved by peft, with separate parts and alpha / rank other than 1."""
    flux, pipeline = models
    names = ["attn.to_q", "attn.to_v", "attn.add_k_proj", "proj_mlp", "attn.to_out.0", "ff.net.0.proj", "norm.linear"]
    targets = rf".*transformer_blocks\.0\.({'|'.join(map(re.escape, names))})"
    wrapped = peft.get_peft_model(
        pipeline.transformer, peft.LoraConfig(r=3, lora_alpha=2, target_modules=targets, init_lora_weights=False)
    )
    theirs = their_velocity(pipeline)
    wrapped.save_pretrained(tmp_path / "saved")
    pipeline.transformer = wrapped.unload()
    lora = load_lora(tmp_path / "saved", CONFIG)
    attach_loras(flux, [(lora.adapters, 1.0)])
    assert relative_error(flux(**inputs()) - base, theirs - base) <= 1e-4
    path = tmp_path / "written.safetensors"
    save_lora(path, lora.adapters, CONFIG, dialect, torch.float32)
    assert relative_error(velocity_with(pipeline, path, dialect) - base, theirs - base) <= 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("dialect", ["kohya", "diffusers", "comfy"])
@torch.no_grad()
def test_the_clip_part_reaches_the_text_encoder(tmp_path, models, dialect):
    _, pipeline = models
    sizes = dict(hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=1, vocab_size=500)
    encoder = transformers.CLIPTextModel(transformers.CLIPTextConfig(**sizes, eos_token_id=499)).eval()
    shapes = {"self_attn.q_proj": (64, 64), "self_attn.out_proj": (64, 64), "mlp.fc2": (64, 256)}
    clip = {
        f"encoder.layers.1.{name}": Adapter(torch.randn(2, inputs), torch.randn(out, 2), 3.0)
        for name, (out, inputs) in shapes.items()
    }
    merged, ids = copy.deepcopy(encoder), torch.randint(0, 499, (1, 9))
    for module, adapter in clip.items():
        merged.get_submodule(module).weight += adapter.change()
    base, wanted = encoder(ids).last_hidden_state, merged(ids).last_hidden_state
    down, up = torch.randn(2, 3072), torch.randn(3072, 2)
    path = tmp_path / "lora.safetensors"
    save_lora(
        path, {"double_blocks.0.img_attn.proj": Adapter(down, up, 2.0)}, CONFIG, dialect, torch.float32, clip=clip
    )
    pipeline.text_encoder = encoder
    pipeline.load_lora_weights(path)
    theirs = encoder(ids).last_hidden_state
    pipeline.unload_lora_weights()
    pipeline.text_encoder = None
    assert relative_error(theirs - base, wanted - base) <= 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("dialect", ["kohya", "diffusers"])
@torch.no_grad()
def test_diffusers_encodes_prompts_like_the_trained_clip(tmp_path, models, dialect):
    """nano's CLIP-L with LoRA on all layers, as a run saves it."""
    _, pipeline = models
    tokenizer = (nano.CLIP_TOKENIZER / "vocab.json", nano.CLIP_TOKENIZER / "merges.txt")
    clip, source = load_clip(nano.CLIP_L, tokenizer, torch.device("cpu")), open_clip(nano.CLIP_L)
    encoder = transformers.CLIPTextModel(transformers.CLIPTextConfig(**source.config, bos_token_id=None)).eval()
    encoder.load_state_dict(clip.state_dict(), strict=True)
    torch.manual_seed(0)
    for layer in add_lora(clip, RANK, 3, CLIP_TARGETS).values():
        torch.nn.init.normal_(layer.get_parameter("lora_up"), std=0.3)
    adapter = Adapter(torch.randn(2, 3072), torch.randn(3072, 2), 2.0)
    path, of_flux = tmp_path / "lora.safetensors", {"double_blocks.0.img_attn.proj": adapter}
    save_lora(path, of_flux, CONFIG, dialect, torch.float32, clip=adapters_of(clip))
    ids, ends, _ = clip._tokens(["a red star", "a blue circle at the top"])
    base, wanted = encoder(ids).pooler_output, clip(ids, ends)
    pipeline.text_encoder = encoder
    pipeline.load_lora_weights(path)
    theirs = encoder(ids).pooler_output
    pipeline.unload_lora_weights()
    pipeline.text_encoder = None
    assert relative_error(wanted, base) > 0.05
    assert relative_error(theirs - base, wanted - base) <= 1e-4
