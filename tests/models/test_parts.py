"""Finding models: by path, below a folder by their headers, in the hub's cache; and the errors if they are missing."""

from __future__ import annotations

import json
import shutil
import tomllib
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from PIL import Image
from safetensors.torch import load_file, save_file

from fluxq import nano
from fluxq.commands.quantize import quantize_command
from fluxq.config import ModelConfig
from fluxq.config_files import config_from_dict
from fluxq.errors import WrongRequest
from fluxq.formats.checkpoint.keys import autoencoder_to_diffusers, to_diffusers
from fluxq.model import FluxConfig
from fluxq.models import candidates
from fluxq.models.candidates import search
from fluxq.models.finder import NANO, PARTS
from fluxq.models.hub import NotFetched, hub_id
from fluxq.models.parts import Models
from fluxq.train import train

REPOSITORY = "someone/FLUX.1-toy"


@pytest.fixture(autouse=True)
def _no_models_of_ones_own(monkeypatch, tmp_path):
    monkeypatch.delenv("FLUXQ_MODELS", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)


def place(file: Path, target: Path) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    return Path(shutil.copy(file, target))


def comfy(folder: Path) -> dict[str, Path]:
    """nano in ComfyUI's folders, under meaningless names, among unrelated files."""
    places = {"flux": "unet/a", "ae": "vae/b", "clip_l": "clip/c", "t5xxl": "text_encoders/sub/d"}
    files = {part: place(NANO[part], folder / "models" / f"{name}.safetensors") for part, name in places.items()}
    save_lora(folder / "models/loras/style.safetensors")
    place(nano.T5_TOKENIZER, folder / "models/notes.txt")
    return files


def save_lora(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({"lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": torch.ones(2, 2)}, path)


def cast(part: str, path: Path, dtype: torch.dtype) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: tensor.to(dtype) for key, tensor in load_file(NANO[part]).items()}, path)
    return path


def served(**config) -> dict[str, Path]:
    models = Models(ModelConfig(**config), torch.device("cpu"), notify=lambda line: None)
    models.check()
    return {part: models.served(part).path for part in PARTS}


def refusal(**config) -> str:
    with pytest.raises(WrongRequest) as caught:
        served(**config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_folder_is_searched_by_headers(tmp_path, monkeypatch):
    files = comfy(tmp_path)
    assert served(models=tmp_path) == files
    assert served(models=Path("models")) == {part: path.relative_to(tmp_path) for part, path in files.items()}
    monkeypatch.setenv("FLUXQ_MODELS", str(tmp_path))
    assert served() == files
    other = place(nano.AE, tmp_path / "other" / "x.safetensors")
    assert served(ae=other, models=tmp_path / "models")["ae"] == other  # an explicit path wins


def test_each_file_and_its_reason_are_printed_once(tmp_path):
    files, lines = comfy(tmp_path), []
    models = Models(ModelConfig(models=tmp_path), notify=lines.append)
    models.check()
    models.check()
    assert lines[0] == f"flux: {files['flux']} (the only one in {tmp_path})" and len(lines) == 4


def test_one_all_in_one_file_serves_every_part(tmp_path):
    prefixes = {"flux": "model.diffusion_model.", "ae": "vae.", "clip_l": "text_encoders.clip_l.transformer."}
    prefixes["t5xxl"] = "text_encoders.t5xxl.transformer."
    path = tmp_path / "all.safetensors"
    save_file({p + k: t for part, p in prefixes.items() for k, t in load_file(NANO[part]).items()}, path)
    assert served(models=path) == dict.fromkeys(PARTS, path)
    alone = place(nano.AE, tmp_path / "b.safetensors")
    lines = []
    models = Models(ModelConfig(models=tmp_path), notify=lines.append)
    assert models.served("ae").path == alone
    assert lines[-1].endswith(f"the best of 2 in {tmp_path}: it holds no other model)")


def test_the_file_with_the_most_bits_wins(tmp_path):
    files = comfy(tmp_path)
    cast("t5xxl", tmp_path / "models/text_encoders/8.safetensors", torch.float8_e4m3fn)
    lines = []
    models = Models(ModelConfig(models=tmp_path), notify=lines.append)
    assert models.served("t5xxl").path == files["t5xxl"]
    assert lines[-1].endswith(f"the best of 2 in {tmp_path}: it has the most bits (bf16))")


def test_two_equally_good_files_are_both_named(tmp_path):
    files = comfy(tmp_path)
    second = place(nano.FLUX, tmp_path / "models/unet/finetune.safetensors")
    sentence = refusal(models=tmp_path)
    assert (
        f"in {files['flux']} and in {second}, which are equally good (bf16); name the one to use with --flux"
        in sentence
    )
    assert served(models=tmp_path, flux=second)["flux"] == second


# --- the transformer next to files that fluxq quantize made from it ---


def quantized(source: Path, target: Path, format: str) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    quantize_command(source, target, format)
    return target


def found_flux(**config) -> tuple[Path, str]:
    """The transformer's file and the line that is printed about it."""
    lines = []
    models = Models(ModelConfig(**config), torch.device("cpu"), notify=lines.append)
    models.check()
    return models.served("flux").path, lines[0]


@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_a_quantized_file_serves_if_its_format_is_requested(format, tmp_path):
    """In place of its original: both are the same model, so this is not an ambiguity."""
    files = comfy(tmp_path)
    made = {f: quantized(files["flux"], tmp_path / f"models/unet/{f}.safetensors", f) for f in ("nf4", "int8")}
    assert found_flux(models=tmp_path, format=format) == (
        made[format],
        f"flux: {made[format]} (a.safetensors, already quantized to {format})",
    )
    path, said = found_flux(models=tmp_path, format="fp8")
    assert path == files["flux"]
    assert said.endswith(
        f"(the only one in {tmp_path}; int8.safetensors is the same in int8; nf4.safetensors is the same in nf4)"
    )


def test_a_quantized_file_alone_serves_in_its_format(tmp_path):
    files = comfy(tmp_path)
    made = quantized(files["flux"], tmp_path / "models/unet/made.safetensors", "int8")
    files["flux"].unlink()
    path, said = found_flux(models=tmp_path, format="int8")
    assert path == made and said.endswith(f"(the only one in {tmp_path} in int8)")
    assert f"{made} holds int8, not nf4; pass --format int8" in refusal(models=tmp_path, format="nf4")
    models = Models(ModelConfig(models=tmp_path), torch.device("cpu"), notify=lambda line: None)
    assert models.quantized and models.format == models.resolved().format == "int8" and not models.format_is_open
    again = place(made, tmp_path / "models/unet/again.safetensors")  # the same file twice is the same model
    assert found_flux(models=tmp_path, format="int8")[0] in (made, again)


def test_a_format_chosen_later_is_served_by_its_quantized_file(tmp_path):
    files = comfy(tmp_path)
    made = quantized(files["flux"], tmp_path / "models/unet/made.safetensors", "int8")
    models = Models(ModelConfig(models=tmp_path), torch.device("cpu"), notify=lambda line: None)
    assert models.flux_file == files["flux"] and models.format == "nf4" and models.quantized is None
    assert all(models.fits_on_disk(format) for format in ("nf4", "int8", "bf16"))
    models.use_format("int8")
    assert models.flux_file == made and models.quantized and models.resolved().format == "int8"


def test_a_format_that_does_not_fit_on_the_disk_is_not_a_candidate(tmp_path, monkeypatch):
    models = Models(
        ModelConfig(models=comfy(tmp_path)["flux"].parents[2]), torch.device("cpu"), notify=lambda line: None
    )
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(1 << 40, 0, 1 << 10))
    monkeypatch.setenv("FLUXQ_CACHE", str(tmp_path / "cache"))
    assert [f for f in ("nf4", "int8", "bf16") if models.fits_on_disk(f)] == ["bf16"]


def test_the_original_is_chosen_first_then_its_quantized_form(tmp_path):
    """The original with the most bits wins, even if the other one was quantized."""
    files = comfy(tmp_path)
    fewer = cast("flux", tmp_path / "models/unet/8.safetensors", torch.float8_e4m3fn)
    quantized(fewer, tmp_path / "models/unet/8-nf4.safetensors", "nf4")
    assert found_flux(models=tmp_path, format="nf4")[0] == files["flux"]
    files["flux"].unlink()
    assert found_flux(models=tmp_path, format="nf4")[0].name == "8-nf4.safetensors"


def test_two_originals_stay_an_ambiguity_whatever_is_quantized(tmp_path):
    files = comfy(tmp_path)
    second = place(nano.FLUX, tmp_path / "models/unet/finetune.safetensors")
    quantized(second, tmp_path / "models/unet/made.safetensors", "nf4")
    assert f"in {files['flux']} and in {second}, which are equally good (bf16)" in refusal(models=tmp_path)


def test_quantized_files_of_different_models_are_both_named(tmp_path):
    files = comfy(tmp_path)
    other = cast("flux", tmp_path / "elsewhere/other.safetensors", torch.float16)
    first = quantized(other, tmp_path / "models/unet/first.safetensors", "nf4")
    sentence = refusal(models=tmp_path / "models")
    assert f"in {files['flux']}, and {first} in nf4, which was made from another file; name the one" in sentence
    assert sentence.endswith("to use with --flux")
    assert found_flux(models=tmp_path / "models", format="int8")[0] == files["flux"]
    second = quantized(files["flux"], tmp_path / "models/unet/second.safetensors", "nf4")
    files["flux"].unlink()
    assert f"in {first} and in {second}, which are equally good (nf4); name" in refusal(models=tmp_path / "models")


def test_a_damaged_quantized_file_is_skipped(tmp_path):
    files = comfy(tmp_path)
    made = quantized(files["flux"], tmp_path / "models/unet/made.safetensors", "nf4")
    made.write_bytes(made.read_bytes()[:-5])
    assert found_flux(models=tmp_path)[0] == files["flux"]
    files["flux"].unlink()
    assert f"skipped: {made} is truncated" in refusal(models=tmp_path)


def test_encoders_of_another_size_are_skipped(tmp_path):
    files = comfy(tmp_path)
    ae = load_file(nano.AE)
    tensors = {
        key: tensor.repeat(1, 2, 1, 1) if key == "decoder.conv_in.weight" else tensor for key, tensor in ae.items()
    }
    for leaf in ("weight", "bias"):
        tensors[f"encoder.conv_out.{leaf}"] = torch.cat([ae[f"encoder.conv_out.{leaf}"]] * 2)
    wide = tmp_path / "wide.safetensors"
    save_file(tensors, wide)
    assert served(models=tmp_path)["ae"] == files["ae"]
    files["ae"].unlink()
    assert f"{wide} gives vectors of width 32, but {files['flux']} takes 16" in refusal(models=tmp_path)


def test_a_missing_part_is_named_with_the_skipped_files(tmp_path):
    files = comfy(tmp_path)
    files["flux"].write_bytes(files["flux"].read_bytes()[:-5])
    sentence = refusal(models=tmp_path)
    assert (
        f"{tmp_path} holds no FLUX.1 transformer; name it with --flux; skipped: {files['flux']} is truncated"
        in sentence
    )
    assert "style" not in sentence


def test_no_model_and_nowhere_to_look_names_every_remedy():
    assert "no --flux, --ae, --clip-l, --t5xxl was given; pass --models FOLDER (or set FLUXQ_MODELS)" in refusal()


def test_a_folder_that_is_gone_is_named(tmp_path, monkeypatch):
    assert f"{tmp_path / 'gone'} does not exist" in refusal(models=tmp_path / "gone")
    monkeypatch.setenv("FLUXQ_MODELS", str(tmp_path / "gone"))
    assert f"{tmp_path / 'gone'} does not exist" in refusal()


def test_the_search_has_limits(tmp_path, monkeypatch):
    comfy(tmp_path)
    monkeypatch.setattr(candidates, "MAX_FILES", 2)
    assert "holds more than 2 model files; name a folder further down" in refusal(models=tmp_path)
    monkeypatch.setattr(candidates, "MAX_FILES", 100)
    monkeypatch.setattr(candidates, "MAX_FOLDERS", 3)
    assert "holds more than 3 folders" in refusal(models=tmp_path)
    monkeypatch.setattr(candidates, "MAX_FOLDERS", 100)
    monkeypatch.setattr(candidates, "MAX_DEPTH", 3)
    assert "holds no T5 text encoder" in refusal(models=tmp_path)


def test_links_are_followed_once(tmp_path):
    """A link to a folder is searched, a cycle of links ends, and a file counts once however it is reached."""
    files = comfy(tmp_path / "real")
    linked = tmp_path / "linked"
    linked.mkdir()
    try:
        (linked / "models").symlink_to(tmp_path / "real" / "models")
        (tmp_path / "real/models/vae/circle").symlink_to(linked)
        (tmp_path / "real/models/vae/again.safetensors").symlink_to(files["ae"])
    except OSError:
        pytest.skip("links are not allowed here")
    assert {part: len(sources) for part, sources in search(linked).sources.items()} == dict.fromkeys(PARTS.values(), 1)


def test_a_resolved_config_names_every_file_absolutely(tmp_path):
    comfy(tmp_path)
    models = Models(ModelConfig(models=Path("models")), notify=lambda line: None)
    config = models.resolved()
    assert config.models is None and config.flux == tmp_path / "models/unet/a.safetensors"
    assert Models(config).served("t5xxl").path == tmp_path / "models/text_encoders/sub/d.safetensors"


@pytest.mark.slow
def test_a_run_from_a_diffusers_folder_is_the_run_from_single_files(tmp_path):
    """Layout and shards change nothing: the same losses to the last bit, from caching to training."""
    folder, photos = tmp_path / "diffusers", tmp_path / "photos"
    flux = to_diffusers(load_file(nano.FLUX), FluxConfig.nano())
    halves = {f"m-0000{i + 1}-of-00002.safetensors": sorted(flux)[i::2] for i in (0, 1)}
    (folder / "transformer").mkdir(parents=True)
    for name, keys in halves.items():
        save_file({key: flux[key].contiguous() for key in keys}, folder / "transformer" / name)
    listing = {key: name for name, keys in halves.items() for key in keys}
    (folder / "transformer/m.safetensors.index.json").write_text(json.dumps({"weight_map": listing}))
    (folder / "vae").mkdir()
    ae = autoencoder_to_diffusers(load_file(nano.AE))
    save_file({key: tensor.contiguous() for key, tensor in ae.items()}, folder / "vae/model.safetensors")
    place(nano.CLIP_L, folder / "text_encoder/model.safetensors")
    place(nano.T5XXL, folder / "text_encoder_2/model.safetensors")
    shutil.copytree(nano.WEIGHTS / "tokenizer", folder / "tokenizer")
    place(nano.T5_TOKENIZER, folder / "tokenizer_2/spiece.model")
    photos.mkdir()
    Image.effect_mandelbrot((96, 96), (-2, -1, 1, 1), 20).convert("RGB").save(photos / "0.png")

    losses = []
    for name, model in (("a", {"name": "nano"}), ("b", {"models": str(folder), "t5_length": 32})):
        values = {"model": model, "data": {"folders": [str(photos)], "trigger": "zqx", "resolution": 96}}
        values["data"]["cache"] = str(tmp_path / f"cache_{name}")
        values |= {"lora": {"rank": 4}, "training": {"steps": 2}, "output": {"out": str(tmp_path / name)}}
        result = train(config_from_dict(values, "a test"), notify=lambda line: None)
        losses.append((result.loss_first, result.loss_last))
    assert losses[0] == losses[1]
    written = tomllib.loads((tmp_path / "b/config.toml").read_text())["model"]
    assert written["flux"] == str(folder / "transformer/m.safetensors.index.json") and "models" not in written


# --- the hub, by its cache and by a hub that is made up here ---


def cached(tmp_path: Path, names: dict[str, str]) -> Path:
    """The hub's cache with these parts of REPOSITORY under these names."""
    folder = tmp_path / "hub" / f"models--{REPOSITORY.replace('/', '--')}"
    snapshot = folder / "snapshots" / ("0" * 40)
    for part, name in names.items():
        place(NANO[part], snapshot / name)
    (folder / "refs").mkdir(parents=True)
    (folder / "refs/main").write_text("0" * 40)
    return snapshot


NAMES = {
    "flux": "flux.safetensors",
    "ae": "vae/diffusion_pytorch_model.safetensors",
    "clip_l": "text_encoder/model.safetensors",
    "t5xxl": "text_encoder_2/model.safetensors",
}


def test_a_hub_id_is_answered_from_the_cache_first(tmp_path):
    snapshot = cached(tmp_path, NAMES)
    wanted = {part: snapshot / name for part, name in NAMES.items()}
    assert served(models=Path(REPOSITORY)) == wanted
    assert served(**{part: Path(REPOSITORY) for part in PARTS}) == wanted


@pytest.mark.parametrize("name", ["flux.gguf", "flux.sft", "flux.safetensors", "FLUX.GGUF", "flux.ckpt", "a.json"])
def test_the_name_of_a_file_is_not_a_hub_id(name):
    assert hub_id(Path("models") / name) is None and hub_id(Path(REPOSITORY)) == REPOSITORY


def test_files_that_end_in_sft_are_found(tmp_path):
    file = place(nano.AE, tmp_path / "models/ae.sft")
    assert [source.path for source in search(tmp_path / "models").sources[PARTS["ae"]]] == [file]


def test_a_folder_of_models_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    def closed(folder):
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr(Path, "iterdir", closed)
    assert f"{tmp_path} cannot be read (Permission denied); check its permissions" in refusal(models=tmp_path)


def test_a_path_that_exists_wins_over_a_hub_id(tmp_path):
    cached(tmp_path, NAMES)
    files = comfy(tmp_path / REPOSITORY)
    assert served(models=Path(REPOSITORY)) == {part: path.relative_to(tmp_path) for part, path in files.items()}


def test_offline_gives_one_error(tmp_path):
    snapshot = cached(tmp_path, {"flux": "flux.safetensors"})
    sentence = refusal(models=Path(REPOSITORY))
    assert f"{REPOSITORY} is neither a file or folder here nor complete in the hub's cache" in sentence
    assert sentence.endswith("go online once, or give paths")
    assert snapshot.exists()


class MadeUpHub:
    """A hub that holds `files`: what fluxq asks for is put into the cache."""

    def __init__(self, tmp_path: Path, files: dict[str, str], error: Exception | None = None) -> None:
        self.tmp_path, self.files, self.error, self.fetched = tmp_path, files, error, []

    def model_info(self, repository: str, files_metadata: bool):
        if self.error:
            raise self.error
        names = [*self.files.values(), "vae/config.md", "README.md"]
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name, size=10**9) for name in names])

    def snapshot_download(self, repository: str, local_files_only: bool = False, allow_patterns=None):
        if local_files_only:
            return self.cached(repository, local_files_only=True)
        self.fetched += allow_patterns
        shutil.rmtree(self.tmp_path / "hub", ignore_errors=True)
        cached(self.tmp_path, {part: name for part, name in self.files.items() if name in self.fetched})
        return None

    def install(self, monkeypatch) -> None:
        self.cached = huggingface_hub.snapshot_download
        monkeypatch.setattr(huggingface_hub, "HfApi", lambda: self)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", self.snapshot_download)


def test_only_the_needed_files_are_fetched_once(tmp_path, monkeypatch):
    hub, lines = MadeUpHub(tmp_path, NAMES), []
    hub.install(monkeypatch)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    models = Models(ModelConfig(models=Path(REPOSITORY)), notify=lines.append)
    assert models.served("ae").path.parts[-2:] == ("vae", "diffusion_pytorch_model.safetensors")
    assert hub.fetched == [NAMES["ae"]]
    assert lines == [
        f"a FLUX.1 autoencoder of {REPOSITORY} is not in the hub's cache: looking it up on huggingface.co",
        f"fetching 1 files of {REPOSITORY} for a FLUX.1 autoencoder, 1.0 GB, once",
    ]
    Models(ModelConfig(ae=Path(REPOSITORY), models=tmp_path)).served("ae")
    assert hub.fetched == [NAMES["ae"]]
    with pytest.raises(NotFetched, match=r"1 files of someone/FLUX.1-toy, 1.0 GB, are not in the hub's cache yet"):
        Models(ModelConfig(models=Path(REPOSITORY)), fetch=False).served("t5xxl")


def test_offline_asks_nobody_and_says_what_is_missing(tmp_path, monkeypatch):
    hub = MadeUpHub(tmp_path, NAMES, AssertionError("the hub was asked"))
    hub.install(monkeypatch)
    snapshot = cached(tmp_path, {"flux": NAMES["flux"]})
    models = Models(ModelConfig(models=Path(REPOSITORY), offline=True), notify=pytest.fail)
    assert models.served("flux").path == snapshot / NAMES["flux"]
    with pytest.raises(
        WrongRequest, match="a FLUX.1 autoencoder of .* --offline forbids downloading it; .* with --ae, or"
    ):
        models.served("ae")


def test_a_download_that_the_disk_has_no_room_for_is_refused_before_it_starts(tmp_path, monkeypatch):
    hub = MadeUpHub(tmp_path, NAMES)
    hub.install(monkeypatch)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(1 << 40, 0, 1 << 10))
    assert "FLUX.1-toy needs 1.0 GB, but only 0.0 GB are free" in refusal(models=Path(REPOSITORY))
    assert not hub.fetched


ANSWER = SimpleNamespace(headers={}, request=None)  # of the hub, as its errors carry it


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (lambda: GatedRepoError("gated", response=ANSWER), "asks you to accept its license: do so on its page"),
        (
            lambda: RepositoryNotFoundError("none", response=ANSWER),
            "is neither a file or folder here nor a model",
        ),
        (lambda: OSError("no route"), "the hub cannot be reached (no route); go online once, or give paths"),
    ],
)
def test_a_refusal_of_the_hub_gives_one_error(tmp_path, monkeypatch, error, sentence):
    hub = MadeUpHub(tmp_path, NAMES, error())
    hub.install(monkeypatch)
    found = refusal(models=Path(REPOSITORY))
    assert found.startswith(REPOSITORY) and sentence in found
    assert not (tmp_path / "hub").exists()


def test_a_repository_of_many_loose_files_asks_for_one(tmp_path, monkeypatch):
    MadeUpHub(tmp_path, {"flux": "a.safetensors", "t5xxl": "b.safetensors"}).install(monkeypatch)
    sentence = refusal(flux=Path(REPOSITORY), models=tmp_path)
    assert f"{REPOSITORY} has no folder transformer but a.safetensors, b.safetensors; download the file" in sentence


def test_a_gpu_without_fp8_is_refused_for_it(monkeypatch):
    gpu, config = torch.device("cuda"), ModelConfig(name="nano", compute="fp8_dx")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    with pytest.raises(WrongRequest, match=r"--compute fp8_dx needs .* \(sm_86\) has none; pass --compute int8_dx, or"):
        Models(config, gpu).resolved()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    assert Models(config, gpu).resolved().compute == "fp8_dx"
    assert Models(config, torch.device("cpu")).compute == "fp8_dx"
