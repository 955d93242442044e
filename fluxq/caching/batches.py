"""Micro-batches by index: what a training step sees, read from the cache.

The order of an epoch, the choice of caption and the noise in the latents are all addressed by (seed, index), so any
batch can be made at any time, in any order, and again after a resume. A batch never mixes buckets; the last batch of a
bucket may be short.
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby

import torch
from torch.nn.utils.rnn import pad_sequence

from fluxq.data.dataset import Dataset, Entry
from fluxq.data.randomness import generator, normal

from .store import Store, Text


@dataclass(frozen=True)
class Batch:
    """One micro-batch, in RAM.

    `examples` are the names of its B items, unique within an epoch: "<folder>/<file>", with "#2", "#3" ... for repeats.
    `captions` are the captions behind txt and pooled, if there are any. `txt_mask` is True for their tokens; it is None
    if all captions have L of them.
    """

    latents: torch.Tensor  # (B, 16, h, w) fp32
    txt: torch.Tensor  # (B, L, D) bf16
    pooled: torch.Tensor  # (B, D2) fp32
    examples: list[str]
    captions: Sequence[str] = ()
    txt_mask: torch.Tensor | None = None  # (B, L) bool


class Batches:
    """The micro-batches of a dataset, over endless epochs; `len` is the number per epoch.

    `text_cache_bytes` limits the encoded captions kept in memory.
    """

    def __init__(
        self, dataset: Dataset, store: Store, batch_size: int, seed: int, text_cache_bytes: int = 256 << 20
    ) -> None:
        if batch_size < 1 or not dataset.examples:
            raise ValueError(f"batches of {batch_size} out of {len(dataset.examples)} examples")
        self.store, self.batch_size, self.seed = store, batch_size, seed
        self._buckets: dict[tuple[int, int], list[tuple[str, Entry]]] = {}
        for entry in sorted(dataset.examples, key=lambda entry: entry.name):
            items = self._buckets.setdefault(entry.bucket, [])
            items += [(entry.name if n == 1 else f"{entry.name}#{n}", entry) for n in range(1, entry.repeats + 1)]
        self._per_epoch = sum(-(-len(items) // batch_size) for items in self._buckets.values())
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)
        self._texts = _TextCache(store, text_cache_bytes)

    def __len__(self) -> int:
        return self._per_epoch

    def batch(self, index: int) -> Batch:
        """Micro-batch number `index`, counted from 0 at the start of training."""
        latents, texts, names = [], [], []
        for name, entry in self._items(index):
            mean, spread = self.store.latents(self._variant("variant", index, name, entry.latents))
            latents.append(mean + spread * normal(mean.shape, self.seed, "latents", index, name))
            texts.append(self._texts.get(self._variant("caption", index, name, entry.text)))
            names.append(name)
        return _batch(latents, texts, names)

    def bucket_of(self, index: int) -> tuple[int, int]:
        """(w, h) in pixels of the images in micro-batch `index`. Reads no files."""
        return self._items(index)[0][1].bucket

    def examples_of(self, index: int) -> list[str]:
        """The `examples` of micro-batch `index`. Reads no files."""
        return [name for name, _ in self._items(index)]

    def pooled_of(self, index: int) -> torch.Tensor:
        """(B, D2): the `pooled` of micro-batch `index`. Reads nothing else."""
        keys = [self._variant("caption", index, name, entry.text) for name, entry in self._items(index)]
        return torch.stack([self.store.pooled(key) for key in keys])

    def _items(self, index: int) -> list[tuple[str, Entry]]:
        if index < 0:
            raise IndexError(f"micro-batches are counted from 0, not {index}")
        return self._epoch(index // len(self))[index % len(self)]

    def _make_epoch(self, epoch: int) -> list[list[tuple[str, Entry]]]:
        random = generator(self.seed, "order", epoch)
        batches = []
        for _, items in sorted(self._buckets.items()):
            order = random.permutation(len(items))
            for start in range(0, len(items), self.batch_size):
                batches.append([items[i] for i in order[start : start + self.batch_size]])
        return [batches[i] for i in random.permutation(len(batches))]

    def _variant(self, purpose: str, index: int, name: str, keys: tuple[str, ...]) -> str:
        """One of an example's keys, at random; several are variants of its image or caption."""
        which = int(generator(self.seed, purpose, index, name).integers(len(keys))) if len(keys) > 1 else 0
        return keys[which]


def held_out_batches(dataset: Dataset, store: Store, batch_size: int) -> Iterator[Batch]:
    """Every example once, in a fixed order, with the mean of its latents: the batches for validation."""
    entries = sorted(dataset.examples, key=lambda entry: (entry.bucket, entry.name))
    for _, group in groupby(entries, key=lambda entry: entry.bucket):
        members = list(group)
        for start in range(0, len(members), batch_size):
            some = members[start : start + batch_size]
            texts = [store.text(entry.text[0]) for entry in some]
            latents = [store.latents(entry.latents[0])[0] for entry in some]
            yield _batch(latents, texts, [entry.name for entry in some])


def joined(texts: Sequence[Text]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """txt (B, L, D) and pooled (B, D2) of encoded captions, and the mask (B, L) of the tokens that they have.

    Texts of unequal lengths are padded with zeros to the longest of them; without any, the mask is None.
    """
    txt, lengths = pad_sequence([text.t5 for text in texts], batch_first=True), [len(text.t5) for text in texts]
    mask = None
    if min(lengths) < max(lengths):
        mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return txt, torch.stack([text.clip for text in texts]), mask


def _batch(latents: Sequence[torch.Tensor], texts: Sequence[Text], names: list[str]) -> Batch:
    txt, pooled, mask = joined(texts)
    return Batch(torch.stack([*latents]), txt, pooled, names, [text.caption for text in texts], mask)


class _TextCache:
    """Text records; the most recently used stay in memory, up to `max_bytes`."""

    def __init__(self, store: Store, max_bytes: int) -> None:
        self.store, self.max_bytes, self.nbytes = store, max_bytes, 0
        self._kept: OrderedDict[str, Text] = OrderedDict()

    def get(self, key: str) -> Text:
        text = self._kept.pop(key, None)
        if text is None:
            text = self.store.text(key)
            self.nbytes += text.t5.nbytes + text.clip.nbytes
        self._kept[key] = text
        while self.nbytes > self.max_bytes and len(self._kept) > 1:
            _, oldest = self._kept.popitem(last=False)
            self.nbytes -= oldest.t5.nbytes + oldest.clip.nbytes
        return text
