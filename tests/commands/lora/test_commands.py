"""`fluxq lora`: what each command writes, the error that it measures, and refusals that write nothing."""

from __future__ import annotations

import json

import pytest
import torch
from click.testing import CliRunner
from lora_files import ALPHA, CONFIG, RANK, WRITERS
from safetensors.torch import load_file

from fluxq import nano
from fluxq.cli.main import main
from fluxq.commands.lora.extract import nearest
from fluxq.formats.checkpoint.files import Checkpoint, write_safetensors
from fluxq.formats.checkpoint.shapes import flux_shapes
from fluxq.formats.checkpoint.source import open_flux
from fluxq.formats.lora.algebra import Adapter
from fluxq.formats.lora.read import load_lora
from fluxq.formats.lora.write import save_lora

SHAPES = flux_shapes(CONFIG)
PAIR = ("double_blocks.1.img_attn.qkv", "single_blocks.0.linear2")

a, b, c, d, x, y, z = (f"{letter}.safetensors" for letter in "abcdxyz")


def run(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments])


def answer(*arguments):
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def written(path, dialect, dtype=torch.float32, **metadata):
    tensors, changes, inside = WRITERS[dialect]()
    cast = {key: tensor if key.endswith(".alpha") else tensor.to(dtype) for key, tensor in tensors.items()}
    write_safetensors(path, cast, inside | metadata)
    return changes


def adapters(modules, rank, alpha) -> dict[str, Adapter]:
    shapes = {m: SHAPES[f"{m}.weight"] for m in modules}
    return {m: Adapter(torch.randn(rank, k), torch.randn(n, rank) * 0.05, alpha) for m, (n, k) in shapes.items()}


def distance(found, wanted) -> float:
    """|found - wanted| / |wanted| over all modules, from whole matrices in fp64."""
    assert found.keys() == wanted.keys()
    lost = whole = 0.0
    for module, change in wanted.items():
        a = found[module]
        lost += (a.scale * a.up.double() @ a.down.double() - change.double()).square().sum().item()
        whole += change.double().square().sum().item()
    return (lost / whole) ** 0.5


@pytest.mark.parametrize("to", ["kohya", "diffusers", "comfy", "peft"])
def test_convert_is_exact_and_keeps_the_metadata(tmp_path, to):
    wanted = written(tmp_path / x, "OneTrainer legacy", ss_tag_frequency='{"a": {"zqx": 3, "red": 9}}', sshs_x="old")
    answered = answer("lora", "convert", tmp_path / x, tmp_path / y, "--to", to)
    lora = load_lora(tmp_path / y)
    assert distance(lora.adapters, wanted) <= 1e-6 and answered["relative_error"] <= 1e-6
    assert (answered["source_dialect"], answered["dialect"], answered["precision"]) == ("onetrainer", to, "fp32")
    assert lora.metadata["ss_tag_frequency"] and "sshs_x" not in lora.metadata
    assert lora.metadata["modelspec.architecture"] == "flux-1-dev/lora"
    assert lora.metadata["ss_network_dim"] == "Dynamic"  # fused layers have the ranks of their parts together


def test_convert_to_half_precision_measures_its_rounding(tmp_path):
    wanted = written(tmp_path / x, "kohya")
    answered = answer("lora", "convert", tmp_path / x, tmp_path / y, "--precision", "bf16")
    assert answered["relative_error"] == pytest.approx(distance(load_lora(tmp_path / y).adapters, wanted), rel=1e-3)
    assert 1e-4 < answered["relative_error"] < 2**-7
    assert Checkpoint(tmp_path / y).dtype("lora_unet_txt_in.lora_down.weight") == torch.bfloat16
    answered = answer("lora", "convert", tmp_path / y, tmp_path / z)  # the precision of the source
    assert answered["precision"] == "bf16" and answered["relative_error"] == 0


def test_convert_with_a_rank_is_the_best_of_that_rank(tmp_path):
    wanted = written(tmp_path / x, "ai-toolkit")
    answered = answer("lora", "convert", tmp_path / x, tmp_path / y, "--rank", 4)
    lost = sum(torch.linalg.svdvals(change)[4:].square().sum().item() for change in wanted.values())
    whole = sum(change.square().sum().item() for change in wanted.values())
    assert answered["ranks"] == [4] and load_lora(tmp_path / y).ranks == [4]
    assert answered["relative_error"] == pytest.approx((lost / whole) ** 0.5, rel=1e-4)


def test_resize_by_energy_keeps_that_share(tmp_path):
    wanted = written(tmp_path / x, "ai-toolkit")
    answered = answer("lora", "resize", tmp_path / x, tmp_path / y, "--energy", 0.8)
    read = load_lora(tmp_path / y).adapters
    for module, change in wanted.items():
        shares = torch.linalg.svdvals(change).square().cumsum(0)
        assert read[module].rank == 1 + int((shares < 0.8 * shares[-1]).sum()), module
    assert answered["relative_error"] == pytest.approx(distance(read, wanted), rel=1e-3)
    assert answered["relative_error"] <= 0.2**0.5


def test_merged_loras_add_up_at_their_strengths(tmp_path):
    one, two = written(tmp_path / a, "ai-toolkit, one down"), written(tmp_path / b, "XLabs")
    answered = answer("lora", "merge", f"{tmp_path / a}=0.5", f"{tmp_path / b}=-2", "--out", tmp_path / c)
    wanted = {m: 0.5 * one.get(m, 0) - 2 * two.get(m, 0) for m in {**one, **two}}
    lora = load_lora(tmp_path / c)
    assert distance(lora.adapters, wanted) <= 1e-6 and answered["relative_error"] <= 1e-6
    assert lora.metadata["modelspec.merged_from"] == "a.safetensors=0.5, b.safetensors=-2"
    assert lora.adapters["double_blocks.1.txt_attn.qkv"].rank == 2 * RANK
    answered = answer("lora", "merge", tmp_path / a, tmp_path / b, "--out", tmp_path / d, "--rank", 3)
    wanted = {m: one.get(m, 0) + two.get(m, 0) for m in {**one, **two}}
    assert answered["ranks"] == [3]
    assert answered["relative_error"] == pytest.approx(distance(load_lora(tmp_path / d).adapters, wanted), rel=1e-3)


def test_a_lora_merged_and_extracted_again_is_the_same(tmp_path):
    lora = adapters(PAIR, rank=3, alpha=2.0)
    save_lora(tmp_path / a, lora, CONFIG, dtype=torch.float32)
    source = open_flux(nano.FLUX)
    wide = {name: source.value(name, torch.float32) for name in source.shapes}
    write_safetensors(tmp_path / "wide.safetensors", wide)
    merged = tmp_path / "merged.safetensors"
    answered = answer("lora", "merge", f"{tmp_path / a}=0.8", "--base", tmp_path / "wide.safetensors", "--out", merged)
    assert answered["modules"] == 2 and answered["relative_error"] <= 1e-5
    answered = answer("lora", "extract", nano.FLUX, merged, tmp_path / b, "--rank", 3, "--precision", "fp32")
    wanted = {module: 0.8 * adapter.change() for module, adapter in lora.items()}
    assert distance(load_lora(tmp_path / b).adapters, wanted) <= 1e-5
    assert answered["difference_lost"] <= 1e-5 and answered["modules"] == 2
    answered = answer("lora", "extract", nano.FLUX, merged, tmp_path / c, "--rank", 1, "--precision", "fp32")
    lost = sum(torch.linalg.svdvals(w.double())[1:].square().sum().item() for w in wanted.values())
    whole = sum(w.double().square().sum().item() for w in wanted.values())
    assert answered["difference_lost"] == pytest.approx((lost / whole) ** 0.5, rel=1e-3)


def test_extract_names_what_a_lora_cannot_change(tmp_path):
    source = open_flux(nano.FLUX)
    tuned = {name: source.value(name, torch.float32) for name in source.shapes}
    tuned["single_blocks.0.linear2.weight"] += 0.01 * torch.randn(192, 960)
    for name in ("img_in.weight", "single_blocks.0.linear2.bias"):
        tuned[name] = tuned[name] + 1
    write_safetensors(tmp_path / "tuned.safetensors", tuned)
    result = run("lora", "extract", nano.FLUX, tmp_path / "tuned.safetensors", tmp_path / x, "--rank", 4)
    assert result.exit_code == 0, result.output
    printed = " ".join(result.output.split())
    assert "cannot change it: 2 tensors (img_in.weight, single_blocks.0.linear2.bias)" in printed


@pytest.mark.parametrize("spoilt", [0, 1])
def test_extract_names_the_model_that_is_not_finite(tmp_path, spoilt):
    tensors = load_file(nano.FLUX)
    tensors["single_blocks.0.linear2.weight"][3, 5] = torch.nan
    write_safetensors(path := tmp_path / "nan.safetensors", tensors)
    result = run("lora", "extract", *[(path, nano.FLUX), (nano.FLUX, path)][spoilt], tmp_path / x, "--rank", 4)
    sentence = f"error: {path} has NaN or infinite numbers in single_blocks.0.linear2.weight"
    assert result.exit_code == 2 and sentence in result.stderr.replace("\n", "")


@pytest.mark.parametrize("shape", [(200, 90), (90, 200), (12, 300)])
def test_the_randomized_decomposition_is_near_the_exact_one(shape):
    torch.manual_seed(1)
    left, right = (torch.linalg.qr(torch.randn(n, min(shape)))[0] for n in shape)
    values = torch.arange(1, min(shape) + 1).float() ** -0.7
    matrix = left * values @ right.T
    error = (matrix - nearest(matrix, 8).change()).norm()
    assert error <= 1.01 * values[8:].norm()
    assert torch.equal(nearest(matrix, 8).up, nearest(matrix, 8).up)  # the seed is fixed


PROGRAMS = {
    "kohya": {"ComfyUI": "yes", "Forge": "yes", "diffusers": "partly: it drops 4 modules outside", "sd-scripts": "yes"},
    "ai-toolkit": {"ComfyUI": "yes", "diffusers": "yes", "sd-scripts": "after its convert"},
    "diffusers with alpha": {"ComfyUI": "yes", "diffusers": "yes", "sd-scripts": "wrong"},
    "diffusers with metadata": {"ComfyUI": "wrong", "Forge": "wrong", "diffusers": "yes"},
    "diffusers down/up": {"ComfyUI": "yes", "diffusers": "wrong"},
    "comfy A/B": {"ComfyUI": "yes", "diffusers": "no: applies nothing"},
    "comfy down/up": {"ComfyUI": "yes", "diffusers": "partly: it drops 4 modules outside"},
    "OneTrainer legacy": {"ComfyUI": "yes", "diffusers": "attention only"},
    "fal Kontext": {"ComfyUI": "no"},
    "XLabs": {"ComfyUI": "only if", "Forge": "no", "diffusers": "yes"},
    "DiffSynth": {"Forge": "no"},
    "OneTrainer original": {"ComfyUI": "not tried"},
    "SimpleTuner lycoris": {"ComfyUI": "yes"},
}


@pytest.mark.parametrize("dialect", PROGRAMS)
def test_info_names_the_programs_that_read_it(tmp_path, dialect):
    written(tmp_path / x, dialect)
    answered = answer("lora", "info", tmp_path / x)
    for program, beginning in PROGRAMS[dialect].items():
        assert answered["programs"][program].startswith(beginning), program


def test_info_groups_layers_and_finds_the_trigger(tmp_path):
    wanted = written(tmp_path / x, "kohya", torch.float16, **{"modelspec.trigger_phrase": "zqx [b]", "ss_steps": "70"})
    answered = answer("lora", "info", tmp_path / x)
    assert (answered["dialect"], answered["precision"], answered["modules"], answered["trigger"]) == (
        "kohya",
        "float16",
        15,
        "zqx [b]",
    )
    row = answered["layers"]["double_blocks.*.txt_mlp.2"]
    assert (row["count"], row["ranks"]) == (1, [RANK]) and row["scales"][0] == pytest.approx(ALPHA / RANK)
    assert row["norm_mean"] == pytest.approx(wanted["double_blocks.0.txt_mlp.2"].norm().item(), rel=1e-2)
    screen = run("lora", "info", tmp_path / x).output
    assert "zqx [b]" in screen and "steps         70" in screen
    written(tmp_path / y, "kohya", ss_tag_frequency='{"a": {"red": 9}, "b": {"red": 1, "zqx": 12}}')
    assert answer("lora", "info", tmp_path / y)["trigger"] == "zqx"
    for nonsense in ("[1]", "[" * 100_000):
        written(tmp_path / z, "kohya", ss_tag_frequency=nonsense, ss_network_args=nonsense)
        assert answer("lora", "info", tmp_path / z)["trigger"] is None


def test_info_shows_metadata_of_strangers_as_plain_text(tmp_path):
    written(tmp_path / x, "kohya", **{"modelspec.title": "[/b]\x1b[31m", "modelspec.trigger_phrase": "[red]zqx"})
    screen = run("lora", "info", tmp_path / x).output
    assert "'[/b]\\x1b[31m'" in screen and "[red]zqx" in screen and "\x1b" not in screen
    screen = run("check", tmp_path / x).output
    assert "'[/b]\\x1b[31m'" in screen and "\x1b" not in screen


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["convert", "{tmp}/x.safetensors", "{tmp}/there"], "there exists; choose another name"),
        (["convert", "{tmp}/x.safetensors", "{tmp}"], "is an existing folder; choose another name"),
        (["convert", "{tmp}/absent", "{tmp}/y.safetensors"], "absent does not exist"),
        (["convert", nano.FLUX, "{tmp}/y.safetensors"], "is a FLUX.1 transformer, not a LoRA"),
        (["convert", "{tmp}/there", "{tmp}/y.safetensors"], "there"),
        (["convert", "{tmp}/lies", "{tmp}/y.safetensors"], "has a damaged header"),
        (["convert", "{tmp}/nan", "{tmp}/y.safetensors"], "NaN or infinite numbers"),
        (
            ["convert", "{tmp}/large", "{tmp}/y.safetensors", "--precision", "fp16"],
            "has numbers out of the range of F16",
        ),
        (
            ["convert", "{tmp}/large", "{tmp}/y.safetensors", "--to", "peft", "--precision", "fp16"],
            "has numbers out of the range of F16",
        ),
        (
            ["convert", "{tmp}/ranks", "{tmp}/y.safetensors"],
            "is damaged: 1 wrong tensor (lora_unet_txt_in.lora_up.weight is (192, 4)",
        ),
        (
            ["merge", "{tmp}/large=1e300", "--base", nano.FLUX, "--out", "{tmp}/y.safetensors"],
            "is not finite after merging the LoRA",
        ),
        (["resize", "{tmp}/x.safetensors", "{tmp}/y.safetensors"], "give either --rank N or --energy X"),
        (
            ["resize", "{tmp}/x.safetensors", "{tmp}/y.safetensors", "--rank", "2", "--energy", "0.5"],
            "give either --rank N or --energy X",
        ),
        (["resize", "{tmp}/x.safetensors", "{tmp}/y.safetensors", "--energy", "nan"], "energy"),
        (["merge", "{tmp}/x.safetensors=much", "--out", "{tmp}/y.safetensors"], "is not a number"),
        (
            ["merge", "{tmp}/x.safetensors", "{tmp}/big", "--out", "{tmp}/y.safetensors"],
            "are LoRAs of different models",
        ),
        (["merge", "{tmp}/big", "--base", nano.FLUX, "--out", "{tmp}/y.safetensors"], "none of its 1 modules"),
        (["merge", "{tmp}/x.safetensors", "--base", nano.AE, "--out", "{tmp}/y.safetensors"], "ae.safetensors"),
        (
            ["merge", "{tmp}/x.safetensors", "--base", nano.FLUX, "--out", "{tmp}/y.safetensors", "--rank", "3"],
            "--rank is for a merged LoRA",
        ),
        (["extract", nano.FLUX, nano.FLUX, "{tmp}/y.safetensors"], "have the same weights in all blocks"),
        (["extract", nano.FLUX, nano.AE, "{tmp}/y.safetensors"], "ae.safetensors"),
        (["info", "{tmp}/absent"], "absent does not exist"),
    ],
)
def test_wrong_requests_are_one_sentence_and_write_nothing(tmp_path, arguments, sentence):
    written(tmp_path / x, "kohya")
    (tmp_path / "there").write_text("mine")
    big = {"down": torch.ones(2, 3072), "up": torch.ones(3072, 2)}
    name = "lora_unet_double_blocks_18_img_attn_proj"
    write_safetensors(tmp_path / "big", {f"{name}.lora_{part}.weight": tensor for part, tensor in big.items()})
    (tmp_path / "lies").write_bytes(
        (tmp_path / x).read_bytes().replace(b'"data_offsets":[0,', b'"data_offsets":[8,', 1)
    )
    spoilt, _, _ = WRITERS["kohya"]()
    spoilt["lora_unet_txt_in.lora_up.weight"][3, 1] = torch.nan
    write_safetensors(tmp_path / "nan", spoilt)
    large, _, _ = WRITERS["kohya"]()
    large["lora_unet_txt_in.lora_up.weight"] *= 1e6
    write_safetensors(tmp_path / "large", large)
    write_safetensors(tmp_path / "ranks", large | {"lora_unet_txt_in.lora_down.weight": torch.ones(5, 128)})
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    result = run("lora", *(str(a).format(tmp=tmp_path) for a in arguments))
    assert result.exit_code == 2, result.output
    assert sentence in result.stderr and "Traceback" not in result.output
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_overwrite_replaces_even_the_source(tmp_path):
    wanted = written(tmp_path / x, "ai-toolkit")
    assert run("lora", "convert", tmp_path / x, tmp_path / x, "--overwrite").exit_code == 0
    assert load_lora(tmp_path / x).dialect == "kohya"
    assert distance(load_lora(tmp_path / x).adapters, wanted) <= 1e-6


def test_a_lora_of_the_text_encoder_alone_converts_to_all_but_peft(tmp_path):
    name = "lora_te1_text_model_encoder_layers_0_mlp_fc1"
    parts = {"lora_down.weight": torch.randn(3, 64), "lora_up.weight": torch.randn(256, 3), "alpha": torch.tensor(1.5)}
    write_safetensors(tmp_path / x, {f"{name}.{part}": tensor for part, tensor in parts.items()})
    assert answer("lora", "info", tmp_path / x)["clip_modules"] == 1
    for to in ("kohya", "diffusers", "comfy"):
        assert (
            answer("lora", "convert", tmp_path / x, tmp_path / f"{to}.safetensors", "--to", to)["relative_error"]
            <= 1e-6
        )
        wanted = 0.5 * parts["lora_up.weight"].double() @ parts["lora_down.weight"].double()
        assert distance(load_lora(tmp_path / f"{to}.safetensors").clip, {"encoder.layers.0.mlp.fc1": wanted}) <= 1e-6
    refused = run("lora", "convert", tmp_path / x, tmp_path / "peft", "--to", "peft")
    assert refused.exit_code == 2 and "adapts only the text encoder" in refused.stderr
    assert not (tmp_path / "peft").exists()


@pytest.mark.parametrize("command", ["convert", "resize --rank 1", "merge"])
def test_a_target_that_no_program_would_find_is_refused_before_anything_is_read(command, tmp_path):
    name, *options = command.split()
    source, target = tmp_path / "gone.safetensors", tmp_path / "style.ckpt"
    paths = [source, "--out", target] if name == "merge" else [source, target]
    to = ["--to", "kohya"] if name == "convert" else []
    result = CliRunner().invoke(main, ["lora", name, *map(str, paths), *to, *options])
    assert result.exit_code == 2 and f"{target} must be named .safetensors, like style.safetensors" in result.stderr
