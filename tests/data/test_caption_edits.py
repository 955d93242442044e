"""Captions as text: what is taken out leaves a sentence, replacing is done once, and what is frequent is counted."""

import pytest

from fluxq.data.caption_edits import Frequent, frequent, removed, replaced, shortened, whole_sentences


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("1girl, red hair, glasses, smile", "1girl, smile"),
        ("Red  Hair, a dog", "a dog"),
        ("a dog, glasses", "a dog"),
        ("red hair", ""),
        ("glasses, red hair.", ""),
        ("a woman with red hair on a beach", "a woman on a beach"),
        ("a woman with red hair and glasses.", "a woman."),
        ("a woman with red hair, glasses, standing on a beach", "a woman, standing on a beach"),
        ("a woman with red hair and a blue dress", "a woman with a blue dress"),
        ("a woman with red hair, glasses, and a hat", "a woman with a hat"),
        ("a woman with a hat, the red hair, and her glasses", "a woman with a hat"),
        ("a man with blue eyes and glasses on a beach", "a man with blue eyes on a beach"),
        ("a hat, red hair and boots", "a hat and boots"),
        ("a man wearing glasses", "a man"),
        ("a man smiling and glasses and a dog", "a man smiling and a dog"),
        ("She has red hair and blue eyes. He smiles.", "She has blue eyes. He smiles."),
        ("A dog. Red hair. A cat.", "A dog. A cat."),
        ("a man, (red hair:1.2), [glasses]", "a man"),
        ("a red hair clip", "a clip"),
        ("an red hair orange clip, a dog", "an orange clip, a dog"),
        ("redhair, sunglasses, glasses-case, red hair's end", "redhair, sunglasses, glasses-case, red hair's end"),
        ("  two  spaces ,a comma", "  two  spaces ,a comma"),
    ],
)  # fmt: skip
def test_phrases_are_taken_out_with_what_they_leave_dangling(caption, expected):
    assert removed(caption, ["red hair", "glasses"]) == expected
    assert removed(expected, ["red hair", "glasses"]) == expected


def test_the_longer_phrase_is_taken_out_first():
    assert removed("a girl with long red hair, a dog", ["hair", "long red hair"]) == "a girl, a dog"
    assert removed("(: a dog :)", [":)", "(:"]) == "a dog"


def test_replacing_twice_is_replacing_once():
    once = replaced("A Man and the man's  dog, man-made", "man", "zqx man")
    assert once == "A zqx man and the man's  dog, man-made"
    assert replaced(once, "man", "zqx man") == once
    assert replaced("a b c", "a  B", r"\1") == r"\1 c"


def test_sentences_clauses_or_words_fit():
    text = "A dog runs. It is red, and old. The end."
    assert [shortened(text, n) for n in (10, 8, 7, 3, 2)] == [
        "A dog runs. It is red, and old. The end.",
        "A dog runs. It is red, and old.",
        "A dog runs.",
        "A dog runs.",
        "A dog",
    ]  # fmt: skip
    assert shortened("a dog, a cat, a bird and a fish", 6) == "a dog, a cat"
    assert whole_sentences("A dog. A cat.A 3.5 and a") == "A dog."
    assert whole_sentences("a dog without end") == "a dog without end"


def test_what_every_caption_has_comes_first_and_longest_first():
    captions = ["a woman with Red hair, a dog", "red hair of a woman with red hair", "red hair; the woman with a dog"]
    assert frequent(captions) == [
        Frequent("red hair", 3),
        Frequent("woman", 3),
        Frequent("woman with red hair", 2),
        Frequent("dog", 2),
    ]
    assert frequent(captions, most=1) == [Frequent("red hair", 3)]
    assert frequent(["a man's hat"]) == [Frequent("man's hat", 1)] and frequent([]) == []
