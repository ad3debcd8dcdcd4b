"""The embedded world: what a picture can hold, and how one is drawn by lot.

A scene is a background and one to three coloured shapes on 64×64 pixels that never touch.
Everything that an outsider needs to read our pictures is in this file: palette, shapes, sizes, the
board. `render.py` turns a scene into pixels, `parser.py` pixels into a scene, `captions.py` a scene
into words.

Coordinates are pixels, x to the right and y down, the picture spans [0, 64] and a pixel's centre
lies at .5. Random numbers come from a `random.Random`, whose sequence is the same on every machine.
"""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any, Literal

from tokenizer_hf.errors import ConfigurationError, DataError

IMAGE_SIZE = 64
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "diamond", "heart")
COLOURS = {
    "red": (220, 35, 40),
    "green": (40, 165, 60),
    "blue": (40, 80, 220),
    "yellow": (240, 215, 40),
    "orange": (245, 130, 25),
    "purple": (135, 55, 185),
    "cyan": (50, 200, 225),
    "pink": (245, 130, 195),
}
BACKGROUNDS = {
    "white": (250, 250, 250),
    "black": (15, 15, 15),
    "gray": (125, 125, 125),
    "tan": (222, 203, 170),
}
SIZES = ("small", "large")
_COLOUR_NAMES, _BACKGROUND_NAMES = tuple(COLOURS), tuple(BACKGROUNDS)

CELL = 16
"""Pixels along one cell of the 4×4 board."""
BOARD_RADIUS = {"small": 7.0, "large": 14.0}
FREE_RADII = {"small": (8.0, 8.25, 8.5, 8.75, 9.0), "large": (13.0, 13.25, 13.5, 13.75, 14.0)}
FREE_GAP = 3.0
"""Pixels between the boxes (centre ± radius) of two objects of a `free` scene, at least."""

HELD_OUT = frozenset(
    {
        ("circle", "purple"),
        ("square", "yellow"),
        ("triangle", "pink"),
        ("star", "cyan"),
        ("cross", "orange"),
        ("ring", "green"),
        ("diamond", "red"),
        ("heart", "blue"),
    }
)
"""(shape, colour) pairs that no training picture shows and nothing said of one names; every shape
and colour is in one. The text-only lines and chats speak of them."""

CATEGORIES = ("single", "two", "counting", "colours", "position", "binding", "caption")
RELATIONS = ("left", "right", "above", "below")
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}
STATED_DISTANCE = 12.0
"""Pixels between two centres, along the axis of the relation, from which captions state it."""
JUDGED_DISTANCE = 10.0
"""Pixels from which the verdict accepts it. Lower, so that reading a centre half a pixel off does
no harm; on the board both accept exactly the same scenes (distances are multiples of 8)."""

Level = Literal["board", "free"]
HeldOut = Literal["exclude", "only", "any"]


@dataclass(frozen=True, slots=True)
class Object:
    """One coloured shape. `x`, `y`: its centre in pixels; `radius`: half the side of its box."""

    shape: str
    colour: str
    size: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True, slots=True)
class Scene:
    """A background and its objects in reading order (by y, then x)."""

    background: str
    objects: tuple[Object, ...]

    def to_json(self) -> str:
        """One line of JSON; `from_json` is the inverse."""
        objects = [
            {k: getattr(o, k) for k in ("shape", "colour", "size", "x", "y", "radius")}
            for o in self.objects
        ]
        return json.dumps({"background": self.background, "objects": objects})

    @classmethod
    def from_json(cls, text: str) -> "Scene":
        """Read what `to_json` wrote.

        Raises:
            DataError: the text is not JSON, or not a scene.
        """
        try:
            data: dict[str, Any] = json.loads(text)
            objects = tuple(Object(**entry) for entry in data["objects"])
            return cls(data["background"], objects)
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"not a scene: {text[:80]!r} ({error}); expected the JSON that `unimodal shapes` "
                "writes; make the world again"
            ) from error


def distance_along(relation: str, first: Object, second: Object) -> float:
    """Pixels by which `first` lies to the left (…) of `second`; negative where it does not."""
    if relation == "left":
        return second.x - first.x
    if relation == "right":
        return first.x - second.x
    if relation == "above":
        return second.y - first.y
    return first.y - second.y


def board_cells(scene: Scene) -> dict[tuple[int, int], tuple[Object, str]]:
    """The occupied cells of a board scene.

    Returns:
        (row, column) -> (object, quadrant); the quadrant is "" for a small object and "top left",
        "top right", "bottom left" or "bottom right" for a quarter of a large one.

    Raises:
        DataError: an object does not stand on the board, so the scene is of level `free`.
    """
    cells: dict[tuple[int, int], tuple[Object, str]] = {}
    for o in scene.objects:
        row, column = (o.y - o.radius) // CELL, (o.x - o.radius) // CELL
        half = CELL / 2 if o.size == "small" else float(CELL)
        snapped = (row * CELL + half, column * CELL + half, BOARD_RADIUS[o.size])
        if (o.y, o.x, o.radius) != snapped:
            raise DataError(f"{o} does not stand on the 4×4 board; expected a scene of level board")
        corner = (int(row), int(column))
        if o.size == "small":
            cells[corner] = (o, "")
            continue
        for down, vertical in enumerate(("top", "bottom")):
            for right, horizontal in enumerate(("left", "right")):
                cells[corner[0] + down, corner[1] + right] = (o, f"{vertical} {horizontal}")
    return cells


def sample_scene(
    rng: random.Random,
    level: Level = "board",
    category: str | None = None,
    held_out: HeldOut = "exclude",
) -> Scene:
    """Draw one scene by lot.

    Args:
        rng: source of randomness.
        level: `board` (snapped to a 4×4 board of 16-px cells: small objects fill one cell, large
            ones 2×2) or `free` (anywhere on half pixels, radius varying).
        category: one of CATEGORIES: a scene that a prompt of this category describes. None or
            "caption": the mixture that training sees.
        held_out: `exclude`: no object is a HELD_OUT pair; `only`: at least one is; `any`.

    Returns:
        A scene of one to three objects that do not touch.

    Raises:
        ConfigurationError: an unknown level, category or held_out.
    """
    if level not in ("board", "free"):
        raise ConfigurationError(f"level is {level!r}; expected 'board' or 'free'")
    if held_out not in ("exclude", "only", "any"):
        raise ConfigurationError(f"held_out is {held_out!r}; expected 'exclude', 'only' or 'any'")
    if category is not None and category not in CATEGORIES:
        raise ConfigurationError(
            f"category is {category!r}; expected one of {', '.join(CATEGORIES)}"
        )
    place = _place_on_board if level == "board" else _place_freely
    while True:
        pairs = _sample_pairs(rng, category, held_out)
        sizes = ["large" if rng.random() < 0.4 else "small" for _ in pairs]
        if len(pairs) > 1 and len(set(pairs)) == 1 and rng.random() < 0.6:
            sizes = [sizes[0]] * len(pairs)
        places = None
        while places is None:
            places = place(rng, sizes)
        objects = [
            Object(shape, colour, size, x, y, radius)
            for (shape, colour), size, (x, y, radius) in zip(pairs, sizes, places, strict=True)
        ]
        objects.sort(key=lambda o: (o.y, o.x))
        if category == "position" and not stated_relations(objects):
            continue
        return Scene(rng.choice(_BACKGROUND_NAMES), tuple(objects))


def stated_relations(objects: Sequence[Object]) -> list[tuple[int, str, int]]:
    """Every (first, relation, second) that is plain enough to be said, as indices."""
    return [
        (i, relation, j)
        for i, first in enumerate(objects)
        for j, second in enumerate(objects)
        if i != j
        for relation in RELATIONS
        if distance_along(relation, first, second) >= STATED_DISTANCE
    ]


def _sample_pairs(
    rng: random.Random, category: str | None, held_out: HeldOut
) -> list[tuple[str, str]]:
    if category in ("single", "colours"):
        kinds = ["new"]
    elif category in ("two", "position", "binding"):
        kinds = ["new", "new"]
    elif category == "counting":
        kinds = ["new", *[rng.choice(("same", "same", "shape"))] * rng.choice((1, 2))]
    else:
        count = rng.choices((1, 2, 3), (0.3, 0.4, 0.3))[0]
        tail = rng.choices(("new", "same", "shape"), (0.7, 0.18, 0.12))[0]
        kinds = ["new", *[tail] * (count - 1)]
        if count == 3 and tail == "same" and rng.random() < 0.5:
            kinds[2] = "new"
    while True:
        pairs: list[tuple[str, str]] = []
        for kind in kinds:
            if kind == "same":
                pairs.append(pairs[0])
            else:
                shape = pairs[0][0] if kind == "shape" else rng.choice(SHAPES)
                pairs.append((shape, rng.choice(_COLOUR_NAMES)))
        if held_out == "only" and not HELD_OUT.intersection(pairs):
            continue
        if held_out == "exclude" and HELD_OUT.intersection(pairs):
            continue
        shapes, colours = ({pair[i] for pair in pairs} for i in (0, 1))
        if category in ("two", "position", "binding") and len(shapes) < 2:
            continue
        if category == "binding" and len(colours) < 2:
            continue
        rng.shuffle(pairs)
        return pairs


def _blocks(span: int) -> list[tuple[float, float, frozenset[tuple[int, int]]]]:
    """Centre (x, y) and cells of every block of span×span cells."""
    return [
        (
            (column + span / 2) * CELL,
            (row + span / 2) * CELL,
            frozenset((row + a, column + b) for a in range(span) for b in range(span)),
        )
        for row in range(5 - span)
        for column in range(5 - span)
    ]


_BOARD_BLOCKS = {"small": _blocks(1), "large": _blocks(2)}


def _place_on_board(
    rng: random.Random, sizes: Sequence[str]
) -> list[tuple[float, float, float]] | None:
    taken: set[tuple[int, int]] = set()
    places: list[tuple[float, float, float]] = []
    for size in sizes:
        x, y, cells = rng.choice(_BOARD_BLOCKS[size])
        if not taken.isdisjoint(cells):
            return None  # drawing everything anew keeps all arrangements equally likely
        taken |= cells
        places.append((x, y, BOARD_RADIUS[size]))
    return places


def _place_freely(
    rng: random.Random, sizes: Sequence[str]
) -> list[tuple[float, float, float]] | None:
    places: list[tuple[float, float, float]] = []
    for size in sizes:
        for _ in range(6):  # two large ones may leave no room for a third: do not insist
            radius = rng.choice(FREE_RADII[size])
            first = ceil(2 * radius + 2) / 2
            steps = 2 * (IMAGE_SIZE - 2 * first) + 1  # half pixels
            x, y = first + int(rng.random() * steps) / 2, first + int(rng.random() * steps) / 2
            apart = radius + FREE_GAP
            for a, b, other in places:
                if abs(x - a) < apart + other and abs(y - b) < apart + other:
                    break
            else:
                places.append((x, y, radius))
                break
        else:
            return None
    return places
