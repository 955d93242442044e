"""Command lines, dataset configs and prompts are read as sd-scripts reads them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fluxq.compat.kohya import parse_prompt, read_command, read_dataset
from fluxq.compat.kohya.command import PROGRAM, pasted
from fluxq.compat.kohya.prompts import read_prompts
from fluxq.compat.kohya.scripts import script_command
from fluxq.errors import WrongRequest


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("a cat, sitting", {"prompt": "a cat, sitting"}),
        (
            "a cat --w 768 --H 1024 --d 7 --s 20 --l 1.5 --g 3.5 --n bad, hands",
            {
                **{"prompt": "a cat", "width": 768, "height": 1024, "seed": 7, "sample_steps": 20},
                **{"scale": 1.5, "guidance_scale": 3.5, "negative_prompt": "bad, hands"},
            },
        ),
        (
            "x --ss euler --cn a.png --ctr 0.5 --rcfg 2 --fs 3",
            {
                **{"prompt": "x", "sample_sampler": "euler", "controlnet_image": "a.png", "cfg_trunc_ratio": 0.5},
                **{"renorm_cfg": 2.0, "flow_shift": "3"},
            },
        ),
        ("a --s 0 --w 5 --w 6", {"prompt": "a", "sample_steps": 1, "width": 6}),
        ("a --s 5000", {"prompt": "a", "sample_steps": 1000}),
        ("w 512", {"prompt": "w 512", "width": 512}),  # the prompt is read as an option too
        ("a --l 1.2.3 --w x --q 1 --d -1", {"prompt": "a"}),
        ("a--w 512", {"prompt": "a--w 512"}),
        ("a --w 512.9", {"prompt": "a", "width": 512}),
    ],
)
def test_a_prompt_has_its_options(line, wanted):
    assert parse_prompt(line) == wanted


def test_prompts_come_from_three_kinds_of_files(tmp_path):
    (tmp_path / "p.txt").write_text("# no\n\na cat --w 64\n  a dog \n")
    (tmp_path / "p.toml").write_text('[prompt]\nwidth = 64\n[[prompt.subset]]\nprompt = "a cat"\n')
    (tmp_path / "p.json").write_text(json.dumps([{"prompt": "a cat", "width": 64}, "a dog --h 8"]))
    assert read_prompts(tmp_path / "p.txt") == [{"prompt": "a cat", "width": 64}, {"prompt": "a dog"}]
    assert read_prompts(tmp_path / "p.toml") == [{"prompt": "a cat", "width": 64}]
    assert read_prompts(tmp_path / "p.json")[1] == {"prompt": "a dog", "height": 8}


@pytest.mark.parametrize(
    ("name", "text"), [("p.md", "a"), ("p.toml", "[prompt]"), ("p.json", "{}"), ("p.json", "[1]"), ("p.json", "[")]
)
def test_a_file_without_prompts_is_refused(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(WrongRequest, match=name):
        read_prompts(tmp_path / name)


def test_defaults_are_those_of_sd_scripts():
    options = read_command([])
    assert len(options) == 215
    assert (options["timestep_sampling"], options["model_prediction_type"]) == ("sigma", "sigma_scaled")
    assert (options["guidance_scale"], options["learning_rate"], options["network_alpha"]) == (3.5, 2e-6, 1)
    assert options["network_dim"] is None and options["fp8_base"] is False and options["dataset_config"] is None


def test_values_have_their_types():
    argv = ["--network_args", "a=1", "b=2", "--text_encoder_lr", "1e-5", "0", "--max_train_e=3", "--fp8_base"]
    options = read_command([*argv, "--lr_warmup_steps", "10%", "--lr_decay_steps", "7", "--dataset_config", "d.toml"])
    assert options["network_args"] == ["a=1", "b=2"] and options["text_encoder_lr"] == [1e-5, 0.0]
    assert options["max_train_epochs"] == 3 and options["fp8_base"] is True
    assert (options["lr_warmup_steps"], options["lr_decay_steps"]) == (0.1, 7)
    assert options["dataset_config"] == Path("d.toml")


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--netwrk_dim", "4"], "did you mean --network_dim?"),
        (["--network_dim", "4.5"], "invalid int value"),
        (["--loss_type", "l3"], "choose from"),
        (["--lr_warmup_steps", "10.5"], "whole steps"),
        (["--lr_s", "a"], "ambiguous"),
        (["my", "cat"], "a value with spaces needs quotes"),
        (["sdxl_train_network.py", "--seed", "1"], "another program"),
        (["--config_file", "none"], "none.toml cannot be read"),
    ],
)
def test_a_wrong_command_says_why(argv, said):
    with pytest.raises(WrongRequest) as error:
        read_command(argv)
    assert said in str(error.value)


def test_a_config_file_is_below_the_command_line_and_not_checked(tmp_path):
    file = tmp_path / "c.toml"
    file.write_text('seed = "x"\nunknown = 1\n[a]\nnetwork_dim = 8\nfp8_base = true\n[b]\nmax_train_steps = 5\n')
    options = read_command(["--config_file", str(tmp_path / "c"), "--max_train_steps", "7"])
    assert (options["seed"], options["unknown"], options["network_dim"], options["fp8_base"]) == ("x", 1, 8, True)
    assert options["max_train_steps"] == 7 and options["config_file"] == str(tmp_path / "c")
    with pytest.raises(WrongRequest, match="--write-config"):
        read_command(["--config_file", str(file), "--output_config"])


LAUNCHED = ["accelerate", "launch", "--mixed_precision", "bf16", "C:\\sd-scripts\\" + PROGRAM]


@pytest.mark.parametrize(
    "argv",
    [
        [*LAUNCHED, "--seed", "1", "^", "--ae", "a b"],
        [*LAUNCHED, "--seed", "1", "^--ae", "a b"],
        [*LAUNCHED, "\\", "--seed", "1", "\r\n", "--ae", "a b", "`"],
        [f"accelerate launch {PROGRAM}\n  --seed 1 \\\n  --ae 'a b'"],
        ["\n--seed 1 ^\n--ae 'a b'"],
        ["--seed", "1", "--ae", "a b"],
    ],
)
def test_a_command_is_taken_as_it_is_pasted(argv):
    assert pasted(argv) == ["--seed", "1", "--ae", "a b"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "t.bat",
            '@echo off\nREM {p}\nset DIR=D:\\a b\npython {p} ^\n  --ae "%DIR%\\ae.sft" ^--seed 1^\n --v2\npause\n',
        ),
        ("t.sh", '#!/bin/sh\nDIR="D:\\a b"\naccelerate launch {p} --ae "${{DIR}}\\ae.sft" \\\n  --seed 1 --v2\n'),
        ("t.ps1", '$dir = "D:\\a b"\naccelerate launch {p} `\n --ae "$dir\\ae.sft" --seed 1 `\n --v2\n'),
        ("t.txt", "{p}\n--ae 'D:\\a b\\ae.sft'\n--seed 1\n--v2\n"),
    ],
)
def test_a_script_holds_the_command(tmp_path, name, text):
    (tmp_path / name).write_text(text.format(p=PROGRAM))
    assert pasted(script_command(tmp_path / name, PROGRAM)) == ["--ae", "D:\\a b\\ae.sft", "--seed", "1", "--v2"]


@pytest.mark.parametrize(
    ("text", "said"),
    [("echo", "does not run it"), ("{p}\n\n{p}", "2 times"), ("{p} --ae $HERE", "does not set it")],
)
def test_a_script_without_one_command_is_refused(tmp_path, text, said):
    (tmp_path / "t.sh").write_text(text.format(p=PROGRAM))
    with pytest.raises(WrongRequest, match=said):
        script_command(tmp_path / "t.sh", PROGRAM)


def of(dataset: dict, *keys: str) -> list:
    return [dataset["params"][key] for key in keys]


def test_a_value_is_the_first_of_subset_dataset_general_and_command_line():
    text = """
    [general]
    keep_tokens = 1
    flip_aug = true
    [[datasets]]
    resolution = [512, 768]
    keep_tokens = 2
      [[datasets.subsets]]
      image_dir = "a"
      keep_tokens = 3
      [[datasets.subsets]]
      image_dir = "b"
    """
    argv = ["--train_batch_size", "4", "--dataset_repeats", "5", "--keep_tokens", "9", "--caption_extention", ".cap"]
    (dataset,) = read_dataset(text, argv)
    assert dataset["style"] == "dreambooth"
    assert of(dataset, "resolution", "batch_size", "bucket_reso_steps") == [(512, 768), 4, 64]
    first, second = dataset["subsets"]
    assert (first["keep_tokens"], second["keep_tokens"]) == (3, 2)
    assert first["flip_aug"] is True and first["num_repeats"] == 5 and first["caption_extension"] == ".cap"
    assert first["caption_separator"] == "," and first["is_reg"] is False and "metadata_file" not in first


def test_styles_follow_the_keys_of_all_subsets():
    tuned = '[[datasets]]\n[[datasets.subsets]]\nmetadata_file = "m.json"\n'
    masked = '[[datasets]]\n[[datasets.subsets]]\nimage_dir = "a"\nconditioning_data_dir = "c"\n'
    assert read_dataset(tuned)[0]["style"] == "finetuning"
    assert read_dataset(masked, ["--masked_loss"])[0]["style"] == "controlnet"
    assert read_dataset("[[datasets]]")[0]["style"] == "controlnet"  # without subsets, as there
    assert read_dataset("") == []
    assert read_dataset('{"datasets": [{"resolution": 64}]}', format="json")[0]["params"]["resolution"] == (64, 64)


SUBSET = '[[datasets.subsets]]\nimage_dir = "a"\n'


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[[dataset]]", "did you mean 'datasets'?"),
        ("[[datasets]]\nnum_repeat = 1", "did you mean 'num_repeats'?"),
        (f"[[datasets]]\n{SUBSET}resolution = 512", "it is for [general] and datasets"),
        (f"[[datasets]]\n{SUBSET}[[datasets.subsets]]\nmetadata_file = 'm'", "make them two datasets"),
        ("[[datasets]]\n[[datasets.subsets]]\nclass_tokens = 'a'", "image_dir is missing"),
        (f"[[datasets]]\n{SUBSET}conditioning_data_dir = 'c'", "controlnet"),  # without --masked_loss
        ("[[datasets]]\nresolution = 512.0", "a whole number or two"),
        ("[[datasets]]\nresolution = [512]", "a whole number or two"),
        ("[[datasets]]\nnetwork_multiplier = 1", "decimal point"),
        ("[[datasets]]\nshuffle_caption = 1", "true or false"),
        ("[[datasets]]\nclass_tokens = 'a'", "class_tokens"),
        ("[general]\nface_crop_aug_range = [1, 2]", "two numbers"),
        ("datasets = 1", "a list"),
        ("[[datasets]]\nsubsets = 1", "a list of tables"),
        ("[", "not valid TOML"),
    ],
)
def test_a_wrong_dataset_config_says_why(text, said):
    with pytest.raises(WrongRequest) as error:
        read_dataset(text)
    assert said in str(error.value)


def test_true_counts_as_a_number_there():
    assert read_dataset("[[datasets]]\nbatch_size = true")[0]["params"]["batch_size"] is True


@pytest.mark.parametrize("argv", [["--resolution", "1,2,3"], ["--resolution", "x"], ["--face_crop_aug_range", "2,1"]])
def test_sizes_on_the_command_line_are_texts(argv):
    assert read_dataset("[[datasets]]", ["--resolution", "64"])[0]["params"]["resolution"] == (64, 64)
    with pytest.raises(WrongRequest, match="must be text like"):
        read_dataset("[[datasets]]", argv)


def test_types_in_a_config_file_are_checked_where_they_are_used(tmp_path):
    (tmp_path / "c.toml").write_text('min_bucket_reso = "256"')
    with pytest.raises(WrongRequest, match="--min_bucket_reso must be a whole number"):
        read_dataset("", ["--config_file", str(tmp_path / "c")])
