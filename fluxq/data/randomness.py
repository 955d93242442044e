"""Addressed randomness: every draw has an address, and equal addresses give equal numbers.

A generator is Philox (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), whose 128-bit key is a hash
of (seed, purpose, address). Nothing is consumed and nothing is global, so a step's inputs do not depend on what ran
before it: a resumed run, a preview in between or another number of workers changes no number. Draws are made on the
host in fp64.
"""

import operator
from collections.abc import Sequence
from hashlib import blake2b

import numpy as np
import torch


def generator(seed: int, purpose: str, *address: int | str) -> np.random.Generator:
    """The generator that lives at this address. Ask again for a fresh one that starts at the same first number.

    TypeError if a part of the address is neither a whole number nor text: other types have no stable encoding.
    """
    digest = blake2b(digest_size=16, person=b"fluxq.random")
    for part in (seed, purpose, *address):
        encoded = _encode(part)
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return np.random.Generator(np.random.Philox(key=np.frombuffer(digest.digest(), "<u8").astype(np.uint64)))


def normal(shape: Sequence[int], seed: int, purpose: str, *address: int | str) -> torch.Tensor:
    """Standard normal numbers of `shape`, fp32 on the host."""
    return torch.from_numpy(generator(seed, purpose, *address).standard_normal(tuple(shape)).astype(np.float32))


def _encode(part: int | str) -> bytes:
    if isinstance(part, str):
        return b"s" + part.encode("utf-8", "surrogateescape")
    if isinstance(part, bool):
        raise TypeError(f"an address is made of whole numbers and text, not {part!r}")
    return b"i" + str(operator.index(part)).encode()
