"""Training CLIP-L along with the transformer, on nano: what it learns alone, resume, files, LoRAs to start from."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from helpers import relative_error

from fluxq import nano
from fluxq import train as module
from fluxq.caching.store import Store
from fluxq.cli.main import main
from fluxq.config import ModelConfig
from fluxq.config_files import config_from_dict
from fluxq.errors import WrongRequest
from fluxq.formats.checkpoint.files import Checkpoint
from fluxq.formats.checkpoint.source import open_clip
from fluxq.formats.lora.algebra import Adapter
from fluxq.formats.lora.read import Lora, load_lora
from fluxq.formats.lora.write import save_lora
from fluxq.model import FluxConfig
from fluxq.models.parts import Models
from fluxq.nano import drawing
from fluxq.train import train
from fluxq.training import objective
from fluxq.training.run import Result

CONFIG = FluxConfig.nano()
MODULES = {
    name.removesuffix(".weight"): shape
    for name, shape in open_clip(nano.CLIP_L).shapes.items()
    if len(shape) == 2 and name.startswith("encoder.")
}


def images_in(folder: Path, seed: int, count: int) -> Path:
    folder.mkdir()
    for i, (image, caption) in enumerate(drawing.concept(seed, count)):
        image.save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(caption)
    return folder


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return images_in(tmp_path / "photos", 5, 6)


def run(tmp_path: Path, photos: Path, name: str = "run", resume: bool = False, **sections) -> Result:
    values = {
        "model": {"name": "nano"},
        "data": {"folders": [str(photos)], "cache": str(tmp_path / "cache")},
        "lora": {"rank": 4, "text_encoder": "clip_l"},
        "training": {"steps": 4, "batch": 2, "learning_rate": 1e-3},
        "output": {"out": str(tmp_path / name), "name": "test", "plot_seconds": 1e9},
    }
    for section, changes in sections.items():
        values[section] = values.get(section, {}) | changes
    return train(config_from_dict(values, "a test"), resume=resume, notify=silent)


def silent(line: str) -> None:
    pass


def assert_same_tensors(a: Path, b: Path) -> None:
    first, second = Checkpoint(a), Checkpoint(b)
    assert first.keys() == second.keys()
    for key in first.keys():
        assert torch.equal(first.get(key), second.get(key)), key


def lora_of(result: Result) -> Lora:
    return load_lora(result.lora, CONFIG)


@pytest.mark.slow
def test_clip_alone_learns_a_new_word(tmp_path):
    """With a learning rate of 0 for the transformer's LoRA; measured on held-out images."""
    photos, held_out = images_in(tmp_path / "photos", 5, 8), images_in(tmp_path / "held_out", 77, 4)
    losses = {}
    for rate, steps in ((6e-3, 18), (0.0, 1)):
        sections = {
            "training": {
                "steps": steps,
                "batch": 4,
                "learning_rate": 0.0,
                "text_learning_rate": rate,
                "optimizer": "adamw",
            }
        }
        result = run(tmp_path, photos, f"{rate}", data={"validation": [str(held_out)]}, **sections)
        losses[rate] = result.validation_before["held_out"], result.validation_after["held_out"]
        lora = lora_of(result)
        assert all((a.up == 0).all() for a in lora.adapters.values())
        assert all((a.up != 0).any() == (rate > 0) for a in lora.clip.values())
    assert losses[0.0][0] == losses[0.0][1] == losses[6e-3][0]
    assert losses[6e-3][1] < 0.9 * losses[6e-3][0]


@pytest.mark.slow
def test_resume_is_bit_exact_whatever_ran_between(tmp_path, photos):
    """Previews in only one of the runs; both learning rates follow the schedule."""
    lora = {"rank": 24}  # enough for bitsandbytes to keep the state of CLIP's MLP, too, in 8 bits
    training = {"steps": 5, "warmup": 1, "schedule": "cosine", "accumulate": 2, "optimizer": "adamw8bit"}
    one = run(tmp_path, photos, "one", training=training, lora=lora)
    restless = {
        "lora": lora,
        "samples": {"every": 2, "steps": 1},
        "output": {"out": str(tmp_path / "two"), "save_every": 2},
    }
    with pytest.raises(KeyboardInterrupt), pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "StopRequest", _stopping)
        run(tmp_path, photos, training=training, **restless)
    run(tmp_path, photos, training=training, resume=True, **restless)
    two = tmp_path / "two"
    assert_same_tensors(Path(one.lora), two / "test.safetensors")
    assert_same_tensors(tmp_path / "one/state/state.safetensors", two / "state/state.safetensors")
    assert all((a.up != 0).any() for a in lora_of(one).everything.values())


class _stopping:
    """Asks to stop after the second step."""

    def __init__(self, *_) -> None: ...

    def __enter__(self):
        asked = iter([None, 2])
        return lambda: next(asked)

    def __exit__(self, *_) -> None:
        pass


@pytest.mark.slow
def test_a_step_that_runs_out_of_memory_half_way_is_repeated_to_the_bit(tmp_path, photos, monkeypatch):
    """The gradients that its first micro-step left in CLIP do not count twice."""
    training = {"steps": 2, "accumulate": 2}
    undisturbed, calls, real = run(tmp_path, photos, "one", training=training), [], objective.flow_loss

    def failing(*arguments, **options):
        calls.append(1)
        if len(calls) == 4:
            raise torch.OutOfMemoryError("injected")
        return real(*arguments, **options)

    monkeypatch.setattr(objective, "flow_loss", failing)
    again = run(tmp_path, photos, "two", training=training)
    assert len(calls) == 2 + 2 + 2
    assert_same_tensors(Path(undisturbed.lora), Path(again.lora))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dialect", "of_clip"),
    [("kohya", r"lora_te1_text_model_encoder_"), ("diffusers", r"text_encoder\.text_model\.enc")],
)
def test_the_file_has_clips_part_and_its_learning_rate(tmp_path, photos, dialect, of_clip):
    result = run(tmp_path, photos, lora={"rank": 4, "text_encoder": "clip_l", "file_format": dialect})
    checkpoint, lora = Checkpoint(Path(result.lora)), lora_of(result)
    assert {tuple(a.up.shape)[:1] + tuple(a.down.shape)[1:] for a in lora.clip.values()} == set(MODULES.values())
    assert lora.clip.keys() == MODULES.keys() and len(lora.adapters) == 2 * 8 + 2 * 2
    parts = 3 if dialect == "kohya" else 2
    assert sum(bool(re.match(of_clip, key)) for key in checkpoint.keys()) == parts * len(MODULES)
    assert (checkpoint.metadata["ss_unet_lr"], checkpoint.metadata["ss_text_encoder_lr"]) == ("0.001", "0.0005")


def adapters(shapes: dict[str, tuple[int, int]], rank: int = 3, alpha: float = 2.0) -> dict[str, Adapter]:
    generator = torch.Generator().manual_seed(rank)

    def adapter(out: int, inputs: int) -> Adapter:
        down = torch.randn(rank, inputs, generator=generator)
        return Adapter(down, 0.01 * torch.randn(out, rank, generator=generator), alpha)

    return {module: adapter(*shape) for module, shape in shapes.items()}


PAIR = {"double_blocks.1.img_attn.proj": (192, 192), "single_blocks.0.linear2": (192, 960)}


@pytest.mark.slow
def test_a_run_starts_from_clips_part_only_if_clip_is_trained(tmp_path, photos):
    path, wanted = tmp_path / "old.safetensors", adapters(MODULES, 5)
    save_lora(path, adapters(PAIR), CONFIG, dtype=torch.float32, clip=wanted)
    for encoder, said in (("clip_l", "14 layers, rank 5"), (None, "its CLIP-L part (12 modules) is left out")):
        arguments = ["train", photos, "--model", "nano", "--from-lora", path, "--lr", 0, "--steps", 1, "--name", "x"]
        arguments += ["--text-encoder", encoder] * bool(encoder) + [
            "--cache",
            tmp_path / "c",
            "--out",
            tmp_path / "run",
        ]
        result = CliRunner().invoke(main, [str(a) for a in (*arguments, "--overwrite")])
        assert result.exit_code == 0 and said in " ".join(result.output.split()), result.output
        written = load_lora(tmp_path / "run/x.safetensors", CONFIG).clip
        assert written.keys() == (wanted.keys() if encoder else set())
        for path_, adapter in written.items():  # the file rounds to bf16
            assert relative_error(adapter.change(), wanted[path_].change()) <= 2**-7 and adapter.rank == 5


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--text-encoder", "t5xxl"], "T5-XXL cannot be trained: its 4.7 billion weights"),
        (["--text-encoder", "clip_l", "--lora-format", "peft"], "a PEFT folder is for one model"),
        (["--text-lr", "1e-4"], "--text-lr needs a text encoder to train; add --text-encoder clip_l"),
        (
            ["--text-encoder", "clip_l", "--from-lora", "{tmp}/x.safetensors"],
            "encoder.layers.1.mlp.fc2 is (64, 32), not",
        ),
        (
            ["--text-encoder", "clip_l", "--from-lora", "{tmp}/y.safetensors"],
            "encoder.layers.9.mlp.fc2 is (64, 256), not",
        ),
    ],
)
def test_requests_that_cannot_be_met_are_refused_before_anything_is_written(tmp_path, photos, arguments, sentence):
    for name, part in (("x", {"encoder.layers.1.mlp.fc2": (64, 32)}), ("y", {"encoder.layers.9.mlp.fc2": (64, 256)})):
        save_lora(tmp_path / f"{name}.safetensors", adapters(PAIR), CONFIG, clip=adapters(part))
    common = ["train", str(photos), "--model", "nano", "--steps", "1", "--cache", str(tmp_path / "cache")]
    common += ["--out", str(tmp_path / "run")]
    result = CliRunner().invoke(main, [*common, *(a.format(tmp=tmp_path) for a in arguments)])
    assert result.exit_code == 2 and sentence in result.stderr and "Traceback" not in result.output, result.output
    assert not (tmp_path / "run").exists() and not (tmp_path / "cache").exists()


@pytest.mark.slow
def test_captions_are_encoded_as_cached_before_any_training(tmp_path, photos):
    run(tmp_path, photos, data={"trigger": "zqx"})
    store, clip = Store(tmp_path / "cache"), Models(ModelConfig(name="nano")).load_clip()
    texts = [store.text(record.stem) for record in store.records("text")]
    assert len(texts) == 7 and sum("zqx" in text.caption for text in texts) == 6
    with torch.no_grad():
        assert relative_error(clip.pooled([t.caption for t in texts]), torch.stack([t.clip for t in texts])) <= 1e-5


@pytest.mark.slow
def test_resume_refuses_another_encoder(tmp_path, photos):
    run(tmp_path, photos)
    with pytest.raises(WrongRequest, match="was started with lora.text_encoder = "):
        run(tmp_path, photos, resume=True, lora={"text_encoder": None})


@pytest.mark.slow
def test_a_complete_cache_still_needs_the_encoder_that_is_trained(tmp_path, photos):
    files = tmp_path / "models"
    shutil.copytree(nano.WEIGHTS, files)
    parts = {part: str(files / own.name) for part, own in nano_files().items()}
    model = {"name": None, "t5_length": 32, **parts}
    sections = {"model": model, "data": {"resolution": 96}, "training": {"steps": 1}}
    run(tmp_path, photos, **sections)
    (files / nano.CLIP_L.name).unlink()
    with pytest.raises(WrongRequest, match=f"{nano.CLIP_L.name} does not exist"):
        run(tmp_path, photos, "other", **sections)
    run(tmp_path, photos, "other", **sections, lora={"text_encoder": None})


def nano_files() -> dict[str, Path]:
    return {"flux": nano.FLUX, "ae": nano.AE, "clip_l": nano.CLIP_L, "t5xxl": nano.T5XXL}
