"""Extract T5's tokenizer from a GGUF T5, as the spiece.model that it was made from.

The values of `tokenizer.ggml.*` are read and checked. No tensors are read.
"""

import re
import struct
from pathlib import Path
from typing import Any, NoReturn

from .checkpoint.files import refuse
from .checkpoint.gguf import read_gguf_values

GGUF_T5 = ("t5", "t5encoder")  # the architectures whose files have T5's tokenizer
GGUF_KEYS = tuple(
    f"tokenizer.ggml.{name}"
    for name in (
        "model",
        "tokens",
        "scores",
        "token_type",
        "precompiled_charsmap",
        "add_space_prefix",
        "remove_extra_whitespaces",
        "padding_token_id",
        "eos_token_id",
        "unknown_token_id",
    )
)
UNKNOWN, UNUSED, PIECE_TYPES = 2, 5, range(1, 7)  # GGUF's token types, the same as SentencePiece's
MAX_SCORE = 1e9  # of a piece; padding has -10,000


def read_gguf_tokenizer(path: Path) -> dict[str, Any]:
    """The checked values of `tokenizer.ggml.*`, keyed by the last part of their names; padding pieces are left out.

    Raises WrongRequest unless the file is a GGUF T5 with a tokenizer.
    """
    header = read_gguf_values(path, ("general.architecture", *GGUF_KEYS))
    architecture = header.pop("general.architecture", None)
    if architecture not in GGUF_T5:
        _refuse(path, "it is not a GGUF T5")
    values: dict[str, Any] = {key.removeprefix("tokenizer.ggml."): value for key, value in header.items()}
    if wrong := _wrong_in_gguf(values):
        _refuse(path, wrong)
    tokens, types = values["tokens"], values["token_type"]
    count = len(tokens)
    while count > 3 and (types[count - 1] == UNUSED or re.fullmatch(r"<extra_id_\d+>", tokens[count - 1])):
        count -= 1  # files pad to the number of rows of the embedding, some with the sentinels
    return values | {key: values[key][:count] for key in ("tokens", "scores", "token_type")}


def spiece_of(values: dict[str, Any]) -> bytes:
    """A spiece.model that gives the same ids as the one these GGUF values were made from.

    It is a protocol buffer (sentencepiece_model.proto). The tokenizers library could use the values directly, but it
    normalizes some letters with combining marks differently from SentencePiece.
    """
    rows = zip(values["tokens"], values["scores"], values["token_type"], strict=True)
    pieces = [
        _field(1, token.encode()) + b"\x15" + struct.pack("<f", score) + _field(3, kind) for token, score, kind in rows
    ]
    charsmap = bytes(byte & 255 for byte in values.get("precompiled_charsmap", ()))
    trainer = _field(3, 1) + _field(40, 2)  # a unigram model; the id of the unknown token
    normalizer = _field(2, charsmap)
    normalizer += _field(3, int(bool(values.get("add_space_prefix", True))))
    normalizer += _field(4, int(bool(values.get("remove_extra_whitespaces", True))))
    return b"".join(_field(1, piece) for piece in pieces) + _field(2, trainer) + _field(3, normalizer)


def _wrong_in_gguf(values: dict[str, Any]) -> str | None:
    """Why these values are not a T5 tokenizer; None if they are one."""
    if values.get("model") != "t5":
        return "it has no T5 tokenizer"
    tokens, scores, types = (values.get(key) for key in ("tokens", "scores", "token_type"))
    if not (isinstance(tokens, list) and isinstance(scores, tuple) and isinstance(types, tuple)):
        return "its tokens, scores or token types are missing"
    if not len(tokens) == len(scores) == len(types):
        return f"it has {len(tokens):,} tokens, {len(scores):,} scores and {len(types):,} token types"
    if not all(isinstance(score, float) and abs(score) <= MAX_SCORE for score in scores):
        return "a score is not a number"
    if not all(isinstance(kind, int) and kind in PIECE_TYPES for kind in types):
        return "a token has an unknown type"
    ids = [values.get(f"{key}_token_id", i) for i, key in enumerate(("padding", "eos", "unknown"))]
    if tokens[:2] != ["<pad>", "</s>"] or ids != [0, 1, 2] or types[2:3] != (UNKNOWN,):
        return "its ids 0, 1 and 2 are not <pad>, </s> and the unknown token"
    if not isinstance(charsmap := values.get("precompiled_charsmap", ()), tuple) or not all(
        isinstance(byte, int) and -128 <= byte < 256 for byte in charsmap
    ):
        return "its precompiled charsmap is not bytes"
    return None


def _refuse(path: Path, wrong: str) -> NoReturn:
    refuse(path, f"is not a usable T5 tokenizer ({wrong})", "use spiece.model")


def _field(number: int, value: int | bytes) -> bytes:
    """A field of a protocol buffer."""
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    low = bytearray()
    while value > 127:
        low.append(value & 127 | 128)
        value >>= 7
    return bytes([*low, value])
