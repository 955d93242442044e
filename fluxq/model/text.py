"""Captions to what the transformer reads: T5's token states and CLIP's pooled vector.

The encoders are transformers' own modules. Padding is attended to, as FLUX.1 was trained; T5 runs in bf16 or fp32,
never fp16, where its feed-forward layers overflow.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

Tokenize = Callable[[str], list[int]]
"""A caption to its token ids, without special tokens, without padding, of any length."""

CLIP_LENGTH = 77


class Encoded(NamedTuple):
    """t5 (B, L, D) and clip (B, D2) in the encoders' dtype; per caption the number of T5 tokens it has, and whether
    it was cut.
    """

    t5: Tensor
    clip: Tensor
    tokens: list[int]
    truncated: list[bool]


@dataclass(frozen=True)
class TextEncoders:
    """T5's encoder and CLIP-L's text model with their tokenizers, at a T5 length of `length` tokens.

    clip_ids are CLIP's (begin, end) tokens; padding is the end token. T5 ends with 1 and pads with 0.
    """

    t5: nn.Module
    clip: nn.Module
    t5_tokenize: Tokenize
    clip_tokenize: Tokenize
    clip_ids: tuple[int, int]
    length: int

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> Encoded:
        t5_tokens = [self.t5_tokenize(caption) for caption in captions]
        t5_ids = [[*ids[: self.length - 1], 1] for ids in t5_tokens]
        t5_ids = [ids + [0] * (self.length - len(ids)) for ids in t5_ids]
        begin, end = self.clip_ids
        clip_ids = [[begin, *self.clip_tokenize(caption)[: CLIP_LENGTH - 2], end] for caption in captions]
        ends = torch.tensor([len(ids) - 1 for ids in clip_ids])
        clip_ids = [ids + [end] * (CLIP_LENGTH - len(ids)) for ids in clip_ids]

        device = next(self.t5.parameters()).device
        t5 = self.t5(torch.tensor(t5_ids, device=device)).last_hidden_state
        states = self.clip(torch.tensor(clip_ids, device=device)).last_hidden_state
        counts = [len(ids) + 1 for ids in t5_tokens]
        return Encoded(t5, states[torch.arange(len(captions)), ends], counts, [n > self.length for n in counts])
