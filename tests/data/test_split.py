"""Held-out images are chosen by what is in them: stable, together with their copies, never none and never all."""

from __future__ import annotations

from hashlib import blake2b
from pathlib import Path

import numpy as np
import pytest

from fluxq.data.looks import AREAS, Look
from fluxq.data.split import held_out_images
from fluxq.errors import WrongRequest


def hashed(number: int) -> str:
    return blake2b(b"%d" % number, digest_size=16).hexdigest()


def place(number: int) -> float:
    return int(hashed(number), 16) / 16**32


def look(number: int, brighter: int = 0) -> Look:
    colors = np.random.default_rng(number).integers(0, 250, AREAS) + brighter
    return Look(colors.astype(np.uint8).tobytes().hex(), 50.0, 50.0)


def split(numbers: dict[str, int], share: float = 0.25, copies: dict[str, int] | None = None, prior=()) -> set[str]:
    """The held-out of images that have these numbers; copies: images that look like those of a number, but differ."""
    hashes = {Path(name): hashed(number) for name, number in numbers.items()}
    looks = {Path(name): look(number) for name, number in numbers.items()}
    for name, number in (copies or {}).items():
        looks[Path(name)] = look(number, brighter=1)
    return {str(path) for path in held_out_images(hashes, looks, share, set(hashes) - {Path(p) for p in prior})}


MANY = {f"{number:03}.png": number for number in range(200)}


def test_a_share_of_the_images_is_held_out_whatever_they_are_called_and_however_many_there_are():
    held_out = split(MANY)
    assert len(held_out) == pytest.approx(50, abs=15)
    moved = {f"elsewhere/{number}.jpg": number for number in reversed(range(200))}
    assert {moved[name] for name in split(moved)} == {MANY[name] for name in held_out}
    fewer = {name: number for name, number in MANY.items() if number % 3}
    assert split(fewer) == held_out & fewer.keys()
    assert split(MANY, 0.1) < held_out


def test_what_looks_alike_is_on_one_side():
    """Images that differ a little, in a chain, and equal ones; whoever looks like one that is trained on is too."""
    low, high = min(range(200), key=place), max(range(200), key=place)
    assert split(MANY | {"equal.png": low}) == split(MANY) | {"equal.png"}
    near = next(number for number in range(200, 999) if place(number) < 0.2)
    assert "near.png" in split({**MANY, "near.png": near}, copies={"near.png": low})
    assert split({**MANY, "near.png": near}, copies={"near.png": high}) == split(MANY), "it changes nothing for others"
    far = next(number for number in range(200, 999) if place(number) > 0.9)
    assert split({**MANY, "near.png": far}, copies={"near.png": low}) == split(MANY) - {f"{low:03}.png"}
    assert not {"000.png", "001.png"} & split({"000.png": far, "001.png": low, "2.png": 5}, copies={"001.png": far})


def test_images_that_are_added_hold_out_none_that_was_trained_on():
    lost = 0
    for seed in range(60):
        numbers = {str(i): 1000 * seed + i for i in range(36)}
        few, more = ({name: numbers[name] for name in [*numbers][:count]} for count in (12, 36))
        before, after = split(few, 0.1), split(more, 0.1)
        assert after & few.keys() <= before
        lost += before > after & few.keys()
    assert 0 < lost < 20, "the lowest of a few, which stands for none below the share, goes back"


def test_images_that_are_all_of_one_color_and_equal_are_on_one_side():
    plain = Look("00" * AREAS, 0.0, 0.0)
    hashes = {Path("a"): hashed(1), Path("b"): hashed(1), Path("c"): hashed(2)}
    for share in (0.0001, 0.5):
        assert held_out_images(hashes, dict.fromkeys(hashes, plain), share, hashes) in (
            {Path("a"), Path("b")},
            {Path("c")},
        )


def test_one_image_is_held_out_at_least_and_one_trained_on():
    numbers = {"a": 1, "b": 2, "c": 3}
    lowest = min(numbers, key=lambda name: place(numbers[name]))
    assert split(numbers, 1e-9) == {lowest}
    highest = max(numbers, key=lambda name: place(numbers[name]))
    assert split(numbers, 1.0) == numbers.keys() - {highest}


def test_images_for_regularization_are_never_held_out():
    assert split(MANY, prior=list(MANY)[:190]) <= {*list(MANY)[190:]}
    assert len(split({"a": 1, "b": 2, "c": 3}, 1.0, prior=["a"])) == 1, "something else is left to train on"
    with pytest.raises(WrongRequest, match="leaves nothing"):
        split({"a": 1, "b": 2}, prior=["a"])


@pytest.mark.parametrize("numbers", [{"a": 1}, {"a": 1, "copy": 1}])
def test_a_split_that_leaves_nothing_is_refused(numbers):
    with pytest.raises(
        WrongRequest, match=r"--validation-split 0\.25 leaves nothing: without copies there is only one"
    ):
        split(numbers)
