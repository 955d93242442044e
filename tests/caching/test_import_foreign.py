"""Imported caches of sd-scripts and ai-toolkit train without an encoder; one that does not fit gives one error."""

from __future__ import annotations

import base64
import hashlib
import json
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import save_file

from fluxq import nano
from fluxq.caching.store import Origin, Store
from fluxq.cli.main import main
from fluxq.data.dataset import Dataset
from fluxq.formats.checkpoint.files import Checkpoint
from fluxq.nano import drawing

CHANNELS, LENGTH, T5_WIDTH, CLIP_WIDTH = 16, nano.T5_LENGTH, 128, 64  # nano's
SIZES = [(96, 96), (128, 72), (60, 90)]


def run(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments])


def cached(tmp_path, *more):
    return run("cache", tmp_path / "photos", "--model", "nano", "--cache", tmp_path / "cache", *more)


def without_encoders(tmp_path) -> list:
    """Options for the toy model with missing encoders."""
    names = {"--ae": "ae", "--clip-l": "clip", "--t5xxl": "t5"}
    gone = [word for flag, name in names.items() for word in (flag, tmp_path / f"{name}.safetensors")]
    return ["--flux", nano.FLUX, *gone, "--t5-length", LENGTH, "--resolution", 96]


def trained(tmp_path, *more):
    out, cache = tmp_path / "run", tmp_path / "cache"
    plain = [tmp_path / "photos", "--steps", 2, "--rank", 2, "--format", "bf16", "--cache", cache, "--out", out]
    return run("train", *plain, *without_encoders(tmp_path), *more)


@pytest.fixture
def photos(tmp_path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for n, ((image, caption), size) in enumerate(zip(drawing.concept(seed=1, count=3), SIZES, strict=True)):
        image.resize(size).save(folder / f"{n}.png")
        (folder / f"{n}.txt").write_text(caption)
    return folder


def latents_of(n: int, w: int, h: int) -> np.ndarray:
    return np.random.default_rng((n, w)).normal(size=(CHANNELS, h // 8, w // 8)).astype(np.float32)


def text_of(n: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(n + 100)
    t5 = torch.from_numpy(random.normal(size=(LENGTH, T5_WIDTH))).bfloat16().float().numpy()
    return t5, random.normal(size=CLIP_WIDTH).astype(np.float32)


def write_sd_latents(folder, n, bucket, others=(), suffixed=True, **changes):
    """Like FluxLatentsCachingStrategy: several sizes in one file, names with the latents' height and width."""
    size, arrays = SIZES[n], {}
    for w, h in (bucket, *others):
        suffix = f"_{h // 8}x{w // 8}" if suffixed else ""
        arrays[f"latents{suffix}"] = latents_of(n, w, h)
        arrays[f"original_size{suffix}"] = np.array(size)
        arrays[f"crop_ltrb{suffix}"] = np.array([0, 0, *size])
    path = folder / f"{n}_{size[0]:04d}x{size[1]:04d}_flux.npz"
    np.savez(path, **{**arrays, **changes})
    return path


def write_sd_text(folder, n, **changes):
    t5, pooled = text_of(n)
    arrays = dict(l_pooled=pooled, t5_out=t5, txt_ids=np.zeros((LENGTH, 3), np.float32), apply_t5_attn_mask=False)
    arrays["t5_attn_mask"] = np.arange(LENGTH) < 9
    arrays = {name: value for name, value in {**arrays, **changes}.items() if value is not None}
    np.savez(folder / f"{n}_flux_te.npz", **arrays)
    return folder / f"{n}_flux_te.npz"


BUCKETS = [(96, 96), (112, 80), (64, 128)]  # the second is not the one that fluxq would choose, 128 x 64


@pytest.fixture
def sd_scripts(photos) -> Path:
    for n, bucket in enumerate(BUCKETS):
        write_sd_latents(photos, n, bucket)
        write_sd_text(photos, n)
    return photos


def toolkit_hash(about: dict) -> str:
    digest = hashlib.md5(json.dumps(about, sort_keys=True).encode("utf-8")).digest()
    return base64.urlsafe_b64encode(digest).decode("ascii").replace("=", "")


def write_toolkit(folder, n, bucket, caption=None, latents=None, flip=False, space="flux1", **said):
    """Like its dataloader_mixins: the source of the latents is in the header, and its hash is in the name."""
    (w, h), size = bucket, SIZES[n]
    scale = max(w / size[0], h / size[1])
    scaled = (max(w, int(size[0] * scale)), max(h, int(size[1] * scale)))
    about = OrderedDict(filename=f"{n}.png", scale_to_width=scaled[0], scale_to_height=scaled[1], crop_x=0, crop_y=0)
    about |= OrderedDict(crop_width=w, crop_height=h, latent_space_version=space, latent_version=1)
    about |= {"flip_x": True} if flip else {}
    told = {k: v if isinstance(v, str) else json.dumps(v) for k, v in (about | said).items()}
    told |= {"software": '{"name": "ai-toolkit"}', "format": "pt"}
    path = folder / "_latent_cache" / f"{n}_{toolkit_hash(about)}.safetensors"
    path.parent.mkdir(exist_ok=True)
    values = torch.from_numpy(latents_of(n + 10 * flip, w, h)).bfloat16() if latents is None else latents
    save_file({"latent": values}, path, metadata=told)
    caption = (folder / f"{n}.txt").read_text() if caption is None else caption
    hashed = toolkit_hash({"caption": caption, "text_embedding_space_version": "flux", "text_embedding_version": 1})
    text = folder / "_t_e_cache" / f"{n}_{hashed}.safetensors"
    text.parent.mkdir(exist_ok=True)
    t5, pooled = (torch.from_numpy(values)[None] for values in text_of(n))
    save_file({"text_embed": t5.bfloat16(), "pooled_embed": pooled}, text)
    return path, text


def dataset_of(tmp_path) -> tuple[Dataset, Store]:
    store = Store(tmp_path / "cache")
    return Dataset.load(store.datasets()[0]), store


def snapshot(folder: Path) -> dict:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_sd_scripts_cache_trains_without_any_encoder(tmp_path, sd_scripts):
    result = run("cache", sd_scripts, *without_encoders(tmp_path), "--cache", tmp_path / "cache", "--import", "--json")
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    assert (answer["images"], answer["imported_images"], answer["imported_captions"]) == (3, 3, 3)
    dataset, store = dataset_of(tmp_path)
    assert [example.bucket for example in dataset.examples] == BUCKETS
    for n, example in enumerate(dataset.examples):
        mean, spread = store.latents(example.latents[0])
        assert torch.equal(mean, torch.from_numpy(latents_of(n, *BUCKETS[n]))) and not spread.any()
        text = store.text(example.text[0])
        assert torch.equal(text.t5.float(), torch.from_numpy(text_of(n)[0]))
        assert torch.equal(text.clip, torch.from_numpy(text_of(n)[1]))
        assert (text.tokens, text.truncated, text.caption) == (9, False, (sd_scripts / f"{n}.txt").read_text())
        assert store.origin("text", example.text[0]) == Origin("sd-scripts", False)
    result = trained(tmp_path)
    assert result.exit_code == 0, result.output
    said = " ".join(result.output.split())
    assert "3 latents and 3 captions imported from sd-scripts, 6 of these 6 records unverified" in said
    assert (tmp_path / "run" / "result.json").is_file()


def test_ai_toolkit_cache_trains_without_any_encoder(tmp_path, photos):
    for n, bucket in enumerate(BUCKETS):
        write_toolkit(photos, n, bucket)
        write_toolkit(photos, n, bucket, flip=True)
        write_toolkit(photos, n, (192, 192), space="sdxl")
    result = run("cache", photos, *without_encoders(tmp_path), "--cache", tmp_path / "cache", "--import")
    assert result.exit_code == 0, result.output
    dataset, store = dataset_of(tmp_path)
    for n, example in enumerate(dataset.examples):
        wanted = [torch.from_numpy(latents_of(m, *BUCKETS[n])).bfloat16().float() for m in (n, n + 10)]
        for key, latents in zip(example.latents, wanted, strict=True):  # the mirror image is a variant
            assert torch.equal(store.latents(key)[0], latents)
        assert store.origin("latents", example.latents[0]) == Origin("ai-toolkit", False)
        assert store.origin("text", example.text[0]) == Origin("ai-toolkit", True)
    result = trained(tmp_path)
    assert result.exit_code == 0, result.output
    assert "imported from ai-toolkit, 6 of these 9 records unverified" in " ".join(result.output.split())


@pytest.mark.slow
def test_caches_with_masked_padding_are_imported_with_text_mask_alone(tmp_path, sd_scripts):
    """A record has the states of the caption's own tokens; a run trains on them without any encoder."""
    lengths = (9, 1, LENGTH)
    for n, length in enumerate(lengths):
        write_sd_text(sd_scripts, n, apply_t5_attn_mask=True, t5_attn_mask=np.arange(LENGTH) < length)
    refused = cached(tmp_path, "--import")
    assert refused.exit_code == 2 and "pass --text-mask to train as sd-scripts did" in " ".join(refused.stderr.split())
    options = [*without_encoders(tmp_path), "--text-mask", "--cache", tmp_path / "cache"]
    result = run("cache", sd_scripts, *options, "--import")
    assert result.exit_code == 0, result.output
    dataset, store = dataset_of(tmp_path)
    for n, example in enumerate(dataset.examples):
        text = store.text(example.text[0])
        assert torch.equal(text.t5.float(), torch.from_numpy(text_of(n)[0])[: lengths[n]])
        assert (text.tokens, text.truncated) == (lengths[n], lengths[n] == LENGTH)
    result = trained(tmp_path, "--text-mask")
    assert result.exit_code == 0, result.output
    assert run("check", sd_scripts, "--model", "nano", "--text-mask", "--cache", tmp_path / "cache").output.count(
        "3 captions imported from sd-scripts"
    )
    result = trained(tmp_path, "--out", tmp_path / "seen")  # these records are not those of a T5 that sees the padding
    assert result.exit_code == 2 and "3 captions must be encoded" in result.stderr


def test_caches_of_a_t5_that_saw_the_padding_are_refused_with_text_mask(tmp_path, photos):
    for write in (lambda: write_sd_text(photos, 1), lambda: write_toolkit(photos, 0, BUCKETS[0])):
        write()
        result = cached(tmp_path, "--import", "--text-mask")
        assert result.exit_code == 2 and "saw the padding, but with --text-mask it must not" in result.stderr
        (photos / "1_flux_te.npz").unlink(missing_ok=True)


@pytest.mark.parametrize("mask", [np.zeros(LENGTH), np.arange(LENGTH) % 2, np.arange(LENGTH) > 3])
def test_a_mask_that_does_not_begin_with_tokens_is_refused(tmp_path, photos, mask):
    write_sd_text(photos, 1, apply_t5_attn_mask=True, t5_attn_mask=mask)
    result = cached(tmp_path, "--import", "--text-mask")
    assert result.exit_code == 2 and "t5_attn_mask that does not begin with the caption's tokens" in result.stderr


def test_verify_reports_unverified_records_and_keeps_them(tmp_path, sd_scripts):
    assert cached(tmp_path, "--import").exit_code == 0
    told = cached(tmp_path, "--verify")
    assert told.exit_code == 0 and "6 of these 6 records unverified" in " ".join(told.output.split())
    assert cached(tmp_path, "--prune").exit_code == 0
    assert len(Store(tmp_path / "cache").records("latents")) == 3


def test_check_reports_unverified_records_of_unchanged_files(tmp_path, sd_scripts):
    assert cached(tmp_path, "--import").exit_code == 0
    for change, counts in ((lambda: None, "3 latents and 3"), ((sd_scripts / "0.txt").unlink, "3 latents and 2")):
        change()
        told = run("check", sd_scripts, "--model", "nano", "--cache", tmp_path / "cache")
        assert f"{counts} captions imported from sd-scripts" in " ".join(told.output.split()), told.output
    (tmp_path / "elsewhere").mkdir()
    assert "imported" not in run("check", sd_scripts, "--model", "nano", "--cache", tmp_path / "elsewhere").output


def test_a_changed_image_or_caption_is_encoded_again(tmp_path, sd_scripts):
    assert cached(tmp_path, "--import").exit_code == 0
    Image.effect_noise(SIZES[1], 50).convert("RGB").save(sd_scripts / "1.png")
    (sd_scripts / "2.txt").write_text("another caption")
    before = dataset_of(tmp_path)[0].examples
    assert cached(tmp_path).exit_code == 0
    after, store = dataset_of(tmp_path)
    kept = [(a.latents == b.latents, a.text == b.text) for a, b in zip(before, after.examples, strict=True)]
    assert kept == [(True, True), (False, True), (True, False)]
    assert store.origin("latents", after.examples[1].latents[0]) is None and after.examples[1].bucket == (128, 64)
    result = trained(tmp_path)  # nothing is missing where the encoders were known once
    assert result.exit_code == 2 and "must be encoded, but" in result.stderr


def test_own_records_come_first(tmp_path, sd_scripts):
    assert cached(tmp_path).exit_code == 0
    before = dataset_of(tmp_path)[0]
    assert cached(tmp_path, "--import").exit_code == 0
    assert dataset_of(tmp_path)[0] == before


def test_early_names_mirror_images_and_masks(tmp_path, photos):
    mirrored = latents_of(7, 96, 96)
    write_sd_latents(photos, 0, (96, 96), suffixed=False, latents_flipped=mirrored)
    suffix = "_8x16"
    write_sd_latents(photos, 1, (128, 64), others=[(64, 32)], **{f"alpha_mask{suffix}": np.ones((64, 128), np.float32)})
    result = cached(tmp_path, "--import")
    assert result.exit_code == 0, result.output
    said = " ".join(result.output.split())
    assert "2 images and 0 captions imported from sd-scripts" in said
    assert "the alpha masks of 1 images are not imported" in said and "1 images and 3 captions have no cache" in said
    dataset, store = dataset_of(tmp_path)
    assert torch.equal(store.latents(dataset.examples[0].latents[1])[0], torch.from_numpy(mirrored))
    assert torch.equal(store.latents(dataset.examples[1].latents[0])[0], torch.from_numpy(latents_of(1, 128, 64)))
    assert store.origin("latents", dataset.examples[2].latents[0]) is None


def test_masks_and_sizes_follow_the_imported_latents(tmp_path, photos):
    """An image's latents of another bucket than fluxq's get a mask of their shape; each of several sizes its own."""
    write_sd_latents(photos, 0, (96, 96), others=[(64, 64)])
    write_sd_latents(photos, 1, (112, 80), others=[(80, 48)])
    write_sd_latents(photos, 2, (64, 128), others=[(48, 80)])
    mask = Image.new("L", SIZES[1], 0)
    mask.paste(255, (0, 0, SIZES[1][0] // 2, SIZES[1][1]))
    mask.save(photos / "1-masklabel.png")
    sizes = ["--resolution", "64,96", "--masks", "beside"]
    result = cached(tmp_path, "--import", *sizes)
    assert result.exit_code == 0, result.output
    dataset, store = dataset_of(tmp_path)
    assert [e.bucket for e in dataset.examples if e.path.endswith("0.png")] == [(64, 64), (96, 96)]
    wide = [e for e in dataset.examples if e.path.endswith("1.png")]
    assert [(e.bucket, [tuple(store.mask(key).shape) for key in e.masks]) for e in wide] == [
        ((80, 48), [(6, 10)]),
        ((112, 80), [(10, 14)]),
    ]
    assert all(store.mask(e.masks[0])[:, 0].eq(1).all() and store.mask(e.masks[0])[:, -1].eq(0).all() for e in wide)


def test_an_image_without_a_caption_needs_the_empty_one(tmp_path, sd_scripts):
    assert cached(tmp_path, "--import").exit_code == 0
    (sd_scripts / "2.txt").unlink()
    result = trained(tmp_path)
    assert result.exit_code == 2 and "the empty caption must be encoded, but" in " ".join(result.stderr.split())


def nan(shape):
    values = np.zeros(shape, np.float32)
    values.flat[-1] = np.nan
    return values


def spoil(folder, name):
    """Write one bad cache, for image 1, among good ones."""
    if name == "truncated":
        path = write_sd_text(folder, 1)
        path.write_bytes(path.read_bytes()[:-100])
    elif name == "image replaced":
        Image.new("RGB", (64, 128)).save(folder / "1.png")
    elif name == "two images":
        Image.open(folder / "1.png").save(folder / "1.bmp")
    elif name.startswith("latents"):
        changes = {
            "latents: other size": dict(bucket=(32, 32)),
            "latents: too large": dict(bucket=(256, 128)),
            "latents: odd": dict(bucket=(136, 56)),
            "latents: channels": dict(bucket=(128, 64), latents_8x16=np.zeros((4, 8, 16), np.float32)),
            "latents: name": dict(bucket=(128, 64), latents_8x16=np.zeros((16, 16, 8), np.float32)),
            "latents: not finite": dict(bucket=(128, 64), latents_8x16=nan((16, 8, 16))),
            "latents: mirror": dict(bucket=(128, 64), latents_flipped_8x16=np.zeros((16, 8, 8), np.float32)),
            "latents: original": dict(bucket=(128, 64), original_size_8x16=np.array([72, 128])),
            "latents: objects": dict(bucket=(128, 64), latents_8x16=np.array([{}], object)),
        }
        write_sd_latents(folder, 1, **changes[name])
    else:
        changes = {
            "text: masked": dict(apply_t5_attn_mask=True),
            "text: flag lacks": dict(apply_t5_attn_mask=None),
            "text: length": dict(t5_out=np.zeros((64, T5_WIDTH), np.float32), t5_attn_mask=np.ones(64)),
            "text: width": dict(l_pooled=np.zeros(CLIP_WIDTH + 1, np.float32)),
            "text: not finite": dict(t5_out=nan((LENGTH, T5_WIDTH))),
        }
        write_sd_text(folder, 1, **changes[name])


BAD = {
    "truncated": "1_flux_te.npz is not a valid .npz file",
    "image replaced": "1_0128x0072_flux.npz was made from an image of another size, but 1.png has [64, 128] pixels",
    "two images": "may belong to any of 1.bmp, 1.png",
    "latents: other size": "has 1.png at 32 x 32, but about 128 x 64 pixels are needed; choose the --resolution",
    "latents: too large": "has 1.png at 256 x 128, but about",
    "latents: odd": "has 1.png at 136 x 56, but about",
    "latents: channels": "has latents_8x16 of shape (4, 8, 16), not (16, h, w)",
    "latents: name": "has latents_8x16 of shape (16, 16, 8), not (16, h, w)",
    "latents: not finite": "holds numbers that are not finite in latents_8x16",
    "latents: mirror": "has latents_flipped_8x16 of shape (16, 8, 8), unlike",
    "latents: original": "was made from an image of [72, 128], but 1.png has [128, 72] pixels",
    "latents: objects": "has more than numbers in latents_8x16.npy",
    "text: masked": "was made with apply_t5_attn_mask",
    "text: flag lacks": "lacks apply_t5_attn_mask",
    "text: length": "does not fit --t5-length 32 and this model: t5_out is (64, 128), not (32, 128)",
    "text: width": "l_pooled is (65,), not (64,)",
    "text: not finite": "holds numbers that are not finite in t5_out",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BAD)
def test_one_bad_cache_gives_one_error_and_nothing_is_imported(tmp_path, sd_scripts, name):
    spoil(sd_scripts, name)
    before = snapshot(tmp_path)
    result = cached(tmp_path, "--import")
    assert result.exit_code == 2, result.output
    assert BAD[name] in result.stderr and "Traceback" not in result.output and result.stderr.count("\n") <= 2
    assert snapshot(tmp_path) == before
    result = cached(tmp_path, "--import", "--skip-bad")
    assert result.exit_code == 0 and "not imported: " in result.output
    assert len([key for key in dataset_of(tmp_path)[0].records() if key[1].startswith("imported-")]) >= 4


def test_a_trigger_that_the_cache_lacks_is_named(tmp_path, sd_scripts):
    result = cached(tmp_path, "--import", "--trigger", "qqq")
    assert result.exit_code == 2 and "leave the trigger out, or set caption_line" in result.stderr


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (dict(said={"crop_x": 8}), "has a header that contradicts its name"),
        (dict(latents=torch.zeros(16, 8, 8)), "has latents of shape (16, 8, 8)"),
        (dict(latents=torch.full((16, 8, 16), torch.inf)), "numbers that are not finite in latent"),
        (dict(space="sdxl"), "has no latents of FLUX.1"),
    ],
)
def test_a_bad_cache_of_ai_toolkit_gives_one_error(tmp_path, photos, changes, sentence):
    write_toolkit(photos, 1, (128, 64), **{k: v for k, v in changes.items() if k != "said"}, **changes.get("said", {}))
    result = cached(tmp_path, "--import")
    assert result.exit_code == 2 and sentence in result.stderr, result.output
    assert not (tmp_path / "cache").exists()


def test_ai_toolkits_hash_detects_another_caption(tmp_path, photos):
    write_toolkit(photos, 1, (128, 64), caption="of before")
    result = cached(tmp_path, "--import")
    assert result.exit_code == 0 and "2 images and 3 captions have no cache" in " ".join(result.output.split())


def test_ai_toolkits_masked_text_is_refused(tmp_path, photos):
    _, text = write_toolkit(photos, 1, (128, 64))
    file, mask = Checkpoint(text), torch.arange(LENGTH)[None] < 5
    t5 = file.get("text_embed") * mask[..., None]
    save_file({"text_embed": t5, "pooled_embed": file.get("pooled_embed"), "attention_mask": mask}, text)
    result = cached(tmp_path, "--import")
    assert result.exit_code == 2 and "was made with attn_masking" in result.stderr


def test_no_cache_and_musubis_are_named(tmp_path, photos):
    result = cached(tmp_path, "--import")
    assert result.exit_code == 2 and "there is no *_flux.npz, *_flux_te.npz" in result.stderr
    save_file({"t5_vec_bf16": torch.zeros(2)}, photos / "1_fk_te.safetensors")
    result = cached(tmp_path, "--import")
    assert result.exit_code == 2 and "musubi-tuner's caches" in result.stderr and "Kontext" in result.stderr
    result = cached(tmp_path, "--import", "--verify")
    assert result.exit_code == 2 and "one after the other" in result.stderr
    assert not (tmp_path / "cache").exists()
