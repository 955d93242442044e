"""`--text-mask`: what reaches the model are the tokens of the captions, and no padding that anything attends to."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner

from fluxq.cli.main import main
from fluxq.config import ModelConfig
from fluxq.config_files import config_from_dict
from fluxq.errors import WrongRequest
from fluxq.formats.checkpoint.files import Checkpoint
from fluxq.memory.placement import costs_of
from fluxq.models import Models
from fluxq.nano import drawing
from fluxq.train import train
from fluxq.training import objective
from fluxq.training.defaults import resolve

CAPTIONS = ["zqx", "zqx, a large red circle at the top of a blue field, and a star", "zqx and a square"]


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for i, ((image, _), caption) in enumerate(zip(drawing.concept(seed=5, count=3), CAPTIONS, strict=True)):
        image.save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(caption)
    return folder


def configured(tmp_path, photos, out="run", **training):
    values = {"name": "nano", "text_mask": True}, {"steps": 4, "batch": 3, **training}
    return config_from_dict(
        {
            "model": values[0],
            "data": {"folders": [str(photos)], "cache": str(tmp_path / "cache")},
            "lora": {"rank": 2},
            "training": values[1],
            "output": {"out": str(tmp_path / out), "name": "test", "plot_seconds": 1e9},
            "samples": {"every": 2, "steps": 2, "prompts": ["zqx", "a longer prompt"]},
        },
        "a test",
    )


def counted() -> list[int]:
    return Models(ModelConfig(name="nano", text_mask=True)).tokens_of(CAPTIONS)


@pytest.mark.slow
def test_a_run_sees_the_tokens_of_its_captions_alone_and_resumes(tmp_path, photos, monkeypatch):
    said, seen, room, real = [], [], [], objective.flow_loss

    def watched(*given):
        seen.append((tuple(given[4].shape), given[8].sum(1).tolist()))
        return real(*given)

    monkeypatch.setattr(objective, "flow_loss", watched)
    monkeypatch.setattr("fluxq.train.require_room_for_run", lambda *given: room.append(given[-1]))
    done = train(configured(tmp_path, photos), notify=said.append)
    taken = sum(path.stat().st_size for path in (tmp_path / "cache").glob("*/*.safetensors"))
    assert room == [pytest.approx(taken, rel=0.05)]
    lengths = counted()
    assert len(set(lengths)) == 3 and max(lengths) < 32
    assert len(seen) == 4 and all(shape == (3, max(lengths), 128) for shape, _ in seen)
    assert all(sorted(mask) == sorted(lengths) for _, mask in seen)
    assert any(f"captions have up to {max(lengths)} of 32 T5 tokens; their padding is masked" in line for line in said)
    assert Checkpoint(tmp_path / "run" / "test.safetensors").metadata["ss_apply_t5_attn_mask"] == "True"
    assert (tmp_path / "run" / "samples" / "000004_01.png").is_file()

    train(configured(tmp_path, photos, "again", steps=2))
    train(configured(tmp_path, photos, "again", steps=4), resume=True)
    first, second = (Checkpoint(tmp_path / name / "test.safetensors") for name in ("run", "again"))
    assert all(torch.equal(first.get(key), second.get(key)) for key in first.shapes)
    other = configured(tmp_path, photos)
    with pytest.raises(WrongRequest, match="started with model.text_mask = True, not False"):
        train(replace(other, model=replace(other.model, text_mask=False)), resume=True)
    assert done.steps == 4

    sampling = ["sample", "--model", "nano", "--prompt", "zqx", "--steps", "1", "--out", str(tmp_path / "images")]
    sampling += ["--lora", str(tmp_path / "run" / "test.safetensors"), "--cache", str(tmp_path / "cache")]
    for options, told in (([], True), (["--text-mask"], False)):
        result = CliRunner().invoke(main, [*sampling, *options])
        assert result.exit_code == 0, result.output
        assert ("trained with the padding of text masked" in " ".join(result.output.split())) == told


def test_a_plan_is_made_for_the_longest_caption(tmp_path, photos, monkeypatch):
    gpu = SimpleNamespace(capability=86, library=0)
    monkeypatch.setattr("fluxq.memory.placement.measure", lambda folder: gpu)
    config = configured(tmp_path, photos)
    for masked, expected in ((True, max(counted())), (False, 32)):
        chosen = replace(config, model=replace(config.model, text_mask=masked))
        models = Models(chosen.model)
        resolve(chosen, models, lambda line: None)
        assert costs_of(chosen, models, 96).about["txt_tokens"] == expected


def test_without_a_tokenizer_the_plan_is_made_for_the_bound(tmp_path, photos):
    config = ModelConfig(name="nano", text_mask=True, t5_tokenizer=tmp_path / "gone")
    models = Models(config)
    assert models.use_captions(CAPTIONS) is None and models.text_tokens == 32
