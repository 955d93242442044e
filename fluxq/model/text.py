"""Captions to what the transformer reads: T5's token states and CLIP's pooled vector.

Padding is attended to, as FLUX.1 was trained; T5 runs in bf16 or fp32, never fp16, where its feed-forward layers
overflow.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .text_layers import ClipEncoder, T5Encoder, Tick

Tokenize = Callable[[str], list[int]]
"""A caption to its token ids, without special tokens, without padding, of any length."""

CLIP_LENGTH = 77
STATES_BYTES = {"cpu": 128 << 20, "cuda": 512 << 20}
"""T5 states of the captions of one call. More captions share one reading of the file; on a CPU that is short beside the
computing, and an interrupt should lose little."""


class Encoded(NamedTuple):
    """t5 (B, L, D) and clip (B, D2) in the encoders' dtype; per caption the number of T5 tokens it has, whether it was
    cut to L of them, and whether it was cut to CLIP_LENGTH of CLIP's.
    """

    t5: Tensor
    clip: Tensor
    tokens: list[int]
    truncated: list[bool]
    clip_truncated: list[bool]


@dataclass(frozen=True)
class TextEncoders:
    """T5's encoder and CLIP-L's text model with their tokenizers, at a T5 length of `length` tokens.

    clip_ids are CLIP's (begin, end) tokens; padding is the end token. T5 ends with 1 and pads with 0.
    """

    t5: T5Encoder
    clip: ClipEncoder
    t5_tokenize: Tokenize
    clip_tokenize: Tokenize
    clip_ids: tuple[int, int]
    length: int
    group: int
    """How many captions are best given to one `encode`: each call reads both models' files once."""

    @torch.no_grad()
    def encode(self, captions: Sequence[str], tick: Tick = lambda done, total: None) -> Encoded:
        """`tick` is called after each of T5's blocks."""
        ids, ends, clip_truncated = clip_tokens(captions, self.clip_tokenize, self.clip_ids)
        clip = self.clip(ids, ends)

        t5_tokens = [self.t5_tokenize(caption) for caption in captions]
        t5_ids = [[*ids[: self.length - 1], 1] for ids in t5_tokens]
        t5 = self.t5(torch.tensor([ids + [0] * (self.length - len(ids)) for ids in t5_ids]), tick)
        counts = [len(ids) + 1 for ids in t5_tokens]
        return Encoded(t5, clip, counts, [n > self.length for n in counts], clip_truncated)


def clip_tokens(
    captions: Sequence[str], tokenize: Tokenize, special: tuple[int, int]
) -> tuple[Tensor, Tensor, list[bool]]:
    """CLIP's token ids (B, CLIP_LENGTH), the places of their end tokens (B,), and whether captions were cut to them.

    special: the (begin, end) tokens; padding is the end token.
    """
    begin, end = special
    tokens = [tokenize(caption) for caption in captions]
    ids = [[begin, *own[: CLIP_LENGTH - 2], end] for own in tokens]
    ends = torch.tensor([own.index(end) for own in ids])
    padded = torch.tensor([own + [end] * (CLIP_LENGTH - len(own)) for own in ids])
    return padded, ends, [len(own) + 2 > CLIP_LENGTH for own in tokens]
