"""Addressed random numbers: every draw has an address, and equal addresses give equal numbers.

Each generator is a Philox (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") whose 128-bit key is a
hash of (seed, purpose, address). There is no global state, so a step's inputs do not depend on what ran before it:
resuming, previews and the number of workers change no number. Numbers are drawn on the CPU in fp64.
"""

import operator
from collections.abc import Sequence
from hashlib import blake2b

import numpy as np
import torch


def generator(seed: int, purpose: str, *address: int | str) -> np.random.Generator:
    """A new generator for this address. Every call returns one that starts at the same first number.

    Raises TypeError if a part of the address is neither an integer nor a string: other types have no stable encoding.
    """
    digest = blake2b(digest_size=16, person=b"fluxq.random")
    for part in (seed, purpose, *address):
        encoded = _encode(part)
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return np.random.Generator(np.random.Philox(key=np.frombuffer(digest.digest(), "<u8").astype(np.uint64)))


def normal(shape: Sequence[int], seed: int, purpose: str, *address: int | str) -> torch.Tensor:
    """Standard normal numbers of `shape`, fp32 on the CPU."""
    return torch.from_numpy(generator(seed, purpose, *address).standard_normal(tuple(shape)).astype(np.float32))


def _encode(part: int | str) -> bytes:
    if isinstance(part, str):
        return b"s" + part.encode("utf-8", "surrogateescape")
    if isinstance(part, bool):
        raise TypeError(f"an address consists of integers and strings, not {part!r}")
    return b"i" + str(operator.index(part)).encode()
