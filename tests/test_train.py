"""The loop end to end on nano: resume after kill -9, real photographs, encoders deleted, runs that must not be lost."""

from __future__ import annotations

import errno
import json
import math
import multiprocessing
import os
import random
import re
import signal
import socket
import tempfile
import time
from contextlib import nullcontext
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from helpers import place_sensitive
from PIL import Image

from fluxq import nano
from fluxq.cli import main
from fluxq.config import LoraConfig, TrainingConfig
from fluxq.config_files import config_from_dict, read_toml
from fluxq.console import silent
from fluxq.data import Folder
from fluxq.data.folders import by_label
from fluxq.errors import GPUFailure, WrongRequest, is_gpu_failure, is_out_of_memory
from fluxq.formats.checkpoint.files import Checkpoint
from fluxq.formats.lora.read import load_lora
from fluxq.formats.lora.write import WRITTEN_DIALECTS
from fluxq.model import FluxConfig
from fluxq.models import Models
from fluxq.nano import drawing
from fluxq.train import train
from fluxq.training import disk, saves, stopping
from fluxq.training.defaults import resolve
from fluxq.training.objective import Objective
from fluxq.training.report import read_log
from fluxq.training.run import Run
from fluxq.training.schedules import learning_rate_factor


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Six captioned images in two buckets."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for i, (image, caption) in enumerate(drawing.concept(seed=5, count=6)):
        image.resize((96, 96) if i % 3 else (128, 64)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(caption)
    return folder


def settings(tmp_path: Path, photos: Path, **sections) -> dict:
    values = {
        "model": {"name": "nano"},
        "data": {"folders": [str(photos)], "trigger": "zqx", "cache": str(tmp_path.parent / "encoded")},  # of all tests
        "lora": {"rank": 4},
        "training": {"steps": 4, "batch": 2, "learning_rate": 1e-3},
        "output": {"out": str(tmp_path / "run"), "name": "test", "plot_seconds": 1e9},
    }
    for name, section in sections.items():
        values.setdefault(name, {}).update(section)
    return values


def configured(*args, **sections):
    return config_from_dict(settings(*args, **sections), "a test")


def tensors(path: Path) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint(path)
    return {key: checkpoint.get(key) for key in checkpoint.keys()}


def assert_same_tensors(a: Path, b: Path) -> None:
    first, second = tensors(a), tensors(b)
    assert first.keys() == second.keys()
    for key in first:
        assert torch.equal(first[key], second[key]), key


@pytest.mark.slow
@pytest.mark.skipif("forkserver" not in multiprocessing.get_all_start_methods(), reason="needs a fork server")
def test_resume_after_kill_is_bit_exact(tmp_path, photos):
    """Killed at three random moments, previews on, against one undisturbed run without previews. All data varies."""
    changes = {
        "data": {"shuffle_tags": True, "tag_dropout": 0.2, "caption_dropout": 0.2, "flip": True, "random_crop": True},
        "lora": {"rank": 24},  # 24 x 192 weights and more a matrix: enough for bitsandbytes to keep its state in 8 bits
        "training": {
            "steps": 28,
            "batch": 2,
            "accumulate": 2,
            "warmup": 5,
            "schedule": "cosine",
            "optimizer": "adamw8bit",
        },
        "output": {"save_every": 5},
    }
    plain = settings(tmp_path, photos, **changes)
    train(config_from_dict(plain, "a test"))

    killed = tmp_path / "killed"
    restless = settings(tmp_path, photos, **changes, samples={"every": 3, "steps": 2})
    restless["output"] = {**restless["output"], "out": str(killed)}
    config = config_from_dict(restless, "a test")
    processes = multiprocessing.get_context("forkserver")  # its processes begin with the modules imported
    processes.set_forkserver_preload(["fluxq.train", "bitsandbytes"])
    moments, kills, runs = random.Random(11), 0, 0
    while not (killed / "result.json").exists():
        runs += 1
        assert runs < 12, "the run does not get anywhere"
        resumable = (killed / "state" / "state.safetensors").exists()
        choices = {"overwrite": not resumable, "resume": resumable}
        process = processes.Process(target=train, args=(config,), kwargs=choices)
        process.start()
        if kills < 3:
            steps_before, patience = logged(killed), moments.randint(2, 5)
            while process.is_alive() and logged(killed) < steps_before + patience:
                time.sleep(0.02)
            time.sleep(moments.random() * 0.2)
            if process.is_alive():
                process.kill()
                kills += 1
        process.join()

    assert kills == 3
    assert_same_tensors(tmp_path / "run" / "test.safetensors", killed / "test.safetensors")
    assert_same_tensors(*(folder / "state" / "state.safetensors" for folder in (tmp_path / "run", killed)))
    logs = [read_log(folder / "log.jsonl") for folder in (tmp_path / "run", killed)]
    assert [[(r["step"], r["loss"], r["learning_rate"], r["grad"]) for r in log] for log in logs[:1]] == [
        [(r["step"], r["loss"], r["learning_rate"], r["grad"]) for r in log] for log in logs[1:]
    ]
    assert [r["step"] for r in logs[1]] == list(range(1, 29))
    assert len(list((killed / "samples").glob("*.png"))) == 10
    assert not list(killed.rglob(".*.tmp-*"))  # what a kill left behind was cleared away


def logged(folder: Path) -> int:
    return len(read_log(folder / "log.jsonl"))


@pytest.mark.slow
def test_photographs_from_an_empty_cache_to_a_lora(tmp_path, monkeypatch, plots):
    """scikit-image's photographs: many sizes, one gray, one with alpha; through the command line, and reopened."""
    data = pytest.importorskip("skimage.data")
    folder = tmp_path / "PHOTOS"
    folder.mkdir()
    for name in ("astronaut", "camera", "chelsea", "coffee", "rocket", "logo"):
        Image.fromarray(getattr(data, name)()).save(folder / f"{name}.png")
    command = (
        "train PHOTOS --trigger zqx --model nano --steps 3 --rank 4 --out runs/photos --sample-every 3 --sample-steps 2"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(socket.socket, "connect", lambda *address: pytest.fail("a run of files uses no network"))
    done = CliRunner().invoke(main, command.split())
    assert done.exit_code == 0, done.output
    run = tmp_path / "runs" / "photos"
    result = json.loads((run / "result.json").read_text())
    assert (result["steps"], Path(result["lora"]).name) == (3, "zqx.safetensors")
    lora = load_lora(run / "zqx.safetensors", FluxConfig.nano())
    adapters, metadata = lora.adapters, lora.metadata
    assert len(adapters) == 2 * 8 + 2 * 2
    assert all(a.up.abs().max() > 0 for a in adapters.values())
    assert metadata["modelspec.trigger_phrase"] == "zqx"
    assert json.loads(metadata["ss_dataset_dirs"]) == {"PHOTOS": {"n_repeats": 1, "img_count": 6}}
    for made in ("config.toml", "log.jsonl", "loss.png", "samples/000003_00.png", "state/state.safetensors"):
        assert (run / made).stat().st_size > 0
    parameters = Image.open(run / "samples" / "000003_00.png").text["parameters"]
    assert parameters.startswith(
        "zqx\nSteps: 2, Sampler: Euler, CFG scale: 1, Distilled CFG Scale: 3.5, Seed: 42, Size: 96x96"
    )


@pytest.mark.slow
def test_a_complete_cache_trains_without_encoder_files(tmp_path, photos):
    """The four files lie in a folder of their own; once cached, the encoders and tokenizers are deleted."""
    import shutil

    files = tmp_path / "models"
    shutil.copytree(nano.WEIGHTS, files)
    model = {
        "name": None,
        "flux": str(files / nano.FLUX.name),
        "ae": str(files / nano.AE.name),
        "clip_l": str(files / nano.CLIP_L.name),
        "t5xxl": str(files / nano.T5XXL.name),
        "t5_length": 32,
    }
    sections = {"model": model, "data": {"resolution": 96, "cache": str(tmp_path / "cache")}}
    train(configured(tmp_path, photos, **sections))
    first = tensors(tmp_path / "run" / "test.safetensors")
    for path in (nano.AE, nano.CLIP_L, nano.T5XXL):
        (files / path.name).unlink()
    shutil.rmtree(files / "tokenizer")
    shutil.rmtree(files / "tokenizer_2")
    train(configured(tmp_path, photos, **sections), overwrite=True)
    for key, tensor in tensors(tmp_path / "run" / "test.safetensors").items():
        assert torch.equal(tensor, first[key])


@pytest.mark.slow
def test_an_existing_run_is_never_replaced_silently(tmp_path, photos):
    config = configured(tmp_path, photos)
    train(config)
    before = (tmp_path / "run" / "test.safetensors").read_bytes()
    with pytest.raises(
        WrongRequest, match="already has a run .*; continue it with fluxq train --resume .*, replace it with --overw"
    ):
        train(config)
    assert (tmp_path / "run" / "test.safetensors").read_bytes() == before


@pytest.mark.slow
def test_every_lora_format_is_the_same_lora_and_replaces_only_its_own(tmp_path, photos):
    formats = next(f for f in fields(LoraConfig) if f.name == "file_format").metadata["choices"]
    assert formats == WRITTEN_DIALECTS
    found = {}
    for name in formats:
        out = tmp_path / f"run {name}"
        changes = {"lora": {"file_format": name}, "output": {"out": str(out), "save_every": 1, "keep": 1}}
        changes["training"] = {"steps": 3}
        for overwrite in (False, True)[: 2 if name == "peft" else 1]:  # the second time over what is there
            result = train(configured(tmp_path, photos, **changes), overwrite=overwrite)
        suffix = ".peft" if name == "peft" else ".safetensors"
        saved = sorted(path.name for path in out.iterdir() if path.name.startswith("test"))
        assert saved == [f"test-step00000002{suffix}", f"test{suffix}"]
        found[name] = load_lora(result.lora, FluxConfig.nano())
        assert found[name].dialect == name
    for name in formats[1:]:
        for module, adapter in found["kohya"].adapters.items():
            # bf16 in every file; diffusers' and PEFT's have alpha / rank, 1 here, in lora_B
            torch.testing.assert_close(found[name].adapters[module].change(), adapter.change(), rtol=1e-5, atol=1e-7)


def test_somebody_elses_lora_in_the_folder_is_kept(tmp_path, photos):
    """--out may be a folder of LoRAs that are not of any run."""
    out = tmp_path / "loras"
    out.mkdir()
    (out / "test.safetensors").write_bytes(b"precious")
    with pytest.raises(WrongRequest, match="test.safetensors"):
        train(configured(tmp_path, photos, output={"out": str(out)}))
    assert (out / "test.safetensors").read_bytes() == b"precious"


@pytest.mark.slow
@pytest.mark.parametrize("wrong", [{"lora": {"targets": ["nope"]}}, {"training": {"learning_rate": 1e30}}])
def test_a_request_that_fails_before_its_first_save_costs_nothing(wrong, tmp_path, photos):
    """A wrong target is refused while the old run is whole; NaN stops the run, and is never saved."""
    train(configured(tmp_path, photos))
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*.safetensors")}
    with pytest.raises(WrongRequest, match="matches no layer|no finite gradient; .* lower --lr"):
        train(configured(tmp_path, photos, **wrong), overwrite=True)
    if "lora" in wrong:
        assert {p: p.read_bytes() for p in before} == before
    assert not [p for p in (tmp_path / "run").rglob("*.safetensors") if p not in before]


def test_a_refused_first_attempt_does_not_block_the_second(tmp_path, photos):
    with pytest.raises(WrongRequest, match="matches no layer"):
        train(configured(tmp_path, photos, lora={"targets": ["nope"]}))
    train(configured(tmp_path, photos))


def test_what_a_killed_save_left_is_removed_file_or_folder(tmp_path):
    values = {"output": {"out": str(tmp_path), "name": "x"}, "data": {"folders": ["p"]}, "training": {"steps": 1}}
    (tmp_path / ".x.tmp-0.peft").mkdir()
    (tmp_path / ".x.tmp-0.peft" / "half").write_text("1")
    (tmp_path / ".x.tmp-0.safetensors").write_text("1")
    Run(config_from_dict(values, "a test")).begin(resume=False)
    assert [path.name for path in tmp_path.iterdir()] == ["config.toml"]


@pytest.mark.slow
def test_resume_notices_changed_images_and_captions(tmp_path, photos):
    train(configured(tmp_path, photos))
    (photos / "0.txt").write_text("another caption, zqx")
    (photos / "1.png").unlink()
    longer = configured(tmp_path, photos, training={"steps": 6})
    wanted = r"the images or captions changed \(removed photos/1.png; caption of photos/0.png\); restore that"
    with pytest.raises(WrongRequest, match=wanted):
        train(longer, resume=True)
    result = train(longer, resume=True, accepts_data=True)
    changes = json.loads(load_lora(result.lora, FluxConfig.nano()).metadata["fluxq_changes"])
    assert changes == [
        "after step 4: training.steps 4 -> 6",
        "after step 4: the images or captions changed (removed photos/1.png; caption of photos/0.png)",
    ]
    train(configured(tmp_path, photos, training={"steps": 7}), resume=True)  # now it is what the run is trained on
    records = map(json.loads, (tmp_path / "run" / "log.jsonl").read_text().splitlines())
    logged = [record.get("step", record.get("change")) for record in records]
    assert logged == [1, 2, 3, 4, *changes, 5, 6, "after step 6: training.steps 6 -> 7", 7]


@pytest.mark.slow
def test_validation_does_not_depend_on_the_batch_size(tmp_path, photos):
    """And it is the untrained model's before, by folder, with the folder's own trigger or none."""
    losses, said = [], []
    for batch in (1, 4):
        sections = {"training": {"batch": batch, "steps": 1}, "output": {"out": str(tmp_path / f"run{batch}")}}
        held_out = tmp_path / "held_out"
        if batch == 1:
            held_out.mkdir()
            for i, (image, caption) in enumerate(drawing.ordinary(seed=9, count=2)):
                image.save(held_out / f"{i}.png")
                (held_out / f"{i}.txt").write_text(caption)
        config = configured(tmp_path, photos, data={"validation": [str(held_out)]}, **sections)
        result = train(config, notify=said.append)
        losses.append(result.validation_before)
    assert said[-1] == f"LoRA: {result.lora}"
    assert list(losses[0]) == ["held_out"]
    assert losses[0]["held_out"] == pytest.approx(losses[1]["held_out"], rel=2e-3)  # bf16 sums in another order
    for when, loss in (("before", result.validation_before), ("after step 1", result.validation_after)):
        assert any(line.startswith(f"validation {when}: held-out images {loss['held_out']:.4f}") for line in said)


@pytest.mark.slow
def test_resume_goes_on_longer_but_refuses_other_mathematics(tmp_path, photos):
    said: list[str] = []
    first = train(configured(tmp_path, photos), notify=said.append)
    log = read_log(tmp_path / "run" / "log.jsonl")
    assert (first.loss_first, first.loss_last) == (log[0]["loss"], log[-1]["loss"])
    assert all(0 < r["seconds"] < first.seconds for r in log)
    assert any(
        re.search(r"trainable parameters in 20 layers; 6 images, \d batches per epoch, 4 steps", s) for s in said
    )
    lora = Path(first.lora)
    before = lora.read_bytes()
    lora.unlink()  # as if the run was killed between state and LoRA
    train(configured(tmp_path, photos), resume=True)
    assert lora.stat().st_size == len(before)
    lora = re.escape(str(tmp_path / "run" / "test.safetensors"))
    for changes, refusal in (
        ({"lora": {"rank": 8}}, "lora.rank = 4, not 8, and its LoRA has that rank; resume it without changing lora.r"),
        ({"training": {"optimizer": "adamw"}}, "training.optimizer = adamw8bit, not adamw, and its state is not that"),
        ({"model": {"format": "int8"}}, "model.format = nf4, not int8, and in another format the frozen weights are"),
        ({"model": {"text_mask": True}}, "model.text_mask = False, not True, and its steps so far were made with that"),
        ({"model": {"compute": "int8"}}, "model.compute = bf16, not int8, and in another arithmetic the frozen model"),
        (
            {"training": {"seed": 1}},
            "training.seed = 42, not 1, and its steps so far were made with that; resume it wi",
        ),
    ):
        with pytest.raises(WrongRequest, match=rf"run was started with {refusal}.*\(--from-lora {lora} --out ANOTHER"):
            train(configured(tmp_path, photos, **changes), resume=True)
    result = train(configured(tmp_path, photos, training={"steps": 6}), resume=True)
    assert result.steps == 6
    assert [r["step"] for r in read_log(tmp_path / "run" / "log.jsonl")] == list(range(1, 7))
    straight = configured(tmp_path, photos, training={"steps": 6}, output={"out": str(tmp_path / "straight")})
    train(straight)
    assert_same_tensors(tmp_path / "run" / "test.safetensors", tmp_path / "straight" / "test.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "accumulate"), [(64, 1), (8, 2)])
def test_resume_in_the_middle_of_what_is_computed_ahead_changes_no_bit(rows, accumulate, tmp_path, photos, monkeypatch):
    """With tiles of 32 micro-steps and of 4, and rows that show it if they are computed at another place."""
    monkeypatch.setattr("fluxq.model.modulation.FEW_ROWS", rows)
    monkeypatch.setattr("fluxq.model.modulation.Flux.modulation_rows", place_sensitive)

    def run(name: str, steps: int, resume: bool = False) -> Path:
        sections = {"training": {"steps": steps, "accumulate": accumulate}, "output": {"out": str(tmp_path / name)}}
        return Path(train(configured(tmp_path, photos, **sections), resume=resume).lora)

    run("resumed", 3)
    assert_same_tensors(run("resumed", 7, resume=True), run("straight", 7))


def test_folders_of_one_name_are_told_apart_by_their_paths():
    folders = [Folder(Path(path)) for path in ("a/x", "b/x", "c/y")]
    assert list(by_label(folders)) == [str(Path("a/x")), str(Path("b/x")), "y"]


def test_resume_without_a_saved_state_says_so(tmp_path, photos):
    train(configured(tmp_path, photos))
    (tmp_path / "run" / "state" / "state.safetensors").unlink()
    with pytest.raises(WrongRequest, match="has no saved state yet"):
        train(configured(tmp_path, photos), resume=True)


def test_a_size_off_the_grid_names_what_would_do(tmp_path, photos):
    with pytest.raises(WrongRequest, match="multiple of 16 pixels, not 100; use 96 or 112"):
        train(configured(tmp_path, photos, data={"resolution": 100}))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "fails_at", ["run/test.safetensors", "state/state.safetensors", "test-step00000004.safetensors"]
)
def test_a_full_disk_keeps_the_last_good_file(fails_at, tmp_path, photos, monkeypatch):
    """The system refuses to flush one file after the first save: the run goes on, and says at its end what it could
    not save. The LoRA of a step before the end is not worth that.
    """
    import errno

    from fluxq.formats import atomic

    real, good = atomic._flush, tmp_path / "run" / "state" / "state.safetensors"

    def full(path, flags):
        final = path.name.split(".tmp-")[0].removeprefix(".")
        if good.exists() and f"{path.parent.name}/{final}{path.suffix}".endswith(fails_at):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return real(path, flags)

    settings = {"training": {"steps": 6}, "output": {"save_every": 2}}
    monkeypatch.setattr(atomic, "_flush", full)
    said = []
    ends = nullcontext() if "-step" in fails_at else pytest.raises(WrongRequest, match="the disk is full .* step 6")
    with ends:
        train(configured(tmp_path, photos, **settings), notify=said.append)
    assert fails_at.startswith("run/") or any("step 4 could not be saved" in line for line in said)
    monkeypatch.undo()
    result = train(configured(tmp_path, photos, **settings), resume=True)
    assert [r["step"] for r in read_log(tmp_path / "run" / "log.jsonl")] == [1, 2, 3, 4, 5, 6]
    assert Path(result.lora).exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "file_format, variant", [("kohya", {}), ("diffusers", {}), ("diffusers", {"ranks": "mlp=8", "ema": 0.9})]
)
def test_a_run_takes_the_room_that_was_said_before_it_started(file_format, variant, tmp_path, photos, monkeypatch):
    found: list[disk.Need] = []
    monkeypatch.setattr(disk, "require_room", lambda needs, notify: found.extend(needs))
    for path in [*photos.glob("*.png")]:
        Image.new("L", Image.open(path).size, 255).save(path.with_name(f"{path.stem}-masklabel.png"))
    changes = {"data": {"cache": str(tmp_path / "cache"), "masks": "beside"}, "output": {"save_every": 2}}
    changes |= {"lora": {"rank": 24, "file_format": file_format, **variant}, "training": {"steps": 3}}
    train(configured(tmp_path, photos, **changes))
    said, run = {need.what: need.nbytes for need in found}, tmp_path / "run"
    taken = {"state twice": 2 * (run / "state/state.safetensors").stat().st_size}
    taken["LoRAs"] = sum(path.stat().st_size for path in run.glob("*.safetensors"))
    taken["cache"] = sum(path.stat().st_size for path in (tmp_path / "cache").rglob("*.safetensors"))
    for what, nbytes in taken.items():
        assert nbytes == pytest.approx(said[what], rel=0.02), what


def test_defaults_are_printed_with_their_reasons(tmp_path, photos, monkeypatch):
    """Every default that was left open is said, and nothing that was not."""
    from fluxq import train as module

    said: list[str] = []
    values = {"model": {"name": "nano"}, "data": {"folders": [str(photos)], "cache": str(tmp_path / "cache")}}
    config = config_from_dict(values | {"output": {"out": str(tmp_path / "run")}}, "a test")
    resolved, _ = module.resolve(config, module.Models(config.model), said.append)
    beginnings = [
        "resolution 96: ",
        "rank 16: ",
        "alpha 16: ",
        "steps 1000: ",
        "learning rate 0.0001: ",
        "shift 3.1582: ",
    ]
    assert [line[: len(b)] for line, b in zip(said, beginnings, strict=True)] == beginnings
    assert resolved.training.steps == 1000
    assert any(line == "steps 1000: each of 6 images is seen 166.7 times on average" for line in said), said
    several = replace(config, training=replace(config.training, batch=4, accumulate=2))
    assert module.resolve(several, module.Models(config.model), said.append)[0].training.steps == 167, (
        "6 a step, as buckets have 4 and 2 images"
    )
    said.clear()
    module.resolve(resolved, module.Models(config.model), said.append)
    assert {line.split()[0] for line in said} <= {"rank", "learning", "shift"}


@pytest.mark.slow
def test_an_edited_config_is_compared_with_the_saved_state(tmp_path, photos):
    """What was edited counts as asked: it is recorded where it may change, and refused where it may not."""
    train(configured(tmp_path, photos))
    written = tmp_path / "run" / "config.toml"
    before = written.read_text()
    written.write_text(before.replace('compute = "bf16"', 'compute = "int8"'))
    with pytest.raises(WrongRequest, match="model.compute = bf16, not int8"):
        train(config_from_dict(read_toml(written), "the run"), resume=True)
    written.write_text(before.replace("steps = 4", "steps = 5"))
    result = train(config_from_dict(read_toml(written), "the run"), resume=True)
    changes = json.loads(load_lora(result.lora, FluxConfig.nano()).metadata["fluxq_changes"])
    assert changes == ["after step 4: training.steps 4 -> 5"]


@pytest.mark.slow
def test_folders_are_added_when_asked(tmp_path, photos):
    train(configured(tmp_path, photos))
    more = tmp_path / "more"
    more.mkdir()
    drawing.concept(seed=6, count=1)[0][0].resize((96, 96)).save(more / "0.png")
    both = configured(tmp_path, photos, data={"folders": [str(photos), str(more)]}, training={"steps": 5})
    with pytest.raises(
        WrongRequest, match=r"data.folders = .*photos trigger zqx repeats 1, not .*more.*; resume it with FOLDERS"
    ):
        train(both, resume=True)
    result = train(both, resume=True, accepts_data=True)
    assert "more/0.png" in load_lora(result.lora, FluxConfig.nano()).metadata["fluxq_changes"]


@pytest.mark.slow
def test_resume_takes_another_learning_rate_and_a_longer_schedule_when_asked(tmp_path, photos):
    """The finished LoRA is kept under its step, also where only one is to be kept."""
    schedule = {"schedule": "cosine", "steps": 2}
    first = Path(train(configured(tmp_path, photos, training=schedule, output={"keep": 1})).lora)
    before = first.read_bytes()
    changed = {"schedule": "cosine", "steps": 6, "learning_rate": 5e-4}
    result = train(configured(tmp_path, photos, training=changed, output={"keep": 1, "save_every": 2}), resume=True)
    assert (tmp_path / "run" / "test-step00000002.safetensors").read_bytes() == before
    assert Path(result.lora) == first and first.read_bytes() != before
    rates = [r["learning_rate"] for r in read_log(tmp_path / "run" / "log.jsonl")]
    cosine = TrainingConfig(schedule="cosine", steps=6)
    assert rates[2:] == pytest.approx([5e-4 * learning_rate_factor(cosine, step) for step in range(2, 6)])
    again = {**changed, "steps": 9}
    train(configured(tmp_path, photos, training=again, output={"keep": 1, "save_every": 2}), resume=True)
    kept = sorted(path.name for path in (tmp_path / "run").glob("test-step*"))
    assert kept == [f"test-step0000000{step}.safetensors" for step in (2, 6, 8)]


@pytest.mark.slow
def test_a_run_resumes_after_its_images_moved(tmp_path, photos):
    train(configured(tmp_path, photos))
    elsewhere = tmp_path / "another disk" / photos.name
    elsewhere.parent.mkdir()
    photos.rename(elsewhere)
    result = train(configured(tmp_path, elsewhere, training={"steps": 5}), resume=True)
    assert result.steps == 5


def test_one_process_a_run_directory(tmp_path, photos):
    config = configured(tmp_path, photos)
    with Run(resolve(config, Models(config.model), silent)[0]).locked():
        for choice in ({}, {"overwrite": True}, {"resume": True}):
            with pytest.raises(
                WrongRequest, match=rf"run is in use by another fluxq \(process {os.getpid()} on .*, st"
            ):
                train(config, **choice)
    assert not (tmp_path / "run").exists(), "a folder made for nothing is removed"


@pytest.mark.slow
def test_a_lora_that_an_end_between_two_files_has_cost_is_written_when_the_run_resumes(tmp_path, photos):
    lora = Path(train(configured(tmp_path, photos)).lora)
    before = tensors(lora)
    lora.unlink()
    train(configured(tmp_path, photos), resume=True)
    assert all(torch.equal(tensor, before[key]) for key, tensor in tensors(lora).items())


@pytest.mark.slow
def test_a_step_without_a_finite_gradient_is_skipped_and_named(tmp_path, photos, monkeypatch):
    said, real = [], Objective.terms

    def terms(self, index):
        return (term * (math.nan if index in (1, 3) else 1) for term in real(self, index))

    monkeypatch.setattr(Objective, "terms", terms)
    train(configured(tmp_path, photos, output={"save_every": 2}), notify=said.append)
    line, last = [line for line in said if "is skipped" in line]
    assert last.startswith("step 4 is skipped"), "what the run made is saved all the same"
    assert re.match(
        r"step 2 is skipped, its gradient is nan: photos/\d\.png \('.*zqx.*'\) at t = 0\.\d+; photos/", line
    )
    assert not (tmp_path / "run" / "test-step00000002.safetensors").exists(), "what may be wrong is not saved"
    assert (tmp_path / "run" / "test-step00000003.safetensors").exists(), "but the next step is"
    assert [math.isnan(r["grad"]) for r in read_log(tmp_path / "run" / "log.jsonl")] == [False, True, False, True]
    assert all(tensor.isfinite().all() for tensor in tensors(tmp_path / "run" / "test.safetensors").values())


@pytest.mark.slow
def test_a_save_that_fails_costs_nothing(tmp_path, photos, monkeypatch):
    undisturbed = Path(train(configured(tmp_path, photos, output={"out": str(tmp_path / "undisturbed")})).lora)
    said, real = [], saves.save_state

    def full(path, progress, *rest):
        if progress.step == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path, progress, *rest)

    monkeypatch.setattr(saves, "save_state", full)
    result = train(configured(tmp_path, photos, output={"save_every": 2}), notify=said.append)
    (line,) = [line for line in said if "could not be saved" in line]
    assert line.startswith("step 2 could not be saved: ") and line.endswith("training goes on, next try in 30 s")
    assert_same_tensors(undisturbed, Path(result.lora))


@pytest.mark.slow
def test_a_state_that_the_disk_does_not_take_at_the_end_is_put_elsewhere(tmp_path, photos, monkeypatch):
    real = saves.save_state
    run = tmp_path / "run"

    def full(path, *rest):
        if path.is_relative_to(run):
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(saves, "save_state", full)
        with pytest.raises(WrongRequest, match="No space left.*the state of step 4 is in .*: move it to ") as refused:
            train(configured(tmp_path, photos))
    (moved,) = tmp_path.glob("test-state-step00000004.safetensors")
    assert str(moved) in str(refused.value)
    (run / "state").mkdir(exist_ok=True)
    moved.rename(run / "state" / "state.safetensors")
    result = train(configured(tmp_path, photos, training={"steps": 5}), resume=True)
    assert result.steps == 5


def test_where_no_disk_takes_the_state_the_last_save_is_named(tmp_path, monkeypatch):
    def fail(*_):
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", fail)
    run, progress = SimpleNamespace(folder=tmp_path / "run", name="test", state_file=None), SimpleNamespace(step=4)
    told = saves.Saves._elsewhere(SimpleNamespace(run=run, progress=progress, _saved=2, _state=fail))
    assert told == f"the last save is that of step 2; continue from it with --resume {run.folder}"


@pytest.mark.slow
def test_a_step_that_takes_too_long_after_a_signal_costs_only_itself(tmp_path, photos, monkeypatch):
    """SIGTERM in step 3, and the process killed before that ends: step 2 was saved meanwhile."""
    undisturbed = Path(train(configured(tmp_path, photos, output={"out": str(tmp_path / "undisturbed")})).lora)
    state, real = tmp_path / "run" / "state" / "state.safetensors", Objective.terms

    def slow(self, index):
        if index < 2:
            return real(self, index)
        signal.raise_signal(signal.SIGTERM)
        for _ in range(500):
            if state.exists():
                raise SystemExit("killed")
            time.sleep(0.02)

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="killed"):
        patch.setattr(Objective, "terms", slow)
        patch.setattr(stopping, "PATIENCE", 0.1)
        train(configured(tmp_path, photos))
    assert json.loads(Checkpoint(state).metadata["fluxq_state"])["step"] == 2
    result = train(configured(tmp_path, photos), resume=True)
    assert_same_tensors(undisturbed, Path(result.lora))


GPU_ERRORS = [
    torch.AcceleratorError("CUDA error: an illegal memory access was encountered\nFor debugging ..."),
    torch.AcceleratorError("CUDA error: device-side assert triggered"),
    RuntimeError("Triton Error [CUDA]: unspecified launch failure"),
    RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx(...)`"),
]


@pytest.mark.slow
@pytest.mark.parametrize("lost", [False, True])
def test_a_failure_of_the_gpu_costs_one_step_or_what_was_not_saved(lost, tmp_path, photos, monkeypatch):
    """In step 4. Where the GPU's memory is lost with it, the last save is that of step 2."""
    undisturbed = Path(train(configured(tmp_path, photos, output={"out": str(tmp_path / "undisturbed")})).lora)
    state, error, real = saves.save_state, GPU_ERRORS[lost], Objective.terms

    def fails(self, index):
        if index == 3:
            raise error
        return real(self, index)

    def unreadable(path, progress, *rest):
        if lost and progress.step == 3:
            raise error
        state(path, progress, *rest)

    with monkeypatch.context() as patch, pytest.raises(GPUFailure) as failed:
        patch.setattr(Objective, "terms", fails)
        patch.setattr(saves, "save_state", unreadable)
        train(configured(tmp_path, photos, output={"save_every": 2}))
    kept = "everything since is lost: the last save is that of step 2" if lost else "that step is saved"
    run = tmp_path / "run"
    first = str(error).splitlines()[0]
    told = f"the GPU failed after step 3 ({first}); {kept}; continue with: fluxq train --resume {run};"
    assert str(failed.value).startswith(told) and "\n" not in str(failed.value)
    assert json.loads(Checkpoint(run / "state" / "state.safetensors").metadata["fluxq_state"])["step"] == 3 - lost
    assert_same_tensors(undisturbed, Path(train(configured(tmp_path, photos), resume=True).lora))


@pytest.mark.slow
def test_an_update_that_the_gpu_did_not_finish_is_not_saved(tmp_path, photos, monkeypatch):
    real, updates = torch.optim.AdamW.step, []

    def half(self, closure=None):
        real(self)
        updates.append(1)
        if len(updates) == 3:
            raise GPU_ERRORS[2]

    monkeypatch.setattr(torch.optim.AdamW, "step", half)
    with pytest.raises(
        GPUFailure, match=r"after step 2 \(Triton .*; what it held is lost, and nothing was saved yet; start"
    ):
        train(configured(tmp_path, photos, training={"optimizer": "adamw"}))
    assert not list((tmp_path / "run").rglob("state.safetensors"))


@pytest.mark.parametrize("error", GPU_ERRORS)
def test_a_failure_of_the_gpu_is_told_from_memory_that_ran_out_and_from_mistakes(error):
    assert is_gpu_failure(error) and not is_out_of_memory(error)
    for other in (
        torch.OutOfMemoryError("CUDA out of memory. Tried"),
        torch.AcceleratorError("CUDA error: out of memory"),
    ):
        assert is_out_of_memory(other) and not is_gpu_failure(other)
    assert not is_gpu_failure(RuntimeError("shapes cannot be multiplied")) and not is_gpu_failure(None)


def test_names_that_are_not_utf_8_are_kept_in_the_config(tmp_path, photos):
    config = configured(tmp_path, photos, data={"trigger": "caf\udce9 \x1b"})
    run = Run(resolve(config, Models(config.model), silent)[0])
    run.begin(resume=False)
    written = run.folder / "config.toml"
    assert b"caf\xe9" in written.read_bytes()
    assert config_from_dict(read_toml(written), "the copy") == run.config
