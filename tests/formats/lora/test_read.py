"""Every dialect of LoRA files is read as the right weight change, and other files are refused in one clear sentence."""

from __future__ import annotations

import json

import pytest
import torch
from lora_files import ALPHA, CONFIG, RANK, WRITERS, fused, split

from fluxq.errors import WrongRequest
from fluxq.formats.checkpoint.files import write_safetensors
from fluxq.formats.lora.metadata import trigger_of
from fluxq.formats.lora.peft import PEFT_FILES, PEFT_METADATA, PeftSettings, read_settings
from fluxq.formats.lora.programs import programs
from fluxq.formats.lora.read import load_lora
from fluxq.formats.lora.write import WRITTEN_DIALECTS, save_lora
from fluxq.model.config import FluxConfig


def assert_same_change(adapters, changes, tolerance=1e-5):
    assert adapters.keys() == changes.keys()
    for module, wanted in changes.items():
        found = adapters[module].scale * adapters[module].up.double() @ adapters[module].down.double()
        assert (found - wanted).norm() <= tolerance * wanted.norm(), module


@pytest.mark.parametrize("dialect", WRITERS)
def test_every_dialect_is_read_as_the_right_change(tmp_path, dialect):
    tensors, changes, metadata = WRITERS[dialect]()
    write_safetensors(tmp_path / "x.safetensors", tensors, metadata)
    lora = load_lora(tmp_path / "x.safetensors")
    assert lora.config == CONFIG and not lora.notes
    assert_same_change(lora.adapters, changes)


@pytest.mark.slow
@pytest.mark.parametrize("written", WRITTEN_DIALECTS)
@pytest.mark.parametrize("dialect", WRITERS)
def test_written_files_make_the_same_change_as_what_was_read(tmp_path, dialect, written):
    tensors, changes, metadata = WRITERS[dialect]()
    write_safetensors(tmp_path / "x.safetensors", tensors, metadata)
    lora, out = load_lora(tmp_path / "x.safetensors"), tmp_path / "y"
    save_lora(out, lora.adapters, lora.config, written, torch.float32, lora.metadata)
    again = load_lora(out)
    assert_same_change(again.adapters, changes)
    assert "lora_adapter_metadata" not in again.metadata
    save_lora(tmp_path / "z", again.adapters, again.config, "kohya", torch.bfloat16)
    assert_same_change(load_lora(tmp_path / "z").adapters, changes, tolerance=2**-7)  # two factors of 8 bits


def test_equal_downs_keep_the_rank_and_different_downs_add_ranks(tmp_path):
    for shared, rank in ((True, RANK), (False, 3 * RANK)):
        write_safetensors(
            tmp_path / "x", split("transformer.", False, ".lora_A.weight", ".lora_B.weight", False, 1.0, shared)[0]
        )
        assert load_lora(tmp_path / "x").adapters["double_blocks.0.img_attn.qkv"].rank == rank


def test_parts_that_are_not_adapted_keep_their_rows(tmp_path):
    tensors, changes = split("transformer.", False, ".lora_A.weight", ".lora_B.weight", False)
    left = {key: tensor for key, tensor in tensors.items() if "attn.to_k" not in key}
    write_safetensors(tmp_path / "x", left)
    changes["double_blocks.0.img_attn.qkv"][192:384] = 0
    changes["single_blocks.1.linear1"][192:384] = 0
    lora = load_lora(tmp_path / "x")
    assert_same_change(lora.adapters, changes)
    save_lora(tmp_path / "y", lora.adapters, CONFIG, "diffusers", torch.float32)
    assert load_lora(tmp_path / "y").adapters["double_blocks.0.img_attn.qkv"].rank == 2 * RANK


def test_a_peft_folder_is_read_with_its_strengths(tmp_path):
    tensors, changes = split("base_model.model.", False, ".lora_A.weight", ".lora_B.weight", False, scale=8 / RANK)
    folder = tmp_path / "adapter"
    write_safetensors(folder / "adapter_model.safetensors", tensors)
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": 8, "alpha_pattern": {"context_embedder": 1.5}}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    changes["txt_in"] *= 1.5 / 8
    for path in (folder, folder / "adapter_model.safetensors"):
        assert_same_change(load_lora(path).adapters, changes)
    (folder / "adapter_config.json").write_text(json.dumps(settings | {"use_rslora": True}))
    rooted = {module: change * RANK**0.5 for module, change in changes.items()}
    assert_same_change(load_lora(folder).adapters, rooted)


def test_alphas_in_tensors_and_metadata_count_once(tmp_path):
    tensors, changes, _ = WRITERS["diffusers with alpha"]()
    write_safetensors(tmp_path / "x", tensors, {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 99})})
    lora = load_lora(tmp_path / "x")
    assert_same_change(lora.adapters, changes)
    assert "fluxq uses the tensors" in lora.notes[0]


@pytest.mark.parametrize(
    ("keys", "t5"),
    [
        (
            "lora_te1_text_model_encoder_layers_3_self_attn_q_proj.lora_{}.weight",
            "lora_te3_encoder_block_0_layer_0_SelfAttention_q",
        ),
        ("text_encoder.text_model.encoder.layers.3.self_attn.q_proj.lora_{}.weight", "text_encoder_2.encoder.block.0"),
        (
            "text_encoders.clip_l.transformer.text_model.encoder.layers.3.self_attn.q_proj.lora_{}.weight",
            "lora_te2_encoder_block_0_layer_0_SelfAttention_q",
        ),
    ],
)
@pytest.mark.parametrize("written", ["kohya", "diffusers", "comfy"])
def test_clip_is_read_and_t5_is_ignored(tmp_path, keys, t5, written):
    tensors, changes = fused("lora_unet_", True, ".lora_down.weight", ".lora_up.weight", True)
    parts = ("A", "B") if "." in keys.removesuffix(".lora_{}.weight") and "te1" not in keys else ("down", "up")
    a, b = torch.randn(3, 64), torch.randn(64, 3)
    tensors |= {keys.format(parts[0]): a, keys.format(parts[1]): b}
    tensors |= {f"{t5}.lora_down.weight": a, f"{t5}.lora_up.weight": b, "bundle_emb.x.t5_out": a}
    tensors |= {f"lora_te1_text_projection.lora_{part}.weight": a for part in ("down", "up")}
    write_safetensors(tmp_path / "x", tensors)
    lora = load_lora(tmp_path / "x")
    assert list(lora.clip) == ["encoder.layers.3.self_attn.q_proj"]
    assert any(note.startswith("its T5 part (1 modules) is ignored") for note in lora.notes)
    assert any(note.startswith("its text projection part (1 modules)") for note in lora.notes)
    assert any("bundle_emb" in note for note in lora.notes)
    save_lora(tmp_path / "y", lora.adapters, CONFIG, written, torch.float32, clip=lora.clip)
    again = load_lora(tmp_path / "y")
    assert_same_change(again.clip, {"encoder.layers.3.self_attn.q_proj": b.double() @ a.double()})
    assert_same_change(again.adapters, changes)


def test_split_qkv_of_sd_scripts_is_read_at_its_trained_strength(tmp_path):
    """LoRANetwork.state_dict stacks the parts block-diagonally and keeps the alpha of one part."""
    wanted, tensors = {}, {}
    for module, n, out in (("double_blocks.0.img_attn.qkv", 3, 576), ("single_blocks.0.linear1", 4, 1344)):
        rows = [192, 192, 192, out - 576][:n]
        downs, ups = [torch.randn(RANK, 192) for _ in rows], [torch.randn(r, RANK) for r in rows]
        name = "lora_unet_" + module.replace(".", "_")
        tensors |= {f"{name}.lora_down.weight": torch.cat(downs), f"{name}.lora_up.weight": torch.block_diag(*ups)}
        tensors[f"{name}.alpha"] = torch.tensor(ALPHA)
        wanted[module] = torch.cat([ALPHA / RANK * u.double() @ d.double() for u, d in zip(ups, downs, strict=True)])
    name = "lora_unet_double_blocks_0_img_attn_proj"
    a, b = torch.randn(RANK, 192), torch.randn(192, RANK)
    tensors |= {f"{name}.lora_down.weight": a, f"{name}.lora_up.weight": b, f"{name}.alpha": torch.tensor(ALPHA)}
    wanted["double_blocks.0.img_attn.proj"] = ALPHA / RANK * b.double() @ a.double()
    write_safetensors(tmp_path / "x", tensors, {"ss_network_args": json.dumps({"split_qkv": "True"})})
    lora = load_lora(tmp_path / "x")
    assert_same_change(lora.adapters, wanted)
    assert lora.notes[0].startswith("2 modules were trained with sd-scripts' split_qkv")
    save_lora(tmp_path / "y", lora.adapters, CONFIG, "kohya", torch.float32, lora.metadata)
    assert_same_change(load_lora(tmp_path / "y").adapters, wanted)  # not corrected a second time
    write_safetensors(tmp_path / "z", tensors)
    assert load_lora(tmp_path / "z").adapters["single_blocks.0.linear1"].alpha == torch.tensor(ALPHA).item()


def test_a_kernel_of_1_x_1_and_fp8_are_read(tmp_path):
    tensors, _, _ = WRITERS["kohya"]()
    for dtype in (torch.float8_e4m3fn, torch.float16):
        cast = {k: v if k.endswith("alpha") else v.to(dtype)[:, :, None, None] for k, v in tensors.items()}
        write_safetensors(tmp_path / "x", cast)
        change = {m: a.change() for m, a in load_lora(tmp_path / "x").adapters.items()}
        down, up = (cast[f"lora_unet_txt_in.lora_{part}.weight"][:, :, 0, 0].double() for part in ("down", "up"))
        torch.testing.assert_close(change["txt_in"].double(), ALPHA / RANK * up @ down, rtol=1e-4, atol=1e-4)


# --- what is refused ---


def kohya(**changes):
    """One plain module of a kohya file; arguments replace a part, None leaves it out."""
    name = "lora_unet_double_blocks_0_img_attn_proj"
    parts = {"lora_down.weight": torch.ones(4, 192), "lora_up.weight": torch.ones(192, 4), "alpha": torch.tensor(4.0)}
    parts |= {part.replace("__", "."): value for part, value in changes.items()}
    return {f"{name}.{part}": value for part, value in parts.items() if value is not None}


def named(*names, inputs=64):
    """Modules of rank 2 without alpha."""
    downs = {f"{name}.lora_down.weight": torch.ones(2, inputs) for name in names}
    return downs | {f"{name}.lora_up.weight": torch.ones(inputs, 2) for name in names}


def one(key):
    return kohya() | {f"lora_unet_double_blocks_0_img_attn_proj.{key}": torch.ones(4, 4)}


PROJ = "lora_unet_double_blocks_0_img_attn_proj"
REFUSED = {
    "no_up": (kohya(lora_up__weight=None), f"1 halves missing ({PROJ} has no up)"),
    "no_down": (kohya(lora_down__weight=None), f"1 halves missing ({PROJ} has no down)"),
    "alpha_alone": (
        kohya() | {"lora_unet_img_in.alpha": torch.tensor(1.0)},
        "2 halves missing (lora_unet_img_in has no",
    ),
    "wrong_width": (kohya(lora_down__weight=torch.ones(4, 3072)), "is (4, 3072), not (4, 192)"),
    "ranks_disagree": (kohya(lora_up__weight=torch.ones(192, 5)), f"{PROJ}.lora_up.weight is (192, 5), not (192, 4)"),
    "rank_0": (kohya(lora_down__weight=torch.ones(0, 192)), "is (0, 192), not (1, 192)"),
    "scalar": (kohya(lora_down__weight=torch.tensor(1.0)), "is (), not (1, 192)"),
    "kernel": (kohya(lora_down__weight=torch.ones(4, 192, 3, 3)), "is (4, 192, 3, 3), not (4, 192)"),
    "whole_numbers": (kohya(lora_up__weight=torch.ones(192, 4, dtype=torch.int64)), "is I64, not floating point"),
    "long_alpha": (kohya(alpha=torch.ones(2)), f"{PROJ}.alpha is (2,), not one number"),
    "nan": (
        kohya(lora_up__weight=torch.full((192, 4), torch.nan)),
        f"NaN or infinite numbers in {PROJ}.lora_up.weight",
    ),
    "infinite_alpha": (kohya(alpha=torch.tensor(torch.inf)), f"NaN or infinite numbers in {PROJ}.alpha"),
    "later_block": (kohya() | named("lora_unet_single_blocks_37_linear2"), "1 unmatched modules (lora_unet_single_b"),
    "strange": (kohya() | {"something.else": torch.ones(1)}, "1 unexpected (something.else)"),
    "twice": (
        kohya() | named("diffusion_model.double_blocks.0.img_attn.proj", inputs=192),
        "adapts double_blocks.0.img_at",
    ),
    "two_spellings": (one("lora_A.weight"), f"has one tensor under two names ({PROJ}.lora_"),
    "lokr": ({"lycoris_transformer_blocks_0_attn_to_q.lokr_w1": torch.ones(2, 2)}, "is a LoKr (LyCORIS)"),
    "loha": (one("hada_w1_a"), "is a LoHa (LyCORIS)"),
    "dora": (one("dora_scale"), "is a DoRA"),
    "oft": (one("oft_blocks"), "is an OFT"),
    "mid": (one("lora_mid.weight"), "is a LoCon with a third factor"),
    "diff": (one("diff_b"), "is an adapter that also changes whole tensors"),
    "unheard_of": (
        {"lora_unet_img_in.lora_c": torch.ones(1)},
        "is an adapter of a kind that fluxq does not know (lora_",
    ),
    "fill": (named("lora_unet_img_in", inputs=384), "was made for FLUX.1 Fill, whose img_in has 384 inputs, not 64"),
    "control": (
        {"double_blocks.0.img_attn.proj.lora_A.weight": torch.ones(4, 192), "img_in.lora_B.bias": torch.ones(192)},
        "as BFL's control LoRAs (Canny, Depth) do, not a plain LoRA (img_in.lora_B.bias",
    ),
    "sdxl": (
        named("lora_unet_down_blocks_1_attentions_0_transformer_blocks_1_attn1_to_q", "lora_te1_text_model_x"),
        "another model, Stable Diffusion XL (lora_unet_down_blocks_1",
    ),
    "sdxl_ldm": (
        named("lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"),
        "another model, Stable Diffusion XL (lora_unet_input_blocks_4",
    ),
    "sd15": (
        named("lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"),
        "Stable Diffusion 1.x or 2.x",
    ),
    "sd3": (named("lora_unet_joint_blocks_0_x_block_attn_qkv"), "another model, Stable Diffusion 3"),
    "chroma": (kohya() | named("lora_unet_distilled_guidance_layer_in_proj"), "another model, Chroma"),
    "flux2": (named("transformer.single_transformer_blocks.0.attn.to_qkv_mlp_proj"), "another model, FLUX.2"),
    "flux2_shapes": (
        named("lora_unet_double_blocks_0_img_attn_proj", inputs=6144),
        "was made for FLUX.2 dev, a different",
    ),
    "qwen": (named("transformer.transformer_blocks.3.img_mlp.net.2"), "another model, Qwen-Image"),
    "wan": (named("diffusion_model.blocks.3.self_attn.q"), "another model, Wan"),
    "hunyuan": (named("transformer.double_blocks.3.img_attn_qkv"), "another model, HunyuanVideo"),
    "nobody_knows": (
        named("lora_unet_something"),
        "FLUX.1 has none of its 1 modules (the first is lora_unet_something)",
    ),
    "only_t5": (
        named("lora_te3_encoder_block_0_layer_0_SelfAttention_q"),
        "no adapter for the transformer or for CLIP-L",
    ),
    "a_base_model": (
        {"double_blocks.0.img_attn.qkv.weight": torch.ones(1)},
        "is a FLUX.1 transformer, not a LoRA",
    ),
    "nothing": ({}, "is empty (it has no tensors), not a LoRA"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_file_that_is_not_a_lora_of_this_model_is_refused_in_one_sentence(tmp_path, what):
    tensors, sentence = REFUSED[what]
    path = tmp_path / f"{what}.safetensors"
    write_safetensors(path, tensors)
    with pytest.raises(WrongRequest) as caught:
        load_lora(path, CONFIG)
    assert str(caught.value).startswith(str(path)) and sentence in str(caught.value) and "; " in str(caught.value)


def test_the_tables_own_file_is_readable_unchanged(tmp_path):
    write_safetensors(tmp_path / "x", kohya())
    assert load_lora(tmp_path / "x", CONFIG).adapters


def test_metadata_that_names_another_model_decides(tmp_path):
    """A LoRA of Chroma without modulation has FLUX.1's names and shapes."""
    write_safetensors(tmp_path / "x", kohya(), {"modelspec.architecture": "chroma/lora"})
    with pytest.raises(WrongRequest, match=r"another model, Chroma \(its metadata says so\)"):
        load_lora(tmp_path / "x", CONFIG)
    write_safetensors(tmp_path / "x", kohya(), {"modelspec.architecture": "Flux.1-dev/lora"})
    assert load_lora(tmp_path / "x", CONFIG).adapters


def test_full_size_and_toy_are_distinguished(tmp_path):
    names = named("lora_unet_double_blocks_18_img_attn_proj", inputs=3072)
    write_safetensors(tmp_path / "x", names)
    assert load_lora(tmp_path / "x").config == FluxConfig.dev()
    with pytest.raises(WrongRequest, match="none of its 1 modules"):
        load_lora(tmp_path / "x", CONFIG)


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ("[]", "is a JSON list, not an object"),
        ('{"lora_alpha": [1]}', "is not a valid adapter_config.json"),
        ('{"lora_alpha": "x"}', "is not a valid adapter_config.json"),
        ('{"lora_alpha": 1e999}', "is not a valid adapter_config.json"),
        ('{"peft_type": "LOKR"}', "is for a LOKR adapter, not a LoRA"),
        ('{"use_dora": true}', "is for a DoRA"),
    ],
)
def test_unusable_settings_are_refused(tmp_path, config, sentence):
    write_safetensors(tmp_path / "adapter_model.safetensors", named("base_model.model.proj_out"))
    (tmp_path / "adapter_config.json").write_text(config)
    with pytest.raises(WrongRequest, match=sentence):
        load_lora(tmp_path)


def test_invalid_settings_in_metadata_are_refused(tmp_path):
    write_safetensors(
        tmp_path / "x",
        split("transformer.", False, ".lora_A.weight", ".lora_B.weight", False)[0],
        {"lora_adapter_metadata": "{"},
    )
    with pytest.raises(WrongRequest, match="has invalid JSON in lora_adapter_metadata"):
        load_lora(tmp_path / "x")


@pytest.mark.parametrize("pattern", ["(.*.*)*x", "(a+)+b", "(.?){99}{99}", ".*" * 9 + "x"])
def test_patterns_that_take_forever_are_refused(pattern):
    with pytest.raises(ValueError, match="could take forever"):
        PeftSettings.parsed({"lora_alpha": 2, "alpha_pattern": {pattern: 3}})
    PeftSettings.parsed({"lora_alpha": 2, "alpha_pattern": {r"(.*\.)?transformer_blocks\.\d+\.attn\.(to_q|to_k)": 3}})


@pytest.mark.parametrize("patterns", [[1], "x", 3])
def test_patterns_that_are_not_a_table_are_refused(tmp_path, patterns):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 2, "alpha_pattern": patterns}))
    with pytest.raises(WrongRequest, match="is not a valid adapter_config.json"):
        read_settings(tmp_path / "adapter_config.json")


ANY_JSON = (
    "null", "true", "0", "-1", "1.5", "1e999", "NaN", "1" + "0" * 400, "9" * 5000, '""', '"x"', r'"\ud800"', "[]",
    "[1]", "[[]]", "{}", '{"a": {"b": 1}}', '{"a": {"b": 1e999}}', '{"a": {"b": "x"}}', '{"": [{"": null}]}',
    "{", "[" * 9999,
)  # fmt: skip
SETTINGS = ("lora_alpha", "alpha_pattern", "use_rslora", "use_dora", "peft_type")


@pytest.mark.parametrize("key", ["ss_tag_frequency", "ss_network_args"])
def test_metadata_of_other_programs_may_be_any_json(tmp_path, key):
    for value in ANY_JSON:
        write_safetensors(tmp_path / "x", kohya(), {key: value})
        lora = load_lora(tmp_path / "x", CONFIG)
        assert lora.adapters and isinstance(trigger_of(lora.metadata), str | None) and programs(lora)


@pytest.mark.parametrize("key", SETTINGS)
def test_settings_of_peft_may_be_any_json(tmp_path, key):
    """They are used or refused, in the adapter's folder and in the metadata."""
    own, read = ("context_embedder.lora_A.weight", torch.ones(2, 128)), 0
    other = ("context_embedder.lora_B.weight", torch.ones(192, 2))
    write_safetensors(tmp_path / PEFT_FILES[0], {f"base_model.model.{name}": t for name, t in (own, other)})
    for value in ANY_JSON:
        (tmp_path / PEFT_FILES[1]).write_text(f'{{"{key}": {value}}}')
        settings = {PEFT_METADATA: f'{{"transformer.{key}": {value}}}'}
        write_safetensors(tmp_path / "x", {f"transformer.{name}": t for name, t in (own, other)}, settings)
        for path in (tmp_path, tmp_path / "x"):
            try:
                read += bool(load_lora(path, CONFIG).adapters)
            except WrongRequest as error:
                assert str(error).startswith(str(path)) and str(error).isprintable() and len(str(error)) < 500
    assert read
