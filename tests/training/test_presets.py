"""Presets: what the user sets wins over them, and they win over fluxq's defaults."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from fluxq.cli.options import read_config
from fluxq.config import OutputConfig, TrainConfig, TrainingConfig
from fluxq.config_files import to_toml
from fluxq.console import silent
from fluxq.training.defaults import Epoch, resolve_optimizer, resolve_steps
from fluxq.training.presets import LEARNING_RATE_REASON, PRESETS, Preset, lines


def read(*assignments: str, base: Path | None = None, **given) -> TrainConfig:
    return read_config(None, assignments, given, base)


def value_of(config: TrainConfig, key: str) -> object:
    section, name = key.split(".")
    return getattr(getattr(config, section), name)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_wins_over_defaults(name):
    config, unset = read(training__preset=name), read()
    for choice in PRESETS[name].choices:
        assert value_of(config, choice.key) == choice.value
    sections = [replace(getattr(config, s), **_of(PRESETS[name], unset, s)) for s in ("data", "lora", "training")]
    assert sections == [unset.data, unset.lora, replace(unset.training, preset=name)], "it sets nothing else"


def _of(preset: Preset, config: TrainConfig, section: str) -> dict:
    keys = [choice.key for choice in preset.choices if choice.key.startswith(f"{section}.")]
    return {key.partition(".")[2]: value_of(config, key) for key in keys}


def test_what_the_user_sets_wins_over_a_preset(tmp_path):
    """Also the value that is fluxq's default, wherever it comes from."""
    file = tmp_path / "my.toml"
    file.write_text("[training]\npreset = 'style'\ntimesteps = 'shift'\n[data]\ncaption_dropout = 0.0\n")
    config = read_config(file, ("lora.rank=16",), {"data__resolution": 256})
    assert (config.training.timesteps, config.data.caption_dropout, config.lora.rank) == ("shift", 0.0, 16)
    assert config.data.resolution == 256


@pytest.mark.parametrize(
    ("values", "key", "expected"),
    [
        ({"model__name": "nano"}, "data.resolution", None),
        ({"lora__from_lora": Path("a.safetensors")}, "lora.rank", None),
        ({"training__shift": 2.0}, "training.timesteps", "shift"),
        ({"training__shift": 2.0, "training__sigmoid_scale": 2.0}, "training.timesteps", "shift"),
    ],
)
def test_a_preset_leaves_alone_what_another_setting_decides(values, key, expected):
    assert value_of(read(training__preset="style"), key) != expected
    assert value_of(read(training__preset="style", **values), key) == expected


def test_a_setting_of_the_timesteps_of_a_preset_goes_with_them():
    assert read(training__preset="style", training__sigmoid_scale=2.0).training.timesteps == "sigmoid"


def test_a_run_that_resumes_takes_nothing_from_its_preset(tmp_path):
    saved = tmp_path / "config.toml"
    before = TrainConfig(training=TrainingConfig(preset="style", timesteps="uniform", steps=5))
    saved.write_text(to_toml(before))
    assert read(base=saved) == before


@pytest.mark.parametrize(("name", "steps"), [("person", 750), ("style", 1500)])
def test_steps_are_for_the_images_that_a_preset_wants_seen(name, steps):
    said: list[str] = []
    training = TrainingConfig(preset=name, batch=2)
    resolved, _ = resolve_steps(training, OutputConfig(), Epoch(20, 20, 10, 10, 2), said.append)
    assert resolved.steps == steps and PRESETS[name].why in said[0]
    asked, _ = resolve_steps(replace(training, epochs=3), OutputConfig(), Epoch(20, 20, 10, 10, 2), silent)
    assert asked.steps == 30


def test_the_learning_rate_of_a_preset_is_for_optimizers_like_adamw():
    said: list[str] = []
    assert resolve_optimizer(TrainingConfig(preset="style"), said.append).learning_rate == 1e-4
    assert LEARNING_RATE_REASON in said[0]
    assert resolve_optimizer(TrainingConfig(preset="style", optimizer="lion8bit"), said.append).learning_rate == 3e-5
    assert LEARNING_RATE_REASON not in said[1]


def test_each_value_is_said_with_its_reason_and_the_advice_on_images():
    config = read("lora.rank=8", training__preset="person")
    said = list(lines(config, 3))
    values = ["resolution 768", "caption dropout 0", "rank 8", "timesteps shift"]
    assert [line.split(":")[0] for line in said[:-1]] == values
    assert said[2] == "rank 8: set elsewhere, in place of the 16 of preset person"
    assert said[-1] == (
        "preset person: guides advise 10 to 30 images, this run has 3; try the LoRA at a strength of about 0.8"
    )
    assert not list(lines(read(), 3))
