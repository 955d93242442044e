"""Settings: values are read as written, and wrong ones are named."""

from __future__ import annotations

import dataclasses
import re
import tomllib
from pathlib import Path

import pytest

from fluxq.config import MemoryConfig, ModelConfig, TrainConfig
from fluxq.config_files import config_from_dict, read_toml, set_values, to_toml
from fluxq.data.examples import check_folder
from fluxq.errors import WrongRequest
from fluxq.settings import ImageSettings


def test_a_written_config_reads_back_equal():
    config = config_from_dict(
        {
            "model": {"flux": "C:\\models\\flux.safetensors"},
            "data": {"folders": ["a", {"path": 'b "c"', "repeats": 3, "trigger": "zqx\n"}], "trigger": "ü"},
            "lora": {"targets": ["attention", r"single_blocks\.\d+\.linear2"], "alpha": 8},
            "training": {"learning_rate": 1e-5, "steps": 12},
        },
        "a test",
    )
    assert config_from_dict(tomllib.loads(to_toml(config)), "the copy") == config


def test_defaults_read_back_equal():
    assert config_from_dict(tomllib.loads(to_toml(TrainConfig())), "the copy") == TrainConfig()


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"lora": {"rnak": 8}}, "unknown key 'lora.rnak' in my.toml; did you mean 'lora.rank'?"),
        ({"trainig": {}}, "unknown key 'trainig' in my.toml; did you mean 'training'?"),
        ({"lora": {"rank": "8"}}, "my.toml: lora.rank must be a whole number, not '8'"),
        ({"lora": {"rank": True}}, "my.toml: lora.rank must be a whole number, not True"),
        ({"lora": {"rank": 0}}, "my.toml: lora.rank must be at least 1, not 0"),
        ({"lora": 3}, "my.toml: lora must be a table, not 3"),
        ({"model": {"flux": "a\0b"}}, "my.toml: model.flux must be a path, not 'a\\x00b'"),
        ({"training": {"rate": float("nan")}}, "my.toml: training.learning_rate must be at least 0, not nan"),
        ({"training": {"rate": float("inf")}}, "my.toml: training.learning_rate must be at least 0, not inf"),
        (
            {"training": {"schedule": "cos"}},
            "my.toml: training.schedule must be one of constant, linear, cosine, polynomial",
        ),
        ({"data": {"folders": [{"repeats": 2}]}}, "my.toml: data.folders.0.path is missing"),
        ({"data": {"folders": [{"path": "a", "repeat": 2}]}}, "unknown key 'data.folders.0.repeat' in my.toml"),
        ({"training": {"noise_offset": 0.1}}, "'training.noise_offset' in my.toml is not for FLUX.1: it corrects"),
        (
            {"min_snr_gamma": 5},
            "'min_snr_gamma' in my.toml is not for FLUX.1: it weighs the losses of diffusion models",
        ),
        (
            {"training": {"max_timestep": 900}},
            "my.toml: training.max_timestep must be at least 0 and at most 1, not 900",
        ),
        ({"data": {"upscale": "yes"}}, "my.toml: data.upscale must be true or false, not 'yes'"),
    ],
)
def test_wrong_settings_are_named(values, sentence):
    with pytest.raises(WrongRequest) as error:
        config_from_dict(values, "my.toml")
    assert str(error.value).startswith(sentence)


def test_assignments_are_toml_or_plain_text():
    values: dict = {"lora": {"rank": 4}}
    set_values(
        values, ("lora.rank=8", "lora.targets=['a', 'b']", "data.trigger=a cat", "training.learning_rate = 1e-3")
    )
    config = config_from_dict(values, "the command line")
    assert (config.lora.rank, config.lora.targets, config.data.trigger, config.training.learning_rate) == (
        8,
        ("a", "b"),
        "a cat",
        1e-3,
    )


@pytest.mark.parametrize("assignment", ["lora.rank", "=3", "lora.rank.x=3"])
def test_malformed_assignments_are_refused(assignment):
    with pytest.raises(WrongRequest, match="--set"):
        set_values({"lora": {"rank": 4}}, (assignment,))


def test_missing_and_malformed_files_are_named(tmp_path: Path):
    with pytest.raises(WrongRequest, match="absent.toml cannot be read"):
        read_toml(tmp_path / "absent.toml")
    broken = tmp_path / "broken.toml"
    broken.write_text("[lora\nrank = 3", encoding="utf-8")
    with pytest.raises(WrongRequest, match=r"broken.toml is not valid TOML: .*line 1"):
        read_toml(broken)


def test_every_field_says_what_it_is():
    for section in dataclasses.fields(TrainConfig):
        for field in dataclasses.fields(section.default_factory):
            assert field.metadata["help"], f"{section.name}.{field.name}"


def test_choices_are_those_of_the_kernels():
    """The config repeats them, because importing it must not import torch."""
    from fluxq.kernels import COMPUTES, FORMATS, POLICIES

    choices = {f.name: f.metadata.get("choices") for c in (ModelConfig, MemoryConfig) for f in dataclasses.fields(c)}
    assert (choices["format"], choices["compute"], choices["policy"]) == (FORMATS, COMPUTES, tuple(POLICIES))


def test_the_settings_of_datasets_that_the_docs_show_are_read():
    page = (Path(__file__).parent.parent / "docs" / "datasets.md").read_text(encoding="utf-8")
    tables = [tomllib.loads(block) for block in re.findall(r"```toml\n(.*?)```", page, re.DOTALL)]
    config = config_from_dict(tables[0], "docs/datasets.md")
    assert [folder.path.name for folder in config.data.folders] == ["photos", "paintings", "other people"]
    assert config.data.folders[1].resolution == ((512, 512), (768, 768))
    for own, folder in zip(config.data.folders, config.data.filled()[0], strict=True):
        check_folder(own, folder)
    named = set(re.findall(r"^\| `(\w+)`(?:, `(\w+)`)? \|", page, re.MULTILINE))
    known = {field.name for field in dataclasses.fields(ImageSettings)}
    assert len(tables) == 1 and {name for pair in named for name in pair if name} <= known
