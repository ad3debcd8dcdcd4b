"""Scene -> words: captions, questions with answers, and board descriptions.

Everything is lower case and true. `reading.py` holds the inverse of the captions.
"""

import random
from collections import Counter
from typing import Literal

import numpy as np

from eval.shapes.render import inside
from eval.shapes.requirement import ObjectRequirement, Relation, Requirement
from eval.shapes.scene import (
    COLOURS,
    HELD_OUT,
    IMAGE_SIZE,
    RELATIONS,
    SHAPES,
    STATED_DISTANCE,
    Level,
    Object,
    Scene,
    board_cells,
    distance_along,
    stated_relations,
)

NUMBERS = ("zero", "one", "two", "three")
PLURALS = {shape: "crosses" if shape == "cross" else f"{shape}s" for shape in SHAPES}
RELATION_PHRASES = {
    "left": ("left of", "to the left of"),
    "right": ("right of", "to the right of"),
    "above": ("above",),
    "below": ("below",),
}
LIST_OPENINGS = ("", "", "", "a picture of ", "an image with ", "there is ")
_NAMED_SHARE = 0.8
_RELATED_SHARE = 0.5
"""How often a caption states a relation where one can be."""
_RELATED_SHARE_OF_GRIDS: dict[Level, float] = {"board": 0.5, "free": 0.8}
_PLACE_QUESTIONS: dict[Level, int] = {"board": 0, "free": 2}
"""So many about one object at most, and as many about a relation."""
_OFF_CENTRE = 4.0
"""Pixels from the middle of the picture, from which questions call an object left, right, ..."""
_RELATED_SHARE_OF_PROMPTS = 0.8

Style = Literal["named", "brief"]


def captions(
    scene: Scene,
    rng: random.Random,
    style: Style | None = None,
    related_share: float = _RELATED_SHARE,
) -> str:
    """One true caption, for example "two small blue circles and a green ring on tan".

    Args:
        scene: what to describe.
        rng: source of randomness.
        style: `named`: colour and shape of every object, sometimes size, background, a relation;
            `brief`: shapes only ("three stars", "a ring left of a heart"), sometimes background or
            relation. None: `named` four times out of five.
        related_share: how often a relation is stated where one can be.

    Returns:
        3 to about 20 words; every object is mentioned, so a picture that holds another number of
        objects does not fit the caption.
    """
    return caption_with_requirement(scene, rng, style, related_share)[0]


def caption_with_requirement(
    scene: Scene,
    rng: random.Random,
    style: Style | None = None,
    related_share: float = _RELATED_SHARE,
) -> tuple[str, Requirement]:
    """As `captions`, together with what the caption demands; objects in order of mention."""
    if style is None:
        style = "named" if rng.random() < _NAMED_SHARE else "brief"
    named = style == "named"
    sized = named and rng.random() < 0.35
    wanted = [
        ObjectRequirement(o.shape, o.colour if named else None, o.size if sized else None)
        for o in scene.objects
    ]
    text, order, relations = _body(scene, wanted, rng, related_share)
    background = scene.background if rng.random() < (0.45 if named else 0.2) else None
    if background is not None:
        text = _with_background(text, background, rng)
    return text, Requirement(tuple(wanted[i] for i in order), tuple(relations), background)


def describe(wanted: ObjectRequirement, number: int = 1, article: str | None = None) -> str:
    """A noun phrase: "a large red star", "two circles", or with `article` "the red star"."""
    shape = wanted.shape if number == 1 else PLURALS[wanted.shape or ""]
    phrase = " ".join(word for word in (wanted.size, wanted.colour, shape) if word)
    if number > 1:
        return f"{NUMBERS[number]} {phrase}"
    return f"{article or ('an' if phrase[0] in 'aeiou' else 'a')} {phrase}"


def list_objects(wanted: list[ObjectRequirement]) -> tuple[str, list[int]]:
    """A list such as "a red star and two hearts", and the order of its mentions."""
    counts = Counter(wanted)
    phrases = [describe(item, number) for item, number in counts.items()]
    text = phrases[0] if len(phrases) == 1 else f"{', '.join(phrases[:-1])} and {phrases[-1]}"
    return text, [i for item in counts for i, other in enumerate(wanted) if other == item]


def _body(
    scene: Scene, wanted: list[ObjectRequirement], rng: random.Random, related_share: float
) -> tuple[str, list[int], list[Relation]]:
    relations = stated_relations(scene.objects)
    distinct = len(set(wanted)) == len(wanted)
    if relations and distinct and rng.random() < related_share:
        return _related(wanted, relations, rng)
    text, order = list_objects(wanted)
    if len(wanted) > 1 and rng.random() < 0.1:
        return f"{NUMBERS[len(wanted)]} objects: {text}", order, []
    opening = rng.choice(LIST_OPENINGS)
    if opening == "there is " and text.startswith(("two", "three")):
        opening = "there are "
    return opening + text, order, []


def _related(
    wanted: list[ObjectRequirement], relations: list[tuple[int, str, int]], rng: random.Random
) -> tuple[str, list[int], list[Relation]]:
    first, name, second = rng.choice(relations)
    others = [i for i in range(len(wanted)) if i not in (first, second)]
    order = [first, second, *others]
    phrase = rng.choice(RELATION_PHRASES[name])
    result = [Relation(0, name, 1)]
    sentence = rng.random() < 0.5
    if sentence:
        text = f"{describe(wanted[first], article='the')} is {phrase} "
        text += describe(wanted[second], article="the")
    else:
        text = f"{describe(wanted[first])} {phrase} {describe(wanted[second])}"
    if others:
        more = [r for r in relations if r[0] == first and r[2] == others[0]]
        if sentence and more and rng.random() < 0.6:
            also = rng.choice(more)[1]
            result.append(Relation(0, also, 2))
            text += f" and {rng.choice(RELATION_PHRASES[also])} "
            text += describe(wanted[others[0]], article="the")
        elif sentence:
            text += f"; there is also {describe(wanted[others[0]])}"
        else:
            text += f", and {describe(wanted[others[0]])}"
    return text, order, result


def _with_background(text: str, background: str, rng: random.Random) -> str:
    way = rng.randrange(4)
    if way == 0:
        return f"on a {background} background, {text}"
    if way == 1 or " is " in text:
        return f"{text}; the background is {background}"
    return f"{text} on a {background} background" if way == 2 else f"{text} on {background}"


# --- questions ------------------------------------------------------------------------------------


def questions(
    scene: Scene, rng: random.Random, n: int = 3, *, every_pair: bool = False
) -> list[tuple[str, str]]:
    """Draw questions about a scene, with answers of one word.

    Args:
        scene: what is asked about.
        rng: source of randomness.
        n: how many.
        every_pair: ask whether there is an object of a HELD_OUT pair where there is none, too.

    Returns:
        up to `n` (question, answer) of different kinds: number, number of a shape, background,
        colour of a shape, shape of a colour, size, existence, relation (yes and no equally often).
        An object is only asked about where the words single it out. HELD_OUT pairs are named only
        where the scene holds them, unless `every_pair`.
    """
    found: list[tuple[str, str]] = []
    for kind in rng.sample(_QUESTION_KINDS, len(_QUESTION_KINDS)):
        if len(found) < n and (pair := _question(kind, scene, rng, every_pair)):
            found.append(pair)
    return found


def place_questions(scene: Scene, rng: random.Random, level: Level) -> list[tuple[str, str]]:
    """Draw more questions about where the objects are, with their answers.

    At level `free`, where that is what is hardest to learn, up to two about one object ("is the red
    star on the left or on the right?") and up to two about a relation; none at level `board`.
    """
    found: list[tuple[str, str]] = []
    n = _PLACE_QUESTIONS[level]
    for question in (_place_question, _relation_question):
        pairs = (question(scene.objects, rng) for _ in range(2 * n))
        found += list(dict.fromkeys(pair for pair in pairs if pair))[:n]
    return found


_QUESTION_KINDS = (
    "objects",
    "number",
    "background",
    "shape colour",
    "colour shape",
    "shape size",
    "existence",
    "relation",
)


def _question(
    kind: str, scene: Scene, rng: random.Random, every_pair: bool
) -> tuple[str, str] | None:
    objects = scene.objects
    if kind == "objects":
        return "how many objects are there?", NUMBERS[len(objects)]
    if kind == "number":
        present = rng.random() < 0.75
        shape = rng.choice(objects).shape if present else rng.choice(SHAPES)
        number = NUMBERS[sum(o.shape == shape for o in objects)]
        return f"how many {PLURALS[shape]} are there?", number
    if kind == "background":
        return "what is the background?", scene.background
    if kind == "existence":
        return _existence_question(objects, rng, every_pair)
    if kind == "relation":
        return _relation_question(objects, rng)
    known, asked = kind.split()
    return _attribute_question(objects, known, asked, rng)


def _attribute_question(
    objects: tuple[Object, ...], known: str, asked: str, rng: random.Random
) -> tuple[str, str] | None:
    counts = Counter(getattr(o, known) for o in objects)
    unique = [o for o in objects if counts[getattr(o, known)] == 1]
    if not unique:
        return None
    o = rng.choice(unique)
    name = o.shape if known == "shape" else f"{o.colour} object"
    if asked == "size":
        return f"is the {name} small or large?", o.size
    return f"what {asked} is the {name}?", getattr(o, asked)


def _existence_question(
    objects: tuple[Object, ...], rng: random.Random, every_pair: bool
) -> tuple[str, str]:
    present = {(o.shape, o.colour) for o in objects}
    if rng.random() < 0.5:
        pair, answer = rng.choice(sorted(present)), "yes"
    else:
        absent = [
            (shape, colour)
            for shape in SHAPES
            for colour in COLOURS
            if (shape, colour) not in present and (every_pair or (shape, colour) not in HELD_OUT)
        ]
        # Half of the time an absent pair that shares an attribute with what is there: harder.
        near = [pair for pair in absent if any(pair[0] == s or pair[1] == c for s, c in present)]
        pair, answer = rng.choice(near if near and rng.random() < 0.5 else absent), "no"
    return f"is there {describe(ObjectRequirement(*pair))}?", answer


def _relation_question(objects: tuple[Object, ...], rng: random.Random) -> tuple[str, str] | None:
    answer = rng.choice(("yes", "no"))
    pairs = Counter((o.shape, o.colour) for o in objects)
    candidates = [
        (first, relation, second)
        for first in objects
        for second in objects
        for relation in RELATIONS
        if first is not second
        and pairs[first.shape, first.colour] == pairs[second.shape, second.colour] == 1
        and _plainly(answer, distance_along(relation, first, second))
    ]
    if not candidates:
        return None
    first, relation, second = rng.choice(candidates)
    names = [describe(ObjectRequirement(o.shape, o.colour), article="the") for o in (first, second)]
    return f"is {names[0]} {rng.choice(RELATION_PHRASES[relation])} {names[1]}?", answer


def _place_question(objects: tuple[Object, ...], rng: random.Random) -> tuple[str, str] | None:
    pairs = Counter((o.shape, o.colour) for o in objects)
    off = [
        (o, where, sides, distance)
        for o in objects
        for where, sides, place in (("on", ("left", "right"), o.x), ("at", ("top", "bottom"), o.y))
        if pairs[o.shape, o.colour] == 1 and abs(distance := place - IMAGE_SIZE / 2) >= _OFF_CENTRE
    ]
    if not off:
        return None
    o, where, sides, distance = rng.choice(off)
    name = describe(ObjectRequirement(o.shape, o.colour), article="the")
    return f"is {name} {where} the {sides[0]} or {where} the {sides[1]}?", sides[distance > 0]


def _plainly(answer: str, distance: float) -> bool:
    # Between the two lies what people would argue about.
    return distance >= STATED_DISTANCE if answer == "yes" else distance <= 4


# --- pictures in words ----------------------------------------------------------------------------


def board_text(scene: Scene) -> str:
    """The 4×4 board in words, cell by cell in reading order, as a picture's codes go.

    An empty cell is the background's word, a small object "small red star", and each of the four
    cells of a large one "large red star". For example "white white small red star white ...".

    Raises:
        DataError: the scene is not of level `board`.
    """
    cells = board_cells(scene)
    phrases = [scene.background] * 16
    for (row, column), (o, _) in cells.items():
        phrases[4 * row + column] = f"{o.size} {o.colour} {o.shape}"
    return " ".join(phrases)


GRID = 8
"""Cells along the grid of `grid_text`, of 8×8 pixels each."""
ROW_END = "; and below "
"""Between the rows of `grid_text`: three ids of the shipped text tokenizer."""
_POINTS = 4  # along a cell, at which the objects are looked up
_LEAST_POINTS = 2
_TICKS = (np.arange(GRID * _POINTS) + 0.5) * (IMAGE_SIZE / (GRID * _POINTS))


def grid_text(scene: Scene) -> str:
    """A scene of any level in words, on an 8×8 grid in reading order, as a picture's codes go.

    A cell is one word: of the object that covers most of it the colour or, as on a chessboard, the
    shape, so that both stand side by side; or the background where objects cover less than an
    eighth. Sizes are not said: they show in the number of cells. With
    `ROW_END` between them all rows have the same number of words, so that a column is an angle of
    rotary positions; `unimodal.row_ends` says why left and right need that, and that 8 + 3 ids fit
    the shipped text LLM.
    """
    cells = [scene.background] * GRID**2
    most = np.full(GRID**2, _LEAST_POINTS - 1)
    for o in scene.objects:
        u, v = ((_TICKS - middle) / o.radius for middle in (o.x, o.y))
        covered = inside(o.shape, *np.meshgrid(u, v)).reshape(GRID, _POINTS, GRID, _POINTS)
        points = covered.sum((1, 3)).ravel()
        for cell in np.flatnonzero(points > most):
            cells[cell] = o.shape if (cell // GRID + cell) % 2 else o.colour
        most = np.maximum(most, points)
    rows = (" ".join(cells[first : first + GRID]) for first in range(0, GRID**2, GRID))
    return ROW_END.join(rows)


def picture_text(scene: Scene, level: Level) -> str:
    """A scene in words, cell by cell: `board_text` or, at level `free`, `grid_text`."""
    return board_text(scene) if level == "board" else grid_text(scene)


TEXT_KINDS = (
    "caption_of_board",
    "board_of_caption",
    "question_about_board",
    "dialogue_about_board",
    "caption",
    "question_about_caption",
)
_KIND_WEIGHTS: dict[Level, tuple[int, ...]] = {
    "board": (5, 10, 3, 3, 1, 1),
    "free": (10, 4, 14, 2, 1, 1),  # there reading is learnt later than drawing
}


def prompt_words(scene: Scene, rng: random.Random) -> str:
    """Words to draw a scene from: as often a brief caption ("two stars") as a named one.

    They state relations oftener than captions do: where things go is what a drawing has to plan.
    """
    style: Style = "brief" if rng.random() < 0.5 else "named"
    return captions(scene, rng, style, _RELATED_SHARE_OF_PROMPTS)


def world_text_messages(
    scene: Scene, rng: random.Random, kind: str | None = None, level: Level = "board"
) -> tuple[str, list[dict[str, str]]]:
    """A short chat about a scene in words only: a text model learns the language of space from it.

    Args:
        scene: what it is about.
        rng: source of randomness.
        kind: one of TEXT_KINDS; None draws one.
        level: the scene's; boards are those of `picture_text`.

    Returns:
        kind and messages [{"role": "user", "content": …}, {"role": "assistant", "content": …}, …];
        a dialogue has two or three pairs of turns: a board is asked for, then asked about. At
        level `free` three questions are asked about a board, and then `place_questions`.

    Raises:
        DataError: a board of level `board` is asked for and the scene does not stand on one.
    """
    kind = kind or rng.choices(TEXT_KINDS, _KIND_WEIGHTS[level])[0]
    if kind == "caption_of_board":
        user = f"{picture_text(scene, level)} describe"
        assistant = captions(scene, rng, related_share=_RELATED_SHARE_OF_GRIDS[level])
    elif kind == "board_of_caption":
        user, assistant = f"draw in words {prompt_words(scene, rng)}", picture_text(scene, level)
    elif kind == "question_about_board":
        several = 3 if level == "free" else 1
        first, *more = questions(scene, rng, several, every_pair=True)
        more += place_questions(scene, rng, level)
        turns = [(f"{picture_text(scene, level)} {first[0]}", first[1]), *more]
        return kind, chat_messages(turns)
    elif kind == "dialogue_about_board":
        turns = [(f"draw in words {prompt_words(scene, rng)}", picture_text(scene, level))]
        turns += questions(scene, rng, 2, every_pair=True)
        return kind, chat_messages([*turns, *place_questions(scene, rng, level)])
    elif kind == "caption":
        user, assistant = "describe", captions(scene, rng)
    elif kind == "question_about_caption":
        text, question, assistant = _caption_that_answers(scene, rng)
        user = f"{text}. {question}"
    else:
        raise ValueError(f"kind is {kind!r}; expected one of {', '.join(TEXT_KINDS)}")
    return kind, chat_messages([(user, assistant)])


def chat_messages(turns: list[tuple[str, str]]) -> list[dict[str, str]]:
    """Chat messages of (user, assistant) turns."""
    return [
        {"role": role, "content": text}
        for turn in turns
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]


def _caption_that_answers(scene: Scene, rng: random.Random) -> tuple[str, str, str]:
    """A caption and a question whose answer it states."""
    text, stated = caption_with_requirement(scene, rng, "named")
    wanted = stated.objects
    found = [("how many objects are there?", NUMBERS[len(wanted)])]
    if stated.background:
        found.append(("what is the background?", stated.background))
    found.append(_existence_question(scene.objects, rng, every_pair=True))
    for known, asked in (("shape", "colour"), ("colour", "shape")):
        if pair := _attribute_question(scene.objects, known, asked, rng):
            found.append(pair)
    for relation in stated.relations:
        names = [
            describe(ObjectRequirement(o.shape, o.colour), article="the")
            for o in (wanted[relation.first], wanted[relation.second])
        ]
        if names[0] != names[1]:
            phrase = rng.choice(RELATION_PHRASES[relation.name])
            found.append((f"is {names[0]} {phrase} {names[1]}?", "yes"))
    question, answer = rng.choice(found)
    return text, question, answer
