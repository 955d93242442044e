"""`fluxq check`: which file serves which part, what a run needs, every reason against it; and what one file is."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path

import gguf
import pytest
import torch
from bitsandbytes.functional import quantize_4bit
from click.testing import CliRunner
from helpers import tiny_config, write_hollow
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import save, save_file

from fluxq import check as checks
from fluxq import nano
from fluxq.cli import main
from fluxq.formats.detect import flux_shapes
from fluxq.formats.files import write_safetensors
from fluxq.formats.load import load_flux
from fluxq.formats.quantized import stored_bytes
from fluxq.hub import NotFetched
from fluxq.machine import Card, Machine
from fluxq.model import FluxConfig
from fluxq.models import PARTS, Models
from fluxq.quantize import quantize_command

ROOT = Path(__file__).parent.parent
WIDE = tiny_config(in_channels=64, out_channels=64, vec_in_dim=64, context_in_dim=64, depth=1, depth_single_blocks=1)


@pytest.fixture(autouse=True)
def _empty_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("FLUXQ_MODELS", raising=False)
    monkeypatch.chdir(tmp_path)


def run(*arguments) -> tuple[int, dict, str]:
    """Exit code, answer, and the lines meant for people."""
    result = CliRunner().invoke(main, ["check", *map(str, arguments), "--json"])
    return result.exit_code, json.loads(result.stdout), result.stderr


@pytest.fixture
def photos(tmp_path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for i, size in enumerate(((96, 96), (96, 96), (128, 64))):
        Image.new("RGB", size, (i, 0, 0)).save(folder / f"{i}.png")
    return folder


def test_a_run_that_could_start_is_described_and_nothing_is_written(photos, tmp_path, monkeypatch):
    monkeypatch.setenv("FLUXQ_CACHE", str(tmp_path / "nothing quantised yet"))
    before = sorted(tmp_path.rglob("*"))
    code, answer, lines = run(photos, "--model", "nano")
    assert code == 0 and answer["ready"] and answer["reasons"] == []
    assert answer["parts"]["flux"] == {
        "path": str(nano.FLUX),
        "why": "the bundled toy",
        "what": "dev, 2 + 2 blocks, 192 wide",
        "precision": "bf16",
        "bytes": answer["parts"]["flux"]["bytes"],
        "files": [str(nano.FLUX)],
    }
    assert answer["pictures"]["pictures"] == 3 and answer["pictures"]["buckets"] == {"96x96": 2, "128x64": 1}
    assert answer["disk"]["needed"] > answer["disk"]["cache"] > answer["pictures"]["latents_bytes"] > 0
    assert "3, 1 different captions; 2 at 96x96, 1 at 128x64" in lines and lines.endswith("ready: a run could start\n")
    assert sorted(tmp_path.rglob("*")) == before


def test_the_cache_takes_the_room_that_is_foretold(photos, tmp_path):
    _, answer, _ = run(photos, "--model", "nano")
    result = CliRunner().invoke(main, ["cache", str(photos), "--model", "nano", "--cache", str(tmp_path / "cache")])
    assert result.exit_code == 0
    records = [path.stat().st_size for kind in ("latents", "text") for path in (tmp_path / "cache" / kind).iterdir()]
    assert answer["disk"]["cache"] == pytest.approx(sum(records), rel=0.15)  # headers are the rest


@pytest.mark.parametrize("format", ["nf4", "bf16"])
def test_stored_bytes_are_those_of_the_loaded_model(format):
    flux = load_flux(nano.FLUX, format, torch.device("cpu"))
    loaded = sum(buffer.nbytes for buffer in flux.buffers())
    padding = 256 * len(list(flux.buffers()))
    assert loaded <= stored_bytes(flux_shapes(flux.config), format) < loaded + padding


def test_full_size_needs_what_is_known():
    # the only tensor that 256 bytes do not divide is the last layer's bias: 64 numbers
    assert stored_bytes(flux_shapes(FluxConfig.dev()), "bf16") == 2 * 11_901_408_320 + 128
    assert 6.7e9 < stored_bytes(flux_shapes(FluxConfig.dev()), "nf4") < 6.9e9
    assert 11.9e9 < stored_bytes(flux_shapes(FluxConfig.dev()), "int8") < 12.1e9


def test_every_reason_is_given_at_once(tmp_path, photos):
    models = tmp_path / "models"
    models.mkdir()
    shutil.copy(nano.FLUX, models)
    shutil.copy(nano.AE, models)
    (photos / "bad.png").write_bytes(b"\x89PNG no picture")
    code, answer, lines = run(photos, "--models", models, "--t5xxl", nano.CLIP_L)
    assert code == 2 and not answer["ready"] and len(answer["reasons"]) == 3
    text = "\n".join(answer["reasons"])
    assert f"{models} holds no CLIP text encoder; name it by --clip-l" in text
    assert "is a CLIP text encoder, where a T5 text encoder is wanted" in text and "bad.png" in text
    assert answer["parts"]["ae"]["why"] == f"the only one in {models}"
    assert lines.count("missing") == 3 and lines.endswith("not ready\n")


def test_nothing_named_is_one_reason():
    code, answer, _ = run()
    assert code == 2 and len(answer["reasons"]) == 1 and "--models" in answer["reasons"][0]


def test_too_little_memory_disk_or_card_is_a_reason(monkeypatch, photos):
    card = Machine("2.13", "13.0", False, True, False, Card("old card", (6, 1), 1 << 20), ("sm_80",))
    monkeypatch.setattr(checks, "memory", lambda: (1 << 30, 1 << 29))
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    monkeypatch.setattr(checks, "read_machine", lambda: card)
    code, answer, _ = run(photos, "--model", "nano")
    memory, card, disk, obstacle = answer["reasons"]
    assert code == 2 and "2.0 GiB of RAM are needed with the transformer in nf4, this machine has 1.0 GiB" in memory
    assert "the old card has 1.0 MiB, and the transformer's weights alone take 2.7 MiB in nf4; use another" in card
    assert "of disk are needed at" in disk and "has no code for the old card (sm_61" in obstacle


def machine_with(card: Card | None, monkeypatch, free: int | None = None) -> None:
    seen = Machine("2.13", "13.0", False, True, False, card, ("sm_80", "sm_86", "sm_89"))
    monkeypatch.setattr(checks, "read_machine", lambda: seen)
    monkeypatch.setattr(checks, "free_on_card", lambda: free)


@pytest.fixture(scope="module")
def full_size(tmp_path_factory) -> Path:
    """FLUX.1 dev as far as headers tell."""
    shapes = flux_shapes(FluxConfig.dev())
    return write_hollow(
        tmp_path_factory.mktemp("full") / "flux1-dev.safetensors", dict.fromkeys(shapes, torch.bfloat16), shapes
    )


def test_the_card_is_described_with_what_training_needs_on_it(full_size, monkeypatch):
    ada = Card("RTX 4090", (8, 9), 24 << 30)
    machine_with(ada, monkeypatch, free=int(22.5 * 2**30))
    _, answer, lines = run("--flux", full_size)
    described = (
        "card         RTX 4090, 22.5 GiB of 24.0 GiB free, compute capability 8.9; training in nf4 needs 6.3 GiB"
    )
    assert f"{described} of it for the weights alone\n" in lines
    weights = stored_bytes(flux_shapes(FluxConfig.dev()), "nf4")
    about = {"name": "RTX 4090", "capability": [8, 9], "free": int(22.5 * 2**30), "all": 24 << 30, "weights": weights}
    assert answer["card"] == about
    assert not any("RTX 4090" in reason for reason in answer["reasons"])


@pytest.mark.parametrize(
    ("format", "gib", "sentence"),
    [
        ("nf4", 6, "the laptop card has 6.0 GiB, and the transformer's weights alone take 6.3 GiB in nf4; use another"),
        ("nf4", 8, None),
        ("int8", 8, "the laptop card has 8.0 GiB, and the transformer's weights alone take 11.2 GiB in int8; use --fo"),
        ("bf16", 24, None),
    ],
)
def test_a_card_that_cannot_hold_the_weights_is_a_reason(format, gib, sentence, full_size, monkeypatch):
    machine_with(Card("laptop card", (8, 6), gib << 30), monkeypatch)
    _, answer, lines = run("--flux", full_size, "--format", format)
    found = [reason for reason in answer["reasons"] if "laptop card" in reason]
    assert len(found) == (sentence is not None) and (sentence is None or sentence in found[0])
    assert f"card         laptop card, {gib}.0 GiB, compute capability 8.6; training in {format} needs" in lines


def test_no_card_is_one_line(monkeypatch):
    machine_with(None, monkeypatch)
    code, answer, lines = run("--model", "nano")
    assert code == 0 and answer["card"] is None
    assert lines.count("card ") == 1 and "card         none that torch can use, so training runs on the proc" in lines


def test_a_card_beside_missing_models_is_described_without_a_need(monkeypatch):
    machine_with(Card("RTX 4090", (8, 9), 24 << 30), monkeypatch)
    code, answer, lines = run()
    assert code == 2 and answer["card"]["weights"] is None
    assert "card         RTX 4090, 24.0 GiB, compute capability 8.9\n" in lines


def test_what_the_hub_would_give_counts_as_room_and_is_not_fetched(monkeypatch):
    served = Models.served

    def from_hub(self, part):
        if part == "t5xxl":
            raise NotFetched("someone/T5", ["a", "b"], 9_000_000_000)
        return served(self, part)

    monkeypatch.setattr(Models, "served", from_hub)
    code, answer, lines = run("--model", "nano")
    assert code == 0 and answer["disk"]["downloads"] == 9_000_000_000
    assert "t5xxl        2 files of someone/T5, 9.0 GB, are not in the hub's cache yet; a run fetches them" in lines


def test_room_for_what_the_hub_gives_is_wanted_on_the_disk_of_the_hubs_cache(tmp_path, monkeypatch):
    """Every place a disk of its own here: the one of the hub's cache is full, home has room."""
    hub, served = tmp_path / "other disk" / "hub", Models.served

    def from_hub(self, part):
        if part == "t5xxl":
            raise NotFetched("someone/T5", ["a"], 9_000_000_000)
        return served(self, part)

    def disk_usage(place):
        return shutil._ntuple_diskusage(10**12, 0, 1 << 30 if place == hub else 10**12)

    monkeypatch.setattr(Models, "served", from_hub)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(hub))
    monkeypatch.setattr(checks, "_by_disk", lambda places: {place: [name] for name, place in places.items()})
    monkeypatch.setattr(checks.shutil, "disk_usage", disk_usage)
    code, answer, lines = run("--model", "nano")
    assert code == 2 and len(answer["reasons"]) == 1
    assert f"8.4 GiB of disk are needed at {hub}, 1.0 GiB are free" in answer["reasons"][0]
    assert f"8.4 GiB needed (downloads 8.4 GiB), 1.0 GiB free at {hub}" in lines


@pytest.mark.parametrize(
    ("variable", "inside"), [("HF_HUB_CACHE", ""), ("HF_HOME", "hub"), ("XDG_CACHE_HOME", "huggingface/hub")]
)
def test_the_hubs_cache_is_where_the_hubs_library_has_it(variable, inside, tmp_path):
    environment = {k: v for k, v in os.environ.items() if k not in ("HF_HUB_CACHE", "HF_HOME", "HUGGINGFACE_HUB_CACHE")}
    code = [sys.executable, "-c", "from fluxq.hub import hub_cache; print(hub_cache())"]
    environment[variable] = str(tmp_path)
    printed = subprocess.run(code, env=environment, check=True, capture_output=True, text=True, cwd=ROOT).stdout
    assert Path(printed.strip()) == tmp_path / inside


def test_a_quantised_file_beside_its_original_is_named_with_the_reason(tmp_path):
    for file in (nano.FLUX, nano.AE, nano.CLIP_L, nano.T5XXL):
        shutil.copy(file, tmp_path)
    made = tmp_path / "made.safetensors"
    quantize_command(nano.FLUX, made, "nf4")
    _, answer, lines = run("--models", tmp_path)
    described = f"{made} (flux1-nano.safetensors in nf4 already): dev, 2 + 2 blocks, 192 wide, nf4, by fluxq"
    assert f"flux         {described}" in lines and answer["parts"]["flux"]["path"] == str(made)
    _, answer, lines = run("--models", tmp_path, "--format", "int8")
    assert answer["parts"]["flux"]["path"] == str(tmp_path / "flux1-nano.safetensors")
    assert f"(the only one in {tmp_path}; made.safetensors is it in nf4)" in lines


# --- one file ---


@pytest.mark.parametrize("part", PARTS)
def test_a_file_is_described_with_its_use(part):
    file = {"flux": nano.FLUX, "ae": nano.AE, "clip_l": nano.CLIP_L, "t5xxl": nano.T5XXL}[part]
    code, answer, lines = run(file)
    assert code == 0 and list(answer["parts"]) == [part] and answer["parts"][part]["precision"] == "bf16"
    assert f"holds        {PARTS[part]}" in lines and f"use it by --{part.replace('_', '-')}" in lines


def test_a_lora_is_known_and_other_files_are_refused_with_the_reason(tmp_path):
    save_file(
        {"lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": torch.ones(2, 2)},
        tmp_path / "lora.safetensors",
        {"ss_output_name": "zqx"},
    )
    code, answer, lines = run(tmp_path / "lora.safetensors")
    assert code == 0 and answer["kind"] == "a LoRA" and answer["title"] == "zqx" and "fluxq sample --lora" in lines

    fill = {name: torch.zeros(shape).bfloat16() for name, shape in flux_shapes(tiny_config()).items()}
    write_safetensors(tmp_path / "fill.safetensors", fill | {"img_in.weight": torch.zeros(64, 96)})
    code, answer, lines = run(tmp_path / "fill.safetensors")
    assert code == 2 and "has 96 inputs as of Fill where 16 are wanted" in lines and answer["parts"] == {}

    save_file({"layer.weight": torch.ones(2)}, tmp_path / "other.safetensors")
    code, answer, _ = run(tmp_path / "other.safetensors")
    assert code == 2 and "is no model that fluxq knows (its first key is layer.weight)" in answer["reasons"][0]

    near = {"img_in.weight": torch.ones(2, 2), "txt_in.bias": torch.ones(2), "blocks.0.qkv.weight": torch.ones(2, 2)}
    save_file(near, tmp_path / "near.safetensors")
    code, answer, _ = run(tmp_path / "near.safetensors")
    sentence = (
        "nearest to a FLUX.1 transformer: 46 missing (img_in.bias; txt_in.weight; time_in.in_layer.weight; time_in.in"
    )
    assert code == 2 and sentence in answer["reasons"][0]
    assert "1 unexpected (blocks.0.qkv.weight)" in answer["reasons"][0]


def transformer() -> dict[str, torch.Tensor]:
    return {name: torch.randn(shape).bfloat16() for name, shape in flux_shapes(WIDE).items()}


def as_nf4() -> dict[str, torch.Tensor]:
    tensors = transformer()
    for name in [name for name, tensor in tensors.items() if tensor.ndim == 2]:
        tensors[name], state = quantize_4bit(tensors[name], quant_type="nf4")
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
        (transformer, "bf16", "--format bf16 keeps its matrices' very bytes"),
        (as_nf4, "nf4", "--format nf4 keeps its matrices' very bytes"),
        (as_scaled_fp8, "fp8 e4m3, scaled", "--format fp8 keeps its matrices' very bytes"),
        (None, "Q8_0", "it is decoded in bands of rows, and stored once in the --format of a run: nf4"),
    ],
)
def test_a_stored_kind_is_named_with_what_becomes_of_it(tmp_path, write, precision, use):
    path = tmp_path / "flux.safetensors"
    save_file(write(), path) if write else write_gguf(path := tmp_path / "flux.gguf")
    code, answer, lines = run(path)
    assert code == 0 and answer["parts"]["flux"]["precision"] == precision
    assert answer["parts"]["flux"]["use"].startswith(use) and use in lines
    assert f"holds        a FLUX.1 transformer: dev, 1 + 1 blocks, 64 wide, {precision}; use it by --flux" in lines
    assert len(lines.splitlines()) == 3


REFUSED = {
    "ControlNet": ("controlnet_blocks.0.weight", "double_blocks.0.img_attn.qkv.weight"),
    "IP-Adapter": ("double_blocks.0.processor.ip_adapter_double_stream_k_proj.weight",),
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
def test_what_fluxq_has_no_use_for_is_named(tmp_path, name):
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
def test_a_bad_file_costs_one_sentence(tmp_path, what, command):
    """No traceback, no memory, and nothing is written."""
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
def test_a_path_that_the_system_refuses_is_one_sentence(command, tmp_path, monkeypatch):
    """As for a file in a folder that is closed to us, or on a drive that went."""

    def closed(path, *args, **options):
        if "closed" in str(path):
            raise PermissionError(13, "Permission denied", str(path))
        return stat(path, *args, **options)

    stat = os.stat
    monkeypatch.setattr(os, "stat", closed)
    others = ["--ae", nano.AE, "--clip-l", nano.CLIP_L, "--t5xxl", nano.T5XXL]
    more = {"check": [], "quantize": [tmp_path / "new"], "train --flux": others}[command]
    for path, sentence in ((tmp_path / "closed", "(Permission denied); check"), (tmp_path / ("n" * 300), "n")):
        result = CliRunner().invoke(main, [*command.split(), str(path), *map(str, more)])
        assert result.exit_code == 2 and isinstance(result.exception, SystemExit), result.exception
        assert sentence in result.stderr and len(result.stderr.splitlines()) == 1 and not list(tmp_path.iterdir())


@pytest.mark.parametrize(("content", "sentence"), [(b"GGUF....", "is GGUF of version"), (None, "does not exist")])
def test_what_is_no_safetensors_file_is_one_sentence(tmp_path, content, sentence):
    if content:
        (tmp_path / "x.safetensors").write_bytes(content * 9)
    result = CliRunner().invoke(main, ["check", str(tmp_path / "x.safetensors")])
    assert result.exit_code == 2 and sentence in result.stderr
