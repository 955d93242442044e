"""Micro-batches by index: what a training step sees, read from the cache.

The order of an epoch, the choice of caption and the noise in the latents are all addressed by (seed, index), so any
batch can be made at any time, in any order, and again after a resume. A batch never mixes buckets; the last batch of a
bucket may be short.
"""

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import groupby

import torch
from torch.nn.utils.rnn import pad_sequence

from fluxq.data.buckets import Size
from fluxq.data.dataset import Dataset, Entry
from fluxq.data.randomness import generator, normal

from .store import Store, Text


@dataclass(frozen=True)
class Batch:
    """One micro-batch, in RAM.

    `examples` are the names of its B items, unique within an epoch: "<folder>/<file>", with "#2", "#3" ... for repeats.
    `captions` are the captions behind txt and pooled, if there are any. `txt_mask` is True for their tokens; it is None
    if all captions have L of them. `weights` is how much each latent's error counts, if not all count 1.
    """

    latents: torch.Tensor  # (B, 16, h, w) fp32
    txt: torch.Tensor  # (B, L, D) bf16
    pooled: torch.Tensor  # (B, D2) fp32
    examples: list[str]
    captions: Sequence[str] = ()
    txt_mask: torch.Tensor | None = None  # (B, L) bool
    weights: torch.Tensor | None = None  # (B, 1, h, w) or (B, 1, 1, 1) fp32


class Batches:
    """The micro-batches of a dataset, over endless epochs; `len` is the number per epoch.

    batch_size: of examples that have none of their own; `largest` is the largest of all. `text_cache_bytes` limits the
    encoded captions kept in memory. in_place: key of a caption -> that of another, which is never dropped.
    """

    def __init__(
        self,
        dataset: Dataset,
        store: Store,
        batch_size: int,
        seed: int,
        text_cache_bytes: int = 256 << 20,
        in_place: Mapping[str, str] | None = None,
    ) -> None:
        if batch_size < 1 or not dataset.examples:
            raise ValueError(f"batches of {batch_size} out of {len(dataset.examples)} examples")
        self.store, self.seed, self.no_caption = store, seed, dataset.prompts.get("")
        self.in_place = in_place or {}
        self._groups: dict[tuple[Size, int], list[tuple[str, Entry]]] = {}  # by bucket and size of its batches
        for entry in sorted(dataset.examples, key=lambda entry: entry.name):
            items = self._groups.setdefault((entry.bucket, entry.batch or batch_size), [])
            items += [(entry.name if n == 1 else f"{entry.name}#{n}", entry) for n in range(1, entry.repeats + 1)]
        self.largest = max(size for _, size in self._groups)
        self._per_epoch = sum(-(-len(items) // size) for (_, size), items in self._groups.items())
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)
        self._texts = _TextCache(store, text_cache_bytes)

    def __len__(self) -> int:
        return self._per_epoch

    def batch(self, index: int) -> Batch:
        """Micro-batch number `index`, counted from 0 at the start of training."""
        latents, texts, weights, names = [], [], [], []
        for name, entry in self._items(index):
            which = self._draw("variant", index, name, len(entry.latents))
            mean, spread = self.store.latents(entry.latents[which])
            latents.append(mean + spread * normal(mean.shape, self.seed, "latents", index, name))
            texts.append(self._texts.get(self._text_key(index, name, entry)))
            weights.append(weights_of(entry, self.store, which))
            names.append(name)
        return _batch(latents, texts, names, weights)

    def seen_before(self, index: int) -> int:
        """How many images the micro-batches before number `index` have, together. Reads no files."""
        epochs, rest = divmod(index, len(self))
        partly = self._epoch(epochs)[:rest] if rest else []
        return epochs * sum(map(len, self._groups.values())) + sum(map(len, partly))

    def bucket_of(self, index: int) -> tuple[int, int]:
        """(w, h) in pixels of the images in micro-batch `index`. Reads no files."""
        return self._items(index)[0][1].bucket

    def examples_of(self, index: int) -> list[str]:
        """The `examples` of micro-batch `index`. Reads no files."""
        return [name for name, _ in self._items(index)]

    def pooled_of(self, index: int) -> torch.Tensor:
        """(B, D2): the `pooled` of micro-batch `index`. Reads nothing else."""
        keys = [self._text_key(index, name, entry) for name, entry in self._items(index)]
        return torch.stack([self.store.pooled(key) for key in keys])

    def _items(self, index: int) -> list[tuple[str, Entry]]:
        if index < 0:
            raise IndexError(f"micro-batches are counted from 0, not {index}")
        return self._epoch(index // len(self))[index % len(self)]

    def _make_epoch(self, epoch: int) -> list[list[tuple[str, Entry]]]:
        random = generator(self.seed, "order", epoch)
        batches = []
        for (_, size), items in sorted(self._groups.items()):
            order = random.permutation(len(items))
            for start in range(0, len(items), size):
                batches.append([items[i] for i in order[start : start + size]])
        return [batches[i] for i in random.permutation(len(batches))]

    def _text_key(self, index: int, name: str, entry: Entry) -> str:
        """The key of one of an example's captions, or of the empty one if this time its caption is dropped."""
        drawn_text = entry.text[self._draw("caption", index, name, len(entry.text))]
        if drawn_text in self.in_place:
            return self.in_place[drawn_text]
        every, epoch = entry.caption_dropout_epochs, 1 + index // len(self)
        drawn = entry.caption_dropout and generator(self.seed, "dropout", index, name).random() < entry.caption_dropout
        if drawn or (every and epoch % every == 0):
            assert self.no_caption is not None, "build_cache encodes it"
            return self.no_caption
        return drawn_text

    def _draw(self, purpose: str, index: int, name: str, count: int) -> int:
        """One of an example's variants, at random."""
        return int(generator(self.seed, purpose, index, name).integers(count)) if count > 1 else 0


def weights_of(entry: Entry, store: Store, which: int) -> torch.Tensor | None:
    """How much each latent of an example's variant counts, (1, h, w) or (1, 1, 1); None if each counts 1."""
    if not entry.masks:
        return None if entry.weight == 1 else torch.full((1, 1, 1), entry.weight)
    mask = entry.mask_outside + (1 - entry.mask_outside) * store.mask(entry.masks[which])
    return (mask / mask.mean() if entry.mask_normalize else mask)[None] * entry.weight


def joined_weights(weights: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    """(B, 1, h, w), or (B, 1, 1, 1) if none has a mask; None if each counts 1."""
    if not any(w is not None for w in weights):
        return None
    ones = torch.ones(1, 1, 1)
    return torch.stack(torch.broadcast_tensors(*(ones if w is None else w for w in weights)))


def held_out_batches(dataset: Dataset, store: Store, batch_size: int) -> Iterator[Batch]:
    """Every example once, in a fixed order, with the mean of its latents: the batches for validation."""
    entries = sorted(dataset.examples, key=lambda entry: (entry.bucket, entry.batch, entry.name))
    for (_, batch), group in groupby(entries, key=lambda entry: (entry.bucket, entry.batch)):
        members, size = list(group), batch or batch_size
        for start in range(0, len(members), size):
            some = members[start : start + size]
            texts = [store.text(entry.text[0]) for entry in some]
            latents = [store.latents(entry.latents[0])[0] for entry in some]
            weights = [weights_of(replace(entry, weight=1.0), store, 0) for entry in some]
            yield _batch(latents, texts, [entry.name for entry in some], weights)


def joined(texts: Sequence[Text]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """txt (B, L, D) and pooled (B, D2) of encoded captions, and the mask (B, L) of the tokens that they have.

    Texts of unequal lengths are padded with zeros to the longest of them; without any, the mask is None.
    """
    txt, lengths = pad_sequence([text.t5 for text in texts], batch_first=True), [len(text.t5) for text in texts]
    mask = None
    if min(lengths) < max(lengths):
        mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return txt, torch.stack([text.clip for text in texts]), mask


def _batch(
    latents: Sequence[torch.Tensor], texts: Sequence[Text], names: list[str], weights: Sequence[torch.Tensor | None]
) -> Batch:
    txt, pooled, mask = joined(texts)
    captions = [text.caption for text in texts]
    return Batch(torch.stack([*latents]), txt, pooled, names, captions, mask, joined_weights(weights))


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
