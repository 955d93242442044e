"""The names of other trainers: each leads to a setting that exists or to a reason, before spelling is looked at."""

from __future__ import annotations

from collections import Counter

import click
import pytest
from click.testing import CliRunner

from fluxq.cli.main import main
from fluxq.cli.options import unknown_option
from fluxq.compat.kohya.table import BY_NAME
from fluxq.config import TrainConfig, keys, own_names
from fluxq.config_files import config_from_dict, to_toml
from fluxq.errors import WrongRequest
from fluxq.names import TRAINERS, meaning, table, trainer_of

OWN = own_names()
FLAGS = {flag for parameter in main.commands["train"].params for flag in parameter.opts}


def said(values: dict) -> str:
    with pytest.raises(WrongRequest) as error:
        config_from_dict(values, "my.toml")
    return str(error.value)


def told(*arguments: str) -> str:
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    return line


def test_every_row_leads_to_a_setting_an_option_or_a_reason():
    known = {*keys(), *FLAGS}
    for row in table():
        if row.exists:
            assert row.here in known, row
        else:
            assert row.here in ("not for FLUX.1", "not needed", "not supported") and row.note, row
        assert any(row.names) and len(row.names) == len(TRAINERS)
    assert len({name for row in table() for names in row.names for name in names}) >= 400


NEAREST = {
    *("min_timestep", "max_timestep"),  # have no effect on FLUX.1 in sd-scripts
    *("lowram", "highvram", "gradient_checkpointing", "cpu_offload_checkpointing"),  # fluxq chooses
    *("resume", "initial_epoch", "initial_step", "skip_until_initial_step"),  # of other runs than fluxq's
    "lr_scheduler_type",  # a class in sd-scripts
    *("network_train_unet_only", "network_module", "caption_extension", "enable_bucket"),  # count only in fluxq kohya
    *("config_file", "dataset_config"),  # files of sd-scripts
}
"""Names that a file of fluxq leads to the nearest setting, or calls not needed, and fluxq kohya reads otherwise."""


def test_names_of_sd_scripts_mean_what_fluxq_kohya_makes_of_them():
    for row in table():
        for option in (BY_NAME[name] for name in row.names[0] if name in BY_NAME and name not in NEAREST):
            read = [key for key in option.to.split(", ") if "." in key]
            assert row.exists == bool(option.to), option
            assert not read or any(f"{row.here}.".startswith(f"{key}.") for key in read), option


@pytest.mark.parametrize("trainer", range(len(TRAINERS)), ids=TRAINERS)
def test_a_trainers_name_means_one_thing(trainer):
    names = [name for row in table() for name in row.names[trainer]]
    assert len(names) >= 40 and [name for name, count in Counter(names).items() if count > 1] == []
    for row in table():
        for name in row.names[trainer]:
            if "." not in name:
                other = meaning(name, OWN)
                assert other and name in sum(other.names, ()), name


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        (
            {"training": {"max_train_steps": 9}},
            "key 'training.max_train_steps' in my.toml; did you mean 'training.steps'?",
        ),
        ({"network_dim": 9}, "unknown key 'network_dim' in my.toml; did you mean 'lora.rank'?"),
        ({"network": {"linear": 9}}, "unknown key 'network.linear' in my.toml; did you mean 'lora.rank'?"),
        ({"data": {"rank": 9}}, "unknown key 'data.rank' in my.toml; did you mean 'lora.rank'?"),
        ({"training": {"lr": 9}}, "unknown key 'training.lr' in my.toml; did you mean 'training.learning_rate'?"),
        ({"lora": {"name": "x"}}, "unknown key 'lora.name' in my.toml; did you mean 'output.name'?"),
        ({"lora": {"format": "x"}}, "unknown key 'lora.format' in my.toml; did you mean 'model.format'?"),
        ({"lora": {"Network-Dim": 9}}, "unknown key 'lora.Network-Dim' in my.toml; did you mean 'lora.rank'?"),
        ({"samples": {"guidance_scale": 9}}, "my.toml; did you mean 'samples.guidance'?"),
        ({"training": {"guidance_scale": 9}}, "my.toml; did you mean 'training.guidance'?"),
        (
            {"training": {"max_denoising_steps": 9}},
            "'training.max_timestep' (0 to 1: steps of 1000 are divided by 1000)?",
        ),
        ({"training": {"num_train_epochs": 9}}, "did you mean 'training.epochs' (or training.steps: epochs x images"),
        (
            {"data": {"folders": [{"image_dir": "a"}]}},
            "'data.folders.0.image_dir' in my.toml; did you mean 'data.folders.0.path'?",
        ),
        ({"data": {"folders": [{"path": "a", "batch_size": 9}]}}, "did you mean 'data.folders.0.batch'?"),
        ({"model": {"xformers": True}}, "'model.xformers' in my.toml is not needed: attention always runs"),
        ({"output": {"push_to_hub": True}}, "'output.push_to_hub' in my.toml is not supported: LoRAs are only saved"),
        ({"lora": {"color": 9}}, "unknown key 'lora.color' in my.toml; fluxq train --help-all lists all settings"),
        ({"zqx": {}}, "unknown key 'zqx' in my.toml; fluxq train --help-all lists all settings"),
    ],
)
def test_an_unknown_key_is_led_to_its_setting_or_nowhere(values, sentence):
    assert sentence in said(values)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("train --max_train_steps 9", "error: unknown option --max_train_steps; did you mean --steps?"),
        ("train --learning-rate 9", "error: unknown option --learning-rate; did you mean --lr?"),
        ("train --network-dim 9", "did you mean --rank?"),
        ("train --max_grad_norm 9", "did you mean --set training.clip=VALUE?"),
        ("train --guidance_scale 9", "did you mean --set training.guidance=VALUE?"),
        ("train --num_repeats 9", "did you mean repeats in [[data.folders]] of a file for --config?"),
        ("train --resume_from_checkpoint x", "did you mean --resume (the directory of the run to continue)?"),
        ("train --xformers", "error: --xformers is not needed: attention"),
        ("train --sedd 9", "did you mean --seed?"),
        ("train --zqx 9", "error: unknown option --zqx; main train --help lists all"),
        ("sample --max_train_steps 9", "error: unknown option --max_train_steps; main sample --help lists all"),
        ("sample --sampel-steps 9", "did you mean --steps?"),
        ("profile --network_dim 9", "did you mean --rank?"),
        ("lora info --jsn x", "did you mean --json?"),
    ],
)
def test_an_unknown_option_is_led_to_its_own_or_nowhere(arguments, sentence):
    assert sentence in told(*arguments.split())


def test_no_suggestion_is_an_option_that_the_command_lacks():
    """Every name of every trainer, in three commands: what is suggested can be written there."""
    for name in ("train", "sample", "profile"):
        flags = {flag for parameter in main.commands[name].params for flag in parameter.opts}
        foreign = {word.rpartition(".")[2] for row in table() for names in row.names for word in names}
        for option in sorted(foreign):
            with click.Context(main.commands[name], info_name=name) as context:
                sentence = unknown_option(click.NoSuchOption(f"--{option}", ctx=context))
            if (suggested := sentence.partition("did you mean ")[2]).startswith("--"):
                assert suggested.split()[0].rstrip("?") in flags, sentence


FOREIGN = {  # file -> what it is; written after files that these programs ship or their users publish
    ("dataset.toml", "[[datasets]]\nbatch_size = 1\n[[datasets.subsets]]\nimage_dir = 'a'\n"): "config of sd-scripts",
    ("flux.toml", "[model_arguments]\npretrained_model_name_or_path = 'a'\nt5xxl = 'b'\n[o]\noutput_dir = 'c'\n"): (
        "config of sd-scripts"
    ),
    (
        "job.yaml",
        "job: extension\nconfig:\n  process:\n  - type: sd_trainer\n    training_folder: 'o'\n    network:\n"
        "      linear: 16\n",
    ): "config of ai-toolkit",
    (
        "job.json",
        '{"job": "extension", "config": {"process": [{"training_folder": "o", "network": {"linear": 16}}]}}',
    ): ("config of ai-toolkit"),
    ("flux.json", '{"base_model_name": "a", "lora_rank": 8, "training_method": "LORA", "clip_grad_norm": 1}'): (
        "config of OneTrainer"
    ),
    ("config.json", '{\n "--model_family": "flux",\n "--lora_type": "standard",\n "--max_train_steps": 9\n}'): (
        "config of SimpleTuner"
    ),
    (
        "data.json",
        '[{"id": "a", "instance_data_dir": "a", "cache_dir_vae": "b", "repeats": 5}]',
    ): "config of SimpleTuner",
    ("ui.json", '{"last_node_id": 1, "nodes": [], "links": []}'): "workflow of ComfyUI",
    ("api.json", '{"1": {"class_type": "InitFluxLoRATraining", "inputs": {}}}'): "workflow of ComfyUI",
}


@pytest.mark.parametrize(("file", "what"), FOREIGN.items(), ids=[name for name, _ in FOREIGN])
def test_a_config_of_another_trainer_is_recognized(file, what, tmp_path):
    path = tmp_path / file[0]
    path.write_text(file[1], encoding="utf-8")
    for arguments in (["train", "--config", str(path)], ["train", str(path)]):
        kinds = {"sd-scripts": "fluxq kohya takes it as it is"}
        kinds |= dict.fromkeys(("ai-toolkit", "ComfyUI"), f"fluxq import {path} writes a TOML file")
        then = next((then for name, then in kinds.items() if name in what), "write its settings into a TOML file")
        assert f"error: {path} is a {what}; {then}" in told(*arguments)


@pytest.mark.parametrize(
    "text", ["", "{}", "[lora\nrank = 3", "rank = 3\nsteps = 4\nlearning_rate: 1", "max_train_steps = 4\n"]
)
def test_what_has_no_two_names_of_a_trainer_is_no_config_of_it(text):
    assert trainer_of(text, own_names()) is None


def test_our_own_files_are_not_taken_for_another_trainers(tmp_path):
    broken = to_toml(TrainConfig())
    assert trainer_of(broken, own_names()) is None
    path = tmp_path / "my.toml"
    path.write_text("[training]\nmax_train_steps = 9\nnetwork_dim = 4\noutput_dir = 'a'\n", encoding="utf-8")
    assert "my.toml; did you mean 'training.steps'?" in told("train", "--config", str(path))
    assert (
        told("train", str(path))
        == f"error: {path} is a file of settings, not a folder of images; pass it with --config {path}"
    )
