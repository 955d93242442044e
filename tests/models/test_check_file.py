"""`fluxq check FILE`: what one file is, what fluxq does with it, or why it refuses."""

from __future__ import annotations

import json
import os
import shutil
import tracemalloc
from pathlib import Path

import gguf
import pytest
import torch
from click.testing import CliRunner
from helpers import tiny_config
from lora_files import WRITERS
from PIL import Image
from safetensors.torch import load_file, save, save_file

from fluxq import nano
from fluxq.cli.main import main
from fluxq.formats.checkpoint.files import write_safetensors
from fluxq.formats.checkpoint.keys import to_diffusers
from fluxq.formats.checkpoint.shapes import flux_shapes
from fluxq.formats.lora.algebra import Adapter
from fluxq.formats.lora.write import save_lora
from fluxq.model import FluxConfig
from fluxq.models.parts import PARTS
from fluxq.training.libraries import import_bitsandbytes

NANO = FluxConfig.nano()
WIDE = tiny_config(in_channels=64, out_channels=64, vec_in_dim=64, context_in_dim=64, depth=1, depth_single_blocks=1)


def run(*arguments) -> tuple[int, dict, str]:
    """Exit code, JSON answer, and the lines for humans."""
    result = CliRunner().invoke(main, ["check", *map(str, arguments), "--json"])
    return result.exit_code, json.loads(result.stdout), result.stderr


@pytest.mark.parametrize("part", PARTS)
def test_a_file_is_described_with_its_use(part):
    file = {"flux": nano.FLUX, "ae": nano.AE, "clip_l": nano.CLIP_L, "t5xxl": nano.T5XXL}[part]
    code, answer, lines = run(file)
    assert code == 0 and list(answer["parts"]) == [part] and answer["parts"][part]["precision"] == "bf16"
    assert f"holds        {PARTS[part]}" in lines and f"use it with --{part.replace('_', '-')}" in lines


LAYER = "lora_unet_double_blocks_0_img_attn_qkv"
WHOLE = {
    f"{LAYER}.lora_down.weight": torch.ones(4, 3072),
    f"{LAYER}.lora_up.weight": torch.ones(9216, 4),
    f"{LAYER}.alpha": torch.tensor(4.0),
}


def test_a_lora_is_described_with_its_uses(tmp_path):
    clip = "lora_te1_text_model_encoder_layers_0_self_attn_q_proj"
    both = WHOLE | {f"{clip}.lora_down.weight": torch.ones(8, 768), f"{clip}.lora_up.weight": torch.ones(768, 8)}
    save_file(both, tmp_path / "lora.safetensors", {"ss_output_name": "zqx"})
    code, answer, lines = run(tmp_path / "lora.safetensors")
    assert code == 0 and answer["kind"] == "a LoRA" and answer["title"] == "zqx"
    assert answer["lora"]["modules"] == answer["lora"]["clip_modules"] == 1
    assert "a LoRA, kohya, 1 modules of rank 4, 1 of CLIP-L" in lines and "fluxq sample --lora" in lines


@pytest.mark.parametrize(
    ("dialect", "what", "reads"),
    [
        (
            "kohya",
            "kohya, 15 modules of rank",
            "loaded as is by ComfyUI, Forge, sd-scripts; not, or not completely, by diff",
        ),
        (
            "ai-toolkit",
            "diffusers, ",
            "loaded as is by ComfyUI, Forge, diffusers; not, or not completely, by sd-scripts",
        ),
        ("fal Kontext", "peft, ", "loaded as is by no other program; not, or not completely, by ComfyUI, Forge, diff"),
    ],
)
def test_a_lora_is_described_with_the_programs_that_load_it(tmp_path, dialect, what, reads):
    tensors, _, metadata = WRITERS[dialect]()
    write_safetensors(tmp_path / "x.safetensors", tensors, {**metadata, "ss_output_name": "zqx"})
    code, answer, lines = run(tmp_path / "x.safetensors")
    lines = " ".join(lines.split())
    assert code == 0 and answer["kind"] == "a LoRA" and answer["title"] == "zqx"
    assert f"holds a LoRA, {what}" in lines and reads in lines and "fluxq lora info" in lines
    assert answer["lora"]["ranks"] and answer["lora"]["programs"]["ComfyUI"]


def test_a_peft_folder_is_a_lora_too(tmp_path):
    save_lora(tmp_path / "peft", {"txt_in": Adapter(torch.ones(2, 128), torch.ones(192, 2), 1.0)}, NANO, "peft")
    code, answer, _ = run(tmp_path / "peft")
    assert code == 0 and answer["lora"]["dialect"] == "peft" and answer["lora"]["ranks"] == [2]


LORAS = {
    "SDXL": (
        {"lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.lora_down.weight": (4, 640)},
        "is a LoRA for another model, Stable Diff",
    ),
    "FLUX.2": (
        {f"diffusion_model.double_blocks.0.img_attn.qkv.lora_{half}.weight": s for half, s in
         (("A", (4, 6144)), ("B", (18432, 4)))},
        "was made for FLUX.2 dev, a different model",
    ),
    "LoKr": ({"lycoris_transformer_blocks_0_attn_to_q.lokr_w1": (4, 4)}, "lokr_w1); use a plain LoRA"),
    "half": ({f"{LAYER}.lora_down.weight": (4, 3072)}, "1 halves missing"),
    "ranks": ({f"{LAYER}.lora_down.weight": (4, 3072), f"{LAYER}.lora_up.weight": (9216, 5)}, "is (9216, 5), not (92"),
}  # fmt: skip


@pytest.mark.parametrize("what", LORAS)
def test_a_lora_that_fluxq_cannot_use_is_refused_with_the_reason(tmp_path, what):
    shapes, sentence = LORAS[what]
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, tmp_path / "lora.safetensors")
    code, answer, lines = run(tmp_path / "lora.safetensors")
    assert code == 2 and not answer["ready"] and sentence in answer["reasons"][0] and lines.count("refused ") == 1


def test_a_model_with_kontext_in_its_name_gets_a_note(tmp_path):
    shutil.copy(nano.FLUX, tmp_path / "flux1-Kontext-dev.safetensors")
    assert "note         Kontext, by its name" in run(tmp_path / "flux1-Kontext-dev.safetensors")[2]
    assert "Kontext" not in run(nano.FLUX)[2]


DIALECTS = (
    "lora_unet_double_blocks_0_img_attn_qkv",
    "diffusion_model.double_blocks.0.img_attn.qkv",
    "transformer.single_transformer_blocks.0.attn.to_q",
    "base_model.model.transformer_blocks.0.attn.to_q",
    "lycoris_transformer_blocks_0_attn_to_q",
)
ADAPTERS = {
    "a LoKr": ("lokr_w1", "lokr_w2_a", "lokr_w2_b", "alpha"),
    "a LoHa": ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "alpha"),
    "an OFT": ("oft_blocks", "alpha"),
    "an OFT or BOFT": ("oft_R.weight",),
    "a BOFT": ("boft_R", "boft_s"),
    "a DoRA": ("lora_down.weight", "lora_up.weight", "dora_scale"),
    "a DoRA,": ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector.default.weight"),
    "an adapter that also changes whole tensors": ("diff", "diff_b"),
    "an adapter that also changes whole tensors (.diff, .diff_b": ("lora_down.weight", "lora_up.weight", "diff_b"),
    "an adapter that also changes whole tensors (.diff, .diff_b, norms": ("w_norm", "b_norm"),
    "a GLoRA": ("a1.weight", "a2.weight", "b1.weight", "b2.weight", "alpha"),
    "an (IA)^3": ("weight", "on_input"),
    "an AdaLoRA": ("lora_A", "lora_B", "lora_E", "ranknum"),
}


@pytest.mark.parametrize("what", ADAPTERS)
def test_an_adapter_that_is_not_a_plain_lora_is_named(tmp_path, what):
    """In every dialect, and in the same sentence wherever a LoRA is read."""
    for dialect in DIALECTS:
        save_file({f"{dialect}.{name}": torch.ones(2, 2) for name in ADAPTERS[what]}, tmp_path / "a.safetensors")
        code, answer, lines = run(tmp_path / "a.safetensors")
        sentence = f"{tmp_path / 'a.safetensors'} is {what}"
        assert code == 2 and answer["reasons"][0].startswith(sentence) and lines.count("refused ") == 1, answer
        assert "; use a plain LoRA, or make one" in answer["reasons"][0]
        for command in ("lora info {}", "lora convert {} {}.safetensors", "quantize {} {}.safetensors"):
            told = CliRunner().invoke(main, command.replace("{}", str(tmp_path / "a.safetensors")).split())
            assert told.exit_code == 2 and sentence.rstrip(",") in told.stderr, told.output


OF_TEXT = {
    "lora_te1_text_model_encoder_layers_0_self_attn_q_proj": "1 modules of rank 4, all of CLIP-L",
    "text_encoder.text_model.encoder.layers.0.mlp.fc1": "1 modules of rank 4, all of CLIP-L",
    "base_model.model.text_model.encoder.layers.0.mlp.fc1": "is a LoRA of a text encoder alone, as PEFT saves it",
    "lora_te3_encoder_block_0_layer_0_SelfAttention_q": "for the transformer or for CLIP-L (its T5 part",
}


@pytest.mark.parametrize("module", OF_TEXT)
def test_a_lora_of_a_text_encoder_alone_is_described(tmp_path, module):
    tensors = {f"{module}.lora_A.weight": torch.ones(4, 64), f"{module}.lora_B.weight": torch.ones(64, 4)}
    save_file(tensors, path := tmp_path / "a.safetensors")
    code, answer, lines = run(path)
    assert OF_TEXT[module] in lines and code == (0 if answer["lora"] else 2)
    out = tmp_path / "merged.safetensors"
    merged = CliRunner().invoke(main, ["lora", "merge", str(path), "--base", str(nano.FLUX), "--out", str(out)])
    assert merged.exit_code == 2 and not out.exists()
    assert not answer["lora"] or ("--from-lora)" in lines and "adapts only CLIP-L, no layer" in merged.stderr)


@pytest.mark.parametrize("part", ["flux", "diffusers", "t5xxl", "clip_l"])
@pytest.mark.parametrize("index", [0, 1, 2])
def test_one_shard_of_several_is_named(tmp_path, part, index):
    tensors = load_file({"t5xxl": nano.T5XXL, "clip_l": nano.CLIP_L}.get(part, nano.FLUX))
    tensors = to_diffusers(tensors, NANO) if part == "diffusers" else tensors
    own = {name: tensors[name].contiguous() for i, name in enumerate(sorted(tensors)) if i * 3 // len(tensors) == index}
    shard = tmp_path / f"model-0000{index + 1}-of-00003.safetensors"
    save_file(own, shard)
    assert (
        "is one shard of 3, and model.safetensors.index.json, which lists them, is not" in run(shard)[1]["reasons"][0]
    )
    assert "is one shard of 3" in run(tmp_path)[2]
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    assert f"is one shard of several; name its folder, {tmp_path}" in run(shard)[1]["reasons"][0]
    code, answer, _ = run(shard.rename(tmp_path / "renamed.safetensors"))
    assert code == 2 and "; if it is one shard of several, name the folder" in answer["reasons"][0], answer


def test_a_folder_of_models_is_described_file_by_file(tmp_path):
    """diffusers' layout, with shards that do not identify themselves; one of the files is damaged."""
    for file, name in ((nano.AE, "vae/a"), (nano.T5XXL, "text_encoder_2/b"), (nano.CLIP_L, "clip")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(file, tmp_path / f"{name}.safetensors")
    code, answer, lines = run(tmp_path)
    assert code == 0 and answer["ready"] and len(answer["files"]) == 3
    assert all(f"holds        {PARTS[part]}" in lines for part in ("ae", "clip_l", "t5xxl"))
    (tmp_path / "vae/a.safetensors").write_bytes(b"")
    code, answer, lines = run(tmp_path)
    assert code == 2 and "refused " in lines and "vae/a.safetensors is empty" in lines and lines.count("holds ") == 2
    Image.new("RGB", (96, 96)).save(tmp_path / "a.png")
    assert "images" in run(tmp_path, "--model", "nano")[1], "models beside images are no matter"


def test_a_model_under_an_unknown_prefix_is_refused_by_its_keys(tmp_path):
    ae = {f"first_stage_model.{key}": tensor for key, tensor in load_file(nano.AE).items()}
    save_file(ae, tmp_path / "a.safetensors")
    code, answer, _ = run(tmp_path / "a.safetensors")
    sentence = "is a FLUX.1 autoencoder under an unknown prefix (first_stage_model."
    assert code == 2 and len(answer["reasons"]) == 1 and sentence in answer["reasons"][0]


def test_other_files_are_refused_with_the_reason(tmp_path):
    fill = {name: torch.zeros(shape).bfloat16() for name, shape in flux_shapes(tiny_config()).items()}
    write_safetensors(tmp_path / "fill.safetensors", fill | {"img_in.weight": torch.zeros(64, 96)})
    code, answer, lines = run(tmp_path / "fill.safetensors")
    assert code == 2 and "has 96 input channels like Fill, not 16" in lines and answer["parts"] == {}

    save_file({"layer.weight": torch.ones(2)}, tmp_path / "other.safetensors")
    code, answer, _ = run(tmp_path / "other.safetensors")
    assert code == 2 and "is a model that fluxq does not know (its first key is layer.weight)" in answer["reasons"][0]

    near = {"img_in.weight": torch.ones(2, 2), "txt_in.bias": torch.ones(2), "blocks.0.qkv.weight": torch.ones(2, 2)}
    save_file(near, tmp_path / "near.safetensors")
    code, answer, _ = run(tmp_path / "near.safetensors")
    sentence = (
        "closest to a FLUX.1 transformer: 46 missing (img_in.bias; txt_in.weight; time_in.in_layer.weight; time_in.in"
    )
    assert code == 2 and sentence in answer["reasons"][0]
    assert "1 unexpected (blocks.0.qkv.weight)" in answer["reasons"][0]


def transformer() -> dict[str, torch.Tensor]:
    return {name: torch.randn(shape).bfloat16() for name, shape in flux_shapes(WIDE).items()}


def as_nf4() -> dict[str, torch.Tensor]:
    tensors = transformer()
    for name in [name for name, tensor in tensors.items() if tensor.ndim == 2]:
        tensors[name], state = import_bitsandbytes().functional.quantize_4bit(tensors[name], quant_type="nf4")
        tensors |= {f"{name}.{part}": tensor for part, tensor in state.as_dict(packed=True).items()}
    return tensors


def as_scaled_fp8() -> dict[str, torch.Tensor]:
    tensors = transformer()
    for name in [name for name, tensor in tensors.items() if tensor.ndim == 2]:
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)
        tensors[name.removesuffix("weight") + "scale_weight"] = torch.tensor(0.5)
    return tensors


def write_gguf(path: Path) -> Path:
    writer = gguf.GGUFWriter(path, "flux")
    for name, tensor in transformer().items():
        kind = gguf.GGMLQuantizationType.Q8_0 if tensor.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quants.quantize(tensor.float().numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("write", "precision", "use"),
    [
        (transformer, "bf16", "--format bf16 keeps the exact bytes of its matrices"),
        (as_nf4, "nf4", "--format nf4 keeps the exact bytes of its matrices"),
        (as_scaled_fp8, "fp8 e4m3, scaled", "--format fp8 keeps the exact bytes of its matrices"),
        (None, "Q8_0", "dequantized a few rows at a time, then stored once in the --format of a run: nf4"),
    ],
)
def test_a_stored_precision_is_named_with_its_use(tmp_path, write, precision, use):
    path = tmp_path / "flux.safetensors"
    save_file(write(), path) if write else write_gguf(path := tmp_path / "flux.gguf")
    code, answer, lines = run(path)
    assert code == 0 and answer["parts"]["flux"]["precision"] == precision
    assert answer["parts"]["flux"]["use"].startswith(use) and use in lines
    assert f"holds        a FLUX.1 transformer: dev, 1 + 1 blocks, 64 wide, {precision}; use it with --flux" in lines
    assert len(lines.splitlines()) == 3


REFUSED = {
    "ControlNet": ("controlnet_blocks.0.weight", "double_blocks.0.img_attn.qkv.weight"),
    "IP-Adapter": ("double_blocks.0.processor.ip_adapter_double_stream_k_proj.weight",),
    "a textual inversion": ("clip_l", "t5xxl"),
    "an image encoder": ("vision_model.embeddings.position_embedding.weight", "vision_model.encoder.layers.0.x.weight"),
    "a language model": ("model.layers.0.self_attn.q_proj.weight", "model.embed_tokens.weight"),
    "FLUX.1 Redux": ("redux_up.weight", "redux_down.weight"),
    "nunchaku": ("single_transformer_blocks.0.qkv_proj.qweight", "single_transformer_blocks.0.qkv_proj.wscales"),
    "Chroma": ("distilled_guidance_layer.in_proj.weight", "double_blocks.0.img_attn.qkv.weight"),
    "FLUX.2": ("double_stream_modulation_img.lin.weight", "double_blocks.0.img_attn.qkv.weight"),
    "quanto or torchao": ("transformer_blocks.0.attn.to_q.weight._data", "single_transformer_blocks.0.x.weight._data"),
    "nvfp4": ("double_blocks.0.img_attn.qkv.weight", "double_blocks.0.img_attn.qkv.weight_scale_2"),
    "Qwen-Image": ("transformer_blocks.0.img_mod.1.weight", "txt_norm.weight"),
    "a video model": ("blocks.0.cross_attn.k.weight", "patch_embedding.weight"),
    "a tiny autoencoder": ("decoder.layers.1.weight", "encoder.layers.1.weight"),
    "Stable Diffusion 3": ("model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight",),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_that_fluxq_cannot_use_is_named(tmp_path, name):
    save_file({key: torch.ones(2, 2) for key in REFUSED[name]}, tmp_path / "a.safetensors")
    code, answer, lines = run(tmp_path / "a.safetensors")
    assert code == 2 and not answer["ready"] and len(answer["reasons"]) == 1 and name in answer["reasons"][0]
    assert lines.count("refused ") == 1


BAD = {
    "strange keys": lambda: save({"layer.weight": torch.ones(2, 2)}),
    "a twin": lambda: b'\x3a\0\0\0\0\0\0\0{"x":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"x":0}',
    "cut": lambda: save(transformer())[:-9],
    "a lying shape": lambda: save(transformer()).replace(b'"shape":[64,64]', b'"shape":[65,64]'),
    "a lying count": lambda: b"GGUF\x03\0\0\0" + b"\xff" * 16,
    "a state that lies": lambda: save(as_nf4()).replace(b'"blocksize": 64', b'"blocksize": 32'),
    "no scale": lambda: save(as_scaled_fp8() | {"scaled_fp8": torch.empty(0), "txt_in.scale_weight": torch.ones(7)}),
}


@pytest.mark.parametrize("command", ["check", "quantize"])
@pytest.mark.parametrize("what", BAD)
def test_a_bad_file_gives_one_error(tmp_path, what, command):
    """No traceback, little memory, and nothing is written."""
    (path := tmp_path / "bad.safetensors").write_bytes(BAD[what]())
    arguments = [command, str(path)] + ([str(tmp_path / "out.safetensors")] if command == "quantize" else [])
    tracemalloc.start()
    result = CliRunner().invoke(main, arguments)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert result.exit_code == 2 and isinstance(result.exception, SystemExit) and str(path) in result.output
    assert "Traceback" not in result.output and len(result.output.splitlines()) <= 2 and peak < 16 << 20
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="POSIX")
def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.safetensors")
    result = CliRunner().invoke(main, ["check", str(tmp_path / "pipe.safetensors")])
    assert result.exit_code == 2 and "does not exist" in result.stderr


@pytest.mark.parametrize("command", ["check", "quantize", "train --flux"])
def test_a_path_that_the_system_refuses_gives_one_error(command, tmp_path, monkeypatch):
    """Such as a file in a folder without permission, or on a drive that is gone."""

    def closed(path, *args, **options):
        if "closed" in str(path):
            raise PermissionError(13, "Permission denied", str(path))
        return stat(path, *args, **options)

    stat = os.stat
    monkeypatch.setattr(os, "stat", closed)
    others = ["--ae", nano.AE, "--clip-l", nano.CLIP_L, "--t5xxl", nano.T5XXL]
    more = {"check": [], "quantize": [tmp_path / "new.safetensors"], "train --flux": others}[command]
    for path, sentence in ((tmp_path / "closed", "(Permission denied); check"), (tmp_path / ("n" * 300), "n")):
        result = CliRunner().invoke(main, [*command.split(), str(path), *map(str, more)])
        assert result.exit_code == 2 and isinstance(result.exception, SystemExit), result.exception
        assert sentence in result.stderr and len(result.stderr.splitlines()) == 1 and not list(tmp_path.iterdir())


@pytest.mark.parametrize(("content", "sentence"), [(b"GGUF....", "is GGUF version"), (None, "does not exist")])
def test_a_file_that_is_not_safetensors_gives_one_error(tmp_path, content, sentence):
    if content:
        (tmp_path / "x.safetensors").write_bytes(content * 9)
    result = CliRunner().invoke(main, ["check", str(tmp_path / "x.safetensors")])
    assert result.exit_code == 2 and sentence in result.stderr
