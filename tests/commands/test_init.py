"""`fluxq init`: five answers to a file that trains."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image

from fluxq.cli.main import main
from fluxq.cli.options import read_config
from fluxq.commands import init
from fluxq.config import PRESET_NAMES
from fluxq.training.presets import PRESETS

ANSWERS = ["--preset", "style", "--trigger", "zqx", "--models", "nano"]


@pytest.fixture
def photos(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FLUXQ_MODELS", raising=False)
    folder = tmp_path / 'my "photos"'
    folder.mkdir()
    Image.effect_mandelbrot((96, 96), (-2, -1, 1, 1), 20).convert("RGB").save(folder / "a.png")
    return folder


def run(*arguments, typed: str = ""):
    return CliRunner().invoke(main, ["init", *map(str, arguments)], input=typed)


@pytest.mark.parametrize("preset", PRESET_NAMES)
def test_the_file_has_what_was_answered_and_what_the_preset_sets_with_reasons(photos, preset):
    result = run(photos, "--preset", preset, "--trigger", 'z"x', "--models", "~/ComfyUI", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["train"] == "fluxq train --config my.toml"
    text, config = Path("my.toml").read_text(encoding="utf-8"), read_config(Path("my.toml"), (), {})
    (folder,) = config.data.folders
    assert (folder.path, folder.trigger, config.training.preset) == (photos, 'z"x', preset)
    assert config.model.models == Path("~/ComfyUI").expanduser() and config.output.out is None
    for choice in PRESETS[preset].choices:
        section, name = choice.key.split(".")
        assert getattr(getattr(config, section), name) == choice.value and choice.reason in text
        assert f"\n{name} = " in text
    assert (config.training.steps, config.training.learning_rate) == (PRESETS[preset].seen, 1e-4)


@pytest.mark.slow
def test_the_file_trains(photos):
    assert run(photos, *ANSWERS, "--out", "run").exit_code == 0
    trained = CliRunner().invoke(main, ["train", "--config", "my.toml", "--steps", "1", "--sample-every", "0"])
    assert trained.exit_code == 0, trained.output
    assert Path("run/zqx.safetensors").is_file()


def test_a_terminal_answers_what_is_missing(photos, monkeypatch):
    monkeypatch.setattr(init, "is_terminal", lambda: True)
    result = run("--trigger", "zqx", typed=f"nowhere\n{photos}\nstyl\nstyle\nnano\nhere\n")
    assert result.exit_code == 0, result.output
    config = read_config(Path("my.toml"), (), {})
    assert (config.training.preset, config.model.name, config.output.out) == ("style", "nano", Path("here"))
    assert config.data.folders[0].path == photos
    again = run(photos, *ANSWERS, "--trigger", "abc", typed="n\n")
    assert again.exit_code == 1 and "my.toml exists. Replace it?" in again.output
    assert "zqx" in Path("my.toml").read_text()
    assert run(photos, *ANSWERS, "--trigger", "abc", typed="y\n").exit_code == 0
    assert "abc" in Path("my.toml").read_text()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "questions need a terminal; without one, give FOLDER, --preset, --trigger, --models"),
        (["nowhere", *ANSWERS], "nowhere is not a folder; name the folder of images"),
        (['my "photos"', *ANSWERS, "--file", "taken"], "taken exists; name another --file, or replace it with --overw"),
    ],
)
def test_what_is_missing_or_taken_is_refused(photos, arguments, sentence):
    Path("taken").write_text("mine")
    result = run(*arguments)
    assert result.exit_code == 2 and sentence in result.output
    assert Path("taken").read_text() == "mine" and not Path("my.toml").exists()


def test_models_may_be_where_the_environment_says(photos, monkeypatch):
    monkeypatch.setenv("FLUXQ_MODELS", "/models")
    assert run(photos, *ANSWERS[:4]).exit_code == 0
    assert read_config(Path("my.toml"), (), {}).model.models == Path("/models")
