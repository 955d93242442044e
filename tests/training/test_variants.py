"""Variants of LoRA end to end on nano: a resumed run is the same run, and files are what they say."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fluxq.config_files import config_from_dict
from fluxq.console import silent
from fluxq.errors import WrongRequest
from fluxq.formats.checkpoint.files import Checkpoint
from fluxq.nano import drawing
from fluxq.train import train
from fluxq.training.report import read_log

EVERYTHING = {
    "lora": {
        "rank": 4,
        "ranks": "mlp=2,single=6",
        "rank_stabilized": True,
        "dropout": 0.1,
        "rank_dropout": 0.2,
        "inner_dropout": 0.1,
        "module_dropout": 0.1,
        "plus_ratio": 4,
        "max_norm": 0.02,
        "ema": 0.9,
    },
    "training": {"batch": 2, "accumulate": 2, "learning_rate": 1e-3, "optimizer": "adamw"},
}


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("variants") / "photos"
    folder.mkdir()
    for i, (image, caption) in enumerate(drawing.concept(seed=5, count=3)):
        image.resize((64, 64)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(caption)
    return folder


def configured(photos: Path, out: Path, steps: int, **sections):
    values = {
        "model": {"name": "nano"},
        "data": {"folders": [str(photos)], "trigger": "zqx", "resolution": 64, "cache": str(photos.parent / "cache")},
        "training": {"steps": steps},
        "output": {"out": str(out), "name": "test", "plot_seconds": 1e9, "save_every": 0},
    }
    for name, section in sections.items():
        values[name] = values.get(name, {}) | section
    return config_from_dict(values, "a test")


def tensors(path: Path) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint(path)
    return {key: checkpoint.get(key) for key in checkpoint.keys()}


def assert_same(a: Path, b: Path) -> None:
    one, other = tensors(a), tensors(b)
    assert one.keys() == other.keys()
    assert not [key for key in one if not torch.equal(one[key], other[key])]


@pytest.mark.slow
@pytest.mark.parametrize("text_encoder", [{}, {"text_encoder": "clip_l"}])
def test_three_steps_and_three_more_are_six_to_the_bit(text_encoder, tmp_path, photos):
    def run(out: str, steps: int, **more) -> Path:
        sections = {**EVERYTHING, "lora": EVERYTHING["lora"] | text_encoder}
        train(configured(photos, tmp_path / out, steps, **sections), notify=silent, **more)
        return tmp_path / out

    whole = run("whole", 6)
    run("parts", 3)
    parts = run("parts", 6, resume=True)
    for name in ("test.safetensors", "test-ema.safetensors", "state/state.safetensors"):
        assert_same(whole / name, parts / name)
    assert (parts / "test-step00000003.safetensors").exists() and (parts / "test-ema-step00000003.safetensors").exists()
    logs = [read_log(folder / "log.jsonl") for folder in (whole, parts)]
    assert [r["loss"] for r in logs[0]] == [r["loss"] for r in logs[1]]
    assert "scaled" not in logs[0][0] and logs[0][5]["scaled"] == logs[1][5]["scaled"] > 0


@pytest.mark.slow
def test_the_file_says_what_it_is_and_its_average_is_another_lora(tmp_path, photos):
    config = configured(photos, tmp_path / "run", 2, **EVERYTHING)
    train(config, notify=silent)
    files = [Checkpoint(tmp_path / "run" / f"test{end}.safetensors") for end in ("", "-ema")]
    about = [file.metadata for file in files]
    assert (about[0]["ss_network_dim"], about[0]["ss_network_alpha"]) == ("Dynamic", "Dynamic")
    assert about[0]["ss_scale_weight_norms"] == "0.02" and "fluxq_ema" not in about[0]
    assert about[1]["fluxq_ema"] == "0.9"
    ups = [key for key in files[0].keys() if key.endswith("up.weight")]
    assert any(not torch.equal(files[0].get(key), files[1].get(key)) for key in ups)
    for name, rank in (
        ("double_blocks_0_img_mlp_0", 2),
        ("single_blocks_0_linear1", 6),
        ("double_blocks_0_img_attn_qkv", 4),
    ):
        alpha = float(files[0].get(f"lora_unet_{name}.alpha"))
        assert files[0].shape(f"lora_unet_{name}.lora_down.weight")[0] == rank
        assert alpha / rank == pytest.approx(4 / rank**0.5), "what every program reads as the scale"
    with pytest.raises(WrongRequest, match="was started with lora.ema = 0.9, not 0.99"):
        more = {**EVERYTHING, "lora": {**EVERYTHING["lora"], "ema": 0.99}}
        train(configured(photos, tmp_path / "run", 4, **more), resume=True, notify=silent)


@pytest.mark.slow
def test_an_average_is_kept_pruned_and_replaced_as_its_lora_is(tmp_path, photos):
    """A run called like the average of another is not touched, and a LoRA that exists has its average."""
    sections = {"training": {"batch": 2}, "output": {"save_every": 1, "keep": 1}}
    config = configured(photos, tmp_path / "run", 3, **sections, lora={"rank": 2, "ema": 0.9})
    train(config, notify=silent)
    files = sorted(path.name for path in (tmp_path / "run").glob("*.safetensors"))
    steps = ["test-ema-step00000002.safetensors", "test-ema.safetensors"]
    assert files == [*steps, "test-step00000002.safetensors", "test.safetensors"]
    with pytest.raises(WrongRequest, match="already has a run"):
        train(config, notify=silent)
    (tmp_path / "run" / "test-ema-step00000001.safetensors").write_bytes((tmp_path / "run" / files[2]).read_bytes())
    train(configured(photos, tmp_path / "run", 1, **sections, lora={"rank": 2}), overwrite=True, notify=silent)
    left = sorted(path.name for path in (tmp_path / "run").glob("*.safetensors"))
    assert left == ["test-ema-step00000001.safetensors", "test.safetensors"]


def test_settings_that_contradict_are_refused(tmp_path, photos):
    wrong = {"lora": {"plus_ratio": 4}, "training": {"optimizer": "prodigy", "learning_rate": 1}}
    with pytest.raises(WrongRequest, match="prodigy finds one of its own"):
        train(configured(photos, tmp_path / "run", 2, **wrong), notify=silent)
    assert not (tmp_path / "run").exists()
