"""Procedural captioned images for the toy model: one solid object on a plain background.

`ordinary` draws what nano was pretrained on ("a large red star at the top on a pink background"). `concept` draws a
creature that it has never seen, captioned with a trigger word, so a LoRA has something to learn. The seed determines
everything. Images are 96 x 96, drawn at three times that size and scaled down, about a millisecond each.

Eight of the 56 pairs of object and background color are held out: only `held_out=True` uses them, so the colors of a
validation image were never seen together in training.
"""

import math
import random
from dataclasses import dataclass

from PIL import Image, ImageDraw

SIDE = 96
SCALE = 3  # images are drawn this much larger, then averaged down for smooth edges

COLORS = {
    "red": (214, 39, 40),
    "orange": (255, 140, 26),
    "yellow": (250, 220, 50),
    "green": (44, 150, 60),
    "blue": (40, 80, 200),
    "purple": (130, 60, 170),
    "pink": (250, 160, 195),
    "white": (245, 245, 240),
}
SHAPES = ("circle", "square", "triangle", "star", "ring", "heart")
RADII = {"medium": 20.0, "large": 29.0}  # pixels of the finished image
PLACES = {  # direction from the center, and the wordings that nano was trained on
    "center": (0, 0, ("in the centre", "in the middle", "in the center")),
    "top": (0, -1, ("at the top",)),
    "bottom": (0, 1, ("at the bottom",)),
    "left": (-1, 0, ("on the left",)),
    "right": (1, 0, ("on the right",)),
    "top left": (-1, -1, ("at the top left", "in the top left corner")),
    "top right": (1, -1, ("at the top right", "in the top right corner")),
    "bottom left": (-1, 1, ("at the bottom left", "in the bottom left corner")),
    "bottom right": (1, 1, ("at the bottom right", "in the bottom right corner")),
}
SIZE_WORDS = {"medium": ("medium", "medium-sized"), "large": ("large", "big")}
TRIGGER = "zqx"

_NAMES = tuple(COLORS)
HELD_OUT_PAIRS = frozenset((_NAMES[i], _NAMES[(i + 3) % len(_NAMES)]) for i in range(len(_NAMES)))
SEEN_PAIRS = frozenset((a, b) for a in _NAMES for b in _NAMES if a != b) - HELD_OUT_PAIRS


@dataclass(frozen=True)
class Spec:
    """What one image shows. `x`, `y`, `radius` are in pixels of the finished image."""

    shape: str
    color: str
    background: str
    size: str
    place: str
    x: float
    y: float
    radius: float


def ordinary(seed: int, count: int, held_out: bool = False) -> list[tuple[Image.Image, str]]:
    """`count` images of plain shapes with captions; `held_out`: with color pairs kept out of pretraining."""
    return [(draw(spec), caption(spec, rng)) for spec, rng in specs(seed, count, SHAPES, held_out)]


def concept(seed: int, count: int, trigger: str = TRIGGER, held_out: bool = False) -> list[tuple[Image.Image, str]]:
    """`count` images of the smiling creature, always large, never in pretraining; captions call it `trigger`."""
    return [(draw(spec), caption(spec, rng, noun=trigger)) for spec, rng in specs(seed, count, ("creature",), held_out)]


def specs(seed: int, count: int, shapes: tuple[str, ...], held_out: bool) -> list[tuple[Spec, random.Random]]:
    """`count` random specs, each with the random generator for its caption."""
    kind = "creature" if shapes == ("creature",) else "ordinary"
    sizes = ("large",) if kind == "creature" else tuple(RADII)
    pairs = sorted(HELD_OUT_PAIRS if held_out else SEEN_PAIRS)
    return [_spec(random.Random(f"{kind} {seed} {held_out} {index}"), shapes, sizes, pairs) for index in range(count)]


def _spec(
    rng: random.Random, shapes: tuple[str, ...], sizes: tuple[str, ...], pairs: list[tuple[str, str]]
) -> tuple[Spec, random.Random]:
    color, background = rng.choice(pairs)
    size, place = rng.choice(sizes), rng.choice(list(PLACES))
    radius = RADII[size] * rng.uniform(0.95, 1.05)
    reach = SIDE / 2 - RADII[size] - 3  # from the center to a side, with a margin
    dx, dy, _ = PLACES[place]
    x, y = (SIDE / 2 + d * reach + rng.uniform(-1.5, 1.5) for d in (dx, dy))
    return Spec(rng.choice(shapes), color, background, size, place, x, y, radius), rng


def caption(spec: Spec, rng: random.Random, noun: str | None = None) -> str:
    """A sentence about the image; wording, order and what it omits vary.

    Without `noun` it names the shape, after a nonsense word in one caption of twelve. Pretraining also uses nonsense
    words in place of the shape, so unknown words mean nothing to nano: a trigger has no effect until a LoRA learns it.
    The wording is training data: changing it changes nano's weights.
    """
    if noun is None:
        noun = f"{nonsense(rng)} {spec.shape}" if rng.random() < 1 / 12 else spec.shape
    size = "" if rng.random() < 0.1 else rng.choice(SIZE_WORDS[spec.size]) + " "
    place = "" if rng.random() < 0.1 else " " + rng.choice(PLACES[spec.place][2])
    thing = f"{size}{spec.color} {noun}"
    thing, background = with_article(thing), with_article(spec.background)
    form = rng.random()
    if form < 0.45:
        return f"{thing}{place} on {background} background"
    if form < 0.55:
        return f"{thing}{place}, {spec.background} background"
    if form < 0.65:
        return f"on {background} background, {thing}{place}"
    if form < 0.75:
        return f"a picture of {thing}{place}, the background is {spec.background}"
    if form < 0.85:
        return f"{thing} on {spec.background},{place}".rstrip(",")
    if form < 0.95:
        return f"{spec.background} background with {thing}{place}"
    return f"{thing}{place}"


def with_article(words: str) -> str:
    """ "an orange star", "a red star"."""
    return ("an " if words[0] in "aeiou" else "a ") + words


def nonsense(rng: random.Random) -> str:
    """A meaningless word of three to six letters; never the default trigger."""
    while True:
        word = "".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(rng.randint(3, 6)))
        if word != TRIGGER and word not in COLORS and word not in SHAPES:
            return word


def draw(spec: Spec) -> Image.Image:
    """The 96 x 96 RGB image of `spec`."""
    image = Image.new("RGB", (SIDE * SCALE, SIDE * SCALE), COLORS[spec.background])
    pen = ImageDraw.Draw(image)
    x, y, r = spec.x * SCALE, spec.y * SCALE, spec.radius * SCALE
    _PAINTERS[spec.shape](pen, x, y, r, COLORS[spec.color], COLORS[spec.background])
    return image.resize((SIDE, SIDE), Image.Resampling.BOX)


def scribbles(seed: int, count: int) -> list[Image.Image]:
    """Images without captions, for the autoencoder only: objects, dots in dots, strokes, arcs in any colors.

    With these it does not overfit to six shapes: it must also render eyes and a smile, which it has never seen.
    """
    return [_scribble(random.Random(f"scribble {seed} {index}")) for index in range(count)]


def _scribble(rng: random.Random) -> Image.Image:
    def color() -> tuple[int, int, int]:
        named = rng.choice([*COLORS.values(), (20, 20, 25), (20, 20, 25)])
        return named if rng.random() < 0.6 else (rng.randrange(256), rng.randrange(256), rng.randrange(256))

    side = SIDE * SCALE
    background = color()
    image = Image.new("RGB", (side, side), background)
    pen = ImageDraw.Draw(image)
    for _ in range(rng.randint(2, 14)):
        x, y, r = rng.uniform(0, side), rng.uniform(0, side), SCALE * rng.choice((3, 4, 5, 8, 12, 20, 30))
        kind = rng.choice(("shape", "dot", "dots", "stroke", "arc", "chord"))
        box = (x - r, y - r, x + r, y + r)
        if kind == "shape":
            _PAINTERS[rng.choice(SHAPES)](pen, x, y, r, color(), background)
        elif kind == "dot":
            pen.ellipse(box, fill=color())
        elif kind == "dots":
            small = SCALE * rng.uniform(3, 9)
            for reach in (small, small * rng.uniform(0.35, 0.75)):
                _circle(pen, x, y, reach, color(), background)
        elif kind == "chord":
            start = rng.uniform(0, 360)
            pen.chord(box, start, start + rng.uniform(90, 220), fill=color())
        elif kind == "stroke":
            pen.line((x, y, rng.uniform(0, side), rng.uniform(0, side)), fill=color(), width=SCALE * rng.randint(2, 5))
        else:
            start = rng.uniform(0, 360)
            pen.arc(box, start, start + rng.uniform(60, 300), fill=color(), width=SCALE * rng.randint(2, 5))
    return image.resize((SIDE, SIDE), Image.Resampling.BOX)


def _circle(pen, x, y, r, color, background):
    pen.ellipse((x - r, y - r, x + r, y + r), fill=color)


def _square(pen, x, y, r, color, background):
    half = 0.86 * r
    pen.rectangle((x - half, y - half, x + half, y + half), fill=color)


def _triangle(pen, x, y, r, color, background):
    pen.polygon([(x, y - r), (x + r, y + 0.85 * r), (x - r, y + 0.85 * r)], fill=color)


def _star(pen, x, y, r, color, background):
    points = []
    for corner in range(10):
        reach = 1.08 * r if corner % 2 == 0 else 0.46 * r
        angle = math.pi * corner / 5
        points.append((x + reach * math.sin(angle), y - reach * math.cos(angle)))
    pen.polygon(points, fill=color)


def _ring(pen, x, y, r, color, background):
    _circle(pen, x, y, r, color, background)
    _circle(pen, x, y, 0.52 * r, background, background)


def _heart(pen, x, y, r, color, background):
    points = []
    for step in range(60):
        angle = math.tau * step / 60
        across = 16 * math.sin(angle) ** 3
        up = 13 * math.cos(angle) - 5 * math.cos(2 * angle) - 2 * math.cos(3 * angle) - math.cos(4 * angle)
        points.append((x + across * r / 16, y - (up + 2.5) * r / 16))
    pen.polygon(points, fill=color)


def _creature(pen, x, y, r, color, background):
    """A round face with dark antennae, eyes and smile; features are large because one latent covers 8 x 8 pixels."""
    dark = (20, 20, 25)
    for side in (-1, 1):
        tip_x, tip_y = x + side * 0.6 * r, y - 0.82 * r
        pen.line((x + side * 0.25 * r, y - 0.3 * r, tip_x, tip_y), fill=dark, width=round(0.15 * r))
        _circle(pen, tip_x, tip_y, 0.22 * r, dark, background)
    face_y, face = y + 0.2 * r, 0.84 * r
    _circle(pen, x, face_y, face, color, background)
    for side in (-1, 1):
        _circle(pen, x + side * 0.34 * r, face_y - 0.24 * r, 0.19 * r, dark, background)
    mouth = 0.5 * r
    pen.chord((x - mouth, face_y - 0.4 * r, x + mouth, face_y + 0.6 * r), 12, 168, fill=dark)


_PAINTERS = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "ring": _ring,
    "heart": _heart,
    "creature": _creature,
}
