"""One reader for every kind of checkpoint, tested with files written by other projects' code."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from helpers import Lazy, randomize, relative_error, tiny_config
from safetensors.torch import load_file, save_file

from benchmarks.peers.diffusers_blocks import transformer
from fluxq import nano
from fluxq.errors import WrongRequest
from fluxq.formats.checkpoint.detect import AUTOENCODER, CLIP, FLUX, T5
from fluxq.formats.checkpoint.keys import autoencoder_to_diffusers, to_diffusers
from fluxq.formats.checkpoint.shapes import flux_shapes
from fluxq.formats.checkpoint.source import OPENERS, open_autoencoder, open_clip, open_flux, open_t5
from fluxq.formats.load import load_autoencoder, load_flux
from fluxq.formats.weights import StoredWeights
from fluxq.kernels import RowScaled
from fluxq.model.embed import image_ids, text_ids
from fluxq.model.text_layers import ClipEncoder

diffusers = Lazy("diffusers")
transformers = Lazy("transformers")
CONFIG = tiny_config()
CPU = torch.device("cpu")
FP8 = torch.float8_e4m3fn


def own_flux(dtype: torch.dtype = torch.float32, config=CONFIG) -> dict[str, torch.Tensor]:
    return {name: torch.randn(shape).to(dtype) for name, shape in flux_shapes(config).items()}


def write(path: Path, tensors) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})
    return path


def assert_holds(source, tensors) -> None:
    """The source returns exactly these tensors, bit for bit, and `shapes` lists their shapes."""
    assert source.shapes.keys() == tensors.keys()
    for name, wanted in tensors.items():
        found = source.get(name)
        assert isinstance(found, torch.Tensor) and found.is_contiguous()
        assert source.shapes[name] == tuple(wanted.shape) and found.dtype == wanted.dtype
        assert torch.equal(found.view(torch.uint8), wanted.contiguous().view(torch.uint8)), name


def refusal(opener, path: Path) -> str:
    with pytest.raises(WrongRequest) as caught:
        opener(path)
    sentence = str(caught.value)
    assert "\n" not in sentence and "; " in sentence and len(sentence) < 1000
    return sentence


# --- single files ---


@pytest.mark.parametrize(
    ("dtype", "precision"),
    [
        (torch.float32, "fp32"),
        (torch.bfloat16, "bf16"),
        (torch.float16, "fp16"),
        (torch.float8_e4m3fn, "fp8 e4m3"),
        (torch.float8_e5m2, "fp8 e5m2"),
    ],
)
def test_a_single_file_gives_its_tensors_as_they_are_stored(tmp_path, dtype, precision):
    """Kijai's fp8 files also store the vectors in 8 bits: they are read both as 8 bits and as values."""
    tensors = own_flux(dtype)
    source = open_flux(write(tmp_path / "flux.safetensors", tensors))
    assert_holds(source, tensors)
    assert (source.config, source.precision, source.alone, source.diffusers) == (CONFIG, precision, True, False)
    assert source.nbytes == sum(tensor.nbytes for tensor in tensors.values())
    assert source.files == (source.path,) == (tmp_path / "flux.safetensors",)
    for name in ("img_in.bias", "single_blocks.1.linear1.weight"):
        assert torch.equal(source.value(name, torch.float32), tensors[name].float())


def all_in_one() -> dict[str, torch.Tensor]:
    """nano's four files in one, as Comfy writes it: with its prefixes and extra tensors."""
    prefixes = {
        nano.FLUX: "model.diffusion_model.",
        nano.AE: "vae.",
        nano.CLIP_L: "text_encoders.clip_l.transformer.",
        nano.T5XXL: "text_encoders.t5xxl.transformer.",
    }
    tensors = {prefix + key: tensor for path, prefix in prefixes.items() for key, tensor in load_file(path).items()}
    tensors["text_encoders.clip_l.transformer.text_projection.weight"] = torch.eye(64)
    return tensors | {f"text_encoders.{name}.logit_scale": torch.tensor(4.6) for name in ("clip_l", "t5xxl")}


def test_all_four_models_come_from_one_file(tmp_path):
    path = write(tmp_path / "all.safetensors", all_in_one())
    parts = ((open_flux, nano.FLUX), (open_autoencoder, nano.AE), (open_clip, nano.CLIP_L), (open_t5, nano.T5XXL))
    for opener, alone in parts:
        source, wanted = opener(path), opener(alone)
        assert_holds(source, {name: wanted.get(name) for name in wanted.shapes})
        assert source.config == wanted.config and not source.alone and wanted.alone


# --- folders that diffusers and transformers wrote ---


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"guidance_embed": False}, {"axes_dim": (8, 12, 12), "depth": 1}])
@pytest.mark.parametrize("shard_size", ["10GB", "40KB"])
def test_a_diffusers_transformer_is_mapped_back(tmp_path, changes, shard_size):
    """Its tensors under diffusers' names are what diffusers saved, and the model computes what diffusers computes."""
    config = tiny_config(**changes)
    theirs = randomize(transformer(config).eval())
    theirs.save_pretrained(tmp_path / "transformer", max_shard_size=shard_size)
    for path in (tmp_path, tmp_path / "transformer"):
        source = open_flux(path)
        assert source.config == config and source.diffusers and (len(source.files) > 3) == (shard_size == "40KB")
        read = {name: source.get(name) for name in source.shapes}
        assert {name: tuple(tensor.shape) for name, tensor in read.items()} == dict(flux_shapes(config))
        saved, again = theirs.state_dict(), to_diffusers(read, config)
        assert saved.keys() == again.keys() and all(torch.equal(saved[name], again[name]) for name in saved)

    ours = load_flux(tmp_path, "bf16", CPU, torch.float32)
    for layer in source.shapes:  # bf16 is the leanest format that there is; hold the exact weights for this comparison
        owner, _, leaf = layer.rpartition(".")
        setattr(ours.get_submodule(owner), leaf, source.get(layer))
    img, txt = torch.randn(2, 12, config.in_channels), torch.randn(2, 5, config.context_in_dim)
    ids, txt_ids = image_ids(3, 4), text_ids(5)
    t, y = torch.tensor([0.3, 0.9]), torch.randn(2, config.vec_in_dim)
    guidance = torch.tensor([3.5, 1.0]) if config.guidance_embed else None
    with torch.no_grad():
        wanted = theirs(img, txt, y, t, ids, txt_ids, guidance, return_dict=False)[0]
        found = ours(img, ids, txt, txt_ids, t, y, guidance)
    assert relative_error(found, wanted) < 1e-5


@pytest.mark.slow
def test_a_diffusers_autoencoder_is_mapped_back(tmp_path):
    theirs = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(12, 24, 24),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=6,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=0.3611,
        shift_factor=0.1159,
    )
    randomize(theirs).eval().save_pretrained(tmp_path / "vae")
    source = open_autoencoder(tmp_path)
    assert (source.config.groups, source.config.ch, source.config.ch_mult) == (6, 12, (1, 2, 2))
    again, saved = autoencoder_to_diffusers({name: source.get(name) for name in source.shapes}), theirs.state_dict()
    assert saved.keys() == again.keys() and all(torch.equal(saved[name], again[name]) for name in saved)
    ours, latents = load_autoencoder(tmp_path / "vae", CPU), torch.randn(1, 16, 5, 7)
    with torch.no_grad():
        wanted = theirs.decode(latents).sample
        found = ours.decode((latents - 0.1159) * 0.3611)
    assert relative_error(found, wanted) < 1e-5

    config = json.loads((tmp_path / "vae/config.json").read_text())
    (tmp_path / "vae/config.json").write_text(json.dumps(config | {"scaling_factor": 1.5305, "shift_factor": 0.0609}))
    assert "belongs to another model's autoencoder (scaling_factor 1.5305" in refusal(open_autoencoder, tmp_path)
    for groups in (0, -1, 7, 10**400):
        (tmp_path / "vae/config.json").write_text(json.dumps(config | {"norm_num_groups": groups}))
        assert f"has norm_num_groups {str(groups)[:9]}" in refusal(open_autoencoder, tmp_path)


def clip_model() -> transformers.CLIPTextModel:
    return transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            vocab_size=70, hidden_size=128, intermediate_size=96, num_hidden_layers=3, max_position_embeddings=20
        )
    )


def t5_model() -> transformers.T5EncoderModel:
    return transformers.T5EncoderModel(
        transformers.T5Config(
            vocab_size=40, d_model=24, d_kv=5, d_ff=56, num_layers=3, num_heads=4, feed_forward_proj="gated-gelu",
            is_encoder_decoder=False,
        )
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("shard_size", ["10GB", "10KB"])
def test_text_encoder_folders_are_read(tmp_path, shard_size):
    for folder, model, opener in (("text_encoder", clip_model(), open_clip), ("text_encoder_2", t5_model(), open_t5)):
        randomize(model).save_pretrained(tmp_path / folder, max_shard_size=shard_size)
        saved = {name.removeprefix("text_model."): tensor for name, tensor in model.state_dict().items()}
        saved.pop("encoder.embed_tokens.weight", None)
        for path in (tmp_path, tmp_path / folder):
            source = opener(path)
            assert (len(source.files) > 2) == (shard_size == "10KB")
            assert_holds(source, {name: saved[name] for name in source.shapes})
            assert source.shapes.keys() == saved.keys()


# --- scaled fp8 text encoders ---


def scaled_t5(rows: bool = False, key: str = "scale_weight", prefix: str = ""):
    """T5 as Comfy scales it: fp8 matrices with one scale each, the rest fp16. Returns (file's, true) values."""
    stored, values = {prefix + "scaled_fp8": torch.empty(0, dtype=torch.float8_e4m3fn)}, {}
    for name, tensor in randomize(t5_model()).state_dict().items():
        if name == "encoder.embed_tokens.weight":
            continue
        if "SelfAttention." in name and "bias" not in name or "DenseReluDense" in name:
            scale = tensor.abs().amax(1, keepdim=True) / 448 if rows else tensor.abs().max() / 448
            codes = (tensor / scale).to(torch.float8_e4m3fn)
            stored[prefix + name] = codes
            stored[f"{prefix}{name.removesuffix('weight')}{key}"] = scale
            stored[f"{prefix}{name.removesuffix('weight')}scale_input"] = torch.tensor(1.0)
            values[name] = codes.float() * scale
        else:
            stored[prefix + name] = tensor.half()
            values[name] = tensor.half().float()
    return stored, values


@pytest.mark.slow
@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("key", ["scale_weight", "weight_scale"])
@pytest.mark.parametrize("prefix", ["", "text_encoders.t5xxl.transformer."])
def test_fp8_text_encoders_keep_their_bytes_and_scales(tmp_path, rows, key, prefix):
    stored, values = scaled_t5(rows, key, prefix)
    source = open_t5(write(tmp_path / "t5.safetensors", stored))
    assert source.precision == "fp8 e4m3, scaled" and source.shapes.keys() == values.keys()
    for name, value in values.items():
        assert torch.equal(source.value(name, torch.float32), value), name
        kept = source.get(name)
        assert isinstance(kept, RowScaled) == (stored[prefix + name].dtype == torch.float8_e4m3fn)
        if isinstance(kept, RowScaled):
            scale = stored[f"{prefix}{name.removesuffix('weight')}{key}"].reshape(-1)
            assert torch.equal(kept.values.view(torch.uint8), stored[prefix + name].view(torch.uint8))
            assert torch.equal(kept.scale, scale.expand(len(value)))


@pytest.mark.slow
def test_scales_that_are_missing_or_of_another_shape_are_refused(tmp_path):
    layer = "encoder.block.1.layer.1.DenseReluDense.wo"
    for change, sentence in (
        (lambda t: t.pop(f"{layer}.scale_weight"), f"1 without a scale ({layer}.weight)"),
        (
            lambda t: t.update({f"{layer}.scale_weight": torch.ones(3)}),
            f"({layer}.scale_weight of (24, 56) is (3,) F32)",
        ),
        (
            lambda t: t.update({f"{layer}.scale_weight": torch.tensor(1)}),
            f"({layer}.scale_weight of (24, 56) is () I64)",
        ),
        (lambda t: t.update({"x.scale_weight": torch.tensor(1.0)}), "1 unexpected (x.scale_weight)"),
    ):
        stored, _ = scaled_t5()
        change(stored)
        assert sentence in refusal(open_t5, write(tmp_path / "t5.safetensors", stored))


def test_a_scaled_transformer_in_the_same_file_does_not_affect_t5(tmp_path):
    tensors = all_in_one() | {"model.diffusion_model.scaled_fp8": torch.empty(0, dtype=torch.float8_e4m3fn)}
    tensors["model.diffusion_model.txt_in.weight"] = tensors["model.diffusion_model.txt_in.weight"].to(FP8)
    path = write(tmp_path / "all.safetensors", tensors)
    assert open_t5(path).precision == "bf16"
    assert "1 without a scale (model.diffusion_model.txt_in.weight)" in refusal(open_flux, path)


# --- bad input ---


def sharded(folder: Path) -> Path:
    """A transformer in diffusers' layout, in two shards."""
    tensors = to_diffusers(own_flux(), CONFIG)
    names = sorted(tensors)
    halves = {"a-00001-of-00002.safetensors": names[::2], "a-00002-of-00002.safetensors": names[1::2]}
    for file, members in halves.items():
        write(folder / file, {name: tensors[name] for name in members})
    listing = {name: file for file, members in halves.items() for name in members}
    (folder / "a.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": listing}))
    return folder


def test_missing_shards_and_shards_that_disagree_are_named(tmp_path):
    folder = sharded(tmp_path / "transformer")
    assert open_flux(folder).config == CONFIG
    second = folder / "a-00002-of-00002.safetensors"
    tensors = load_file(second)
    assert f"is one shard of several; name its folder, {folder}" in refusal(open_flux, second)

    moved = tensors.pop("x_embedder.weight", None)
    key = "x_embedder.weight" if moved is not None else next(iter(tensors))
    tensors.pop(key, None)
    write(second, tensors | {"surplus": torch.zeros(1)})
    sentence = refusal(open_flux, folder)
    assert f"disagree: 1 missing ({key} in {second.name}), 1 unlisted (surplus in {second.name})" in sentence

    second.write_bytes(second.read_bytes()[:-7])
    assert "a-00002-of-00002.safetensors is truncated" in refusal(open_flux, folder)
    second.unlink()
    assert "lists a-00002-of-00002.safetensors, which does not exist" in refusal(open_flux, folder)
    (folder / "a.safetensors.index.json").unlink()
    assert "has shards but no .safetensors.index.json" in refusal(open_flux, folder)


@pytest.mark.parametrize(
    ("index", "sentence"),
    [
        ("{", "is not valid JSON"),
        (" " * (17 << 20), "has 17,825,792 bytes, the limit is 16,777,216"),
        ("[]", "is a JSON list, not an object"),
        ("{}", "has no weight_map"),
        (
            '{"weight_map": {"a": "../b.safetensors"}}',
            "lists ../b.safetensors, which is not a .safetensors file in the same folder",
        ),
        ('{"weight_map": {"a": 3}}', "lists 3, which is no"),
        ('{"weight_map": {"a": "b.bin"}}', "lists b.bin, which is no"),
    ],
)
def test_a_damaged_index_is_refused(tmp_path, index, sentence):
    (tmp_path / "a.safetensors.index.json").write_text(index)
    assert sentence in refusal(open_flux, tmp_path)


def test_two_files_for_one_part_are_both_named(tmp_path):
    for name in ("one", "two"):
        write(tmp_path / f"{name}.safetensors", own_flux(torch.bfloat16))
    shutil.copy(nano.AE, tmp_path)
    sentence = refusal(open_flux, tmp_path)
    assert "holds a FLUX.1 transformer in one.safetensors and in two.safetensors; name the file to use" in sentence
    assert open_autoencoder(tmp_path).path == tmp_path / nano.AE.name
    assert f"{tmp_path} has no .safetensors or .gguf file with a T5 text encoder" in refusal(open_t5, tmp_path)


FILES = {FLUX: nano.FLUX, AUTOENCODER: nano.AE, CLIP: nano.CLIP_L, T5: nano.T5XXL}


@pytest.mark.parametrize("wanted", FILES)
@pytest.mark.parametrize("given", FILES)
def test_each_model_is_distinguished_from_the_others(wanted, given):
    if wanted == given:
        assert OPENERS[wanted](FILES[given]).alone
    else:
        assert f"is {given}, not {wanted}" in refusal(OPENERS[wanted], FILES[given])


@pytest.mark.parametrize("opener", [open_clip, open_t5])
def test_every_tensor_of_a_text_encoder_must_be_there(tmp_path, opener):
    tensors = load_file(nano.CLIP_L if opener is open_clip else nano.T5XXL)
    last = sorted(key for key in tensors if re.search(r"\.1\..*(q_proj|\.q)\.weight$", key))[0]
    short = {key: tensor for key, tensor in tensors.items() if key != last}
    assert "1 missing (" in refusal(opener, write(tmp_path / "a.safetensors", short))
    assert "1 wrong shape (" in refusal(opener, write(tmp_path / "a.safetensors", tensors | {last: torch.ones(3, 5)}))
    assert "as I32" in refusal(opener, write(tmp_path / "a.safetensors", tensors | {last: tensors[last].int()}))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"_class_name": "ChromaTransformer2DModel"}, "is for the class ChromaTransformer2DModel"),
        ({"quantization_config": {"quant_method": "torchao"}}, "describes a FLUX.1 transformer quantized by torchao"),
        ({"axes_dims_rope": [16, 56, 56]}, "has axes_dims_rope [16, 56, 56], which does not fit heads of width 32"),
        ({"axes_dims_rope": "x"}, "has axes_dims_rope x"),
        ({"axes_dims_rope": [math.inf, 14, 14]}, "has axes_dims_rope [inf, 14, 14]"),
    ],
)
def test_a_folders_config_must_fit(tmp_path, settings, sentence):
    folder = sharded(tmp_path)
    (folder / "config.json").write_text(json.dumps(settings))
    assert sentence in refusal(open_flux, folder)


def test_a_diffusers_transformer_with_a_wrong_split_is_refused(tmp_path):
    """The wrong shapes are noticed although the rows add up to the right sum."""
    tensors = to_diffusers(own_flux(), CONFIG)
    for name, rows in (("to_q", 63), ("to_k", 65)):
        tensors[f"single_transformer_blocks.1.attn.{name}.weight"] = torch.ones(rows, 64)
    sentence = refusal(open_flux, write(tmp_path / "a.safetensors", tensors))
    assert "2 wrong shape (single_transformer_blocks.1.attn.to_q.weight is (63, 64), not (64, 64); " in sentence


FOREIGN = {
    "is Chroma": {"distilled_guidance_layer.in_proj.weight": (2, 2), "double_blocks.0.img_attn.qkv.weight": (2, 2)},
    "is FLUX.2": {"double_stream_modulation_img.lin.weight": (2, 2), "double_blocks.0.img_attn.qkv.weight": (2, 2)},
    "is a nunchaku": {"transformer_blocks.0.qkv_proj.qweight": (2, 2)},
    "is a Stable Diffusion model": {"model.diffusion_model.input_blocks.0.0.weight": (2, 2)},
    "is a LoRA": {"lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": (2, 2)},
    "is a file quantized by quanto or torchao": {"single_transformer_blocks.0.proj_out.weight._data": (2, 2)},
    "is HunyuanVideo": {"txt_in.individual_token_refiner.x": (2,), "double_blocks.0.x": (2,)},
}


@pytest.mark.parametrize("sentence", FOREIGN)
def test_other_models_and_other_storage_are_refused_by_name(tmp_path, sentence):
    tensors = {name: torch.zeros(shape) for name, shape in FOREIGN[sentence].items()}
    assert sentence in refusal(open_flux, write(tmp_path / "a.safetensors", tensors))


def test_fill_and_canny_are_refused_by_their_inputs(tmp_path):
    for inputs, name in ((96, "Fill"), (32, "Canny or Depth")):
        tensors = own_flux(torch.bfloat16) | {"img_in.weight": torch.zeros(64, inputs, dtype=torch.bfloat16)}
        sentence = refusal(open_flux, write(tmp_path / "a.safetensors", tensors))
        assert f"has {inputs} input channels like {name}" in sentence


# --- CLIP under OpenCLIP's names ---


class OpenClipBlock(torch.nn.Module):
    """A layer as in OpenAI's and OpenCLIP's code: torch's own attention, and fc, GELU, projection."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.attn = torch.nn.MultiheadAttention(width, width // 64, batch_first=True)
        self.ln_1, self.ln_2 = torch.nn.LayerNorm(width), torch.nn.LayerNorm(width)
        self.mlp = torch.nn.ModuleDict({"c_fc": torch.nn.Linear(width, inner), "c_proj": torch.nn.Linear(inner, width)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h, mask = self.ln_1(x), torch.full((x.shape[1],) * 2, float("-inf")).triu(1)
        x = x + self.attn(h, h, h, need_weights=False, attn_mask=mask)[0]
        h = self.mlp["c_fc"](self.ln_2(x))
        return x + self.mlp["c_proj"](h * torch.sigmoid(1.702 * h))


class OpenClip(torch.nn.Module):
    def __init__(self, width: int = 128, inner: int = 192, layers: int = 2) -> None:
        super().__init__()
        self.token_embedding = torch.nn.Embedding(70, width)
        self.positional_embedding = torch.nn.Parameter(torch.randn(20, width))
        self.transformer = torch.nn.Module()
        self.transformer.resblocks = torch.nn.ModuleList(OpenClipBlock(width, inner) for _ in range(layers))
        self.ln_final = torch.nn.LayerNorm(width)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.token_embedding(ids) + self.positional_embedding[: ids.shape[1]]
        for block in self.transformer.resblocks:
            x = block(x)
        return self.ln_final(x)[torch.arange(len(ids)), ids.argmax(-1)]


def test_clip_is_read_under_openclips_names(tmp_path):
    theirs = randomize(OpenClip()).eval()
    beside = {"text_projection": torch.randn(128, 64), "logit_scale": torch.tensor(4.6), "visual.proj": torch.ones(2)}
    beside |= {"visual.transformer.resblocks.0.ln_1.weight": torch.ones(9), "visual.conv1.weight": torch.ones(2, 2)}
    tensors = theirs.state_dict() | beside
    source = open_clip(write(tmp_path / "a.safetensors", tensors))
    assert source.config["num_hidden_layers"] == 2 and source.config["hidden_size"] == 128
    ours = ClipEncoder(StoredWeights(source, CPU, torch.float32), 2, 2)
    ids = torch.tensor([[68, 4, 5, 69, 1, 1], [68, 1, 69, 2, 2, 2]])
    with torch.no_grad():
        assert relative_error(ours(ids, ids.argmax(-1)), theirs(ids)) < 1e-5

    del tensors["transformer.resblocks.1.attn.in_proj_bias"]
    sentence = refusal(open_clip, write(tmp_path / "a.safetensors", tensors | {"strange": torch.ones(1)}))
    assert "3 missing (encoder.layers.1.self_attn.q_proj.bias; " in sentence and "1 unexpected (strange)" in sentence
