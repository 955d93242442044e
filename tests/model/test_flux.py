"""The transformer against diffusers' FluxTransformer2DModel, with random tensors."""

from __future__ import annotations

import pytest
import torch
from helpers import Lazy, randomize, relative_error, tiny_config

from benchmarks.peers.diffusers_blocks import transformer
from fluxq.formats.checkpoint.keys import to_diffusers
from fluxq.model import Flux, FluxConfig, add_lora
from fluxq.model.embed import image_ids, pack, text_ids, unpack

diffusers = Lazy("diffusers")

CONFIGS = {
    "dev": tiny_config(),
    "schnell": tiny_config(guidance_embed=False, depth=1, depth_single_blocks=3),
    "one head": tiny_config(hidden_size=32, num_heads=1, mlp_ratio=2.0),
    "double only": tiny_config(depth=3, depth_single_blocks=0),
}


def twin(flux: Flux):
    """The same model in diffusers, frozen."""
    c = flux.config
    theirs = transformer(c)
    for block in (*theirs.transformer_blocks, *theirs.single_transformer_blocks):  # diffusers fixes mlp_ratio at 4
        resize_mlp(block, c)
    theirs.load_state_dict(to_diffusers(flux.state_dict(), c))
    return theirs.requires_grad_(False)


def resize_mlp(block, c: FluxConfig) -> None:
    if c.mlp_ratio == 4.0:
        return
    if hasattr(block, "ff"):
        for ff in (block.ff, block.ff_context):
            ff.net[0].proj = torch.nn.Linear(c.hidden_size, c.mlp_hidden)
            ff.net[2] = torch.nn.Linear(c.mlp_hidden, c.hidden_size)
    else:
        block.mlp_hidden_dim = c.mlp_hidden
        block.proj_mlp = torch.nn.Linear(c.hidden_size, c.mlp_hidden)
        block.proj_out = torch.nn.Linear(c.hidden_size + c.mlp_hidden, c.hidden_size)


def inputs(c: FluxConfig, batch=3, rows=3, columns=5, length=7) -> dict:
    """Odd token counts; every input that can need a gradient does."""
    return {
        "img": torch.randn(batch, rows * columns, c.in_channels, requires_grad=True),
        "img_ids": image_ids(rows, columns),
        "txt": torch.randn(batch, length, c.context_in_dim, requires_grad=True),
        "txt_ids": text_ids(length),
        "timesteps": torch.rand(batch),
        "y": torch.randn(batch, c.vec_in_dim, requires_grad=True),
        "guidance": 1 + 4 * torch.rand(batch) if c.guidance_embed else None,
    }


def run_twin(theirs, i: dict) -> torch.Tensor:
    return theirs(
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
@pytest.mark.parametrize("name", CONFIGS)
def test_outputs_and_input_gradients_equal_diffusers(name):
    flux = randomize(Flux(CONFIGS[name]))
    theirs, i = twin(flux), inputs(flux.config)
    leaves = [i["img"], i["txt"], i["y"]]
    ours, expected = flux(**i), run_twin(theirs, i)
    assert relative_error(ours, expected) <= 1e-5
    dy = torch.randn_like(ours)
    for a, b in zip(torch.autograd.grad(ours, leaves, dy), torch.autograd.grad(expected, leaves, dy), strict=True):
        assert relative_error(a, b) <= 1e-5


@pytest.mark.slow
def test_lora_gradients_equal_peft():
    peft = pytest.importorskip("peft")
    flux = randomize(Flux(tiny_config()))
    theirs, i = twin(flux), inputs(flux.config)
    modules = [
        n for n, m in theirs.named_modules() if isinstance(m, torch.nn.Linear) and "block" in n and "norm" not in n
    ]
    theirs = peft.get_peft_model(
        theirs, peft.LoraConfig(r=3, lora_alpha=2, target_modules=modules, init_lora_weights=False)
    )
    layers = add_lora(flux, rank=3, alpha=2)
    given = copy_peft_lora(flux, layers, theirs)

    i = {
        k: v.detach() if isinstance(v, torch.Tensor) else v for k, v in i.items()
    }  # no gradient enters the first block
    ours, expected = flux(**i), run_twin(theirs, i)
    assert relative_error(ours, expected) <= 1e-5
    dy = torch.randn_like(ours)
    ours.backward(dy)
    expected.backward(dy)
    assert len(layers) == 2 * 8 + 2 * 2
    for path, pieces in given.items():
        layer = layers[path]
        d_down = sum(their.lora_A["default"].weight.grad for their, _, _ in pieces)
        assert relative_error(layer.lora_down.grad, d_down) <= 1e-5, path
        for their, start, stop in pieces:
            assert relative_error(layer.lora_up.grad[start:stop], their.lora_B["default"].weight.grad) <= 1e-5, path


def copy_peft_lora(flux, layers, theirs) -> dict:
    """Give our fused layers peft's split LoRA (one down for all parts of a layer); path -> [(peft module, rows)]."""
    from fluxq.formats.checkpoint.keys import module_split

    given = {}
    for path, layer in layers.items():
        pieces = [(theirs.base_model.model.get_submodule(n), a, b) for n, a, b in module_split(path, flux.config)]
        with torch.no_grad():
            layer.lora_down.copy_(pieces[0][0].lora_A["default"].weight)
            for their, start, stop in pieces:
                their.lora_A["default"].weight.copy_(layer.lora_down)
                layer.lora_up[start:stop] = their.lora_B["default"].weight
        given[path] = pieces
    return given


def test_a_whole_model_passes_gradcheck_in_fp64():
    """Both autograd Functions at once: the checkpointed block and its linear layers."""
    config = tiny_config(
        hidden_size=32, num_heads=1, in_channels=4, out_channels=4, mlp_ratio=1.0, depth=1, depth_single_blocks=1
    )
    flux = randomize(Flux(config)).double()
    layers = add_lora(flux, rank=1, alpha=0.3, targets="all")
    for layer in layers.values():
        layer.set_lora(torch.randn(1, layer.in_features), torch.randn(layer.out_features, 1), 0.3)
        layer.lora_down.data, layer.lora_up.data = layer.lora_down.double(), layer.lora_up.double()
    i = inputs(config, batch=1, rows=1, columns=2, length=1)
    leaves = [i[k].detach().double().requires_grad_() for k in ("img", "txt", "y")]
    chosen = [
        layers[p] for p in ("double_blocks.0.txt_mod.lin", "double_blocks.0.img_attn.qkv", "single_blocks.0.linear2")
    ]
    parameters = [p for layer in chosen for p in (layer.lora_down, layer.lora_up)]

    def run(img, txt, y, *_):
        return flux(img, i["img_ids"], txt, i["txt_ids"], i["timesteps"].double(), y, i["guidance"].double())

    assert torch.autograd.gradcheck(run, (*leaves, *parameters), atol=1e-5, rtol=1e-3, fast_mode=True)


@pytest.mark.slow
def test_swapping_two_tensors_of_one_shape_changes_the_output():
    """Every tensor matters and none equals another, so the parity tests above would notice swapped keys."""
    flux = randomize(Flux(tiny_config()))
    i, state = inputs(flux.config), flux.state_dict()
    before = flux(**i).detach()
    by_shape: dict[torch.Size, list[str]] = {}
    for key, tensor in state.items():
        by_shape.setdefault(tensor.shape, []).append(key)
    for a, b in (pair for keys in by_shape.values() for pair in zip(keys, keys[1:], strict=False)):
        flux.load_state_dict({**state, a: state[b].clone(), b: state[a].clone()}, assign=True)
        assert relative_error(flux(**i).detach(), before) > 1e-5, f"{a} and {b} can be swapped unnoticed"


def test_guidance_is_required_by_dev_and_refused_by_schnell():
    for name, guidance in (("dev", None), ("schnell", torch.ones(3))):
        flux = randomize(Flux(CONFIGS[name]))
        with pytest.raises(ValueError, match="guidance"):
            flux(**(inputs(flux.config) | {"guidance": guidance}))


def test_unpack_inverts_pack_and_channels_come_first():
    latents = torch.arange(2 * 3 * 4 * 6).view(2, 3, 4, 6)
    packed = pack(latents)
    assert packed.shape == (2, 6, 12)
    assert torch.equal(packed[0, 1], latents[0, :, 0:2, 2:4].flatten())
    assert torch.equal(unpack(packed, 4, 6), latents)


def test_full_size_key_sets():
    with torch.device("meta"):
        assert len(Flux(FluxConfig.dev()).state_dict()) == 780
        schnell = Flux(FluxConfig.schnell()).state_dict()
    assert len(schnell) == 776
    assert sum(t.numel() for t in schnell.values()) == 11_891_178_560
