"""LoRA files in both dialects: exact round trips, and one clear sentence for what cannot be read."""

import os

import pytest
import torch

from fluxq.errors import WrongRequest
from fluxq.formats.detect import flux_shapes
from fluxq.formats.files import Checkpoint, write_safetensors
from fluxq.formats.lora import Adapter, load_lora, save_lora
from fluxq.formats.metadata import sshs_hashes
from fluxq.model.config import FluxConfig

CONFIG = FluxConfig.nano()
MODULES = [key.removesuffix(".weight") for key, shape in flux_shapes(CONFIG).items() if len(shape) == 2]


def random_adapters(rank=3, alpha=1.7, modules=MODULES, config=CONFIG) -> dict[str, Adapter]:
    torch.manual_seed(0)
    shapes = {module: flux_shapes(config)[f"{module}.weight"] for module in modules}
    return {m: Adapter(torch.randn(rank, k), torch.randn(n, rank), alpha) for m, (n, k) in shapes.items()}


def delta(adapter: Adapter) -> torch.Tensor:
    return adapter.alpha / adapter.rank * (adapter.up.double() @ adapter.down.double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kohya_round_trip_is_exact(tmp_path, dtype):
    adapters = random_adapters() | random_adapters(rank=5, alpha=8, modules=MODULES[7:9])
    save_lora(tmp_path / "x.safetensors", adapters, CONFIG, dtype=dtype, metadata={"ss_steps": "7"})
    read, metadata = load_lora(tmp_path / "x.safetensors", CONFIG)
    assert sorted(read) == sorted(MODULES) and metadata["ss_steps"] == "7"
    for module, adapter in adapters.items():
        assert torch.equal(read[module].down, adapter.down.to(dtype)) and read[module].down.dtype == dtype
        assert torch.equal(read[module].up, adapter.up.to(dtype))
        assert read[module].alpha == torch.tensor(adapter.alpha, dtype=torch.float32).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("alpha", [3, 1.5])
def test_diffusers_round_trip_is_exact_where_the_fold_is(tmp_path, dtype, alpha):
    """alpha / rank of 1 or a power of two folds without rounding; the swapped and the split modules come back whole."""
    adapters = random_adapters(rank=3, alpha=alpha)
    save_lora(tmp_path / "x.safetensors", adapters, CONFIG, "diffusers", dtype)
    read, _ = load_lora(tmp_path / "x.safetensors", CONFIG)
    assert sorted(read) == sorted(MODULES)
    for module, adapter in adapters.items():
        assert torch.equal(read[module].down, adapter.down.to(dtype))
        assert torch.equal(read[module].up, (adapter.up * (alpha / 3)).to(dtype))
        assert read[module].alpha == 3


def test_both_dialects_hold_the_same_delta(tmp_path):
    adapters = random_adapters(rank=4, alpha=3)
    deltas = []
    for dialect in ("kohya", "diffusers"):
        save_lora(tmp_path / dialect, adapters, CONFIG, dialect, torch.float32)
        deltas.append({module: delta(adapter) for module, adapter in load_lora(tmp_path / dialect, CONFIG)[0].items()})
    for module in MODULES:
        torch.testing.assert_close(deltas[0][module], deltas[1][module], rtol=1e-6, atol=1e-6)


def test_kohya_file_has_the_names_of_sd_scripts_and_an_alpha_each(tmp_path):
    modules = ["double_blocks.0.txt_mlp.2", "single_blocks.1.modulation.lin"]
    save_lora(tmp_path / "x", random_adapters(modules=modules), CONFIG)
    checkpoint = Checkpoint(tmp_path / "x")
    assert set(checkpoint.keys()) == {
        f"lora_unet_{name}.{part}"
        for name in ("double_blocks_0_txt_mlp_2", "single_blocks_1_modulation_lin")
        for part in ("lora_down.weight", "lora_up.weight", "alpha")
    }
    assert checkpoint.shape("lora_unet_double_blocks_0_txt_mlp_2.alpha") == ()
    assert checkpoint.dtype("lora_unet_double_blocks_0_txt_mlp_2.lora_up.weight") == torch.bfloat16


def test_diffusers_file_splits_rows_copies_lora_a_and_has_no_alpha(tmp_path):
    adapters = random_adapters(rank=4, alpha=2, modules=["single_blocks.0.linear1"])
    save_lora(tmp_path / "x", adapters, CONFIG, "diffusers", torch.float32)
    checkpoint, up = Checkpoint(tmp_path / "x"), adapters["single_blocks.0.linear1"].up / 2
    base = "transformer.single_transformer_blocks.0."
    rows = {"attn.to_q": (0, 192), "attn.to_k": (192, 384), "attn.to_v": (384, 576), "proj_mlp": (576, 1344)}
    assert set(checkpoint.keys()) == {f"{base}{name}.lora_{part}.weight" for name in rows for part in "AB"}
    for name, (start, end) in rows.items():
        assert torch.equal(checkpoint.get(f"{base}{name}.lora_B.weight"), up[start:end])
    assert "lora_adapter_metadata" not in checkpoint.metadata


def test_file_carries_the_hashes_of_its_own_tensors(tmp_path):
    save_lora(tmp_path / "x", random_adapters(), CONFIG, metadata={"ss_steps": "7", "modelspec.title": "t"})
    checkpoint = Checkpoint(tmp_path / "x")
    hashes = sshs_hashes({key: checkpoint.get(key) for key in checkpoint.shapes}, {"ss_steps": "7"})
    assert checkpoint.metadata == {"ss_steps": "7", "modelspec.title": "t"} | hashes


def test_mixed_ranks_are_refused_for_diffusers_and_nothing_is_written(tmp_path):
    adapters = random_adapters() | random_adapters(rank=5, modules=MODULES[:1])
    with pytest.raises(WrongRequest, match="would have ranks 3, 5, and diffusers wants one; save it as kohya"):
        save_lora(tmp_path / "x", adapters, CONFIG, "diffusers")
    assert not os.listdir(tmp_path)


def kohya_tensors(modules=("double_blocks_0_img_attn_proj", "single_blocks_1_linear2")) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for name, inputs in zip(modules, (192, 960), strict=True):
        tensors[f"lora_unet_{name}.lora_down.weight"] = torch.ones(4, inputs)
        tensors[f"lora_unet_{name}.lora_up.weight"] = torch.ones(192, 4)
        tensors[f"lora_unet_{name}.alpha"] = torch.tensor(4.0)
    return tensors


def diffusers_tensors(names=("to_q", "to_k", "to_v")) -> dict[str, torch.Tensor]:
    base = "transformer.transformer_blocks.0.attn."
    tensors = {f"{base}{name}.lora_A.weight": torch.ones(4, 192) for name in names}
    return tensors | {f"{base}{name}.lora_B.weight": torch.ones(192, 4) for name in names}


def changed(tensors, **changes):
    """`tensors` with every key that contains a name (dots as double underscores) replaced, or removed by None."""
    for part, value in changes.items():
        for key in [key for key in tensors if part.replace("__", ".") in key]:
            if value is None:
                del tensors[key]
            else:
                tensors[key] = value
    return tensors


KOHYA_PROJ = "lora_unet_double_blocks_0_img_attn_proj"
UNREADABLE = {
    "no_alpha": (changed(kohya_tensors(), proj__alpha=None), f"1 missing ({KOHYA_PROJ}.alpha)"),
    "no_up": (changed(kohya_tensors(), proj__lora_up=None), f"1 missing ({KOHYA_PROJ}.lora_up.weight)"),
    "no_down": (changed(kohya_tensors(), proj__lora_down=None), f"1 missing ({KOHYA_PROJ}.lora_down.weight)"),
    "spoilt_alpha": (
        changed(kohya_tensors(), proj__alpha=torch.tensor(float("nan"))),
        f"an alpha of nan in {KOHYA_PROJ}",
    ),
    "vector_alpha": (changed(kohya_tensors(), proj__alpha=torch.ones(1)), f"{KOHYA_PROJ}.alpha is (1,), not ()"),
    "wrong_width": (changed(kohya_tensors(), proj__lora_down=torch.ones(4, 3072)), "is (4, 3072), not (4, 192)"),
    "wrong_rank": (changed(kohya_tensors(), proj__lora_up=torch.ones(192, 5)), "is (192, 5), not (192, 4)"),
    "rank_0": (changed(kohya_tensors(), proj__lora_down=torch.ones(0, 192)), "is (0, 192), not (1, 192)"),
    "scalar_down": (changed(kohya_tensors(), proj__lora_down=torch.tensor(1.0)), "is (), not (1, 192)"),
    "text_encoder": (
        kohya_tensors() | {"lora_te1_text_model_x.alpha": torch.tensor(1.0)},
        "1 unmatched modules (lora_te1_text_model_x)",
    ),
    "later_block": (
        kohya_tensors() | {"lora_unet_single_blocks_37_linear2.alpha": torch.tensor(1.0)},
        "1 unmatched modules (lora_unet_single_blocks_37_linear2)",
    ),
    "dora": (kohya_tensors() | {f"{KOHYA_PROJ}.dora_scale": torch.ones(1)}, f"1 unexpected ({KOHYA_PROJ}.dora_scale)"),
    "sdxl": (
        kohya_tensors(("down_blocks_1_attentions_0_proj_in", "mid_block_attentions_0_proj_in")),
        "is a LoRA of another model: none of its 2 modules (such as lora_unet_down_blocks_1_attentions_0_proj_in) is",
    ),
    "half_a_qkv": (diffusers_tensors(("to_q", "to_v")), "adapts transformer_blocks.0.attn.to_q but not transformer_bl"),
    "own_lora_a": (
        changed(diffusers_tensors(), to_k__lora_A=torch.zeros(4, 192)),
        "has another lora_A in transformer_blocks.0.attn.to_q than in transformer_blocks.0.attn.to_k",
    ),
    "alpha_tensor": (
        diffusers_tensors() | {"transformer.transformer_blocks.0.attn.to_q.alpha": torch.tensor(1.0)},
        "1 unexpected (transformer.transformer_blocks.0.attn.to_q.alpha)",
    ),
    "comfy": (
        {"diffusion_model.double_blocks.0.img_attn.proj.lora_A.weight": torch.ones(1)},
        "in a dialect that fluxq",
    ),
    "peft": ({"base_model.model.proj_out.lora_A.weight": torch.ones(1)}, "in a dialect that fluxq does not read (its"),
    "a_base_model": (
        {"double_blocks.0.img_attn.qkv.weight": torch.ones(1)},
        "is a FLUX.1 transformer, where a LoRA is",
    ),
    "nothing": ({}, "is empty: it has no tensors, where a LoRA is wanted"),
}


@pytest.mark.parametrize("what", UNREADABLE)
def test_unreadable_lora_is_one_sentence(tmp_path, what):
    tensors, sentence = UNREADABLE[what]
    path = tmp_path / f"{what}.safetensors"
    write_safetensors(path, tensors)
    with pytest.raises(WrongRequest) as caught:
        load_lora(path, CONFIG)
    assert str(caught.value).startswith(str(path)) and sentence in str(caught.value) and "; " in str(caught.value)


def test_the_tables_files_are_readable_unchanged(tmp_path):
    for tensors in (kohya_tensors(), diffusers_tensors()):
        write_safetensors(tmp_path / "x", tensors)
        assert load_lora(tmp_path / "x", CONFIG)[0]


def test_alpha_hidden_in_metadata_is_refused(tmp_path):
    write_safetensors(tmp_path / "x", diffusers_tensors(), {"lora_adapter_metadata": "{}"})
    with pytest.raises(WrongRequest, match="keeps its alpha in metadata, which most programs ignore"):
        load_lora(tmp_path / "x", CONFIG)
