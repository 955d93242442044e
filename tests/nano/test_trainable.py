import pytest
import torch

from fluxq.nano.muon import orthogonalize
from fluxq.nano.trainable import Shape, TrainableFlux

SPLIT = {"qkv": (192, 192, 192), "linear1": (192, 192, 192, 768)}


def diffusers_state(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The original keys renamed to diffusers', independently of `fluxq.formats`."""
    renamed = {}
    for key, value in state.items():
        module, leaf = key.rsplit(".", 1)
        names = _diffusers_modules(module)
        if module == "final_layer.adaLN_modulation.1":
            value = torch.cat(value.chunk(2)[::-1])
        parts = value.split(SPLIT[module.rsplit(".", 1)[1]]) if len(names) > 1 else (value,)
        leaf = "weight" if leaf == "scale" else leaf
        renamed |= {f"{name}.{leaf}": part for name, part in zip(names, parts, strict=True)}
    return renamed


def _diffusers_modules(module: str) -> list[str]:
    ends = {
        "img_in": "x_embedder",
        "txt_in": "context_embedder",
        "final_layer.linear": "proj_out",
        "final_layer.adaLN_modulation.1": "norm_out.linear",
    }
    if module in ends:
        return [ends[module]]
    if not module.startswith(("double_blocks", "single_blocks")):
        part, layer = module.split(".")
        embedder = {"time_in": "timestep", "guidance_in": "guidance", "vector_in": "text"}[part]
        return [f"time_text_embed.{embedder}_embedder.linear_{1 if layer == 'in_layer' else 2}"]
    kind, index, part = module.split(".", 2)
    block = f"{'transformer_blocks' if kind == 'double_blocks' else 'single_transformer_blocks'}.{index}"
    single = {
        "modulation.lin": ["norm.linear"],
        "linear1": ["attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"],
        "linear2": ["proj_out"],
        "norm.query_norm": ["attn.norm_q"],
        "norm.key_norm": ["attn.norm_k"],
    }
    double = {
        "img_mod.lin": ["norm1.linear"],
        "txt_mod.lin": ["norm1_context.linear"],
        "img_attn.qkv": ["attn.to_q", "attn.to_k", "attn.to_v"],
        "txt_attn.qkv": ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"],
        "img_attn.norm.query_norm": ["attn.norm_q"],
        "img_attn.norm.key_norm": ["attn.norm_k"],
        "txt_attn.norm.query_norm": ["attn.norm_added_q"],
        "txt_attn.norm.key_norm": ["attn.norm_added_k"],
        "img_attn.proj": ["attn.to_out.0"],
        "txt_attn.proj": ["attn.to_add_out"],
        "img_mlp.0": ["ff.net.0.proj"],
        "img_mlp.2": ["ff.net.2"],
        "txt_mlp.0": ["ff_context.net.0.proj"],
        "txt_mlp.2": ["ff_context.net.2"],
    }
    return [f"{block}.{name}" for name in (double if kind == "double_blocks" else single)[part]]


@pytest.mark.slow  # diffusers takes seconds to import
def test_trainable_flux_equals_diffusers():
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    ours = TrainableFlux(Shape())
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    theirs = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=64,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=32,
        num_attention_heads=6,
        joint_attention_dim=128,
        pooled_projection_dim=64,
        guidance_embeds=True,
        axes_dims_rope=(4, 14, 14),
    )
    theirs.load_state_dict(diffusers_state(ours.state_dict()))
    rows, columns = 5, 7
    img, txt, y = torch.randn(3, rows * columns, 64), torch.randn(3, 33, 128), torch.randn(3, 64)
    t, guidance = torch.tensor([0.05, 0.6, 1.0]), torch.tensor([1.0, 3.5, 2.0])
    ids = torch.zeros(rows * columns, 3)
    ids[:, 1], ids[:, 2] = torch.arange(rows).repeat_interleave(columns), torch.arange(columns).repeat(rows)
    with torch.no_grad():
        velocity = ours(img, txt, y, t, guidance, rows, columns)
        expected = theirs(
            hidden_states=img,
            encoder_hidden_states=txt,
            pooled_projections=y,
            timestep=t,
            img_ids=ids,
            txt_ids=torch.zeros(33, 3),
            guidance=guidance,
        ).sample
    assert (velocity - expected).abs().max() < 1e-5 * expected.abs().max()


def test_key_names_are_the_original_ones():
    keys = set(TrainableFlux(Shape()).state_dict())
    assert "double_blocks.1.txt_attn.norm.key_norm.scale" in keys
    assert "single_blocks.0.modulation.lin.bias" in keys


@pytest.mark.parametrize("shape", [(3, 16, 48), (2, 48, 16), (1, 32, 32)])
def test_orthogonalized_matrices_have_singular_values_near_one(shape):
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonalize(torch.randn(shape)))
    assert values.min() > 0.3 and values.max() < 1.3
