"""Captions edited as text: phrases taken out or replaced, a length kept, and what is said in most of them counted.

A phrase is matched as whole words in any case, with any white space between them. Where one is taken out, the commas,
articles and connectives that would be left dangling go too, and nothing else changes: "a woman with red hair, glasses
and a hat" without "red hair" and "glasses" is "a woman with a hat".
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

LONGEST_PHRASE = 5
"""Words of the longest phrase that `frequent` counts."""

_HOLE = "\0"  # stands where a phrase was until the text around it is mended; no caption has it
_ARTICLES = "a|an|the|his|her|its|their"
_AND = r"(?:and|or|&)"
_OPENS = rf"(?:with|wearing|has|have|having|{_ARTICLES})"  # needs something behind it
_NEXT = r"(?:and|or|on|in|at|by|with|near|under|behind|beside|against|from|for|while|who|that|is|are|sitting|standing)"
_ENDS = rf"(?=\s*(?:[.,;:!?)]|$)|\s+{_NEXT}\b)"  # the hole was a whole noun phrase, not the adjective of one
_MENDS = [
    (r"[(\[]\s*\0\s*(?::\s*[\d.]+\s*)?[)\]]", "\0"),  # (red hair:1.2)
    (rf"\0(?:\s*,?\s*(?:\b{_AND}\s+)?(?:\b(?:{_ARTICLES})\s+)?\0)+", "\0"),  # \0, \0 and a \0
    (rf",\s*(?:(?:{_ARTICLES})\s+)?\0\s*(,?\s+{_AND}\b)", r"\1"),  # a hat, \0 and boots
    (rf"(^|[.!?;]\s+|\b(?:with|wearing|has|have|having|in|of|by)\s+)(?:(?:{_ARTICLES})\s+)?\0\s*,?\s+{_AND}\s+", r"\1"),
    (rf"\s*,?\s+{_AND}\s+(?:(?:{_ARTICLES})\s+)?\0{_ENDS}", "\0"),  # a hat and \0 on a beach
    (rf"(?:\b{_OPENS}\s+)+\0{_ENDS}", "\0"),  # a woman with \0 on a beach
    (r"(^|[.!?;])\s*\0\s*[.,!?;](?=\s|$)", r"\1"),  # a sentence or the first tag
    (r",\s*\0\s*(?=[,.;:!?]|$)", ""),  # a tag
    (r"\s*\0\s*(?=[,.;:!?)]|$)", ""),
    (r"\s*\0\s*", " "),
]
"""What is done to a text with holes, in this order."""
_STOPS = """
a an the and or but of in on at by with to for from as is are was be it its this that there his her their he she they
who which while into over under
"""
_STOP = frozenset(_STOPS.split())
"""Words that no counted phrase begins or ends with."""


def phrase_pattern(phrase: str) -> re.Pattern[str]:
    """Matches `phrase` as whole words: not "art" in "party", "art-deco" or "art's"."""
    words = r"\s+".join(map(re.escape, phrase.split()))
    return re.compile(rf"(?<![\w-]){words}(?![\w-]|['’]\w)", re.IGNORECASE)


def removed(caption: str, phrases: Sequence[str]) -> str:
    """`caption` without `phrases`, and then with single spaces; may be empty."""
    text = caption
    for phrase in sorted(phrases, key=len, reverse=True):  # "red hair" is in "long red hair"
        text = phrase_pattern(phrase).sub(_HOLE, text)
    if text == caption:
        return caption
    text = " ".join(text.split())  # or the patterns could take a time that grows with the cube of a run of spaces
    text = re.sub(r"\b(a)n?(\s+\0\s+)(?=(\w))", _article, text, flags=re.IGNORECASE)
    for pattern, repl in _MENDS:
        text = re.sub(pattern, repl, text, flags=re.IGNORECASE)
    return text.strip(" ,;")


def _article(match: re.Match[str]) -> str:
    """ "a" or "an" for the word that follows the hole."""
    return f"{match[1]}{'n' if match[3].lower() in 'aeiou' else ''}{match[2]}"


def replaced(caption: str, old: str, new: str) -> str:
    """`caption` with `new` in place of `old`. Where `new` is there already, "zqx" in "zqx man", it stays as it is."""
    pattern = phrase_pattern(old)
    if not pattern.search(new):
        return pattern.sub(lambda _: new, caption)
    either = re.compile(f"{phrase_pattern(new).pattern}|{pattern.pattern}", re.IGNORECASE)
    return either.sub(lambda _: new, caption)


def shortened(caption: str, max_words: int) -> str:
    """The whole sentences of `caption` that have at most so many words together; if the first has more, its clauses
    that have, else its words.
    """
    if len(caption.split()) <= max_words:
        return caption
    for end in (r"(?<=[.!?])\s+", r",\s+"):
        ends = [match.start() for match in re.finditer(end, caption)]
        fitting = [caption[:at] for at in ends if len(caption[:at].split()) <= max_words]
        if fitting:
            return fitting[-1].rstrip(" ,;:")
    return " ".join(caption.split()[:max_words]).rstrip(" ,;:")


def whole_sentences(caption: str) -> str:
    """`caption` without a last sentence that does not end, unless that is all there is."""
    ends = [match.end() for match in re.finditer(r"[.!?](?=\s|$)", caption)]
    return caption[: ends[-1]] if ends else caption


class Frequent(NamedTuple):
    """A word or phrase, in lower case, and how many captions it is in."""

    phrase: str
    captions: int


def frequent(captions: Sequence[str], most: int = 50) -> list[Frequent]:
    """The words and phrases that most captions have, those of every caption first, then longer ones first.

    Phrases do not cross punctuation. What is in one caption of several is left out, and so is a part of a phrase that
    is in no more captions than the phrase.
    """
    clauses = [[_words(clause) for clause in re.split(r"[^\w\s'’-]+", caption.lower())] for caption in captions]
    fewest = min(2, len(captions))
    counts: dict[tuple[str, ...], int] = {}
    for length in range(1, LONGEST_PHRASE + 1):  # a phrase is in no more captions than its parts
        found = Counter(
            gram
            for caption in clauses
            for gram in {gram for words in caption for gram in zip(*(words[i:] for i in range(length)), strict=False)}
            if length == 1 or (gram[1:] in counts and gram[:-1] in counts)
        )
        counts |= {gram: count for gram, count in found.items() if count >= fewest}
    shown = {gram: count for gram, count in counts.items() if gram[0] not in _STOP and gram[-1] not in _STOP}
    parts = {
        gram[start:stop]
        for gram, count in shown.items()
        for start in range(len(gram))
        for stop in range(start + 1, len(gram) + 1)
        if stop - start < len(gram) and counts[gram[start:stop]] == count
    }
    ranked = sorted((gram for gram in shown if gram not in parts), key=lambda gram: (-shown[gram], -len(gram), gram))
    return [Frequent(" ".join(gram), shown[gram]) for gram in ranked[:most]]


def _words(clause: str) -> tuple[str, ...]:
    return tuple(re.findall(r"\w+(?:['’-]\w+)*", clause))
