"""`fluxq check`: the model files, what a run needs, and all problems at once."""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from helpers import write_hollow
from huggingface_hub import constants
from PIL import Image

from fluxq import nano
from fluxq.caching import folders
from fluxq.cli.main import main
from fluxq.commands import check as checks
from fluxq.commands.quantize import quantize_command
from fluxq.errors import WrongRequest
from fluxq.formats.checkpoint.shapes import flux_shapes
from fluxq.formats.load import load_flux
from fluxq.formats.quantized import stored_bytes
from fluxq.memory.machine import InstalledGPU, Machine
from fluxq.model import FluxConfig
from fluxq.models.hub import NotFetched, hub_cache
from fluxq.models.parts import Models
from fluxq.training import disk

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _empty_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("FLUXQ_MODELS", raising=False)
    monkeypatch.chdir(tmp_path)


def run(*arguments) -> tuple[int, dict, str]:
    """(exit code, JSON answer, lines for people)"""
    result = CliRunner().invoke(main, ["check", *map(str, arguments), "--json"])
    return result.exit_code, json.loads(result.stdout), result.stderr


@pytest.fixture
def photos(tmp_path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for i, size in enumerate(((96, 96), (96, 96), (128, 64))):
        Image.new("RGB", size, (i, 0, 0)).save(folder / f"{i}.png")
    return folder


def test_a_run_that_could_start_is_described_and_nothing_is_written(photos, tmp_path, monkeypatch):
    scans, scan = [], folders.scan
    monkeypatch.setattr(folders, "scan", lambda *a, **more: scans.append(a) or scan(*a, **more))
    monkeypatch.setenv("FLUXQ_CACHE", str(tmp_path / "nothing quantized yet"))
    before = sorted(tmp_path.rglob("*"))
    code, answer, lines = run(photos, "--model", "nano")
    assert code == 0 and answer["ready"] and answer["reasons"] == []
    assert answer["parts"]["flux"] == {
        "path": str(nano.FLUX),
        "why": "the bundled toy",
        "what": "dev, 2 + 2 blocks, 192 wide",
        "precision": "bf16",
        "bytes": answer["parts"]["flux"]["bytes"],
        "files": [str(nano.FLUX)],
    }
    assert answer["images"]["images"] == 3 and answer["images"]["buckets"] == {"96x96": 2, "128x64": 1}
    assert answer["disk"]["needed"] > answer["disk"]["cache"] > 0
    assert "images       3; 1 different caption; buckets: 2 at 96x96, 1 at 128x64" in lines and lines.endswith(
        "ready: a run could start\n"
    )
    assert sorted(tmp_path.rglob("*")) == before
    assert len(scans) == 1


def test_the_cache_takes_the_predicted_disk_space(photos, tmp_path):
    _, answer, _ = run(photos, "--model", "nano")
    result = CliRunner().invoke(main, ["cache", str(photos), "--model", "nano", "--cache", str(tmp_path / "cache")])
    assert result.exit_code == 0
    records = [path.stat().st_size for kind in ("latents", "text") for path in (tmp_path / "cache" / kind).iterdir()]
    assert answer["disk"]["cache"] == pytest.approx(sum(records), rel=0.15)  # headers are the rest


def test_the_disk_space_is_what_training_says(photos, tmp_path, monkeypatch):
    """Of a new run; with a cache, nothing is left to encode."""

    def require_room(needs, notify):
        asked.append({need.what: need.nbytes for need in needs})
        raise WrongRequest("that is all")

    asked: list[dict[str, int]] = []
    options = [str(photos), "--model", "nano", "--cache", str(tmp_path / "cache"), "--trigger", "zqx"]
    options += ["--set", "training.preserve_class=dog"]  # which has captions of its own
    for encoded in (False, True):
        if encoded:
            assert CliRunner().invoke(main, ["cache", *options]).exit_code == 0
        _, answer, _ = run(*options)
        with monkeypatch.context() as patch:
            patch.setattr(disk, "require_room", require_room)
            assert CliRunner().invoke(main, ["train", *options, "--sample-every", "0"]).exit_code == 2
        for what in ("state twice", "LoRAs", "log", "quantized weights", "cache"):
            assert answer["disk"][what] == pytest.approx(asked[-1][what], rel=0.1, abs=2048), what
        assert (answer["disk"]["cache"] == 0) == encoded
    assert answer["disk"]["state twice"] > answer["disk"]["LoRAs"] > 0


@pytest.mark.parametrize("format", ["nf4", "bf16"])
def test_stored_bytes_are_those_of_the_loaded_model(format):
    flux = load_flux(nano.FLUX, format, torch.device("cpu"))
    loaded = sum(buffer.nbytes for buffer in flux.buffers())
    padding = 256 * len(list(flux.buffers()))
    assert loaded <= stored_bytes(flux_shapes(flux.config), format) < loaded + padding


def test_full_size_needs_what_is_known():
    # the only tensor that 256 bytes do not divide is the last layer's bias: 64 numbers
    assert stored_bytes(flux_shapes(FluxConfig.dev()), "bf16") == 2 * 11_901_408_320 + 128
    assert 6.7e9 < stored_bytes(flux_shapes(FluxConfig.dev()), "nf4") < 6.9e9
    assert 11.9e9 < stored_bytes(flux_shapes(FluxConfig.dev()), "int8") < 12.1e9


def test_all_problems_are_listed_at_once(tmp_path, photos):
    models = tmp_path / "models"
    models.mkdir()
    shutil.copy(nano.FLUX, models)
    shutil.copy(nano.AE, models)
    (photos / "bad.png").write_bytes(b"\x89PNG no image")
    code, answer, lines = run(photos, "--models", models, "--t5xxl", nano.CLIP_L)
    assert code == 2 and not answer["ready"] and len(answer["reasons"]) == 3
    text = "\n".join(answer["reasons"])
    assert f"{models} holds no CLIP text encoder; name it with --clip-l" in text
    assert "is a CLIP text encoder, not a T5 text encoder" in text and "bad.png" in text
    assert answer["parts"]["ae"]["why"] == f"the only one in {models}"
    assert lines.count("\nproblem ") == 3 and lines.endswith("not ready\n")


def test_no_models_is_one_problem():
    code, answer, _ = run()
    assert code == 2 and len(answer["reasons"]) == 1 and "--models" in answer["reasons"][0]


def test_too_little_memory_disk_or_gpu_is_a_problem(monkeypatch, photos):
    gpu = Machine("2.13", "13.0", False, True, False, InstalledGPU("old GPU", (6, 1), 1 << 20), ("sm_80",))
    monkeypatch.setattr(checks, "ram_bytes", lambda: (1 << 30, 1 << 29))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    monkeypatch.setattr(checks, "read_machine", lambda: gpu)
    code, answer, _ = run(photos, "--model", "nano")
    memory, gpu, disk, obstacle = answer["reasons"]
    assert code == 2 and "needs 2.0 GiB of RAM with the transformer in nf4, and this machine has 1.0 GiB" in memory
    assert "the old GPU has 1.0 MiB, and the transformer's weights alone take 2.7 MiB in nf4; use another" in gpu
    assert " has 0.0 MiB free, and " in disk and "has no code for the old GPU (sm_61" in obstacle


def machine_with(gpu: InstalledGPU | None, monkeypatch, free: int | None = None) -> None:
    seen = Machine("2.13", "13.0", False, True, False, gpu, ("sm_80", "sm_86", "sm_89"))
    monkeypatch.setattr(checks, "read_machine", lambda: seen)
    monkeypatch.setattr(checks, "free_gpu_bytes", lambda: free)


@pytest.fixture(scope="module")
def full_size(tmp_path_factory) -> Path:
    """A file with the headers of FLUX.1-dev."""
    shapes = flux_shapes(FluxConfig.dev())
    return write_hollow(
        tmp_path_factory.mktemp("full") / "flux1-dev.safetensors", dict.fromkeys(shapes, torch.bfloat16), shapes
    )


def test_the_gpu_is_described_with_what_training_needs_on_it(full_size, monkeypatch):
    ada = InstalledGPU("RTX 4090", (8, 9), 24 << 30)
    machine_with(ada, monkeypatch, free=int(22.5 * 2**30))
    _, answer, lines = run("--flux", full_size)
    described = (
        "GPU          RTX 4090, 22.5 GiB of 24.0 GiB free, compute capability 8.9; the weights alone take 6.3 GiB"
    )
    assert f"{described} of it in nf4\n" in lines
    weights = stored_bytes(flux_shapes(FluxConfig.dev()), "nf4")
    about = {"name": "RTX 4090", "capability": [8, 9], "free": int(22.5 * 2**30), "all": 24 << 30, "weights": weights}
    assert answer["gpu"] == about
    assert not any("RTX 4090" in reason for reason in answer["reasons"])


@pytest.mark.parametrize(
    ("format", "gib", "sentence"),
    [
        ("nf4", 6, "the laptop GPU has 6.0 GiB, and the transformer's weights alone take 6.3 GiB in nf4; use another"),
        ("nf4", 8, None),
        ("int8", 8, "the laptop GPU has 8.0 GiB, and the transformer's weights alone take 11.2 GiB in int8; use --fo"),
        ("bf16", 24, None),
    ],
)
def test_a_gpu_that_cannot_hold_the_weights_is_a_problem(format, gib, sentence, full_size, monkeypatch):
    machine_with(InstalledGPU("laptop GPU", (8, 6), gib << 30), monkeypatch)
    _, answer, lines = run("--flux", full_size, "--format", format)
    found = [reason for reason in answer["reasons"] if "laptop GPU" in reason]
    assert len(found) == (sentence is not None) and (sentence is None or sentence in found[0])
    assert f"GPU          laptop GPU, {gib}.0 GiB, compute capability 8.6; the weights alone take" in lines


def test_no_gpu_is_one_line(monkeypatch):
    machine_with(None, monkeypatch)
    code, answer, lines = run("--model", "nano")
    assert code == 0 and answer["gpu"] is None
    assert lines.count("GPU ") == 1 and "GPU          none that torch can use, so training runs on the CPU" in lines


def test_a_gpu_without_models_is_described_without_the_weights(monkeypatch):
    machine_with(InstalledGPU("RTX 4090", (8, 9), 24 << 30), monkeypatch)
    code, answer, lines = run()
    assert code == 2 and answer["gpu"]["weights"] is None
    assert "GPU          RTX 4090, 24.0 GiB, compute capability 8.9\n" in lines


def test_downloads_from_the_hub_count_as_disk_space_and_are_not_started(monkeypatch):
    served = Models.served

    def from_hub(self, part):
        if part == "t5xxl":
            raise NotFetched("someone/T5", ["a", "b"], 9_000_000_000)
        return served(self, part)

    monkeypatch.setattr(Models, "served", from_hub)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(10**12, 0, 10**12))
    code, answer, lines = run("--model", "nano")
    assert code == 0 and answer["disk"]["downloads"] == 9_000_000_000
    assert "t5xxl        2 files of someone/T5, 9.0 GB, are not in the hub's cache yet; a run downloads them" in lines


def test_downloads_need_space_on_the_disk_of_the_hubs_cache(tmp_path, monkeypatch):
    """Here every folder is on its own disk: that of the hub's cache is full, the others are not."""
    hub, served = tmp_path / "other disk" / "hub", Models.served

    def from_hub(self, part):
        if part == "t5xxl":
            raise NotFetched("someone/T5", ["a"], 9_000_000_000)
        return served(self, part)

    def disk_usage(place):
        return shutil._ntuple_diskusage(10**12, 0, 1 << 30 if place == hub else 10**12)

    monkeypatch.setattr(Models, "served", from_hub)
    hub.mkdir(parents=True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(hub))
    monkeypatch.setattr(disk, "by_disk", lambda places: {place: [name] for name, place in places.items()})
    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    code, answer, lines = run("--model", "nano")
    assert code == 2 and len(answer["reasons"]) == 1
    assert f"the disk of {hub} has 1.0 GiB free, and 8.4 GiB are needed (downloads 8.4 GiB)" in answer["reasons"][0]
    assert f"disk         {hub} needs up to 8.4 GiB (downloads 8.4 GiB) and has 1.0 GiB free" in lines


@pytest.mark.parametrize(
    ("variable", "inside"), [("HF_HUB_CACHE", ""), ("HF_HOME", "hub"), ("XDG_CACHE_HOME", "huggingface/hub")]
)
def test_the_hubs_cache_is_where_the_hubs_library_has_it(variable, inside, tmp_path, monkeypatch):
    """The library reads the environment when it is imported."""
    with monkeypatch.context() as patch:
        for name in ("HF_HUB_CACHE", "HF_HOME", "HUGGINGFACE_HUB_CACHE"):
            patch.delenv(name, raising=False)
        patch.setenv(variable, str(tmp_path))
        importlib.reload(constants)
        found = hub_cache()
    importlib.reload(constants)
    assert found == tmp_path / inside


def test_a_quantized_file_next_to_its_original_is_named_with_the_reason(tmp_path):
    for file in (nano.FLUX, nano.AE, nano.CLIP_L, nano.T5XXL):
        shutil.copy(file, tmp_path)
    made = tmp_path / "made.safetensors"
    quantize_command(nano.FLUX, made, "nf4")
    _, answer, lines = run("--models", tmp_path)
    described = f"{made} (flux1-nano.safetensors, already quantized to nf4): dev, 2 + 2 blocks, 192 wide, nf4, by fluxq"
    assert f"flux         {described}" in lines and answer["parts"]["flux"]["path"] == str(made)
    _, answer, lines = run("--models", tmp_path, "--format", "int8")
    assert answer["parts"]["flux"]["path"] == str(tmp_path / "flux1-nano.safetensors")
    assert f"(the only one in {tmp_path}; made.safetensors is the same in nf4)" in lines


def test_what_a_run_would_refuse_or_say_is_told_before(monkeypatch, tmp_path):
    def none_here(self):
        raise WrongRequest("no fp8 here")

    monkeypatch.setattr(Models, "compute", property(none_here))
    kontext = tmp_path / "my-kontext.safetensors"
    shutil.copy(nano.FLUX, kontext)
    files = ("--flux", kontext, "--ae", nano.AE, "--clip-l", nano.CLIP_L, "--t5xxl", nano.T5XXL)
    code, answer, lines = run(*files)
    assert code == 2 and answer["reasons"] == ["no fp8 here"]
    assert "note         the transformer is FLUX.1 Kontext by its name" in lines


def test_what_is_unusual_about_images_and_captions_is_said(photos, tmp_path):
    """Every name with --verbose, and in JSON; an image that cannot be decoded is a problem."""
    for i in range(5):
        (photos / f"note{i}.txt").write_text("x")
    _, answer, lines = run(photos, "--model", "nano")
    assert "captions     3 images without\n" in lines and answer["images"]["sources"] == {"without": 3}
    assert "files of captions without an image: 5 (note0.txt, note1.txt, note2.txt, ...)" in lines
    found = {finding["what"]: finding["names"] for finding in answer["images"]["findings"]}
    assert found["files of captions without an image"] == [f"note{i}.txt" for i in range(5)]
    assert "note4.txt" in run(photos, "--model", "nano", "--verbose")[2]
    Image.effect_noise((300, 300), 50).save(photos / "half.jpg")
    (photos / "half.jpg").write_bytes((photos / "half.jpg").read_bytes()[:2000])
    code, answer, _ = run(photos, "--model", "nano")
    assert code == 2 and any("half.jpg cannot be read" in reason for reason in answer["reasons"])
    code, answer, _ = run(photos, "--model", "nano", "--skip-bad")
    assert answer["images"]["images"] == answer["training"]["batches"] == 3
    assert code == 0 and any("half.jpg cannot be read" in line for line in answer["images"]["skipped"])


def test_the_sheet_of_crops_replaces_nothing(photos, tmp_path):
    refused = CliRunner().invoke(
        main, ["check", str(photos), "--model", "nano", "--crops", str(next(photos.glob("*.png")))]
    )
    assert refused.exit_code == 2 and "must be a new file called .png" in refused.stderr
    refused = CliRunner().invoke(main, ["check", str(nano.FLUX), "--crops", str(tmp_path / "a.png")])
    assert refused.exit_code == 2 and "draws the images of folders" in refused.stderr
    assert run(photos, "--model", "nano", "--crops", str(tmp_path / "a.png"))[0] == 0 and (tmp_path / "a.png").exists()


def test_steps_epochs_and_captions_that_are_cut_are_said(photos, tmp_path):
    (photos / "0.txt").write_text("word " * 40)
    code, answer, lines = run(photos, "--model", "nano", "--set", "training.steps=30", "--set", "training.batch=2")
    assert code == 0 and answer["training"] == {"steps": 30, "epochs": 15.0, "batches": 2, "full_batches": 1}
    assert "training     30 steps: 15 epochs of 2 batches" in lines
    assert "1 of 2 batches per epoch is not full: a batch is of one bucket" in lines
    assert "captions that T5 cuts, as they have more tokens than it takes (--t5-length): 1 (photos/0.png)" in lines


def test_records_of_other_images_are_no_room_for_these(photos, tmp_path):
    """A cache that several datasets share."""
    other = tmp_path / "other"
    other.mkdir()
    for i in range(9):
        Image.effect_noise((128, 128), 90 + i).convert("RGB").save(other / f"{i}.png")
    cache = ["--model", "nano", "--cache", str(tmp_path / "cache")]
    _, alone, _ = run(photos, *cache)
    assert CliRunner().invoke(main, ["cache", str(other), *cache]).exit_code == 0
    _, shared, _ = run(photos, *cache)
    assert 0.6 < shared["disk"]["cache"] / alone["disk"]["cache"] < 1, "only the empty caption is there"


def test_a_setting_without_effect_is_a_problem_as_it_is_in_training(photos, tmp_path):
    file = tmp_path / "my.toml"
    file.write_text("[training]\nhuber_c = 0.3\n")
    code, answer, _ = run(str(photos), "--model", "nano", "--trigger", "zqx", "--config", str(file))
    assert code == 2 and any("training.huber_c has no effect here" in reason for reason in answer["reasons"])
