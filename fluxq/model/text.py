"""Encodes captions for the transformer: T5's token states and CLIP's pooled vector.

Padding is attended to, as in FLUX.1's training, or it is masked, as by sd-scripts' apply_t5_attn_mask: then captions
have as many states as tokens. T5 runs in bf16 or fp32, never in fp16: its feed-forward layers would overflow.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .text_layers import BlockProgress, ClipEncoder, T5Encoder

Tokenize = Callable[[str], list[int]]
"""A caption -> its token ids, any number of them, without special tokens and padding."""

CLIP_LENGTH = 77
STATES_BYTES = {"cpu": 128 << 20, "cuda": 512 << 20}
"""Bytes of T5 states that one call may return. Each call reads the file once, so more captions per call read it less
often. On a CPU, reading is fast next to computing, and smaller calls lose less when interrupted."""


class Encoded(NamedTuple):
    """t5 (B, L, D), masked (L, D) for each caption, and clip (B, D2), in the encoders' dtype.

    Per caption: tokens, its length in T5 tokens; truncated, whether it was cut to L of them; clip_truncated, whether it
    was cut to CLIP_LENGTH CLIP tokens.
    """

    t5: Tensor | list[Tensor]
    clip: Tensor
    tokens: list[int]
    truncated: list[bool]
    clip_truncated: list[bool]


@dataclass(frozen=True)
class TextEncoders:
    """T5's encoder and CLIP-L's text model with their tokenizers. T5 captions have `length` tokens.

    clip_ids: CLIP's (begin, end) tokens; it pads with the end token. T5 ends with 1 and pads with 0.
    """

    t5: T5Encoder
    clip: ClipEncoder
    t5_tokenize: Tokenize
    clip_tokenize: Tokenize
    clip_ids: tuple[int, int]
    length: int
    group: int
    """The best number of captions per call of `encode`: each call reads both models' files once."""
    masked: bool = False
    """Whether T5 is without padding, which masks it; otherwise captions are padded to `length`."""

    @torch.no_grad()
    def encode(self, captions: Sequence[str], tick: BlockProgress = lambda done, total: None) -> Encoded:
        """Encode captions; `tick` is called after each T5 block."""
        ids, ends, clip_truncated = clip_tokens(captions, self.clip_tokenize, self.clip_ids)
        clip = self.clip(ids, ends)

        t5_tokens = [self.t5_tokenize(caption) for caption in captions]
        t5_ids = [[*ids[: self.length - 1], 1] for ids in t5_tokens]
        lengths = [len(ids) for ids in t5_ids] if self.masked else None
        longest = max(lengths or [self.length])
        t5 = self.t5(torch.tensor([ids + [0] * (longest - len(ids)) for ids in t5_ids]), tick, lengths)
        if lengths:
            t5 = [states[:n] for states, n in zip(t5, lengths, strict=True)]
        counts = [len(ids) + 1 for ids in t5_tokens]
        return Encoded(t5, clip, counts, [n > self.length for n in counts], clip_truncated)


def clip_tokens(
    captions: Sequence[str], tokenize: Tokenize, special: tuple[int, int]
) -> tuple[Tensor, Tensor, list[bool]]:
    """CLIP's token ids (B, CLIP_LENGTH), the index of each end token (B,), and whether each caption was cut.

    special: the (begin, end) tokens; the end token is also the padding.
    """
    begin, end = special
    tokens = [tokenize(caption) for caption in captions]
    ids = [[begin, *own[: CLIP_LENGTH - 2], end] for own in tokens]
    ends = torch.tensor([own.index(end) for own in ids])
    padded = torch.tensor([own + [end] * (CLIP_LENGTH - len(own)) for own in ids])
    return padded, ends, [len(own) + 2 > CLIP_LENGTH for own in tokens]
