"""Workflows of ComfyUI-FluxTrainer, of its editor and of its API, become settings."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from PIL import Image

from fluxq import nano
from fluxq.cli.main import main
from fluxq.compat.flux_trainer import INIT, WIDGETS, read_workflow
from fluxq.config_files import config_from_dict, read_toml
from fluxq.errors import WrongRequest

MODELS = [f"models/{name}.safetensors" for name in ("flux1-nano", "ae", "clip_l", "t5xxl")]
TRAINER = ["zqx", "out", 4, 2.0, 1e-4, 6, False, "disk", "disk", 0, "logit_normal", 0, 1, 1.29, "shift", 1, "raw", 1]
TRAINER += [3.1582, False, True, "bf16", "bf16", "sdpa", "a | b", "", "disabled", 0, 0, "enabled"]
NODES: dict[str, tuple[str, list[Any], dict[str, str]]] = {  # id -> kind, values, inputs
    "1": ("FluxTrainModelSelect", [*MODELS, ""], {}),
    "2": ("TrainDatasetGeneralConfig", [False, True, False, 0.1, False, False, ".txt"], {}),
    "3": ("TrainDatasetAdd", [96, 96, 1, "photos", "a man", True, False, 2, 64, 256], {"dataset_config": "2"}),
    "4": ("TrainDatasetAdd", [96, 160, 1, "photos", "a man", True, False, 1, 64, 256], {"dataset_config": "3"}),
    "5": ("OptimizerConfig", ["adamw8bit", 0.5, "constant", 0, 1, 1, 5, "eps=1e-6|betas=(0.9,0.99)"], {}),
    "6": (INIT, TRAINER, {"flux_models": "1", "dataset": "4", "optimizer_settings": "5"}),
    "7": ("FluxTrainLoop", [2], {"network_trainer": "6"}),
    "8": ("FluxTrainSave", [False, False], {"network_trainer": "7"}),
    "9": ("FluxTrainLoop", [2], {"network_trainer": "8"}),
    "10": ("FluxTrainValidate", [], {"network_trainer": "9", "validation_settings": "11"}),
    "11": ("FluxTrainValidationSettings", [1, 96, 112, 3, 7, "fixed", True, 0.5, 1.15], {}),
    "12": ("VisualizeLoss", ["ggplot", 100, True, 768, 512, False], {"network_trainer": "10"}),
    "13": ("PreviewImage", [], {"images": "12"}),
}


def api(nodes: dict[str, Any] = NODES) -> dict[str, Any]:
    return {
        id: {
            "class_type": kind,
            "inputs": {
                **dict(zip(WIDGETS.get(kind, "").split(), values, strict=True)),
                **{k: [v, 0] for k, v in links.items()},
            },
        }
        for id, (kind, values, links) in nodes.items()
    }


def editor(nodes: dict[str, Any] = NODES) -> dict[str, Any]:
    links, found = [], []
    for id, (kind, values, inputs) in nodes.items():
        slots = []
        for name, source in inputs.items():
            links.append([len(links), int(source), 0, int(id), 0, "*"])
            slots.append({"name": name, "link": links[-1][0]})
        found.append({"id": int(id), "type": kind, "mode": 0, "inputs": slots, "widgets_values": values})
    return {"nodes": found, "links": links}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: photos/ with two images, and nano's files in models/."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    for i in range(2):
        Image.effect_mandelbrot((160, 160), (-2, -1, 1, 1), 20 + i).convert("RGB").save(tmp_path / f"photos/{i}.png")
    (tmp_path / "models").symlink_to(nano.WEIGHTS)
    return tmp_path


@pytest.mark.parametrize("form", [api, editor])
def test_nodes_become_settings(form):
    found = read_workflow(form())
    assert not found.refusals()
    config = found.config()
    training, output = config.training, config.output
    assert (config.lora.rank, config.lora.alpha, config.model.format) == (4, 2.0, "fp8")
    assert (training.learning_rate, training.steps, training.clip, training.seed) == (1e-4, 4, 0.5, 42)
    assert (training.timesteps, training.shift, training.guidance) == ("shift", 3.1582, 1)
    assert training.optimizer_args == ("eps=1e-06", "betas=(0.9, 0.99)")
    assert (str(output.out), output.name, output.save_every) == ("out", "zqx_rank4_bf16", 2)
    first, second = config.data.folders
    assert (first.resolution, first.repeats, first.class_tokens, first.flip) == (96, 2, "a man", True)
    assert second.resolution == ((96, 160),) and second.caption_dropout == 0.1
    samples = config.samples
    assert (samples.prompts, samples.every, samples.width, samples.height) == (("a", "b"), 4, 96, 112)
    assert (samples.steps, samples.guidance, samples.seed) == (1, 3, 7)
    said = "\n".join(found.lines)
    assert all(f"{kind}." in said or f"{kind} {id}" in said for id, (kind, *_) in NODES.items())
    lines = found.toml("w.json").splitlines()
    assert f"rank = 4  # {INIT}.network_dim: 4" in lines
    assert f'timesteps = "shift"  # {INIT}.timestep_sampling: "shift"' in lines
    assert all("  # " in line for line in lines if " = " in line.partition("#")[0])


def test_what_only_passes_on_is_followed_and_bypassed_nodes_do_nothing():
    nodes = deepcopy(NODES)
    nodes["20"] = ("SetNode", ["all"], {"*": "4"})
    nodes["21"] = ("GetNode", ["all"], {})
    nodes["22"] = ("StringConstantMultiline", ["c | d", True], {})
    nodes["6"][2].update({"dataset": "21", "sample_prompts": "22"})
    workflow = editor(nodes)
    workflow["nodes"][7]["mode"] = 4
    found = read_workflow(workflow)
    assert len(found.config().data.folders) == 2 and found.config().samples.prompts == ("c", "d")
    assert found.config().training.steps == 4 and found.config().output.save_every == 0
    assert "FluxTrainSave 8: ignored: it is muted" in found.lines


@pytest.mark.parametrize(
    ("id", "change", "why"),
    [
        ("6", {"timestep_samplin": "shift"}, "the node has no such value; did you mean timestep_s"),
        ("6", {"train_text_encoder": "clip_l+T5"}, "train_t5xxl: T5-XXL cannot be trained"),
        ("5", {"lr_scheduler": "adafactor"}, "--lr_scheduler: adafactor is not read"),
        ("11", {"max_shift": 2.0}, "FluxTrainValidationSettings.shift: fluxq samples with"),
        ("3", {"dataset_path": r"D:\zqx"}, r"not on this machine: D:\zqx; --map"),
        ("13", {"class_type": "FluxTrainBlockSelect"}, "FluxTrainBlockSelect: this node is not read"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused_by_name(id, change, why):
    workflow = api()
    workflow[id]["inputs"] |= change
    workflow[id]["class_type"] = change.get("class_type", workflow[id]["class_type"])
    assert why in "; ".join(read_workflow(workflow).refusals())


@pytest.mark.parametrize("without", ["6", "4", "2"])
def test_a_workflow_without_a_trainer_or_its_datasets_is_refused(without, folder):
    (folder / "w.json").write_text(json.dumps({k: v for k, v in api().items() if k != without}), encoding="utf-8")
    answer = CliRunner().invoke(main, ["import", "w.json"])
    assert answer.exit_code == 2 and INIT in answer.output and "Traceback" not in answer.output


@pytest.mark.slow
@pytest.mark.parametrize("value", [None, [], {"a": 1}, [[1]], "'", -1, 10**400, True])
def test_values_of_any_type_are_taken_or_refused(value):
    for form in (api, editor):
        for id, (kind, values, _) in NODES.items():
            for i, name in enumerate(WIDGETS.get(kind, "").split()[: len(values)]):
                workflow = deepcopy(form())
                if form is api:
                    workflow[id]["inputs"][name] = value
                else:
                    workflow["nodes"][int(id) - 1]["widgets_values"][i] = value
                try:
                    found = read_workflow(workflow)
                    assert found.refusals() or found.toml("w.json")
                except WrongRequest as error:
                    assert str(error)


@pytest.mark.slow
def test_an_imported_workflow_trains(folder):
    (folder / "w.json").write_text(json.dumps(editor()), encoding="utf-8")
    assert CliRunner().invoke(main, ["import", "w.json"]).exit_code == 0
    assert config_from_dict(read_toml(folder / "w.toml"), "") == read_workflow(editor()).config()
    answer = CliRunner().invoke(main, ["train", "--config", "w.toml"])
    assert answer.exit_code == 0, answer.output
    names = {path.name for path in (folder / "out").glob("*.safetensors")}
    assert names == {"zqx_rank4_bf16.safetensors", "zqx_rank4_bf16-step00000002.safetensors"}
