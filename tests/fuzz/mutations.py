"""Damage to a file: its bytes, the lengths in it, and the JSON in it, also JSON inside strings of JSON."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from random import Random
from typing import Any

RAW = "@raw@"  # stands for text that json.dumps would not write
NUMBERS = ("0", "-1", "1", "2147483648", "4294967295", "9223372036854775807", "18446744073709551616", "0.5", "1e999")
NUMBERS += ("-1e999", "NaN", "Infinity", "1" + "0" * 400, "1" * 5000)
TEXTS = (
    "",
    "../../x",
    "/etc/passwd",
    "C:\\x",
    "\x1b[2J\x07",
    "a\nb",
    "\u202egnp",
    "\ud800",
    "\0",
    "<script>",
    "x" * 5000,
)
TEXTS += ("U8", "F4", "F32", "BF16", "weight", "nf4", ".*.*.*.*a", "(a+)+$")
DEEP = ("[" * 100_000 + "]" * 100_000, '{"a":' * 50_000 + "1" + "}" * 50_000, "[" * 100_000)
VALUES = (*NUMBERS, *map(json.dumps, TEXTS), *DEEP, "null", "true", "[]", "{}", "[[]]", '{"a": {}}', "[1, 2]", "x", "")
SIZES = (0, 1, 7, 255, 1 << 15, (1 << 16) - 1, (1 << 31) - 1, (1 << 32) - 1, 1 << 40, (1 << 63) - 1, (1 << 64) - 1)


def damaged(data: bytes, rng: Random, joined: Callable[[bytes, Random], bytes] | None) -> bytes:
    """`data` after one to three kinds of damage; `joined` damages the JSON in it."""
    kinds = [flipped, cut, spliced, resized, *([joined] * 8 if joined else [])]
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        data = rng.choice(kinds)(data, rng)
    return data


def flipped(data: bytes, rng: Random) -> bytes:
    """Up to 8 bytes changed, half of the time near the beginning, where headers are."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 8) if data else 0):
        changed[_place(changed, rng)] = rng.choice((0, 0x20, 0x7F, 0x80, 0xFF, rng.randint(0, 255)))
    return bytes(changed)


def cut(data: bytes, rng: Random) -> bytes:
    return data[: _place(data, rng)]


def spliced(data: bytes, rng: Random) -> bytes:
    """A piece taken out, put in twice, or put in somewhere else."""
    start = _place(data, rng)
    piece, to = data[start : start + rng.choice((1, 4, 8, 100, 5000))], _place(data, rng)
    return rng.choice((data[:start] + data[start + len(piece) :], data[:to] + piece + data[to:], data + piece))


def resized(data: bytes, rng: Random) -> bytes:
    """A number of 2, 4 or 8 bytes, in either order, replaced by an extreme one."""
    code = rng.choice(("<H", "<I", "<Q", ">H", ">I", ">Q"))
    size, at = struct.calcsize(code), _place(data, rng)
    return data[:at] + struct.pack(code, rng.choice(SIZES) & (256**size - 1)) + data[at + size :]


def as_json(data: bytes, rng: Random) -> bytes:
    """`data`, which is JSON, with values replaced, removed, renamed or repeated."""
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        return data
    raw: list[str] = []
    text = json.dumps(_changed(content, rng, raw))
    for value in raw:
        text = text.replace(f'"{RAW}"', value, 1)
    if rng.random() < 0.1:
        text = text.replace(",", ', "metadata": 1,', 1)
    return text.encode(errors="surrogatepass")


def as_lines(data: bytes, rng: Random) -> bytes:
    """`data`, which has a JSON object per line, with one of them changed."""
    lines = data.split(b"\n")
    at = rng.randrange(len(lines))
    lines[at] = as_json(lines[at], rng)
    return b"\n".join(lines)


def as_safetensors(data: bytes, rng: Random) -> bytes:
    """`data`, which is a safetensors file, with its header changed; the tensors stay, and their places."""
    length = min(int.from_bytes(data[:8], "little"), len(data))
    header = as_json(data[8 : 8 + length], rng)
    header += b" " * (max(0, length - len(header)) if rng.random() < 0.5 else -len(header) % 8)
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


def as_text(data: bytes, rng: Random) -> bytes:
    """`data`, which is text, with a word replaced or put in."""
    words = data.split(b" ")
    at, word = rng.randrange(len(words)), rng.choice(VALUES).encode(errors="surrogatepass")
    return b" ".join([*words[:at], word, *words[at + rng.choice((0, 1)) :]])


def _place(data: bytes, rng: Random) -> int:
    return rng.randrange(min(len(data), 400) if rng.random() < 0.5 else len(data)) if data else 0


def _changed(content: Any, rng: Random, raw: list[str]) -> Any:
    """`content` with one change at a random depth."""
    inner = content
    if isinstance(content, str) and content[:1] in ("{", "["):
        try:
            inner = json.loads(content)
        except (ValueError, RecursionError):
            return _replaced(rng, raw)
        own: list[str] = []
        text = json.dumps(_changed(inner, rng, own))
        for value in own:
            text = text.replace(f'"{RAW}"', value, 1)
        return text
    if not isinstance(inner, dict | list) or not inner or rng.random() < 0.15:
        return _replaced(rng, raw)
    keys = list(inner) if isinstance(inner, dict) else list(range(len(inner)))
    key = rng.choice(keys)
    what = rng.random()
    if what < 0.1:
        return (
            {k: v for k, v in inner.items() if k != key} if isinstance(inner, dict) else inner[:key] + inner[key + 1 :]
        )
    if what < 0.2 and isinstance(inner, dict):
        return {rng.choice((*TEXTS, *keys)) if k == key else k: v for k, v in inner.items()}
    if isinstance(inner, dict):
        return inner | {key: _changed(inner[key], rng, raw)}
    return [*inner[:key], _changed(inner[key], rng, raw), *inner[key + 1 :]]


def _replaced(rng: Random, raw: list[str]) -> str:
    raw.append(rng.choice(VALUES))
    return RAW
