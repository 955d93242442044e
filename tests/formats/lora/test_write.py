"""Written LoRA files: the names and tensors that each program needs, exact round trips, no partial files."""

from __future__ import annotations

import json
import os
import re

import pytest
import torch

from fluxq.errors import WrongRequest
from fluxq.formats.checkpoint.files import Checkpoint
from fluxq.formats.checkpoint.shapes import flux_shapes
from fluxq.formats.lora import write
from fluxq.formats.lora.algebra import Adapter
from fluxq.formats.lora.metadata import sshs_hashes
from fluxq.formats.lora.read import load_lora
from fluxq.formats.lora.write import WRITTEN_DIALECTS, save_lora
from fluxq.model.config import FluxConfig

CONFIG = FluxConfig.nano()
MODULES = [key.removesuffix(".weight") for key, shape in flux_shapes(CONFIG).items() if len(shape) == 2]


def random_adapters(rank=3, alpha=1.7, modules=MODULES) -> dict[str, Adapter]:
    shapes = {module: flux_shapes(CONFIG)[f"{module}.weight"] for module in modules}
    return {m: Adapter(torch.randn(rank, k), torch.randn(n, rank), alpha) for m, (n, k) in shapes.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dialect", ["kohya", "comfy"])
def test_fused_round_trip_is_exact(tmp_path, dialect, dtype):
    adapters = random_adapters() | random_adapters(rank=5, alpha=8, modules=MODULES[7:9])
    save_lora(tmp_path / "x", adapters, CONFIG, dialect, dtype, {"ss_steps": "7"})
    lora = load_lora(tmp_path / "x", CONFIG)
    assert sorted(lora.adapters) == sorted(MODULES) and lora.metadata["ss_steps"] == "7" and lora.dialect == dialect
    for module, adapter in adapters.items():
        read = lora.adapters[module]
        assert torch.equal(read.down, adapter.down.to(dtype)) and read.down.dtype == dtype == lora.dtype
        assert torch.equal(read.up, adapter.up.to(dtype))
        assert read.alpha == torch.tensor(adapter.alpha, dtype=torch.float32).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("alpha", [3, 1.5])
@pytest.mark.parametrize("dialect", ["diffusers", "peft"])
def test_split_round_trip_is_exact_if_the_fold_is(tmp_path, dialect, dtype, alpha):
    """alpha / rank of 1 or a power of two folds without rounding; swapped and split modules are restored."""
    adapters = random_adapters(rank=3, alpha=alpha)
    save_lora(tmp_path / "x", adapters, CONFIG, dialect, dtype)
    read = load_lora(tmp_path / "x", CONFIG).adapters
    assert sorted(read) == sorted(MODULES)
    for module, adapter in adapters.items():
        assert torch.equal(read[module].down, adapter.down.to(dtype))
        assert torch.equal(read[module].up, (adapter.up * (alpha / 3)).to(dtype))
        assert read[module].alpha == 3


def test_kohya_file_has_the_names_of_sd_scripts_and_an_alpha_each(tmp_path):
    modules = ["double_blocks.0.txt_mlp.2", "single_blocks.1.modulation.lin"]
    clip = {"encoder.layers.1.self_attn.out_proj": Adapter(torch.ones(2, 8), torch.ones(8, 2), 2.0)}
    save_lora(tmp_path / "x", random_adapters(modules=modules), CONFIG, clip=clip)
    checkpoint = Checkpoint(tmp_path / "x")
    assert set(checkpoint.keys()) == {
        f"{name}.{part}"
        for name in (
            "lora_unet_double_blocks_0_txt_mlp_2",
            "lora_unet_single_blocks_1_modulation_lin",
            "lora_te1_text_model_encoder_layers_1_self_attn_out_proj",
        )
        for part in ("lora_down.weight", "lora_up.weight", "alpha")
    }
    assert checkpoint.shape("lora_unet_double_blocks_0_txt_mlp_2.alpha") == ()
    assert checkpoint.dtype("lora_unet_double_blocks_0_txt_mlp_2.lora_up.weight") == torch.bfloat16


def test_comfy_file_never_has_lora_a_with_an_alpha(tmp_path):
    save_lora(tmp_path / "x", random_adapters(modules=["single_blocks.0.linear1"]), CONFIG, "comfy")
    base = "diffusion_model.single_blocks.0.linear1"
    assert set(Checkpoint(tmp_path / "x").keys()) == {
        f"{base}.lora_down.weight",
        f"{base}.lora_up.weight",
        f"{base}.alpha",
    }


@pytest.mark.parametrize("dialect", ["diffusers", "peft"])
def test_split_file_copies_lora_a_and_has_one_rank_and_no_alpha(tmp_path, dialect):
    modules = ["single_blocks.0.linear1", "double_blocks.1.img_attn.proj"]
    adapters = random_adapters(4, 2, modules[:1]) | random_adapters(2, 2, modules[1:])
    save_lora(tmp_path / "x", adapters, CONFIG, dialect, torch.float32, {"lora_adapter_metadata": "{}"})
    path, prefix = (
        (tmp_path / "x", "transformer.")
        if dialect == "diffusers"
        else (tmp_path / "x/adapter_model.safetensors", "base_model.model.")
    )
    checkpoint, up = Checkpoint(path), adapters[modules[0]].up / 2
    base = f"{prefix}single_transformer_blocks.0."
    rows = {"attn.to_q": (0, 192), "attn.to_k": (192, 384), "attn.to_v": (384, 576), "proj_mlp": (576, 1344)}
    names = [*(base + name for name in rows), f"{prefix}transformer_blocks.1.attn.to_out.0"]
    assert set(checkpoint.keys()) == {f"{name}.lora_{part}.weight" for name in names for part in "AB"}
    for name, (start, end) in rows.items():
        assert torch.equal(checkpoint.get(f"{base}{name}.lora_B.weight"), up[start:end])
        assert torch.equal(checkpoint.get(f"{base}{name}.lora_A.weight"), adapters[modules[0]].down)
    assert checkpoint.shape(f"{names[-1]}.lora_A.weight") == (4, 192)
    assert "lora_adapter_metadata" not in checkpoint.metadata
    if dialect == "peft":
        settings = json.loads((tmp_path / "x/adapter_config.json").read_text())
        assert settings["r"] == settings["lora_alpha"] == 4 and settings["peft_type"] == "LORA"
        assert set(settings["target_modules"]) == {name.removeprefix(prefix) for name in names}


def test_strengths_are_folded_before_the_one_rounding(tmp_path):
    adapters = random_adapters(rank=3, alpha=1.7)
    save_lora(tmp_path / "x", adapters, CONFIG, "diffusers", torch.bfloat16)
    for module, adapter in load_lora(tmp_path / "x", CONFIG).adapters.items():
        assert torch.equal(adapter.up, (adapters[module].up * (1.7 / 3)).to(torch.bfloat16)), module


def test_file_carries_the_hashes_of_its_own_tensors(tmp_path):
    save_lora(tmp_path / "x", random_adapters(), CONFIG, metadata={"ss_steps": "7", "modelspec.title": "t"})
    checkpoint = Checkpoint(tmp_path / "x")
    hashes = sshs_hashes({key: checkpoint.get(key) for key in checkpoint.shapes}, {"ss_steps": "7"})
    assert checkpoint.metadata == {"ss_steps": "7", "modelspec.title": "t"} | hashes


@pytest.mark.parametrize("dialect", WRITTEN_DIALECTS)
def test_unwritable_path_is_named_and_unchanged(tmp_path, dialect):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(WrongRequest, match="file"):
        save_lora(tmp_path / "file" / "x", random_adapters(modules=MODULES[:1]), CONFIG, dialect)
    assert os.listdir(tmp_path) == ["file"]


def test_a_folder_that_exists_is_not_replaced(tmp_path):
    with pytest.raises(WrongRequest, match="already exists; name a new folder"):
        save_lora(tmp_path, random_adapters(modules=MODULES[:1]), CONFIG, "peft")
    assert not os.listdir(tmp_path)


def test_a_folder_that_the_disk_has_no_room_for_is_named(tmp_path, monkeypatch):
    """Not the temporary one that it is written in."""

    def full(path, tensors, metadata=None):
        raise WrongRequest(f"{path} cannot be written because the disk is full")

    monkeypatch.setattr(write, "write_safetensors", full)
    adapters = {"single_blocks.0.linear2": Adapter(torch.ones(2, 960), torch.ones(192, 2), 1.0)}
    with pytest.raises(WrongRequest, match="^" + re.escape(str(tmp_path / "x.peft"))):
        save_lora(tmp_path / "x.peft", adapters, FluxConfig.nano(), "peft")
