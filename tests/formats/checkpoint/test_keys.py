"""diffusers' names, compared with its own full-size models, built without weights."""

import hashlib

import pytest
import torch
from helpers import Lazy

from benchmarks.peers.diffusers_blocks import transformer
from fluxq.formats.checkpoint.keys import autoencoder_to_diffusers, module_split, to_diffusers
from fluxq.formats.checkpoint.shapes import autoencoder_shapes, flux_shapes
from fluxq.model.config import AutoEncoderConfig, FluxConfig

diffusers = Lazy("diffusers")
single_file = Lazy("diffusers.loaders.single_file_utils")


@pytest.mark.slow
@pytest.mark.parametrize("config", [FluxConfig.dev(), FluxConfig.schnell(), FluxConfig.nano()])
def test_transformer_has_exactly_diffusers_names_and_shapes(config):
    with torch.device("meta"):
        wanted = {name: tensor.shape for name, tensor in transformer(config).state_dict().items()}
        tensors = {name: torch.empty(shape) for name, shape in flux_shapes(config).items()}
    assert {name: tensor.shape for name, tensor in to_diffusers(tensors, config).items()} == wanted


def test_every_name_of_dev_maps_as_listed():
    """The digest is of a list of all 780 names, made with diffusers' own conversion and checked by equal outputs."""
    config, lines = FluxConfig.dev(), []
    for key in flux_shapes(config):
        module, leaf = key.rsplit(".", 1)
        pieces = module_split(module, config)
        names = [f"{name}.{leaf.replace('scale', 'weight')}" for name in dict.fromkeys(name for name, _, _ in pieces)]
        lines.append(f"{key} {' '.join(names)}{'|swap_halves' if pieces[0][1] else ''}")
    digest = hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()
    assert digest == "7cb609a2c007ca24a043433e0b4fdb91a826d34f170b7a9d3312e2184bc7724e"


def test_split_rows_and_the_one_swap():
    config = FluxConfig.dev()
    assert module_split("single_blocks.7.linear1", config) == [
        ("single_transformer_blocks.7.attn.to_q", 0, 3072),
        ("single_transformer_blocks.7.attn.to_k", 3072, 6144),
        ("single_transformer_blocks.7.attn.to_v", 6144, 9216),
        ("single_transformer_blocks.7.proj_mlp", 9216, 21504),
    ]
    assert module_split("double_blocks.18.txt_attn.norm.key_norm", config) == [
        ("transformer_blocks.18.attn.norm_added_k", 0, 128)
    ]
    for leaf, shape in (("weight", (6144, 2)), ("bias", (6144,))):
        tensor = torch.randn(shape)
        swapped = to_diffusers({f"final_layer.adaLN_modulation.1.{leaf}": tensor}, config)
        assert torch.equal(swapped[f"norm_out.linear.{leaf}"], torch.cat([tensor[3072:], tensor[:3072]]))


@pytest.mark.parametrize("module", ["double_blocks.19.img_mod.lin", "single_blocks.0.linear3", "img_out"])
def test_module_that_the_model_lacks_is_a_key_error(module):
    with pytest.raises(KeyError, match=module):
        module_split(module, FluxConfig.dev())


@pytest.mark.slow
@pytest.mark.parametrize("config", [AutoEncoderConfig(), AutoEncoderConfig(ch=32, ch_mult=(1, 2, 2), num_res_blocks=1)])
def test_autoencoder_has_exactly_diffusers_names_and_shapes(config):
    levels = len(config.ch_mult)
    with torch.device("meta"):
        model = diffusers.AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            block_out_channels=tuple(config.ch * mult for mult in config.ch_mult),
            layers_per_block=config.num_res_blocks,
            latent_channels=config.z_channels,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
        tensors = {name: torch.empty(shape) for name, shape in autoencoder_shapes(config).items()}
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items()}
    assert {name: tensor.shape for name, tensor in autoencoder_to_diffusers(tensors).items()} == wanted


@pytest.mark.slow
def test_autoencoder_converts_as_diffusers_own_converter_does():
    config = AutoEncoderConfig(ch=8, ch_mult=(1, 2, 2), num_res_blocks=1, z_channels=4)
    tensors = {name: torch.randn(shape) for name, shape in autoencoder_shapes(config).items()}
    ours = autoencoder_to_diffusers(tensors)
    wanted = single_file.convert_ldm_vae_checkpoint(
        dict(tensors), {"down_block_types": [""] * 3, "up_block_types": [""] * 3}
    )
    assert {name: tuple(tensor.shape) for name, tensor in ours.items()} == {
        n: tuple(t.shape) for n, t in wanted.items()
    }
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in ours.items())
