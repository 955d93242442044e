"""`fluxq cache` with toy encoders that count their calls: nothing is encoded twice and nothing is stale."""

import gc
import os
import shutil
import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from fluxq.caching import Batches, Store
from fluxq.caching.build import (
    EncoderFiles,
    build_cache,
    cache_prompts,
    missing_records,
    prune_cache,
    verify_cache,
)
from fluxq.caching.encoding import truncation_notes
from fluxq.data import Dataset, Folder, scan
from fluxq.data.images import open_image, prepare
from fluxq.errors import WrongRequest
from fluxq.formats.checkpoint.files import Checkpoint, write_safetensors

LENGTH, CLIP_WORDS = 6, 4


class ToyAutoencoder(torch.nn.Module):
    """Moments that a test can compute: means of 8 x 8 patches, and fixed log variances, some beyond the clamp."""

    config = SimpleNamespace(scale_factor=0.3611, shift_factor=0.1159)
    log_variance = torch.linspace(-40, 4, 16)

    def __init__(self, calls: list):
        super().__init__()
        self.calls = calls
        self.register_buffer("weight", torch.ones(1))

    def moments(self, x: torch.Tensor) -> torch.Tensor:
        self.calls.append(tuple(x.shape))
        mean = torch.nn.functional.avg_pool2d(x, 8).mean(1, keepdim=True) * torch.arange(1, 17).view(1, 16, 1, 1)
        return torch.cat([mean, self.log_variance.view(1, 16, 1, 1).expand_as(mean)], 1)


class ToyText:
    group = 8

    def __init__(self, calls: list, masked: bool = False):
        self.calls, self.masked = calls, masked

    def encode(self, captions, tick):
        self.calls.extend(captions)
        for part in (1, 2):
            tick(part, 2)
        t5 = torch.stack([torch.full((LENGTH, 8), float(len(caption))) for caption in captions])
        pooled = torch.stack([torch.full((5,), float(len(caption))) for caption in captions])
        words = [len(caption.split()) for caption in captions]
        if self.masked:
            t5 = [states[:n] for states, n in zip(t5, words, strict=True)]
        return t5, pooled, words, [count > LENGTH for count in words], [count > CLIP_WORDS for count in words]


class Workshop:
    """A folder of images, toy encoders with their own files, and a log of their calls."""

    def __init__(self, root: Path):
        self.root, self.photos, self.store_dir = root, root / "photos", root / "cache"
        self.images, self.captions, self.loads = [], [], []
        self.photos.mkdir()
        for n, size in enumerate([(64, 64), (64, 64), (128, 64), (64, 128)]):
            noise = np.random.default_rng(n).integers(0, 256, (*size[::-1], 3)).astype(np.uint8)
            Image.fromarray(noise).save(self.photos / f"{n}.png")
            (self.photos / f"{n}.txt").write_text(f"image number {n}")
        for name in ("ae", "clip", "t5", "vocabulary", "merges"):
            (root / f"{name}.safetensors").write_text(name)
        paths = {name: root / f"{name}.safetensors" for name in ("ae", "clip", "t5", "vocabulary", "merges")}
        self.encoders = EncoderFiles(
            (paths["ae"],), (paths["clip"],), (paths["t5"],), (paths["vocabulary"], paths["merges"])
        )

    def load_autoencoder(self):
        self.loads.append("ae")
        return ToyAutoencoder(self.images)

    def load_text(self):
        self.loads.append("text")
        return ToyText(self.captions)

    def build(self, **changes) -> Dataset:
        """Build the cache; afterwards `images`, `captions` and `loads` hold what this build requested."""
        for log in (self.images, self.captions, self.loads):
            log.clear()
        scanning = {"folders": [Folder(self.photos)], "resolution": 64, "min_side": 32, "max_side": 128}
        scanning |= {name: changes.pop(name) for name in [*scanning, "upscale", "step"] if name in changes}
        arguments = {
            "store_dir": self.store_dir,
            "encoders": self.encoders,
            "load_autoencoder": self.load_autoencoder,
            "load_text": self.load_text,
            "t5_length": LENGTH,
        }
        scanned = scan(**scanning, skip_bad=changes.get("skip_bad", False))
        return build_cache(scanned, **{**arguments, **changes}, request=repr(scanning))

    def asked(self) -> tuple[int, list[str], list[str]]:
        """(images encoded, captions encoded, encoders loaded)"""
        return sum(shape[0] for shape in self.images), sorted(self.captions), sorted(self.loads)

    def delete_encoders(self):
        for path in (*self.encoders.ae, *self.encoders.text()):
            path.unlink()


NOTHING = (0, [], [])


def test_masked_captions_have_records_of_their_own_and_of_their_own_length(workshop):
    def masked():
        return ToyText(workshop.captions, masked=True)

    (workshop.photos / "0.txt").write_text("one two three four five six seven eight")
    before = workshop.build(prompts=["a"])
    built = workshop.build(prompts=["a"], text_mask=True, load_text=masked)
    images, captions, _ = workshop.asked()
    assert images == 0 and len(captions) == 6  # with "" and the prompt
    store, lengths = Store(workshop.store_dir), [LENGTH, 3, 3, 3]
    assert [len(store.text(e.text[0]).t5) for e in built.examples] == lengths
    assert [store.text(e.text[0]).truncated for e in built.examples] == [True, False, False, False]
    assert all(len(store.text(e.text[0]).t5) == LENGTH for e in before.examples)
    batch = Batches(built, store, 4, seed=0)
    masks = [batch.batch(i).txt_mask for i in range(len(batch))]
    assert sum(mask is not None for mask in masks) == 1  # the bucket of image 0 and 1
    assert workshop.build(prompts=["a"]) == before and workshop.asked()[:2] == (0, [])  # both stay
    assert len(list((workshop.store_dir / "datasets").iterdir())) == 2
    with pytest.raises(ValueError, match="states for captions of"):
        workshop.build(prompts=["new"], text_mask=True)


@pytest.fixture
def workshop(tmp_path) -> Workshop:
    return Workshop(tmp_path)


def test_first_build_encodes_everything_once_and_the_next_nothing(workshop):
    dataset = workshop.build(prompts=["a prompt", "image number 1"])
    captions = [f"image number {n}" for n in range(4)]
    assert workshop.asked() == (4, ["", "a prompt", *captions], ["ae", "text"])
    assert [example.name for example in dataset.examples] == [f"photos/{n}.png" for n in range(4)]
    assert set(dataset.prompts) == {"", "a prompt", "image number 1"}
    assert workshop.build(prompts=["a prompt", "image number 1"]) == dataset
    assert workshop.asked() == NOTHING
    assert [Dataset.load(path) for path in Store(workshop.store_dir).datasets()] == [dataset]


def test_latents_are_scaled_shifted_and_their_variance_is_clamped(workshop):
    dataset, store = workshop.build(), Store(workshop.store_dir)
    for example in dataset.examples:
        mean, spread = store.latents(example.latents[0])
        width, height = example.bucket
        assert mean.shape == spread.shape == (16, height // 8, width // 8)
        resized = {(64, 64): (64, 64), (80, 48): (96, 48), (48, 80): (48, 96)}[example.bucket]
        x = prepare(open_image(Path(example.path)), resized, example.bucket)
        m = torch.nn.functional.avg_pool2d(x, 8).mean(0) * torch.arange(1, 17).view(16, 1, 1)
        assert torch.allclose(mean, 0.3611 * (m - 0.1159), atol=1e-6)
        variance = ToyAutoencoder.log_variance.clamp(-30, 20)
        assert torch.allclose(spread[:, 0, 0], 0.3611 * torch.exp(0.5 * variance))


def test_text_records_keep_the_output_of_the_encoder(workshop):
    (workshop.photos / "0.txt").write_text("one two three four five six seven")
    dataset, store = workshop.build(), Store(workshop.store_dir)
    text = store.text(dataset.examples[0].text[0])
    assert (text.caption, text.tokens, text.truncated) == ("one two three four five six seven", 7, True)
    assert (text.t5 == 33).all() and text.t5.dtype == torch.bfloat16 and (text.clip == 33).all()
    assert store.text(dataset.prompts[""]).tokens == 0


def test_every_build_notes_each_truncated_caption(workshop):
    (workshop.photos / "0.txt").write_text("one two three four five six seven")
    (workshop.photos / "1.txt").write_text("one two three four five six seven")
    (workshop.photos / "3.txt").write_text("word " * 100)
    t5 = "is longer than 6 T5 tokens; the rest was cut off"
    for _ in range(2):
        first, second, prompt, _ = workshop.build(prompts=["a b c d e f g"]).notes
        assert first == f"the caption of photos/0.png, 'one two three four five six seven', {t5}"
        assert second == f"the caption of photos/3.png, '{'word ' * 12}...', {t5}"
        assert prompt == f"the prompt 'a b c d e f g' {t5}"
    assert truncation_notes({str(n): (True, False) for n in range(5000)}, {}, 6)[10:] == [
        "4,990 more captions are longer than 6 T5 tokens"
    ]


@pytest.mark.parametrize(
    ("texts", "are"),
    [
        (["1 2 3 4"], None),
        (["1 2 3 4", "1 2 3 4 5"], "the caption of photos/1.png, '1 2 3 4 5', is"),
        (["1 2 3 4 5", "5 4 3 2 1", "1 2 3 4 5", "1"], "the caption of photos/0.png, '1 2 3 4 5', and 1 more are"),
        (["1 2 3 4 5 6", "6 5 4 3 2", "2 3 4 5 6"], "the caption of photos/0.png, '1 2 3 4 5 6', and 2 more are"),
    ],
)
def test_every_build_notes_captions_truncated_for_clip_in_one_line(texts, are, workshop):
    for n, text in enumerate(texts):
        (workshop.photos / f"{n}.txt").write_text(text)
    wanted = (f"{are} longer than 77 CLIP tokens; only T5 sees the rest",) if are else ()
    assert workshop.build().notes == workshop.build().notes == wanted
    assert workshop.loads == []


def test_records_without_clip_truncated_are_read(workshop):
    (workshop.photos / "0.txt").write_text("1 2 3 4 5")
    dataset, store = workshop.build(), Store(workshop.store_dir)
    path = store.root / "text" / f"{dataset.examples[0].text[0]}.safetensors"
    record = Checkpoint(path)
    metadata = {name: value for name, value in record.metadata.items() if name != "clip_truncated"}
    write_safetensors(path, {name: record.get(name) for name in record.keys()}, metadata)
    assert workshop.build().notes == () and store.verify() == {}


def test_edited_caption_alone_is_encoded_again(workshop):
    before = workshop.build()
    (workshop.photos / "2.txt").write_text("something else")
    after = workshop.build()
    assert workshop.asked() == (0, ["something else"], ["text"])
    assert before.examples[2].text != after.examples[2].text
    assert before.examples[2].latents == after.examples[2].latents


def test_edited_image_alone_is_encoded_again(workshop):
    before = workshop.build()
    Image.new("RGB", (64, 64), "blue").save(workshop.photos / "1.png")
    after = workshop.build()
    assert workshop.asked() == (1, [], ["ae"])
    assert [a.latents == b.latents for a, b in zip(before.examples, after.examples, strict=True)] == [
        True,
        False,
        True,
        True,
    ]


def test_touched_or_renamed_image_is_not_encoded_again(workshop):
    workshop.build()
    os.utime(workshop.photos / "0.png", ns=(1, 1))
    (workshop.photos / "1.png").rename(workshop.photos / "new.png")
    (workshop.photos / "1.txt").rename(workshop.photos / "new.txt")
    workshop.build()
    assert workshop.asked() == NOTHING


def test_warm_build_reads_no_image_and_no_encoder_file(workshop, monkeypatch):
    workshop.build()

    def read(*_):
        raise AssertionError("a file was read")

    monkeypatch.setattr("fluxq.caching.hashes.file_digest", read)
    monkeypatch.setattr("fluxq.caching.encoding.open_image", read)
    workshop.build()
    assert workshop.asked() == NOTHING


@pytest.mark.parametrize(
    ("name", "asked"),
    [("ae", (4, 0)), ("clip", (0, 5)), ("t5", (0, 5)), ("vocabulary", (0, 5)), ("merges", (0, 5))],
)
def test_changed_encoder_file_encodes_what_depends_on_it(workshop, name, asked):
    workshop.build()
    (workshop.root / f"{name}.safetensors").write_text("another one")
    workshop.build()
    images, captions, _ = workshop.asked()
    assert (images, len(captions)) == asked


def test_changed_size_encodes_images_and_changed_length_captions(workshop):
    workshop.build()
    workshop.build(resolution=96)
    assert workshop.asked()[:2] == (4, [])
    with pytest.raises(ValueError, match=r"captions of \[7, 7, 7, 7, 7\] tokens"):
        workshop.build(t5_length=7)
    assert len(Store(workshop.store_dir).datasets()) == 2


def test_shared_captions_and_equal_images_are_stored_once(workshop):
    for n in range(4):
        (workshop.photos / f"{n}.txt").write_text("the same caption")
    (workshop.photos / "copy.png").write_bytes((workshop.photos / "0.png").read_bytes())
    (workshop.photos / "copy.txt").write_text("")
    dataset, store = workshop.build(), Store(workshop.store_dir)
    assert workshop.asked()[:2] == (4, ["", "the same caption"])
    assert len(store.records("text")) == 2 and len(store.records("latents")) == 4
    assert len(dataset.examples) == 5


def test_images_of_a_bucket_are_encoded_together(workshop, monkeypatch):
    workshop.build()
    assert sorted(shape[0] for shape in workshop.images) == [1, 1, 2]
    monkeypatch.setattr("fluxq.caching.encoding.PIXELS_PER_BATCH", 100)
    workshop.build(store_dir=workshop.root / "other")
    assert [shape[0] for shape in workshop.images] == [1, 1, 1, 1]


def test_complete_cache_builds_and_trains_without_the_encoder_files(workshop):
    dataset = workshop.build(prompts=["a prompt"])
    workshop.delete_encoders()
    assert workshop.build(prompts=["a prompt"]) == dataset
    assert workshop.asked() == NOTHING
    batches = Batches(dataset, Store(workshop.store_dir), 2, seed=1)
    names = [name for index in range(len(batches)) for name in batches.batch(index).examples]
    assert sorted(names) == [f"photos/{n}.png" for n in range(4)]


def test_missing_encoder_is_named_with_what_needs_it(workshop):
    workshop.build()
    workshop.encoders.t5xxl[0].unlink()
    (workshop.photos / "0.txt").write_text("new")
    with pytest.raises(WrongRequest, match=r"^1 captions must be encoded, but .*t5.safetensors does not exist"):
        workshop.build()
    (workshop.photos / "0.txt").write_text("image number 0")
    workshop.encoders.ae[0].unlink()
    Image.new("RGB", (64, 64)).save(workshop.photos / "new.png")
    with pytest.raises(WrongRequest, match=r"^1 images must be encoded, but .*ae.safetensors does not exist"):
        workshop.build()
    assert workshop.asked() == NOTHING


def test_encoder_never_seen_is_named_before_anything_is_read(workshop):
    workshop.delete_encoders()
    with pytest.raises(WrongRequest, match=r"^4 images must be encoded, but .*ae.safetensors does not exist"):
        workshop.build()
    workshop.encoders.ae[0].write_text("ae")
    with pytest.raises(WrongRequest, match=r"^5 captions must be encoded, but .*t5.safetensors does not exist"):
        workshop.build()
    assert not workshop.store_dir.exists()


@pytest.mark.parametrize("stop", ["hashing", "images", "captions"])
def test_interrupted_build_keeps_what_is_done(workshop, monkeypatch, stop):
    monkeypatch.setattr("fluxq.caching.encoding.PIXELS_PER_BATCH", 1)
    monkeypatch.setattr(ToyText, "group", 1)

    def progress(stage, done, total):
        if stage == stop and done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        workshop.build(progress=progress)
    first = workshop.asked()
    assert (first[0], len(first[1])) == {"hashing": (0, 0), "images": (2, 0), "captions": (4, 2)}[stop]
    assert Store(workshop.store_dir).datasets() == []
    dataset = workshop.build()
    second = workshop.asked()
    assert (first[0] + second[0], len(first[1]) + len(second[1])) == (4, 5)
    assert verify_cache(workshop.store_dir).bad == {} and len(dataset.examples) == 4
    assert not [path for path in workshop.store_dir.rglob("*") if ".tmp-" in path.name]


def test_encoder_that_crashes_keeps_what_is_done(workshop, monkeypatch):
    monkeypatch.setattr("fluxq.caching.encoding.PIXELS_PER_BATCH", 1)
    encoder = ToyAutoencoder.moments
    monkeypatch.setattr(ToyAutoencoder, "moments", lambda self, x: encoder(self, x) if len(self.calls) < 3 else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        workshop.build()
    monkeypatch.setattr(ToyAutoencoder, "moments", encoder)
    workshop.build()
    assert workshop.asked()[0] == 1


def test_progress_counts_every_stage_to_its_end(workshop):
    told = []
    workshop.build(progress=lambda *event: told.append(event))
    last = {stage: (done, total) for stage, done, total in told}
    assert last == {"hashing": (9, 9), "looking": (4, 4), "images": (4, 4), "captions": (5, 5)}
    assert all(0 <= done <= total for _, done, total in told)
    assert [done for stage, done, _ in told if stage == "captions"] == [2, 5]  # half of the only group, then all


def test_one_encoder_is_freed_before_the_other_is_loaded(workshop):
    alive = []

    def load_autoencoder():
        autoencoder = ToyAutoencoder([])
        alive.append(weakref.ref(autoencoder))
        return autoencoder

    def load_text():
        gc.collect()
        assert alive[0]() is None
        return ToyText([])

    workshop.build(load_autoencoder=load_autoencoder, load_text=load_text)
    assert len(alive) == 1


def test_image_that_cannot_be_decoded_is_named_or_skipped(workshop):
    data = (workshop.photos / "1.png").read_bytes()
    (workshop.photos / "1.png").write_bytes(data[: len(data) // 2])
    (workshop.photos / "2.png").write_bytes(b"")
    with pytest.raises(WrongRequest, match=r"2.png cannot be read \(it is empty\); .*--skip-bad"):
        workshop.build()
    (workshop.photos / "2.png").unlink()
    with pytest.raises(WrongRequest, match=r"1.png cannot be read .*truncated.*--skip-bad"):
        workshop.build()
    (workshop.photos / "2.png").write_bytes(b"")
    dataset = workshop.build(skip_bad=True)
    assert [example.name for example in dataset.examples] == ["photos/0.png", "photos/3.png"]
    assert [Path(line.split(" cannot")[0]).name for line in dataset.skipped] == ["2.png", "1.png"]
    workshop.delete_encoders()
    assert workshop.build(skip_bad=True) == dataset and workshop.loads == []


class Short(ToyAutoencoder):
    """On a GPU that has memory for bands of up to `most` rows."""

    def __init__(self, calls: list, most: int):
        super().__init__(calls)
        self.most, self.band = most, None

    def in_bands(self, band: int | None) -> None:
        self.band = band

    def moments(self, x: torch.Tensor) -> torch.Tensor:
        if self.band is None or self.band > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().moments(x)


def test_images_too_large_for_the_gpu_are_encoded_in_bands_with_one_notice(workshop):
    said, wanted = [], workshop.build()
    shutil.rmtree(workshop.store_dir)
    dataset = workshop.build(load_autoencoder=lambda: Short(workshop.images, 32), notify=said.append)
    assert dataset == wanted and sum(shape[0] for shape in workshop.images) == 4
    assert said == ["the GPU has too little memory for the autoencoder; from here on it works on 32 rows at a time"]


def test_images_too_large_even_in_bands_are_refused_by_name(workshop):
    with pytest.raises(
        WrongRequest, match=r"\.png at \d+ x \d+ pixels needs more memory than the GPU has left, even in bands"
    ):
        workshop.build(load_autoencoder=lambda: Short([], 1))
    assert Store(workshop.store_dir).datasets() == []


def test_only_bad_images_are_refused_even_when_skipping(workshop):
    for path in workshop.photos.glob("*.png"):
        path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(WrongRequest, match=r"no usable image is left \(\d+ skipped\); the first: .*png cannot be read"):
        workshop.build(skip_bad=True)


def test_settings_of_folders_reach_the_dataset(workshop):
    dataset = workshop.build(folders=[Folder(workshop.photos, repeats=3, trigger="zqx")])
    assert {example.repeats for example in dataset.examples} == {3}
    assert "zqx, image number 0" in workshop.captions
    entry = dataset.examples[0]
    status = (workshop.photos / "0.png").stat()
    assert (entry.path, entry.size, entry.mtime_ns) == (
        str(workshop.photos / "0.png"),
        status.st_size,
        status.st_mtime_ns,
    )
    assert dataset.notes == ("captions without the trigger, now added: 4 (0.png, 1.png, 2.png, ...)",)


def test_prompts_are_encoded_once_and_shared_with_the_captions(workshop):
    workshop.build()
    arguments = (workshop.store_dir, workshop.encoders, workshop.load_text)
    for asked in (["new"], []):
        workshop.captions.clear()
        texts = cache_prompts(["image number 0", "new", "new"], *arguments, t5_length=LENGTH)
        assert workshop.captions == asked
        assert {prompt: text.caption for prompt, text in texts.items()} == {p: p for p in ("image number 0", "new")}
    workshop.delete_encoders()
    assert (cache_prompts(["new"], *arguments, t5_length=LENGTH)["new"].t5 == 3).all()
    with pytest.raises(WrongRequest, match=r"^1 captions must be encoded, but .*t5.safetensors does not exist"):
        cache_prompts(["newer"], *arguments, t5_length=LENGTH)


def test_verify_removes_damage_and_the_next_build_repairs_it(workshop):
    dataset = workshop.build()
    victim = workshop.store_dir / "latents" / f"{dataset.examples[0].latents[0]}.safetensors"
    data = bytearray(victim.read_bytes())
    data[-1] ^= 255
    victim.write_bytes(data)
    report = verify_cache(workshop.store_dir, remove=False)
    assert report.records == 9 and list(report.bad) == [victim] and report.missing == {}
    report = verify_cache(workshop.store_dir)
    assert list(report.bad) == [victim] and list(report.missing.values()) == [1]
    workshop.build()
    assert workshop.asked() == (1, [], ["ae"])
    report = verify_cache(workshop.store_dir)
    assert (report.records, report.bad, report.missing) == (9, {}, {})


def test_prune_deletes_only_what_no_dataset_uses(workshop):
    workshop.build()
    workshop.build(resolution=96)
    assert prune_cache(workshop.store_dir) == (0, 0)
    kept = workshop.root / "run.json"
    workshop.build().save(kept)
    (workshop.photos / "0.txt").write_text("new")
    workshop.build()
    workshop.build(resolution=96)
    assert prune_cache(workshop.store_dir, keep=[kept])[0] == 0
    count, nbytes = prune_cache(workshop.store_dir)
    assert count == 1 and nbytes > 0
    for resolution in (64, 96):
        workshop.build(resolution=resolution)
        assert workshop.asked() == NOTHING


def test_prune_deletes_nothing_when_a_dataset_cannot_be_read(workshop):
    workshop.build()
    path = Store(workshop.store_dir).datasets()[0]
    path.write_text("{")
    before = sorted(workshop.store_dir.rglob("*"))
    with pytest.raises(WrongRequest, match="is not a dataset file"):
        prune_cache(workshop.store_dir)
    assert sorted(workshop.store_dir.rglob("*")) == before


@pytest.mark.parametrize("command", [verify_cache, prune_cache])
def test_folder_that_is_not_a_cache_is_refused(workshop, command):
    with pytest.raises(WrongRequest, match="holds no cache"):
        command(workshop.photos)
    with pytest.raises(WrongRequest, match="holds no cache"):
        command(workshop.root / "none")


def test_unwritable_cache_gives_one_error(workshop):
    workshop.store_dir.write_text("a file where the folder should be")
    with pytest.raises(WrongRequest, match=r"cache/hashes.json cannot be read \(Not a directory\); choose another"):
        workshop.build()


def test_variants_are_encoded_once_and_each_reaches_the_model(workshop):
    folder = Folder(workshop.photos, trigger="zqx", shuffle_tags=True, flip=True, variants=3, caption_dropout=0.5)
    (workshop.photos / "0.txt").write_text("a, b, c, d")
    dataset = workshop.build(folders=[folder])
    first = next(e for e in dataset.examples if e.name.endswith("0.png"))
    assert len(first.text) == 3 and len(first.latents) == 2 and first.caption_dropout == 0.5
    store = Store(workshop.store_dir)
    assert all(set(store.text(key).caption.split(", ")) == {"zqx", "a", "b", "c", "d"} for key in first.text)
    plain, mirrored = (store.latents(key)[0] for key in first.latents)
    torch.testing.assert_close(mirrored, plain.flip(2))
    assert "" in dataset.prompts and workshop.asked()[0] == 8
    assert any(note.startswith("variants: 4 images are 8 latents and 6 captions") for note in dataset.notes)
    assert workshop.build(folders=[folder]) == dataset and workshop.asked() == NOTHING
    assert Dataset.load(next((workshop.store_dir / "datasets").iterdir())) == dataset
    unvaried = workshop.build(folders=[Folder(workshop.photos, trigger="zqx")])
    assert workshop.asked() == (0, ["zqx, a, b, c, d"], ["text"]), "the one that is not among the variants"
    assert unvaried.examples[0].latents == first.latents[:1], "the plain view is the record that was there before"


def test_dropped_captions_need_the_encoders_of_the_empty_one(workshop):
    workshop.build()
    for path in workshop.encoders.text():
        path.unlink()
    assert "" in workshop.build().prompts and workshop.asked() == NOTHING
    changed = Folder(workshop.photos, class_tokens="new", shuffle_tags=True, trigger="other")
    with pytest.raises(WrongRequest, match="captions must be encoded, but .* does not exist"):
        workshop.build(folders=[changed])
    (record,) = (workshop.store_dir / "text").glob(f"{workshop.build().prompts['']}*")
    record.unlink()
    with pytest.raises(WrongRequest, match="the empty caption must be encoded, but .* does not exist"):
        workshop.build(folders=[Folder(workshop.photos, caption_dropout=0.5)])


def test_masks_are_cached_beside_the_latents(workshop):
    mask = Image.new("L", (64, 64), 0)
    mask.paste(255, (0, 0, 32, 64))
    mask.save(workshop.photos / "0-masklabel.png")
    folder = Folder(workshop.photos, masks="beside", mask_outside=0.1, flip=True)
    scanned, foreseen, seen = scan([folder], 64, 32, 128), [], []

    def lacking():
        return missing_records(scanned, workshop.store_dir, workshop.encoders, LENGTH, False, ())

    made = {"before": lambda *missing: foreseen.append([*map(list, missing)]), "progress": lambda *at: seen.append(at)}
    expected = lacking()
    dataset, store = workshop.build(folders=[folder], **made), Store(workshop.store_dir)
    assert [[sorted(part) for part in each] for each in (*foreseen, expected)] == [[*map(sorted, expected)]] * 2
    assert expected[2] == [(64, 64)] * 2 and lacking() == ([], [], []), "the mask and its mirror image"
    assert [at for at in seen if at[0] == "masks"] == [("masks", 1, 2), ("masks", 2, 2)]
    first, second = dataset.examples[:2]
    assert (len(first.masks), second.masks, first.mask_outside, second.mask_outside) == (2, (), 0.1, 0.0)
    assert store.mask(first.masks[0])[0].tolist() == [1, 1, 1, 1, 0, 0, 0, 0]
    assert store.mask(first.masks[1])[0].tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert verify_cache(workshop.store_dir).bad == {}
    prune_cache(workshop.store_dir)
    assert store.has("masks", first.masks[0])
    before = dataset.digest()
    mask.paste(255, (0, 0, 48, 64))
    mask.save(workshop.photos / "0-masklabel.png")
    assert workshop.build(folders=[folder]).digest() != before and workshop.asked() == NOTHING
    mask.paste(0, (0, 0, 64, 64))
    mask.save(workshop.photos / "0-masklabel.png")
    with pytest.raises(WrongRequest, match="0-masklabel.png is black wherever"):
        workshop.build(folders=[folder])
    skipped = workshop.build(folders=[folder], skip_bad=True)
    assert len(skipped.examples) == 3 and "is black wherever" in skipped.skipped[0]
