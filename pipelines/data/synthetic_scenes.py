"""Generated scenes: what is in one, how it is drawn and how people would caption it. Pillow and numpy only.

A scene is two objects and how they lie to each other. Its content is nine small numbers (`Scene`); everything else
(place, exact size, shade, wording) is chance that the caller's generator decides.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from math import cos, pi, sin
from random import Random
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

KINDS = ("circle", "square", "triangle", "star", "heart", "cross", "diamond", "ring", *"0123456789")
COLOURS = {
    "red": (214, 40, 40),
    "yellow": (248, 205, 30),
    "green": (40, 140, 60),
    "turquoise": (50, 205, 205),
    "blue": (35, 75, 215),
    "purple": (140, 45, 160),
    "black": (20, 20, 20),
    "white": (252, 252, 252),
}
SIZES = {"small": 0.25, "medium": 0.35, "large": 0.47}
"""Side of an object over the side of the image."""
TEXTURES = ("plain", "striped", "dotted", "checkered")
AXES = ("left", "above")
"""How the first object lies to the second."""
BACKGROUND = (160, 160, 165)
"""Grey, a shade lighter or darker by chance. Coloured ones are learnt first and keep a small model from the objects."""

LEFT_OUT = 0.15
"""Chance that a caption leaves out one attribute of an object, or the relation."""
VAGUE = 0.13
"""Chance that a caption only mentions one object, by its kind and perhaps its colour."""
_WORDS = {
    "small": ("small", "little"),
    "large": ("large", "big"),
    "medium": ("medium", "medium sized"),
    "dotted": ("dotted", "spotted"),
    "plain": ("plain", "solid"),
}
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_OPENINGS = ("", "", "there is ", "a picture of ", "we see ", "this is ")
_RELATIONS = {
    "left": (("to the left of", "left of"), ("to the right of", "right of"), ("on its left", "on its right")),
    "above": (("above", "over"), ("below", "under"), ("above it", "below it")),
}


class Thing(NamedTuple):
    """One object, or what a caption says of one: indices into KINDS, COLOURS, SIZES, TEXTURES; -1 is not said."""

    kind: int
    colour: int
    size: int
    texture: int


class Scene(NamedTuple):
    """The first object lies to the left of or above the second."""

    axis: int
    first: Thing
    second: Thing


class Caption(NamedTuple):
    """A text and what it says: one or two things (in the scene's order where `axis` is said); -1 is not said."""

    text: str
    things: tuple[Thing, ...]
    axis: int


def draw_thing(random: Random) -> Thing:
    """A random object."""
    return Thing(*(random.randrange(len(names)) for names in (KINDS, COLOURS, SIZES, TEXTURES)))


def draw_scene(random: Random) -> Scene:
    """A random scene."""
    return Scene(random.randrange(len(AXES)), draw_thing(random), draw_thing(random))


def alter(scene: Scene, random: Random) -> Scene:
    """The scene with one attribute of one object drawn anew (which may give the same)."""
    place = random.choice(("first", "second"))
    attribute = random.choice(Thing._fields)
    value = getattr(draw_thing(random), attribute)
    return scene._replace(**{place: getattr(scene, place)._replace(**{attribute: value})})


# ---- drawing


@lru_cache(maxsize=4096)
def _outline(kind: int, side: int) -> Image.Image:
    """Mask of one glyph, L (side, side); drawn eight times larger and averaged, so that edges are smooth."""
    big = 8 * max(side, 8)
    mask = Image.new("L", (big, big))
    pen, name = ImageDraw.Draw(mask), KINDS[kind]
    if name.isdigit():
        _draw_digit(pen, name, big)
    elif name in ("circle", "ring"):
        pen.ellipse((0, 0, big - 1, big - 1), fill=255)
        if name == "ring":
            pen.ellipse((0.3 * big, 0.3 * big, 0.7 * big, 0.7 * big), fill=0)
    elif name == "heart":
        pen.ellipse((0, 0.05 * big, 0.53 * big, 0.58 * big), fill=255)
        pen.ellipse((0.47 * big, 0.05 * big, big - 1, 0.58 * big), fill=255)
        pen.polygon([(0.05 * big, 0.46 * big), (0.95 * big, 0.46 * big), (0.5 * big, 0.98 * big)], fill=255)
    else:
        pen.polygon([(x * big, y * big) for x, y in _corners(name)], fill=255)
    return mask.resize((side, side), Image.Resampling.BOX)


def _corners(name: str) -> list[tuple[float, float]]:
    """Corners of a straight-edged shape in the unit square."""
    if name == "star":
        radii = (0.52, 0.21)
        turns = [(radii[i % 2], pi * (i / 5 - 0.5)) for i in range(10)]
        return [(0.5 + r * cos(a), 0.53 + r * sin(a)) for r, a in turns]
    if name == "cross":
        low, high = 0.32, 0.68
        edge = [(low, 0), (high, 0), (high, low), (1, low), (1, high), (high, high)]
        return [*edge, (high, 1), (low, 1), (low, high), (0, high), (0, low), (low, low)]
    return {
        "square": [(0.05, 0.05), (0.95, 0.05), (0.95, 0.95), (0.05, 0.95)],
        "triangle": [(0.5, 0.03), (1, 0.95), (0, 0.95)],
        "diamond": [(0.5, 0), (0.9, 0.5), (0.5, 1), (0.1, 0.5)],
    }[name]


def _draw_digit(pen: ImageDraw.ImageDraw, digit: str, big: int) -> None:
    """A bold digit that fills the height of the mask, centred. Pillow brings the font along."""
    font = ImageFont.load_default(1.15 * big)
    bold = big // 24
    left, top, right, bottom = pen.textbbox((0, 0), digit, font=font, stroke_width=bold)
    pen.text(((big - left - right) / 2, (big - top - bottom) / 2), digit, fill=255, font=font, stroke_width=bold)


@lru_cache(maxsize=4096)
def _cloth(colour: int, texture: int, side: int) -> Image.Image:
    """The filling of an object, RGB (side, side): its colour, with a pattern in a shade four cells across."""
    paint = np.array(list(COLOURS.values())[colour], np.float32)
    shade = paint * 0.35 + (0 if paint.sum() > 380 else 255) * 0.65
    down, across = np.mgrid[0:side, 0:side] * (4 / side)
    name = TEXTURES[texture]
    if name == "striped":
        pattern = down % 1 >= 0.5
    elif name == "dotted":
        pattern = (down % 1 - 0.5) ** 2 + (across % 1 - 0.5) ** 2 < 0.1
    else:
        pattern = ((down.astype(int) + across.astype(int)) % 2 == 1) & (name == "checkered")
    return Image.fromarray(np.where(pattern[..., None], shade, paint).astype(np.uint8))


def draw(scene: Scene, size: int, random: Random) -> Image.Image:
    """The scene as RGB (size, size); places, exact sizes and the background are chance.

    Each object keeps to its half of the image, and the halves' centres differ more along the axis than across it.
    """
    image = Image.new("RGB", (size, size), tuple(channel + random.randint(-10, 10) for channel in BACKGROUND))
    for half, thing in enumerate((scene.first, scene.second)):
        share = list(SIZES.values())[thing.size] * random.uniform(0.95, 1.05)
        along = half / 2 + share / 2 + random.random() * (0.5 - share)
        across = 0.5 + random.uniform(-0.1, 0.1)
        side = max(2, round(share * size))
        x, y = (along, across) if AXES[scene.axis] == "left" else (across, along)
        corner = (round(x * size - side / 2), round(y * size - side / 2))
        image.paste(_cloth(thing.colour, thing.texture, side), corner, _outline(thing.kind, side))
    return image


# ---- captions


def _forget(thing: Thing, random: Random) -> Thing:
    """The thing with each attribute but its kind left out by chance."""
    kept = [-1 if random.random() < LEFT_OUT else value for value in thing[1:]]
    return Thing(thing.kind, *kept)


def _phrase(thing: Thing, random: Random) -> str:
    """e.g. "a big striped red circle"; what is -1 is not said."""
    tables = ((SIZES, thing.size), (TEXTURES, thing.texture), (COLOURS, thing.colour))
    words = [list(names)[index] for names, index in tables if index >= 0]
    name = KINDS[thing.kind]
    if name.isdigit():
        name = random.choice(("digit ", "number ")) + random.choice((name, _NUMBERS[int(name)]))
    return " ".join(["a", *(random.choice(_WORDS.get(word, (word,))) for word in words), name])


def _relate(axis: int, things: tuple[Thing, Thing], random: Random) -> str:
    """Both things and how they lie to each other, told from either."""
    first, second = (_phrase(thing, random) for thing in things)
    forward, backward, asides = _RELATIONS[AXES[axis]]
    form = random.randrange(4)
    if form == 0:
        return f"{first} {random.choice(forward)} {second}"
    if form == 1:
        return f"{second} {random.choice(backward)} {first}"
    if form == 2:
        return f"{second} with {first} {asides[0]}"
    return f"{first} with {second} {asides[1]}"


def describe(scene: Scene, random: Random) -> Caption:
    """A caption that is true of the scene and leaves some of it out."""
    opening = random.choice(_OPENINGS)
    if random.random() < VAGUE:
        thing = random.choice((scene.first, scene.second))
        thing = Thing(thing.kind, random.choice((-1, thing.colour)), -1, -1)
        return Caption(opening + _phrase(thing, random), (thing,), -1)
    things = (_forget(scene.first, random), _forget(scene.second, random))
    if random.random() < LEFT_OUT:
        phrases = [_phrase(thing, random) for thing in things]
        random.shuffle(phrases)
        return Caption(opening + " and ".join(phrases), things, -1)
    return Caption(opening + _relate(scene.axis, things, random), things, scene.axis)


# ---- how far anyone can get


def truth(captions: Sequence[Caption], scenes: Sequence[Scene]) -> Iterator[np.ndarray]:
    """For each caption, bool (N,): of which scenes it is true."""
    axes = np.array([scene.axis for scene in scenes])
    objects = [np.array([getattr(scene, place) for scene in scenes]) for place in ("first", "second")]

    def fits(thing: Thing, place: int) -> np.ndarray:
        said = np.array(thing)
        return np.asarray(((objects[place] == said) | (said < 0)).all(axis=1))

    for caption in captions:
        one, two = caption.things[0], caption.things[-1]
        if len(caption.things) == 1:
            yield fits(one, 0) | fits(one, 1)
        elif caption.axis >= 0:
            yield fits(one, 0) & fits(two, 1) & (axes == caption.axis)
        else:
            yield (fits(one, 0) & fits(two, 1)) | (fits(one, 1) & fits(two, 0))


def ideal_recall(captions: Sequence[Caption], scenes: Sequence[Scene]) -> float:
    """Upper bound of text-to-image recall@1: what one reaches who sees and understands everything.

    Caption i belongs to scene i; among the n scenes it is true of, nothing tells which is meant: 1 / n.
    """
    return float(np.mean([1 / matches.sum() for matches in truth(captions, scenes)]))
