"""Model sizes from a file's keys and shapes; the public files' lists are kept as digests."""

import hashlib
import math

import pytest
import torch
from helpers import Lazy

from fluxq.errors import WrongRequest
from fluxq.formats.checkpoint import detect
from fluxq.formats.checkpoint.files import Checkpoint, strict_load, write_safetensors
from fluxq.formats.checkpoint.shapes import autoencoder_shapes, clip_shapes, flux_shapes, t5_shapes
from fluxq.formats.checkpoint.sizes import (
    autoencoder_config,
    autoencoder_keys,
    clip_config,
    clip_keys,
    flux_config,
    flux_keys,
    t5_config,
    t5_keys,
    variant,
)
from fluxq.model.config import AutoEncoderConfig, FluxConfig

transformers = Lazy("transformers")
ODD = FluxConfig(12, 12, 48, 40, 96, 3.0, 3, 1, 3, (4, 14, 14), 10_000, False, False)
NANO_AE = AutoEncoderConfig(ch=32, ch_mult=(1, 2, 2, 2), num_res_blocks=1, groups=8)
TINY_CLIP = dict(vocab_size=50, hidden_size=64, intermediate_size=128, num_hidden_layers=2, max_position_embeddings=16)
TINY_T5 = dict(vocab_size=99, d_model=32, d_kv=8, d_ff=56, num_layers=2, num_heads=3, relative_attention_num_buckets=32)
T5_XXL = dict(
    vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, relative_attention_num_buckets=32
)
CLIP_L = dict(
    vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, max_position_embeddings=77
)


def digest(shapes) -> str:
    """The digest of every name and shape, as listed for flux1-dev.safetensors and ae.safetensors."""
    return hashlib.sha256("\n".join(sorted(f"{key} {shape}" for key, shape in shapes.items())).encode()).hexdigest()


def test_shapes_are_those_of_the_public_files():
    dev, schnell = flux_shapes(FluxConfig.dev()), flux_shapes(FluxConfig.schnell())
    assert digest(dev) == "54111f97ed587fc4b278df82593209ed620f470933d3a9177befaadcd3a54ed8"
    assert (len(dev), sum(map(math.prod, dev.values()))) == (780, 11_901_408_320)
    assert (len(schnell), sum(map(math.prod, schnell.values()))) == (776, 11_891_178_560)
    autoencoder = autoencoder_shapes(AutoEncoderConfig())
    assert digest(autoencoder) == "2e1457955756ca07cf52cef4ec72664fe8bad0800f63f83dbadec7350dfa33a4"
    assert (len(autoencoder), sum(map(math.prod, autoencoder.values()))) == (244, 83_819_683)
    clip, t5 = clip_shapes(CLIP_L), t5_shapes(T5_XXL)
    assert (len(clip), sum(map(math.prod, clip.values()))) == (196, 123_060_480)
    assert (len(t5), 2 * sum(map(math.prod, t5.values()))) == (219, 9_524_621_312)


@pytest.mark.parametrize("config", [FluxConfig.dev(), FluxConfig.schnell(), FluxConfig.nano(), ODD])
@pytest.mark.parametrize("prefix", detect.FLUX_PREFIXES)
def test_flux_config_follows_from_shapes_under_any_prefix(config, prefix):
    shapes = {prefix + name: shape for name, shape in flux_shapes(config).items()}
    assert flux_config(shapes) == config
    assert variant(flux_config(shapes)) == ("dev" if config.guidance_embed else "schnell")
    assert flux_keys(shapes) == {name: prefix + name for name in flux_shapes(config)}


def all_in_one() -> dict[str, tuple[int, ...]]:
    """An all-in-one file whose transformer is neither first nor alone."""
    clip, t5 = "text_encoders.clip_l.transformer.text_model.", "text_encoders.t5xxl.transformer."
    return (
        {"vae." + name: shape for name, shape in autoencoder_shapes(NANO_AE).items()}
        | {clip + name: shape for name, shape in clip_shapes(TINY_CLIP).items()}
        | {t5 + name: shape for name, shape in t5_shapes(TINY_T5).items()}
        | {"text_encoders.clip_l.transformer.text_projection.weight": (64, 64)}
        | {"text_encoders.clip_l.logit_scale": (), "text_encoders.t5xxl.logit_scale": ()}
        | {"model.diffusion_model." + name: shape for name, shape in flux_shapes(ODD).items()}
    )


def test_all_in_one_file_gives_each_model_its_own():
    shapes = all_in_one()
    assert flux_config(shapes) == ODD
    assert autoencoder_config(shapes) == NANO_AE
    assert clip_config(shapes).items() >= TINY_CLIP.items()
    assert t5_config(shapes).items() >= TINY_T5.items()
    assert all(key.startswith("vae.") for key in autoencoder_keys(shapes).values())


def test_norm_weight_is_read_as_norm_scale_but_not_next_to_it():
    shapes = dict(flux_shapes(ODD))
    name = "single_blocks.2.norm.key_norm.scale"
    alias = name.replace("scale", "weight")
    shapes[alias] = shapes[name]
    with pytest.raises(WrongRequest, match=rf"x\.safetensors has one tensor under two names \({alias}, {name}\)"):
        flux_config(shapes, "x.safetensors")
    del shapes[name]
    assert flux_config(shapes) == ODD
    assert flux_keys(shapes)[name] == alias


@pytest.mark.parametrize("name", [name for name in flux_shapes(ODD) if "blocks.0." in name or "_in." in name])
def test_every_tensor_of_the_transformer_must_be_there(name):
    shapes = dict(flux_shapes(ODD))
    del shapes[name]
    with pytest.raises(WrongRequest, match=rf"^x\.safetensors .*{name}"):
        flux_config(shapes, "x.safetensors")


def test_missing_block_strange_tensor_and_wrong_shape_are_named():
    shapes = {name: shape for name, shape in flux_shapes(ODD).items() if not name.startswith("single_blocks.1.")}
    shapes |= {"mystery": (3,), "txt_in.bias": (95,)}
    with pytest.raises(WrongRequest) as caught:
        flux_config(shapes, "x.safetensors")
    assert "8 missing (single_blocks.1.linear1.weight; " in str(caught.value)
    assert "mystery" in str(caught.value) and "txt_in.bias is (95,), not (96,)" in str(caught.value)


def without(shapes, *names):
    return {name: shape for name, shape in shapes.items() if name not in names}


DEV = flux_shapes(FluxConfig.dev())
FOREIGN = {
    "chroma": (
        {"distilled_guidance_layer.in_proj.weight": (5120, 64)} | dict(DEV),
        "is Chroma (a different model",
    ),
    "flux2": (
        {"double_stream_modulation_img.lin.weight": (1, 1), "double_blocks.0.x": (1,)},
        "is FLUX.2 (a different model",
    ),
    "fill": (dict(DEV) | {"img_in.weight": (3072, 384)}, "has 384 input channels like Fill, not 64"),
    "canny": (dict(DEV) | {"img_in.weight": (3072, 128)}, "has 128 input channels like Canny or Depth, not 64"),
    "nunchaku": ({"transformer_blocks.0.qkv_proj.qweight": (1, 1), "a.lora_down": (1, 1)}, "is a nunchaku"),
    "kohya_lora": ({"lora_unet_double_blocks_0_img_mod_lin.lora_down.weight": (4, 8)}, "is a LoRA"),
    "comfy_lora": ({"diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight": (4, 8)}, "is a LoRA"),
    "xlabs_lora": ({"double_blocks.0.processor.qkv_lora1.down.weight": (4, 8)}, "is a LoRA"),
    "lokr": ({"lycoris_transformer_blocks_0_attn_to_q.lokr_w1": (4, 8)}, "is a LoKr (LyCORIS), not"),
    "diffusers": ({"single_transformer_blocks.0.attn.to_q.weight": (4, 8)}, "is a FLUX.1 transformer in diffusers'"),
    "autoencoder": (autoencoder_shapes(NANO_AE), "is a FLUX.1 autoencoder, not a FLUX.1 transformer"),
    "sd_autoencoder": ({"decoder.up.0.x": (1,), "quant_conv.weight": (8, 8, 1, 1)}, "is the autoencoder of another"),
    "t5": ({"encoder.block.0.layer.0.SelfAttention.q.weight": (4, 4)}, "is a T5 text encoder, not"),
    "umt5": (
        {f"encoder.block.{i}.layer.0.SelfAttention.relative_attention_bias.weight": (4, 4) for i in range(2)},
        "is UMT5 (a different model from T5)",
    ),
    "clip": ({"text_model.embeddings.position_embedding.weight": (77, 768)}, "is a CLIP text encoder, not"),
    "openclip": ({"transformer.resblocks.0.ln_1.weight": (8,)}, "is a CLIP text encoder in OpenCLIP's layout"),
    "sdxl": ({"model.diffusion_model.input_blocks.0.0.weight": (1,)}, "is a Stable Diffusion model"),
    "sd3": ({"model.diffusion_model.joint_blocks.0.x": (1,)}, "is Stable Diffusion 3"),
    "unet": ({"down_blocks.0.resnets.0.conv1.weight": (1,)}, "is a model in diffusers' layout"),
    "nothing": ({}, "is empty (it has no tensors)"),
    "unknown": ({"layers.0.weight": (3,)}, "is a model that fluxq does not know (its first key is layers.0.weight)"),
    "prefix": (
        {f"ema.{name}": shape for name, shape in DEV.items()},
        "is a FLUX.1 transformer under an unknown prefix",
    ),
    "twice": (dict(DEV) | {f"model.{name}": shape for name, shape in DEV.items()}, "holds a FLUX.1 transformer twice"),
    "neighbor": (
        {f"model.{name}": shape for name, shape in DEV.items()} | {"x.y": (1,)},
        "extra tensors: 1 unexpected (x.y)",
    ),
    "no singles": (
        {name: shape for name, shape in DEV.items() if not name.startswith("single_")},
        "has no single_blocks; if it is one shard of several",
    ),
    "headless": (
        without(DEV, "double_blocks.0.img_attn.norm.query_norm.scale"),
        "has no tensor double_blocks.0.img_",
    ),
    "flat": (
        dict(DEV) | {"img_in.weight": (196_608,)},
        "has img_in.weight of shape (196608,), not 2 nonzero dimensions",
    ),
    "heads": (
        dict(DEV) | {"double_blocks.0.img_attn.norm.query_norm.scale": (100,)},
        "has heads of width 100 at hidden size",
    ),
    "heads of 96": (
        dict(DEV) | {"double_blocks.0.img_attn.norm.query_norm.scale": (96,)},
        "has heads of width 96 at hidden size 3072, not a power of 2",
    ),
    "far": (dict(DEV) | {"double_blocks." + "9" * 5000 + ".x": (1,)}, "1 unexpected (double_blocks.9999999"),
}


@pytest.mark.parametrize("what", FOREIGN)
def test_foreign_file_is_refused_by_name(what):
    shapes, sentence = FOREIGN[what]
    with pytest.raises(WrongRequest) as caught:
        flux_config(shapes, "x.safetensors")
    assert str(caught.value).startswith("x.safetensors ") and sentence in str(caught.value)
    assert "; " in str(caught.value) and len(str(caught.value)) < 800


@pytest.mark.parametrize(
    ("config_of", "wanted"), [(autoencoder_config, "autoencoder"), (clip_config, "CLIP"), (t5_config, "T5")]
)
def test_transformer_in_the_place_of_another_model_is_refused(config_of, wanted):
    with pytest.raises(WrongRequest, match=rf"flux\.st is a FLUX.1 transformer, not a .*{wanted}.*; use "):
        config_of(flux_shapes(ODD), "flux.st")


# --- the autoencoder ---


@pytest.mark.parametrize(
    "config",
    [AutoEncoderConfig(), NANO_AE, AutoEncoderConfig(ch=8, ch_mult=(1, 3), num_res_blocks=3, z_channels=5, groups=2)],
)
@pytest.mark.parametrize("prefix", detect.AUTOENCODER_PREFIXES)
def test_autoencoder_config_follows_from_shapes(config, prefix):
    assert autoencoder_config({prefix + name: shape for name, shape in autoencoder_shapes(config).items()}) == config


@pytest.mark.slow
@pytest.mark.parametrize("name", autoencoder_shapes(NANO_AE))
def test_every_tensor_of_the_autoencoder_must_be_there(name):
    shapes = autoencoder_shapes(NANO_AE)
    del shapes[name]
    with pytest.raises(WrongRequest, match=r"^ae\.safetensors "):
        autoencoder_config(shapes, "ae.safetensors")


# --- text encoders ---


ENCODERS = [(clip_config, clip_shapes(TINY_CLIP)), (t5_config, t5_shapes(TINY_T5))]


# --- a file's tensors give transformers' own output again ---


CLIP = dict(
    vocab_size=70, hidden_size=128, intermediate_size=96, num_hidden_layers=3, num_attention_heads=2,
    max_position_embeddings=20, projection_dim=128, eos_token_id=69,
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("prefix", detect.CLIP_PREFIXES)
def test_clip_is_read_with_and_without_prefix(tmp_path, prefix):
    original = transformers.CLIPTextModel(transformers.CLIPTextConfig(**CLIP)).eval()
    tensors = {prefix + name: tensor for name, tensor in original.state_dict().items()}
    tensors |= {prefix + "embeddings.position_ids": torch.arange(20)[None], "text_projection.weight": torch.eye(3)}
    read = loaded(
        tmp_path,
        tensors,
        clip_keys,
        lambda shapes: transformers.CLIPTextModel(transformers.CLIPTextConfig(**clip_config(shapes))),
    )
    ids = torch.tensor([[68, 4, 5, 69, 69, 69], [68, 1, 69, 69, 69, 69]])
    assert torch.equal(original(ids).pooler_output, read(ids).pooler_output)


@pytest.mark.slow
@pytest.mark.parametrize("prefix", detect.T5_PREFIXES)
@pytest.mark.parametrize("embeddings", [("shared",), ("encoder.embed_tokens",), ("shared", "encoder.embed_tokens")])
def test_t5_is_read_with_either_name_of_its_embedding(tmp_path, prefix, embeddings):
    config = transformers.T5Config(
        vocab_size=40, d_model=24, d_kv=5, d_ff=56, num_layers=3, num_heads=4, relative_attention_num_buckets=16,
        feed_forward_proj="gated-gelu", is_encoder_decoder=False,
    )  # fmt: skip
    original = transformers.T5EncoderModel(config).eval()
    tensors = {
        prefix + name: tensor
        for name, tensor in original.state_dict().items()
        if not name.endswith(("shared.weight", "embed_tokens.weight"))
    }
    tensors |= {f"{prefix}{name}.weight": original.shared.weight.detach() for name in embeddings}
    tensors |= {"logit_scale": torch.tensor(4.6)}  # ComfyUI's CLIPSave adds it
    read = loaded(
        tmp_path,
        tensors,
        t5_keys,
        lambda shapes: transformers.T5EncoderModel(transformers.T5Config(**t5_config(shapes))),
    )
    ids = torch.randint(1, 40, (2, 50))
    assert torch.equal(original(ids).last_hidden_state, read(ids).last_hidden_state)


def loaded(tmp_path, tensors, keys_of, build) -> torch.nn.Module:
    write_safetensors(tmp_path / "x.safetensors", tensors)
    checkpoint = Checkpoint(tmp_path / "x.safetensors")
    model = build(checkpoint.shapes).eval()
    names = keys_of(checkpoint.keys(), checkpoint.path)
    strict_load(model, {name: checkpoint.get(key) for name, key in names.items()}, checkpoint.path)
    return model
