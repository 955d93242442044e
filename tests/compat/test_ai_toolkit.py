"""Jobs of ai-toolkit become settings, each with where it came from; what does not is said or refused."""

from __future__ import annotations

import json
import tomllib
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from PIL import Image

from fluxq import nano
from fluxq.cli.main import main
from fluxq.compat.ai_toolkit import read_job
from fluxq.compat.ai_toolkit.table import TABLE, markdown
from fluxq.compat.imported import Imported
from fluxq.compat.yaml_text import parsed_yaml
from fluxq.config import TrainConfig, keys
from fluxq.config_files import config_from_dict, read_toml
from fluxq.errors import WrongRequest
from fluxq.flow import resolution_shift
from fluxq.formats.lora.keys import matrices
from fluxq.model import FluxConfig
from fluxq.model.lora import targeted

DOCS = Path(__file__).parent.parent.parent / "docs" / "import.md"
LAYERS = [path for path in matrices(FluxConfig.dev()) if "_blocks" in path]
JOB = """
job: extension
config:
  name: my_lora
  process:
    - type: sd_trainer
      training_folder: out
      trigger_word: p3r5on
      network: {type: lora, linear: 4, linear_alpha: 16}
      save: {save_every: 2, max_step_saves_to_keep: 3}
      datasets:
        - {folder_path: photos, caption_ext: txt, resolution: [96, 128], bucket_tolerance: 16, num_repeats: 2}
      train: {steps: 3, lr: 1e-4, optimizer: adamw8bit, train_text_encoder: false, noise_scheduler: flowmatch}
      model: {name_or_path: models, is_flux: true, quantize: true}
      sample: {sample_every: 2, width: 96, height: 96, sample_steps: 1, prompts: ["[trigger] in [name]"]}
meta: {name: "[name]", version: "1.0"}
"""
BOMB = "a: &a [1, 1, 1, 1]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{last}'] * 10)}]\n" for last, name in zip("abcdefg", "bcdefgh", strict=True)
)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: photos/ with two images, masks/, and nano's files in models/."""
    monkeypatch.chdir(tmp_path)
    for name in ("photos", "masks"):
        (tmp_path / name).mkdir()
    (tmp_path / "models").symlink_to(nano.WEIGHTS)
    return tmp_path


PARSED = parsed_yaml(JOB, "job.yaml")


def job(**changes: Any) -> Imported:
    """JOB with these keys of its process, like train={"lr": 1}, and dataset={...} for those of its dataset."""
    found = deepcopy(PARSED)
    process = found["config"]["process"][0]
    process["datasets"][0] |= changes.pop("dataset", {})
    for name, value in changes.items():
        section = process.setdefault(name, {})
        process[name] = {**section, **value} if isinstance(value, dict) and isinstance(section, dict) else value
    return read_job(found)


def config(**changes: Any) -> TrainConfig:
    found = job(**changes)
    assert not found.refusals()
    return found.config()


def fluxq(*arguments: str):
    return CliRunner().invoke(main, list(arguments))


def test_every_row_says_one_thing_and_names_settings_that_exist():
    for row in TABLE:
        assert sum(map(bool, (row.to, row.ignored, row.refused))) == 1, row.name
        assert all(key in keys() for key in row.to.split(", ") if "." in key), row.to
    assert len({row.name for row in TABLE}) == len(TABLE)
    assert markdown() in DOCS.read_text(encoding="utf-8"), "write markdown() of ai_toolkit/table.py into docs/import.md"


def test_a_job_becomes_settings_that_say_where_they_come_from(folder):
    (folder / "job.yaml").write_text(JOB, encoding="utf-8")
    assert fluxq("import", "job.yaml").exit_code == 0
    text = (folder / "job.toml").read_text(encoding="utf-8")
    assert config_from_dict(read_toml(folder / "job.toml"), "") == job().config()
    for line in (
        "learning_rate = 0.0001  # train.lr: 0.0001",
        "rank = 4  # network.linear: 4",
        'timesteps = "sigmoid"  # train.timestep_type: "sigmoid", the default of ai-toolkit',
        "repeats = 2  # num_repeats: 2",
        "# network.linear_alpha 16: ignored: ai-toolkit's LoRAs of FLUX.1 have alpha = rank, whatever it says",
    ):
        assert line in text.splitlines()
    settings = [line for line in text.splitlines() if " = " in line.partition("#")[0]]
    assert all("  # " in line for line in settings)
    again = fluxq("import", "job.yaml")
    assert again.exit_code == 2 and "job.toml exists" in again.output


def test_values_keep_their_meaning():
    found = config()
    assert (found.lora.rank, found.lora.alpha, found.lora.file_format) == (4, 4.0, "diffusers")
    assert targeted(LAYERS, found.lora.targets or ()) == LAYERS
    assert (found.training.steps, found.training.optimizer_args) == (3, ("eps=1e-06",))
    assert (found.model.format, found.data.step, found.data.upscale) == ("fp8", 16, False)
    assert found.data.folders[0].resolution == ((96, 96), (128, 128))
    assert found.samples.prompts == ("p3r5on in my_lora",) and found.samples.guidance == 7
    assert (str(found.output.out), found.output.keep) == ("out/my_lora", 3)
    assert found.output.metadata == ("name=my_lora", "version=1.0")


@pytest.mark.parametrize(
    ("changes", "section", "expected"),
    [
        (
            {"train": {"timestep_type": "linear", "min_denoising_steps": 100}},
            "training",
            {"timesteps": "uniform", "max_timestep": 0.9, "min_timestep": 0.0},
        ),
        (
            {"train": {"timestep_type": "shift"}},
            "training",
            {"timesteps": "sigma", "shift": round(resolution_shift(64), 4)},
        ),
        (
            {"train": {"optimizer": "Prodigy", "lr": 1e-4}},
            "training",
            {"optimizer": "prodigy", "learning_rate": 1.0, "weight_decay": 0},
        ),
        ({"train": {"optimizer_params": {"weight_decay": 1e-4}}}, "training", {"weight_decay": 1e-4}),
        ({"train": {"lr_scheduler": "constant_with_warmup"}}, "training", {"schedule": "constant", "warmup": 1000}),
        (
            {"train": {"lr_scheduler": "cosine", "lr_scheduler_params": {"eta_min": 1e-5}}},
            "training",
            {"schedule": "cosine", "schedule_floor": 0.1},
        ),
        (
            {"train": {"loss_type": "mae", "gradient_accumulation": 3, "gradient_accumulation_steps": 1}},
            "training",
            {"loss": "l1", "accumulate": 3},
        ),
        (
            {"train": {"diff_output_preservation": True, "diff_output_preservation_class": "man"}},
            "training",
            {"preserve_class": "man"},
        ),
        ({"train": {"ema_config": {"use_ema": True}}}, "lora", {"ema": 0.999}),
        ({"train": {"ema_config": {"use_ema": False, "ema_decay": 0.99}}}, "lora", {"ema": 0.0}),
        ({"train": {"disable_sampling": True}}, "samples", {"every": 0, "prompts": ()}),
        ({"model": {"quantize": False}}, "model", {"format": None}),
        ({"model": {"qtype": "uint4"}}, "model", {"format": "nf4"}),
        ({"network": {"dropout": 0.1, "rank": 8}}, "lora", {"rank": 8, "alpha": 8, "inner_dropout": 0.1}),
    ],
)
def test_each_choice_becomes(changes, section, expected):
    found = getattr(config(**changes), section)
    assert {name: getattr(found, name) for name in expected} == expected


def test_a_dataset_keeps_its_settings():
    dataset = {"mask_path": "masks", "mask_min_value": 0.1, "is_reg": True, "shuffle_tokens": True, "keep_tokens": 1}
    folder = config(
        dataset={**dataset, "flip_x": True, "default_caption": "a man"}, train={"reg_weight": 0.5}
    ).data.folders[0]
    assert (folder.masks, folder.mask_outside, folder.mask_normalize) == ("masks", 0.1, True)
    assert folder.trigger == "", "captions of the class get no trigger"
    assert (folder.regularization, folder.prior_weight, folder.shuffle_tags, folder.keep_tokens) == (True, 0.5, True, 1)
    assert (folder.flip, folder.class_tokens, folder.repeats) == (True, "a man", 2)


@pytest.mark.parametrize(
    ("only", "but", "count"),
    [
        (
            ["transformer.single_transformer_blocks.7.proj_out", "transformer.single_transformer_blocks.12.proj_out"],
            [],
            2,
        ),
        (["single_transformer_blocks"], [], 38 * 3),
        ([], ["norm"], 19 * 8 + 38 * 2),
        (["transformer_blocks.3."], [], 10 + 3),
    ],
)
def test_names_of_layers_in_diffusers_choose_ours(only, but, count):
    names = {"only_if_contains": only, "ignore_if_contains": but}
    assert len(targeted(LAYERS, config(network={"network_kwargs": names}).lora.targets or ())) == count


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"train": {"stepz": 3}}, "train.stepz: ai-toolkit has no such key; did you mean train.steps?"),
        ({"train": {"timestep_type": "weighted"}}, 'train.timestep_type: "weighted" is not read; use one of sigmoid'),
        ({"train": {"noise_offset": 0.1}}, "train.noise_offset: fluxq does not change noise"),
        ({"train": {"bypass_guidance_embedding": True}}, "train.bypass_guidance_embedding: FLUX.1-dev"),
        ({"train": {"train_unet": False}}, "train.train_unet: the transformer is always trained"),
        ({"train": {"optimizer": "automagic"}}, 'train.optimizer: "automagic" is not read'),
        ({"train": {"lr_scheduler": "linear"}}, 'train.lr_scheduler: "linear" is not read'),
        ({"model": {"is_flux": False, "arch": "sdxl"}}, 'model.arch: "sdxl" is another model'),
        ({"network": {"type": "lokr"}}, 'network.type: "lokr" is not read'),
        ({"network": {"network_kwargs": {"only_if_contains": ["to_q"]}}}, "as a whole, not transformer."),
        ({"dataset": {"caption_ext": "json"}}, "datasets.0.caption_ext: captions are read from"),
        ({"dataset": {"control_path": "c"}}, "datasets.0.control_path: fluxq trains without control images"),
        (
            {"dataset": {"folder_path": r"D:\zqx"}, "model": {"vae_path": "E:/ae.sft"}},
            r"not on this machine: E:/ae.sft, D:\zqx; --map",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused_by_name(changes, why):
    assert why in "; ".join(job(**changes).refusals())


def test_what_would_be_lost_is_said():
    found = job(sample={"prompts": ["a --w 99", "b"]}, dataset={"caption_dropout_rate": 0.1})
    said = "\n".join(found.lines)
    for words in ("--w 99 of a prompt is left out", "all previews have one seed", "keeps the trigger in dropped"):
        assert words in said
    given = {k for v in PARSED["config"]["process"][0].values() if isinstance(v, dict) for k in v}
    assert all(f".{key} " in said for key in given)


def test_paths_of_another_machine_are_mapped_and_hub_ids_stay(folder):
    found = job(model={"name_or_path": "black-forest-labs/FLUX.1-dev"})
    assert str(found.config().model.models) == "black-forest-labs/FLUX.1-dev" and not found.refusals()
    moved = JOB.replace("folder_path: photos", r"folder_path: 'D:\data\photos'")
    (folder / "job.json").write_text(json.dumps(parsed_yaml(moved, "")), encoding="utf-8")
    answer = fluxq("import", "job.json", "--lint", "--json")
    assert answer.exit_code == 2 and json.loads(answer.stdout)["refused"] == [
        r"not on this machine: D:\data\photos; --map OLD=NEW replaces how paths begin"
    ]
    assert fluxq("import", "job.json", "--map", rf"D:\data={folder}", "--out", "my.toml").exit_code == 0
    assert config_from_dict(read_toml(folder / "my.toml"), "").data.folders[0].path == folder / "photos"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (BOMB, "more than 20,000 values"),
        ("a: &a [*a]", "an alias that contains itself"),
        ("a: 1\nb: 2\na: 3", "has a twice"),
        ("[" * 5000, "job.yaml"),
        ("a: !!python/object/apply:os.system ['true']", "is not valid YAML"),
        ("a: [1", "is not valid YAML"),
        ("a: 1" + " " * 1_000_000, "characters"),
        ("job: extension\nconfig: {name: a, process: [{type: ti_trainer}]}", "the processes of this job are"),
        ("config: {process: []}", "no config.process"),
        (
            "config: {name: a, process: [{type: sd_trainer, datasets: [{folder_path: .}], train: "
            "{gradient_accumulation_steps: 4}}]}",
            "counts train.steps and all other steps before they are accumulated",
        ),
        ("lora_rank: 3\nbase_model_name: a\n", "is a config of OneTrainer; fluxq import reads jobs of ai-toolkit"),
        ("config: {process: [{type: sd_trainer, datasets: 3}]}", "has no datasets"),
        ("[]", "is of a program that fluxq does not know"),
    ],
)  # fmt: skip
def test_bad_files_are_refused_in_a_sentence(text, why, folder):
    (folder / "job.yaml").write_text(text, encoding="utf-8")
    answer = fluxq("import", "job.yaml")
    assert answer.exit_code == 2 and why in answer.output and "Traceback" not in answer.output


def test_numbers_are_numbers_and_text_in_comments_stays_in_them():
    assert parsed_yaml("[1e-4, 1E5, 2.5e-3, 1_0e1, e5, 1.5, '1e-4']", "") == [
        1e-4,
        1e5,
        2.5e-3,
        100.0,
        "e5",
        1.5,
        "1e-4",
    ]
    found = job(sample={"prompts": ["a\x1b[31m\nb = 3\x7f"]})
    assert config_from_dict(tomllib.loads(found.toml("x\ny.yaml")), "") == found.config()


@pytest.mark.slow
@pytest.mark.parametrize("value", [{}, [[1]], {1: 2}, "~x", "x" * 300, -1, 10**400])
def test_values_of_any_type_are_taken_or_refused(value):
    for row in (row for row in TABLE if row.to):
        section, _, name = row.name.rpartition(".")
        changes = {name: value}
        for outer in reversed([part for part in section.split(".") if part]):
            changes = {"dataset" if outer == "datasets" else outer: changes}
        try:
            found = job(**changes)
            assert found.refusals() or found.toml("job.yaml")
        except WrongRequest as error:
            assert "ai-toolkit" in str(error) or "trainer" in str(error)


@pytest.mark.slow
def test_an_imported_job_trains(folder):
    for i in range(2):
        Image.effect_mandelbrot((160, 160), (-2, -1, 1, 1), 20 + i).convert("RGB").save(folder / f"photos/{i}.png")
        (folder / f"photos/{i}.txt").write_text("[trigger], red", encoding="utf-8")
    (folder / "job.yaml").write_text(JOB, encoding="utf-8")
    assert fluxq("import", "job.yaml").exit_code == 0
    answer = fluxq("train", "--config", "job.toml")
    assert answer.exit_code == 0, answer.output
    assert {path.name for path in (folder / "out/my_lora").glob("*.safetensors")} == {
        "my_lora.safetensors",
        "my_lora-step00000002.safetensors",
    }
