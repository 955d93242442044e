"""Batches by index: one bucket each, every example in every epoch, independent of earlier requests."""

from collections import Counter
from dataclasses import replace

import pytest
import torch

from fluxq.caching.batches import Batches, held_out_batches
from fluxq.caching.store import Store, Text
from fluxq.data.dataset import Dataset, Entry
from fluxq.data.randomness import normal
from fluxq.errors import WrongRequest
from fluxq.formats.checkpoint.files import Checkpoint

SMALL, WIDE = (32, 32), (64, 32)


@pytest.fixture
def store(tmp_path) -> Store:
    store = Store(tmp_path)
    for n, (width, height) in enumerate([SMALL] * 5 + [WIDE] * 3):
        shape = (16, height // 8, width // 8)
        store.put_latents(f"picture{n}", torch.full(shape, float(n)), torch.full(shape, 0.5), f"{n}.png")
        store.put_text(f"caption{n}", some_text(n))
    return store


def some_text(n: int) -> Text:
    return Text(torch.full((7, 8), float(n)).bfloat16(), torch.full((6,), float(n)), f"caption {n}", 3, False)


def some_dataset(repeats: int = 1) -> Dataset:
    entries = [
        Entry(f"photos/{n}.png", "", 0, 0, repeats, SMALL if n < 5 else WIDE, (f"picture{n}",), (f"caption{n}",))
        for n in range(8)
    ]
    return Dataset(tuple(entries), {"": "caption0"}, t5_length=7)


@pytest.mark.parametrize(("batch_size", "repeats", "count"), [(1, 1, 8), (2, 1, 5), (4, 1, 3), (9, 1, 2), (2, 3, 13)])
def test_every_epoch_has_every_example_and_repeat_once(store, batch_size, repeats, count):
    batches = Batches(some_dataset(repeats), store, batch_size, seed=3)
    assert len(batches) == count  # the last short batch of each bucket is kept
    for epoch in range(3):
        indices = range(epoch * count, (epoch + 1) * count)
        names = [name for index in indices for name in batches.examples_of(index)]
        assert len(names) == len(set(names)) == 8 * repeats
        assert Counter(name.split("#")[0] for name in names) == {f"photos/{n}.png": repeats for n in range(8)}
        sizes = Counter((batches.bucket_of(index), len(batches.examples_of(index))) for index in indices)
        for bucket, total in ((SMALL, 5 * repeats), (WIDE, 3 * repeats)):
            full, rest = divmod(total, batch_size)
            assert sizes[bucket, batch_size] == full and (not rest or sizes[bucket, rest] == 1)


def test_repeats_are_named_apart(store):
    batches = Batches(some_dataset(repeats=3), store, 1, seed=3)
    names = {name for index in range(len(batches)) for name in batches.examples_of(index)}
    assert {"photos/0.png", "photos/0.png#2", "photos/0.png#3"} <= names and len(names) == 24


def test_facts_known_ahead_match_the_batch(store, monkeypatch):
    """And neither latents nor T5 embeddings are read for them."""
    batches = Batches(some_dataset(repeats=2), store, 3, seed=3)
    expected = [batches.batch(index) for index in range(20)]
    read, get = [], Checkpoint.get
    monkeypatch.setattr(Checkpoint, "get", lambda self, key: read.append(key) or get(self, key))
    for index, batch in enumerate(expected):
        assert torch.equal(batches.pooled_of(index), batch.pooled)
        assert batches.examples_of(index) == batch.examples
        width, height = batches.bucket_of(index)
        assert batch.latents.shape[2:] == (height // 8, width // 8)
    assert set(read) == {"clip"}


def test_batch_holds_latents_text_and_names_of_its_examples(store):
    batches = Batches(some_dataset(), store, 2, seed=3)
    for index in range(2 * len(batches)):
        batch = batches.batch(index)
        width, height = batches.bucket_of(index)
        size = len(batch.examples)
        assert batch.examples == batches.examples_of(index)
        assert batch.latents.shape == (size, 16, height // 8, width // 8) and batch.latents.dtype == torch.float32
        assert batch.txt.shape == (size, 7, 8) and batch.txt.dtype == torch.bfloat16
        assert batch.pooled.shape == (size, 6) and batch.pooled.dtype == torch.float32
        for n, name in enumerate(batch.examples):
            number = float(name.removeprefix("photos/").removesuffix(".png"))
            assert (batch.txt[n] == number).all() and (batch.pooled[n] == number).all()
            assert batch.captions[n] == f"caption {number:g}"
            noise = normal(batch.latents.shape[1:], 3, "latents", index, name)
            assert torch.equal(batch.latents[n], number + 0.5 * noise)


def test_a_batch_does_not_depend_on_earlier_requests(store):
    first = Batches(some_dataset(), store, 2, seed=3)
    expected = [first.batch(index) for index in range(12)]
    second = Batches(some_dataset(), Store(store.root), 2, seed=3)
    for index in [11, 0, 7, 3, 7, 1]:
        batch = second.batch(index)
        assert batch.examples == expected[index].examples
        assert torch.equal(batch.latents, expected[index].latents) and torch.equal(batch.txt, expected[index].txt)


def test_order_of_examples_in_the_dataset_does_not_matter(store):
    dataset = some_dataset()
    turned = Dataset(dataset.examples[::-1], dataset.prompts, dataset.t5_length)
    one, two = Batches(dataset, store, 2, seed=3), Batches(turned, store, 2, seed=3)
    assert [one.examples_of(index) for index in range(10)] == [two.examples_of(index) for index in range(10)]


def test_epochs_and_seeds_differ_and_buckets_are_mixed(store):
    def order(seed, epoch):
        batches = Batches(some_dataset(repeats=4), store, 2, seed)
        return [tuple(batches.examples_of(epoch * len(batches) + n)) for n in range(len(batches))]

    assert len({tuple(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9
    batches = Batches(some_dataset(repeats=4), store, 2, seed=0)
    buckets = [batches.bucket_of(n) for n in range(len(batches))]
    assert sum(a != b for a, b in zip(buckets, buckets[1:], strict=False)) > 1


def test_latents_are_sampled_again_each_time(store):
    batches = Batches(some_dataset(), store, 8, seed=3)
    seen: dict[str, list[torch.Tensor]] = {}
    for index in range(40 * len(batches)):
        batch = batches.batch(index)
        for name, latents in zip(batch.examples, batch.latents, strict=True):
            seen.setdefault(name, []).append(latents)
    for name, draws in seen.items():
        draws = torch.stack(draws)  # 40 draws of mean + 0.5 * noise
        number = float(name.removeprefix("photos/").removesuffix(".png"))
        assert abs(draws.mean() - number) < 5 * 0.5 / draws.numel() ** 0.5
        assert abs(draws.std() - 0.5) < 5 * 0.5 / (2 * draws.numel()) ** 0.5
        assert draws.flatten(1).unique(dim=0).shape[0] == 40


def test_all_variants_are_sampled_by_address(store):
    entry = Entry("photos/a.png", "", 0, 0, 1, SMALL, ("picture0", "picture1"), ("caption0", "caption1", "caption2"))
    batches = Batches(Dataset((entry,), {}, 7), store, 1, seed=3)
    texts = [batches.batch(index).pooled[0, 0].item() for index in range(60)]
    images = [round(batches.batch(index).latents.mean().item()) for index in range(60)]
    assert set(texts) == {0.0, 1.0, 2.0} and set(images) == {0, 1}
    assert min(Counter(texts).values()) > 8 and min(Counter(images).values()) > 15
    again = Batches(Dataset((entry,), {}, 7), store, 1, seed=3)
    assert [again.batch(index).pooled[0, 0].item() for index in range(60)] == texts


def test_captions_in_memory_are_bounded_and_read_once_while_they_fit(store, monkeypatch):
    reads = []
    read = Store.text
    monkeypatch.setattr(Store, "text", lambda self, key: reads.append(key) or read(self, key))
    one = some_text(0).t5.nbytes + some_text(0).clip.nbytes
    for bound, kept in [(100 * one, 8), (3 * one, 3), (one // 2, 1)]:
        reads.clear()
        batches = Batches(some_dataset(), store, 1, seed=3, text_cache_bytes=bound)
        for index in range(80):
            batches.batch(index)
            assert batches._texts.nbytes <= kept * one
        assert len(reads) == 8 if kept == 8 else len(reads) > 30


def test_missing_record_says_what_to_do(store):
    (store.root / "text" / "caption3.safetensors").unlink()
    batches = Batches(some_dataset(), store, 8, seed=3)
    with pytest.raises(WrongRequest, match="run `fluxq cache` again"):
        for index in range(len(batches)):
            batches.batch(index)


def test_nonsense_is_refused(store):
    with pytest.raises(ValueError, match="batches of 0"):
        Batches(some_dataset(), store, 0, seed=3)
    with pytest.raises(IndexError, match="-1"):
        Batches(some_dataset(), store, 2, seed=3).batch(-1)


def varied(store: Store, **changes) -> Dataset:
    """Two small images; what `changes` sets is of the first only."""
    first = Entry("photos/0.png", "", 0, 0, 1, SMALL, ("picture0",), ("caption0",))
    second = Entry("photos/1.png", "", 0, 0, 1, SMALL, ("picture1",), ("caption1",))
    return Dataset((replace(first, **changes), second), {"": "caption4"}, t5_length=7)


def seen(batches: Batches, name: str, steps: int = 400):
    """Index of the micro-batch -> caption of the example `name` there."""
    drawn = {index: batches.batch(index) for index in range(steps)}
    return {i: batch.captions[batch.examples.index(name)] for i, batch in drawn.items() if name in batch.examples}


def test_dropped_captions_are_the_empty_one_at_their_rate_and_address(store):
    batches = Batches(varied(store, caption_dropout=0.3), store, 2, seed=1)
    first, again = seen(batches, "photos/0.png"), seen(batches, "photos/0.png", 50)
    dropped = [index for index, caption in first.items() if caption == "caption 4"]
    assert 90 < len(dropped) < 150 and set(first.values()) == {"caption 0", "caption 4"}
    assert again == {index: caption for index, caption in first.items() if index < 50}
    assert set(seen(batches, "photos/1.png", 50).values()) == {"caption 1"}
    place = batches.examples_of(dropped[0]).index("photos/0.png")
    torch.testing.assert_close(batches.pooled_of(dropped[0])[place], torch.full((6,), 4.0))


def test_captions_in_place_of_others_come_with_the_same_images_and_are_never_dropped(store):
    dataset = varied(store, caption_dropout=0.3, text=("caption0", "caption2"))
    plain = Batches(dataset, store, 2, seed=1)
    other = Batches(dataset, store, 2, seed=1, in_place={"caption0": "caption5", "caption2": "caption6"})
    drawn, undropped = seen(plain, "photos/0.png", 60), seen(other, "photos/0.png", 60)
    pairs = {(caption, undropped[index]) for index, caption in drawn.items()}
    assert pairs == {("caption 0", "caption 5"), ("caption 2", "caption 6")} | {
        ("caption 4", "caption 5"),
        ("caption 4", "caption 6"),
    }
    assert seen(plain, "photos/1.png", 60) == seen(other, "photos/1.png", 60)


def test_every_nth_epoch_is_without_captions(store):
    batches = Batches(varied(store, caption_dropout_epochs=3), store, 1, seed=1)
    epochs = {index // 2 + 1: caption for index, caption in seen(batches, "photos/0.png", 18).items()}
    assert epochs == {1: "caption 0", 2: "caption 0", 3: "caption 4", 4: "caption 0", 5: "caption 0", 6: "caption 4",
                      7: "caption 0", 8: "caption 0", 9: "caption 4"}  # fmt: skip


def test_masks_and_prior_weights_are_the_weights_of_a_batch(store):
    mask = torch.zeros(4, 4)
    mask[:, :1] = 1
    store.put_mask("half", mask, "0.png")
    plain = Batches(varied(store), store, 2, seed=1).batch(0)
    assert plain.weights is None

    def weights(**changes) -> tuple[torch.Tensor, torch.Tensor]:
        batch = Batches(varied(store, **changes), store, 2, seed=1).batch(0)
        assert batch.weights is not None
        return batch.weights[batch.examples.index("photos/0.png")], batch.weights[batch.examples.index("photos/1.png")]

    masked, whole = weights(masks=("half",))
    assert (masked[0] == mask).all() and (whole == 1).all() and whole.shape == (1, 4, 4)
    masked, _ = weights(masks=("half",), mask_outside=0.2, weight=0.5)
    torch.testing.assert_close(masked[0], 0.5 * (0.2 + 0.8 * mask))
    masked, _ = weights(masks=("half",), mask_normalize=True)
    torch.testing.assert_close(masked[0], 4 * mask)
    prior, other = weights(weight=0.25)
    assert prior.tolist() == [[[0.25]]] and other.tolist() == [[[1.0]]]


def test_a_variant_of_an_image_comes_with_its_own_mask(store):
    for n in (0, 1):
        store.put_mask(f"mask{n}", torch.full((4, 4), 0.5 + n / 4), "0.png")
    dataset = varied(store, latents=("picture0", "picture2"), masks=("mask0", "mask1"))
    batches, found = Batches(dataset, store, 2, seed=1), set()
    for index in range(30):
        batch = batches.batch(index)
        i = batch.examples.index("photos/0.png")
        found.add((round(batch.latents[i].mean().item()), batch.weights[i].mean().item()))
    assert found == {(0, 0.5), (2, 0.75)}


def test_a_folder_has_batches_of_its_own_size(store):
    entries = [replace(entry, batch=2 if n < 2 else 0) for n, entry in enumerate(some_dataset().examples)]
    batches = Batches(Dataset(tuple(entries), {}, t5_length=7), store, 4, seed=1)
    sizes = sorted(len(batches.examples_of(index)) for index in range(len(batches)))
    assert batches.largest == 4 and sizes == [2, 3, 3], "two of a folder's own, three others there, three wide ones"


def test_images_seen_are_counted_over_epochs(store):
    batches = Batches(some_dataset(), store, 4, seed=1)
    counts = [len(batches.examples_of(index)) for index in range(2 * len(batches) + 2)]
    assert [batches.seen_before(index) for index in range(len(counts))] == [sum(counts[:i]) for i in range(len(counts))]


def test_held_out_images_come_once_in_batches_as_large_as_their_folder_has(store):
    entries = [replace(e, batch=1) if i in (1, 2) else e for i, e in enumerate(some_dataset().examples)]
    sizes = [
        batch.examples for batch in held_out_batches(Dataset(tuple(entries), {"": "caption0"}, t5_length=7), store, 3)
    ]
    assert sorted(map(len, sizes)) == [1, 1, 3, 3]
    assert {name for names in sizes if len(names) == 1 for name in names} == {"photos/1.png", "photos/2.png"}
    assert sorted(name for names in sizes for name in names) == sorted(e.name for e in entries)
