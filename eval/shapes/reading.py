"""Words -> requirement: the inverse of the captions' grammar."""

import re
from collections.abc import Sequence

from eval.shapes.captions import NUMBERS, PLURALS, RELATION_PHRASES
from eval.shapes.requirement import ObjectRequirement, Relation, Requirement
from eval.shapes.scene import BACKGROUNDS, COLOURS, SHAPES, SIZES


def _any(words: Sequence[str]) -> str:
    return "|".join(sorted(words, key=len, reverse=True))


_SINGULAR = {plural: shape for shape, plural in PLURALS.items()}
_PHRASE_TO_RELATION = {p: name for name, phrases in RELATION_PHRASES.items() for p in phrases}
_ATTRIBUTES = f"(?:({_any(SIZES)}) )?(?:({_any(tuple(COLOURS))}) )?"
_ONE = rf"(?:an?|the) {_ATTRIBUTES}({_any(SHAPES)})"
_MANY = rf"({_any(NUMBERS[2:])}) {_ATTRIBUTES}({_any(tuple(_SINGULAR))})"
_RELATION = f"({_any(tuple(_PHRASE_TO_RELATION))})"
_BACKGROUND = f"(?P<background>{_any(tuple(BACKGROUNDS))})"

_BACKGROUND_FORMS = [
    re.compile(rf"on an? {_BACKGROUND} background, (?P<body>.+)"),
    re.compile(rf"(?P<body>.+); the background is {_BACKGROUND}"),
    re.compile(rf"(?P<body>.+) on an? {_BACKGROUND} background"),
    re.compile(rf"(?P<body>.+) on {_BACKGROUND}"),
]
_RELATED = re.compile(
    rf"{_ONE} (?:is )?{_RELATION} {_ONE}"
    rf"(?:(?:; there is also|, and) {_ONE}| and {_RELATION} {_ONE})?"
)
_OPENING = re.compile(
    rf"a picture of |an image with |there (?:is|are) |({_any(NUMBERS)}) objects: "
)
_ONE_PATTERN, _MANY_PATTERN = re.compile(_ONE), re.compile(_MANY)
_MENTION = re.compile(
    rf"(?:({_any(NUMBERS[2:])}) )?{_ATTRIBUTES}\b({_any(SHAPES)}|{_any(tuple(_SINGULAR))})\b"
)


def parse_caption(text: str) -> Requirement | None:
    """Read a caption of our grammar.

    Args:
        text: a caption; case, surrounding white space and a final full stop do not matter.

    Returns:
        What it demands, objects in order of mention; None where the text is not in the grammar. For
        every caption that `captions.caption_with_requirement` writes, this is its requirement.
    """
    text = " ".join(text.lower().split()).removesuffix(".")
    background = None
    for form in _BACKGROUND_FORMS:
        if match := form.fullmatch(text):
            text, background = match["body"], match["background"]
            break
    related = _RELATED.fullmatch(text)
    if related:
        return _read_related(related, background)
    number = None
    if opening := _OPENING.match(text):
        number = opening[1]
        text = text[opening.end() :]
    wanted: list[ObjectRequirement] = []
    *front, last = text.split(", ")
    if last.count(" and ") > 1:
        return None
    for phrase in [*front, *last.split(" and ")]:
        if one := _ONE_PATTERN.fullmatch(phrase):
            wanted.append(_object(one.groups()))
        elif many := _MANY_PATTERN.fullmatch(phrase):
            count, size, colour, plural = many.groups()
            wanted += [_object((size, colour, _SINGULAR[plural]))] * NUMBERS.index(count)
        else:
            return None
    if number is not None and NUMBERS.index(number) != len(wanted):
        return None
    return Requirement(tuple(wanted), (), background)


def mentioned_objects(text: str) -> list[ObjectRequirement]:
    """Every object phrase in any text, for captions that are not quite in the grammar."""
    wanted: list[ObjectRequirement] = []
    for number, size, colour, noun in _MENTION.findall(text.lower()):
        item = _object((size or None, colour or None, _SINGULAR.get(noun, noun)))
        wanted += [item] * (NUMBERS.index(number) if number else 1)
    return wanted


def _object(groups: Sequence[str | None]) -> ObjectRequirement:
    size, colour, shape = groups
    return ObjectRequirement(shape, colour, size)


def _read_related(match: re.Match[str], background: str | None) -> Requirement:
    groups = match.groups()
    wanted = [_object(groups[0:3]), _object(groups[4:7])]
    relations = [Relation(0, _PHRASE_TO_RELATION[groups[3]], 1)]
    if groups[9]:  # "; there is also a ring", ", and a ring"
        wanted.append(_object(groups[7:10]))
    elif groups[10]:  # " and above the ring"
        wanted.append(_object(groups[11:14]))
        relations.append(Relation(0, _PHRASE_TO_RELATION[groups[10]], 2))
    return Requirement(tuple(wanted), tuple(relations), background)
