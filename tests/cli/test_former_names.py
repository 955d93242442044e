"""Former names of keys and options: accepted everywhere, listed nowhere, refused next to the current name."""

from __future__ import annotations

import json
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from fluxq.cli.main import main
from fluxq.cli.options import read_config
from fluxq.config_files import FORMER_KEYS, FORMER_OPTIONS, config_from_dict, read_toml
from fluxq.errors import WrongRequest
from fluxq.nano import drawing
from fluxq.training.report import read_log

OPTIONS = {  # command -> former options
    "train": {"size", "rate", "text-rate"},
    "cache": {"size"},
    "check": {"size"},
    "profile": {"size", "card"},
    "bench steps": {"size"},
}
VALUES = {"size": "512", "rate": "0.002", "text-rate": "0.001", "card": "rtx3060"}
KEYS = {"data.size": 64, "training.rate": 0.002, "training.text_rate": 0.001}
CURRENT = {"data.resolution": 64, "training.learning_rate": 0.002, "training.text_learning_rate": 0.001}


def run(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments])


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for i, (image, caption) in enumerate(drawing.concept(seed=5, count=2)):
        image.save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(caption)
    return folder


def toml_of(keys: dict[str, float]) -> str:
    """Dotted keys as a TOML file."""
    return "".join(f"{key} = {value}\n" for key, value in keys.items())


def commands(group: click.Group = main, prefix: str = "") -> dict[str, click.Command]:
    found: dict[str, click.Command] = {}
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            found |= commands(command, f"{name} ")
        else:
            found[prefix + name] = command
    return found


def parsed(command: str, *arguments: str) -> dict:
    """The parameters that `command` reads from `arguments`."""
    parent = click.Context(main, **main.context_settings)
    return commands()[command].make_context(command, list(arguments), parent=parent).params


def test_every_command_with_a_renamed_option_is_tested():
    found = {}
    for name, command in commands().items():
        flags = {flag.lstrip("-") for parameter in command.params for flag in parameter.opts}
        if former := {old for old, new in FORMER_OPTIONS.items() if new in flags}:
            found[name] = former
    assert found == OPTIONS and KEYS.keys() == FORMER_KEYS.keys()


@pytest.mark.parametrize(("command", "former"), [(c, f) for c, former in OPTIONS.items() for f in sorted(former)])
def test_a_former_option_is_read_as_the_current_one(command, former):
    current = parsed(command, f"--{FORMER_OPTIONS[former]}", VALUES[former])
    assert parsed(command, f"--{former}", VALUES[former]) == current == parsed(command, f"--{former}={VALUES[former]}")
    assert current != parsed(command)
    assert f"--{former} " not in run(*command.split(), "--help").output


def test_a_former_option_works_from_end_to_end(photos):
    result = run("check", photos, "--model", "nano", "--size", 64, "--json")
    assert result.exit_code == 0 and json.loads(result.stdout)["images"]["resolution"] == 64


def test_former_keys_in_a_file_are_read_as_the_current_ones(tmp_path):
    (tmp_path / "old.toml").write_text(toml_of(KEYS))
    (tmp_path / "new.toml").write_text(toml_of(CURRENT))
    old, new = (read_config(tmp_path / f"{name}.toml", (), {}) for name in ("old", "new"))
    assert old == new and (old.data.resolution, old.training.text_learning_rate) == (64, 0.001)
    assert config_from_dict({"data": {"size": 64}}, "a test").data.resolution == 64


@pytest.mark.parametrize("former", KEYS)
def test_former_keys_work_with_set(former):
    old, new = (read_config(None, (f"{key}={KEYS[former]}",), {}) for key in (former, FORMER_KEYS[former]))
    assert old == new != read_config(None, (), {})


def test_an_option_and_set_override_a_former_key_in_a_file(tmp_path):
    file = tmp_path / "old.toml"
    file.write_text(toml_of(KEYS))
    assert read_config(file, (), {"data__resolution": 96}).data.resolution == 96
    assert read_config(file, ("data.resolution=96",), {}).data.resolution == 96
    assert read_config(file, ("data.size=96",), {}).data.resolution == 96


@pytest.mark.parametrize("former", KEYS)
def test_both_names_of_a_key_in_one_file_are_refused_in_one_sentence(tmp_path, former):
    file, current = tmp_path / "both.toml", FORMER_KEYS[former]
    file.write_text(toml_of({former: KEYS[former], current: CURRENT[current]}))
    sentence = f"{file}: {former} is the former name of {current}; keep only one of them"
    with pytest.raises(WrongRequest) as error:
        read_toml(file)
    assert str(error.value) == sentence
    result = run("train", "--model", "nano", "--config", file)
    assert result.exit_code == 2 and result.stderr == f"error: {sentence}\n"


@pytest.mark.slow
def test_a_run_that_was_saved_with_former_names_resumes(tmp_path, photos):
    out = tmp_path / "run"
    started = run(
        *("train", photos, "--model", "nano", "--cache", tmp_path / "cache", "--out", out, "--name", "x", "--steps", 1),
        *("--rank", 2, "--size", 64, "--rate", 0.002, "--text-encoder", "clip_l", "--text-rate", 0.001),
    )
    assert started.exit_code == 0, started.output
    written = (out / "config.toml").read_text()
    for former, current in FORMER_KEYS.items():
        old, new = former.split(".")[1], current.split(".")[1]
        assert f"\n{new} = {KEYS[former]}\n" in written
        written = written.replace(f"\n{new} = ", f"\n{old} = ")
    (out / "config.toml").write_text(written)
    refused = run("train", "--resume", out, "--size", 96)
    assert refused.exit_code == 2 and "was started with data.resolution = 64, not 96" in refused.stderr
    resumed = run("train", "--resume", out, "--steps", 2)
    assert resumed.exit_code == 0, resumed.output
    assert [record["step"] for record in read_log(out / "log.jsonl")] == [1, 2]
    assert "\nresolution = 64\n" in (out / "config.toml").read_text()
