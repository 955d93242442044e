"""The command line: help, exit codes, a clear sentence for every wrong request, Ctrl-C, the frozen list of options."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from fluxq import nano
from fluxq.cli.main import main
from fluxq.formats.checkpoint.files import Checkpoint
from fluxq.training.report import read_log

MODEL = "--models --flux --ae --clip-l --t5xxl --t5-length --text-mask --format --compute --ae-band --offline --model"
DATA = "--trigger --resolution --recursive --skip-bad --cache --shuffle-tags --keep-tokens --tag-dropout --wildcards "
DATA += "--caption-dropout --flip --masks --validation-split"
SAMPLES = "--prompt --sample-every --width --height --sample-steps --guidance --cfg --negative --sample-seed"
FILES = ("--flux", nano.FLUX, "--ae", nano.AE, "--clip-l", nano.CLIP_L, "--t5xxl", nano.T5XXL)
MEMORY = "--vram --ram --policy --resident-units --blocks-to-swap --slots --offload"
OPTIONS = {
    "train": f"{MODEL} {DATA} {SAMPLES} {MEMORY} --rank --alpha --lora-format --from-lora --base-lora --steps --batch "
    "--text-encoder --text-lr --epochs --save-every-epochs --optimizer-args --validate-every --early-stopping "
    "--lora-init "
    "--accumulate --lr --optimizer --schedule --warmup --timesteps --seed --out --name --save-every --keep --resume "
    "--overwrite --config --set --help-all --json --preset --preserve-class",
    "init": "--preset --trigger --models --out --file --overwrite --json",
    "cache": f"{MODEL} {DATA} --vram --prompt --import --verify --prune --config --set --help-all --json",
    "sample": f"{MODEL} --base-lora --prompt --width --height --steps --guidance --cfg --negative --seed --lora "
    "--strength --grid --vram --resident-units --blocks-to-swap --slots --cache --out --config --set --help-all --json",
    "check": f"{MODEL} {DATA} --verbose --crops --config --set --help-all --json",
    "caption": "--model --prompt --max-words --batch --overwrite --offline --trigger --remove --replace --table "
    "--recursive --json",
    "quantize": "--format --report --overwrite --json",
    "kohya": "--lint --script --write-config --map --overwrite --json",
    "import": "--out --lint --map --overwrite --json",
    "demo": "--out --format --compute --json",
    "settings": "--schema --names",
    "profile": "--gpu --format --resolution --compute --policy --rank --batch --t5-length --slots --weights --steps "
    "--out --json",
    "bench kernels": "--tune --json",
    "bench steps": "--matrix --format --compute --policy --resolution --batch --rank --t5-length --resident-units "
    "--blocks-to-swap --slots --steps --limit-vram --limit-bus --out --json",
    "bench compare": "--out --json",
    "lora convert": "--to --rank --precision --overwrite --json",
    "lora resize": "--to --rank --energy --precision --overwrite --json",
    "lora merge": "--out --base --to --rank --precision --overwrite --json",
    "lora extract": "--to --rank --precision --overwrite --json",
    "lora info": "--json",
}


def run(*arguments: str):
    return CliRunner().invoke(main, [str(a) for a in arguments])


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(2):
        Image.effect_mandelbrot((96, 96), (-2, -1, 1, 1), 20 + i).convert("RGB").save(folder / f"{i}.png")
    return folder


def trained(tmp_path: Path, photos: Path, *more) -> list[str]:
    out, cache = tmp_path / "run", tmp_path / "cache"
    return ["train", photos, "--model", "nano", "--steps", 2, "--out", out, "--cache", cache, "--trigger", "zqx", *more]


def test_options_only_grow_on_purpose():
    """A new option is added here too, with a reason in the change that adds it; none disappears."""
    assert commands().keys() == OPTIONS.keys()
    for name, expected in OPTIONS.items():
        found = {flag for p in commands()[name].params for flag in p.opts if flag.startswith("-")}
        assert found == set(expected.split()), name


def commands() -> dict[str, click.Command]:
    """Name -> command, also for commands of groups, like "lora info"."""
    found = {}
    for name, command in main.commands.items():
        inner = command.commands if isinstance(command, click.Group) else {}
        found |= {f"{name} {word}": c for word, c in inner.items()} or {name: command}
    return found


def test_an_option_takes_the_same_in_every_command():
    """Only quantize does not take bf16."""
    seen: dict[str, set[tuple[str, ...]]] = {}
    for name, command in commands().items():
        for parameter in command.params:
            if parameter.opts[0] in ("--format", "--compute", "--policy") and isinstance(parameter.type, click.Choice):
                seen.setdefault(f"{parameter.opts[0]}{' 8' * (name == 'quantize')}", set()).add(parameter.type.choices)
    everywhere = seen.pop("--format")
    assert seen.pop("--format 8") == {tuple(c for choices in everywhere for c in choices if c != "bf16")}
    assert [len(choices) for choices in (everywhere, *seen.values())] == [1, 1, 1]


@pytest.mark.parametrize("command", OPTIONS)
def test_every_option_is_explained(command):
    assert run(*command.split(), "--help").exit_code == 0
    for parameter in commands()[command].params:
        if parameter.param_type_name == "option" and parameter.name != "help":
            assert len(parameter.help) > 10 and parameter.help[:1].upper() == parameter.help[:1], parameter.opts


@pytest.mark.parametrize("command", ["bench", "lora", *OPTIONS])
def test_the_list_of_commands_shows_whole_sentences(command):
    """`fluxq --help` would cut a first sentence of more than 60 characters."""
    found = commands().get(command) or main.commands[command]
    assert found.help is not None
    sentence = found.help.split("\n\n")[0]
    assert len(sentence) <= 60 and found.get_short_help_str(60) == sentence


def test_help_needs_no_torch():
    """--help answers at once: nothing heavy is imported for it."""
    code = "import sys; from fluxq.cli.main import main; main(['train', '-h'], standalone_mode=False); sys.exit('torch' in sys.modules)"  # noqa: E501
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL, check=False).returncode == 0


@pytest.mark.slow
def test_json_is_the_only_line_on_stdout(tmp_path, photos, capfd):
    main([*map(str, trained(tmp_path, photos, "--json"))], standalone_mode=False)
    printed = capfd.readouterr()
    result = json.loads(printed.out)
    assert result == json.loads((tmp_path / "run" / "result.json").read_text())
    assert set(result) >= {"steps", "seconds", "loss_first", "loss_last", "peak_bytes", "lora", "validation_before"}
    assert "step     2/2 | loss" in printed.err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["train", "--model", "nano"], "no folder of images was given"),
        (["train", "{tmp}/absent", "--model", "nano", "--cache", "{tmp}/c"], "absent does not exist"),
        (["train", "{tmp}/empty", "--model", "nano", "--cache", "{tmp}/c"], "holds no image"),
        (["train", "{photos}", "--flux", "{tmp}/f.safetensors"], "no --ae, --clip-l, --t5xxl was given"),
        (["train", "{photos}"], "no --flux, --ae, --clip-l, --t5xxl was given"),
        (["train", "{photos}", *FILES, "--flux", "{tmp}/model.ckpt"], "model.ckpt"),
        (["train", "{photos}", *FILES, "--flux", "{tmp}/absent.safetensors"], "absent.safetensors"),
        (["train", "{photos}", *FILES, "--flux", nano.AE], "ae.safetensors"),
        (["train", "{photos}", *FILES, "--clip-l", nano.T5XXL], "t5xxl.safetensors"),
        (["train", "{photos}", "--model", "nano", "--resolution", "100"], "resolution must be a multiple of 16"),
        (["train", "{photos}", "--model", "nano", "--set", "lora.rnak=3"], "did you mean 'lora.rank'?"),
        (["train", "{photos}", "--model", "nano", "--steps", "0"], "training.steps must be at least 1, not 0"),
        (["train", "{photos}", "--model", "nano", "--config", "{tmp}/none.toml"], "none.toml cannot be read"),
        (["train", "{photos}", "--model", "nano", "--set", "lora.targets=['x.*y']"], "matches no layer"),
        (["train", "--resume", "{tmp}/empty"], "has no run to resume"),
        (["train", "{photos}", "--model", "nano", "--set", "lora.targets=[]"], "no targets were given"),
        (["train", "{photos}", "--model", "nano", "--warmup", "50", "--steps", "9"], "does not fit into 9"),
        (
            ["train", "{photos}", "--model", "nano", "--noise-offset", "0.1"],
            "--noise-offset is not for FLUX.1: it corrects",
        ),
        (
            ["train", "{photos}", "--model", "nano", "--set", "training.min_timestep=1"],
            "training.min_timestep 1 must be below max_timestep 1",
        ),
        (
            ["train", "{photos}", "--model", "nano", "--set", "training.huber_c=1"],
            "training.huber_c has no effect here",
        ),
        (["train", "{photos}", "--model", "nano", "--t5-length", "4000"], "at most 512, not 4000"),
        (["train", "{photos}", "--model", "nano", "--out", "{photos}"], "is a folder of images; choose another"),
        (["train", "{photos}", "--model", "nano", "--trigger", ".."], "is not a file name; choose one with --name"),
        (["train", "{photos}", "--model", "nano", "--flux", "x"], "brings its own files; leave out --flux"),
        (["train", "--resume", "{tmp}", "--overwrite"], "pass only one of them"),
        (["sample", "--model", "nano", "--prompt", "x", "--width", "100"], "width must be a multiple of 16"),
        (["sample", "--model", "nano", "--prompt", "x", "--out", "{tmp}/model.ckpt/x"], "cannot write to"),
        (["sample", "--model", "nano"], "nothing to sample"),
        (["sample", "--model", "nano", "--prompt", "x", "--lora", "a=b"], "is not a number"),
        (["sample", "--model", "nano", "--prompt", "x", "--lora", "{tmp}/absent.safetensors"], "absent.safetensors"),
        (["cache", "--verify", "--cache", "{tmp}/absent"], "holds no cache"),
        (["demo", "--out", "{photos}"], "is not empty and not an earlier demo"),
        (["quantize", "{tmp}/model.ckpt", "{tmp}/new/x.safetensors"], "model.ckpt"),
    ],
)
def test_wrong_requests_are_one_sentence_and_exit_2(arguments, sentence, tmp_path, photos, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    torch.save({"x": torch.zeros(1)}, tmp_path / "model.ckpt")
    result = run(*(str(a).format(tmp=tmp_path, photos=photos) for a in arguments))
    assert result.exit_code == 2, result.output
    error = result.stderr.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert sentence in error
    assert "Traceback" not in result.output
    made = {p.relative_to(tmp_path) for p in tmp_path.rglob("*.safetensors")}
    assert {p.parts[0] for p in made} <= {"cache", "c"}
    assert [p.name for p in tmp_path.rglob("*") if p.is_dir() and not any(p.iterdir())] == ["empty"]


@pytest.mark.slow
def test_odd_names_work_as_files_and_words(tmp_path, photos):
    """A trigger with every character that a path or console markup could misread."""
    out = tmp_path / "[b]a folder ü[/b]"
    result = run(*trained(tmp_path, photos), "--trigger", "a/b:c[/x]\x7f", "--out", out)
    assert result.exit_code == 0, result.output
    assert (out / "a_b_c[_x]_.safetensors").exists()
    assert str(out) in result.output
    assert run("train", "--resume", out, "--steps", 3).exit_code == 0


def test_truncated_model_file_is_named_with_its_bytes(tmp_path, photos):
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(nano.FLUX.read_bytes()[:100_000])
    result = run("train", photos, *FILES, "--flux", cut)
    assert result.exit_code == 2
    assert "cut.safetensors" in result.stderr
    assert "100,000" in result.stderr


def test_a_corrupt_image_is_named_and_skipped_on_request(tmp_path, photos):
    (photos / "bad.jpg").write_bytes(b"\xff\xd8\xff no image")
    refused = run(*trained(tmp_path, photos))
    assert refused.exit_code == 2
    assert "bad.jpg" in refused.stderr
    (photos / "cut.png").write_bytes((photos / "0.png").read_bytes()[:-300])  # with a header that is good
    accepted = run(*trained(tmp_path, photos, "--skip-bad"))
    assert accepted.exit_code == 0, accepted.output
    assert "bad.jpg" in accepted.output and "cut.png" in accepted.output
    assert "; 2 images, 2 batches per epoch, 2 steps" in accepted.output


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), OSError(2, "No usable temporary directory found in ['/tmp']")]
)
def test_a_disk_that_is_full_where_no_file_is_named_ends_in_one_sentence(error, photos, monkeypatch):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("fluxq.train.train", fail)
    result = run("train", photos, "--model", "nano")
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: a disk is full ({error.strerror}); free some space")


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write anywhere")
def test_an_unwritable_output_is_named(tmp_path, photos):
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    result = run(*trained(tmp_path, photos), "--out", locked / "run")
    assert result.exit_code == 2
    assert "locked" in result.stderr


def test_an_output_under_a_file_is_named(tmp_path, photos):
    (tmp_path / "file").write_text("")
    result = run(*trained(tmp_path, photos), "--out", tmp_path / "file" / "run")
    assert result.exit_code == 2
    assert "file" in result.stderr


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_sigterm_saves_and_the_run_continues(tmp_path, photos):
    arguments = map(str, trained(tmp_path, photos, "--steps", 400))
    process = subprocess.Popen(
        [sys.executable, "-m", "fluxq", *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    while len(read_log(tmp_path / "run" / "log.jsonl")) < 3:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate()
    assert process.returncode == 143
    assert f"fluxq train --resume {tmp_path / 'run'}" in stderr.decode()
    done = len(read_log(tmp_path / "run" / "log.jsonl"))
    assert 3 <= done < 400
    state = Checkpoint(tmp_path / "run" / "state" / "state.safetensors")
    assert json.loads(state.metadata["fluxq_state"])["step"] == done
    resumed = run("train", "--resume", tmp_path / "run", "--steps", done + 2)
    assert resumed.exit_code == 0, resumed.output
    assert [r["step"] for r in read_log(tmp_path / "run" / "log.jsonl")] == list(range(1, done + 3))


@pytest.mark.slow
def test_sample_applies_loras_and_makes_a_grid(tmp_path, photos):
    assert run(*trained(tmp_path, photos)).exit_code == 0
    lora, out = tmp_path / "run" / "zqx.safetensors", tmp_path / "sampled"
    common = ["--model", "nano", "--steps", 2, "--cache", tmp_path / "cache", "--out", out]
    result = run("sample", *common, "--prompt", "a red zqx", "--prompt", "a star", "--lora", f"{lora}=0.8", "--cfg", 2)
    assert result.exit_code == 0, result.output
    first = Image.open(out / "00_seed42.png")
    assert first.size == (96, 96)
    assert first.text["parameters"].startswith("a red zqx\nSteps: 2, Sampler: Euler, CFG scale: 2")
    assert first.text["parameters"].endswith("LoRA: zqx (0.8)")
    result = run("sample", *common, "--prompt", "a red zqx", "--lora", lora, "--grid", "--strength", 0, "--strength", 1)
    assert result.exit_code == 0, result.output
    assert Image.open(out / "grid_00.png").width > 2 * 96


def test_cache_is_encoded_verified_and_pruned(tmp_path, photos):
    data = [photos, "--model", "nano", "--cache", tmp_path / "cache"]
    result = run("cache", *data, "--json")
    assert json.loads(result.stdout)["images"] == 2
    result = run("cache", "--cache", tmp_path / "cache", "--verify", "--prune", "--json")
    answer = json.loads(result.stdout)
    assert (answer["records"], answer["damaged"], answer["deleted"]) == (3, 0, 0)
