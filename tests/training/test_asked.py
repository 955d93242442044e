"""Settings that have no effect are refused by name; kinds of models that need more than a run gives them are said."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fluxq.cli.options import asked_for, folder_settings
from fluxq.config import SamplesConfig
from fluxq.config_files import config_from_dict, to_toml
from fluxq.errors import WrongRequest
from fluxq.training.asked import SAMPLES, refuse_without_effect
from fluxq.training.defaults import caveats

PARTS = {"flux": "f", "ae": "a", "clip_l": "c", "t5xxl": "t"}


def models(variant: str = "dev", device: str = "cpu", nano: bool = False, **more):
    return SimpleNamespace(variant=variant, device=torch.device(device), is_nano=nano, **more)


@pytest.mark.parametrize(
    ("values", "model", "key", "sentence"),
    [
        (
            {"model": {"models": "m", **PARTS}},
            models(),
            "model.models",
            "--models has no effect here: each of the four",
        ),
        (
            {"model": {"models": "m"}},
            models(nano=True),
            "model.models",
            "--model nano brings its own files; leave it o",
        ),
        ({"memory": {"slots": 4}, "model": {"format": "bf16"}}, models(device="cuda"), "memory.slots", "not streamed"),
        ({"lora": {"init_batches": 4}}, models(), "lora.init_batches", "only --lora-init lora_ga measures gradients"),
        (
            {"lora": {"keep_correction": True, "init": "lora_ga"}},
            models(),
            "lora.keep_correction",
            "only --lora-init l",
        ),
        ({"samples": {"steps": 4}}, models(), "samples.steps", "--sample-steps has no effect here: this run makes no"),
        ({"samples": {"negative": "x", "every": 2}}, models(), "samples.negative", "--negative .* needs --cfg above 1"),
        ({"samples": {"guidance": 2, "every": 2}}, models("schnell"), "samples.guidance", "has no guidance input"),
        ({"training": {"guidance": 2}}, models("schnell"), "training.guidance", "training.guidance has no effect"),
        (
            {"training": {"shift": 2, "timesteps": "uniform"}},
            models(),
            "training.shift",
            "--timesteps uniform does not",
        ),
        (
            {"training": {"sigmoid_scale": 2, "timesteps": "sigma"}},
            models(),
            "training.sigmoid_scale",
            "training.sigmoid_scale has no effect here: --timesteps sigma does not",
        ),
        ({"training": {"logit_mean": 2}}, models(), "training.logit_mean", "--timesteps shift does not use it"),
        ({"training": {"logit_std": 2, "timesteps": "mode"}}, models(), "training.logit_std", "mode does not use it"),
        (
            {"training": {"mode_scale": 1, "timesteps": "cosmap"}},
            models(),
            "training.mode_scale",
            "cosmap does not use",
        ),
        ({"training": {"huber_c": 1}}, models(), "training.huber_c", "only training.loss huber and smooth_l1 use it"),
        ({"training": {"huber_schedule": "snr", "loss": "l1"}}, models(), "training.huber_schedule", "and it is l1"),
        (
            {"training": {"schedule_cycles": 2, "schedule": "wsd"}},
            models(),
            "training.schedule_cycles",
            "--schedule wsd does not use it",
        ),
        ({"training": {"schedule_floor": 0.1}}, models(), "training.schedule_floor", "constant does not fall"),
        (
            {"training": {"weight_decay": 0.1, "optimizer": "torch.optim.Rprop"}},
            models(),
            "training.weight_decay",
            "training.weight_decay has no effect here: torch.optim.Rprop has none",
        ),
        ({"output": {"keep": 2, "save_every": 0}}, models(), "output.keep", "no LoRA is saved before the end"),
        ({"training": {"validate_every": 5}}, models(), "training.validate_every", "--validate-every .* are held out"),
        (
            {"data": {"trigger": "a", "folders": [{"path": "p", "trigger": "b"}]}},
            models(),
            "data.trigger",
            "each folder has its own",
        ),
        (
            {
                "data": {
                    "trigger": "a",
                    "folders": [{"path": "p", "trigger": "b"}, {"path": "q", "regularization": True}],
                }
            },
            models(),
            "data.trigger",
            "each folder has its own",
        ),
        (
            {"data": {"flip": True, "folders": [{"path": "p", "flip": False}]}},
            models(),
            "data.flip",
            "has its own flip",
        ),
        ({"data": {"variants": 3, "flip": True, "folders": ["p"]}}, models(), "data.variants", "is drawn at random"),
        ({"data": {"caption_separator": ";", "folders": ["p"]}}, models(), "data.caption_separator", "nor dropped"),
        ({"data": {"min_side": 64, "upscale": False, "folders": ["p"]}}, models(), "data.min_side", "may be enlarged"),
        (
            {"training": {"steps": 9, "epochs": 2}},
            models(),
            "training.steps",
            "--steps .* here: --epochs says how many",
        ),
        (
            {"output": {"save_every": 9, "save_every_epochs": 2}},
            models(),
            "output.save_every",
            "save_every_epochs says when",
        ),
    ],
)
def test_what_has_no_effect_is_refused_by_name(values, model, key, sentence):
    """And only if the user asked for it: a resumed run has every setting in its config."""
    config = config_from_dict(values, "a test")
    refuse_without_effect(config, model, ())
    with pytest.raises(WrongRequest, match=f"(?s){sentence}"):
        refuse_without_effect(config, model, {key, "lora.rank"})


def test_what_has_an_effect_is_not_refused():
    values = {
        "model": {"models": "m", "ae": "a"},
        "memory": {"slots": 4},
        "samples": {"every": 5, "cfg": 2.0, "negative": "x", "guidance": 2, "steps": 3},
        "output": {"keep": 2, "save_every": 10},
        "training": {"steps": 100, "shift": 2, "guidance": 2},
        "data": {
            "trigger": "a",
            "variants": 3,
            "caption_separator": ";",
            "max_side": 128,
            "folders": ["p", {"path": "q", "trigger": "b", "shuffle_tags": True, "upscale": False}],
        },
    }
    asked = {f"{section}.{key}" for section, table in values.items() for key in table}
    refuse_without_effect(config_from_dict(values, "a test"), models(device="cuda"), asked)
    values = {"output": {"keep": 2, "save_every": 0, "save_every_epochs": 1}, "training": {"steps": 9, "epochs": 2}}
    refuse_without_effect(config_from_dict(values, "a test"), models(), {"output.keep", "training.epochs"}, True)


@pytest.mark.parametrize(
    "training",
    [
        {"timesteps": "sigma", "shift": 3},
        {"timesteps": "cosmap", "shift": 3},
        {"timesteps": "logit_normal", "shift": 3, "logit_mean": 1, "logit_std": 2},
        {"timesteps": "mode", "shift": 3, "mode_scale": 1},
        {"timesteps": "sigmoid", "sigmoid_scale": 2},
        {"timesteps": "flux_shift", "sigmoid_scale": 2},
        {"loss": "huber", "huber_c": 1, "huber_schedule": "snr"},
        {"loss": "smooth_l1", "huber_c": 1, "huber_schedule": "exponential"},
    ],
)
def test_what_an_objective_uses_is_not_refused(training):
    config = config_from_dict({"training": training}, "a test")
    refuse_without_effect(config, models(), {f"training.{key}" for key in training})


def test_a_resumed_run_starts_from_no_other_lora():
    config = config_from_dict({"lora": {"from_lora": "x"}}, "a test")
    refuse_without_effect(config, models(device="cuda"), {"lora.from_lora"})
    with pytest.raises(WrongRequest, match="--from-lora has no effect here: a resumed run goes on from its own state"):
        refuse_without_effect(config, models(device="cuda"), {"lora.from_lora"}, resume=True)


def test_every_setting_of_previews_is_known():
    assert {*SAMPLES, "every", "every_epochs"} == {field.name for field in fields(SamplesConfig)}


def test_asked_is_what_options_assignments_and_files_set(tmp_path):
    """But not [samples] of a file, which serves `fluxq sample` too, and what it sets to its default."""
    file = tmp_path / "my.toml"
    file.write_text("[training]\nrate = 1e-3\nsigmoid_scale = 1\n[samples]\nsteps = 4\n")
    given = {"output__keep": 3, "lora__rank": None, "samples__prompts": ()}
    asked = asked_for(file, ("data.size=96", "training.shift = 2"), given)
    assert asked == {"training.learning_rate", "output.keep", "data.resolution", "training.shift"}


def test_a_folder_that_is_named_again_keeps_its_repeats_and_trigger(tmp_path):
    """Also if it was moved."""
    saved = tmp_path / "config.toml"
    folders = [{"path": "/old/photos", "repeats": 4, "trigger": "zqx"}, {"path": "/old/plain"}]
    saved.write_text(to_toml(config_from_dict({"data": {"folders": folders}}, "a test")))
    photos, plain, new = (tmp_path / name for name in ("photos", "plain", "new"))
    assert folder_settings((photos, plain, new), saved) == [
        {"path": str(photos), "repeats": 4, "trigger": "zqx"},
        {"path": str(plain), "repeats": 1},
        {"path": str(new)},
    ]
    assert folder_settings((photos,), None) == [{"path": str(photos)}]


@pytest.mark.parametrize(
    ("name", "variant", "base_loras", "said"),
    [
        ("flux1-dev.safetensors", "dev", [], []),
        ("flux1-kontext-dev.safetensors", "dev", [], ["FLUX.1 Kontext by its name"]),
        ("models--x--FLUX.1-Kontext-dev/snapshots/0/transformer/model.safetensors", "dev", [], ["Kontext"]),
        ("flux1-schnell.safetensors", "schnell", [], ["merge a training adapter for schnell with --base-lora"]),
        ("flux1-schnell.safetensors", "schnell", [("a", 1.0)], []),
    ],
)
def test_kontext_and_schnell_get_a_line_each(name, variant, base_loras, said):
    lines = caveats(models(variant, quantized=None, flux_file=Path("models") / name, base_loras=base_loras))
    assert len(lines) == len(said) and all(re.search(part, line) for part, line in zip(said, lines, strict=True))


def test_a_quantized_kontext_is_known_by_the_file_it_was_made_from():
    quantized = SimpleNamespace(source={"files": ["flux1-kontext-dev.safetensors"]})
    lines = caveats(models(quantized=quantized, flux_file=Path("nf4.safetensors"), base_loras=[]))
    assert len(lines) == 1
