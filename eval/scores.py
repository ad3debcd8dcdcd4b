"""Verdicts -> scores. Every score is {"score", "n", "low", "high"}: a 95 % confidence interval."""

from collections import Counter
from collections.abc import Sequence
from math import sqrt
from typing import Any, TypedDict

import numpy as np
from PIL import Image

from eval.shapes.parser import parse_picture
from eval.shapes.prompts import Prompt
from eval.shapes.reading import mentioned_objects, parse_caption
from eval.shapes.requirement import ObjectRequirement, Requirement, satisfies
from eval.shapes.scene import JUDGED_DISTANCE, Scene, distance_along

_Z = 1.959964  # 95 % of a normal distribution
_RESAMPLES = 1000


class Score(TypedDict):
    """A measured value with the number of things it was measured on.

    `low` and `high` bound the 95 % confidence interval. All are None where nothing was measured
    (`n` is 0); `low` and `high` alone are None for plain counts.
    """

    score: float | None
    n: int
    low: float | None
    high: float | None


def share(verdicts: Sequence[bool]) -> Score:
    """Share of true verdicts, with Wilson's interval.

    Source: Wilson, "Probable Inference, the Law of Succession, and Statistical Inference" (JASA
    22:209-212, 1927).
    """
    n = len(verdicts)
    if n == 0:
        return Score(score=None, n=0, low=None, high=None)
    p = sum(verdicts) / n
    middle = (p + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z * sqrt(p * (1 - p) / n + _Z**2 / (4 * n**2)) / (1 + _Z**2 / n)
    return Score(score=p, n=n, low=max(0.0, middle - half), high=min(1.0, middle + half))


def ratio(above: Sequence[float], below: Sequence[float]) -> Score:
    """sum(above) / sum(below), one entry an item, with a bootstrap interval over the items.

    The interval is the 2.5th to the 97.5th percentile of 1000 resamples with a fixed seed. `n` is
    the number of items.
    """
    n = len(above)
    a, b = np.asarray(above, np.float64), np.asarray(below, np.float64)
    if n == 0 or b.sum() == 0:
        return Score(score=None, n=n, low=None, high=None)
    draws = np.random.default_rng(0).integers(0, n, (_RESAMPLES, n))
    totals = b[draws].sum(1)
    values = a[draws].sum(1)[totals > 0] / totals[totals > 0]
    low, high = np.percentile(values, (2.5, 97.5))
    return Score(score=float(a.sum() / b.sum()), n=n, low=float(low), high=float(high))


def mean(values: Sequence[float]) -> Score:
    """The mean, with the bootstrap interval of `ratio`."""
    return ratio(values, np.ones(len(values)).tolist())


# --- drawings -------------------------------------------------------------------------------------


def judge_drawings(pictures: Sequence[Image.Image], prompts: Sequence[Prompt]) -> list[bool]:
    """The strict verdict on every drawing, from its pixels; see `requirement.satisfies`."""
    return [
        satisfies(parse_picture(picture), prompt.requirement)
        for picture, prompt in zip(pictures, prompts, strict=True)
    ]


def score_drawings(pictures: Sequence[Image.Image], prompts: Sequence[Prompt]) -> dict[str, Score]:
    """Share of drawings that fulfil their prompt, by the prompts' category."""
    verdicts: dict[str, list[bool]] = {}
    for prompt, verdict in zip(prompts, judge_drawings(pictures, prompts), strict=True):
        verdicts.setdefault(prompt.category, []).append(verdict)
    return {category: share(found) for category, found in verdicts.items()}


# --- captions -------------------------------------------------------------------------------------


def caption_is_exact(text: str, scene: Scene) -> bool:
    """Whether a caption is in the grammar, true, and names colour and shape of every object."""
    requirement = parse_caption(text)
    return (
        requirement is not None
        and all(o.shape and o.colour for o in requirement.objects)
        and satisfies(scene, requirement)
    )


def score_captions(texts: Sequence[str], scenes: Sequence[Scene]) -> dict[str, Score]:
    """Score captions against the scenes that they are about.

    Returns:
        exact: share of captions that are in the grammar, true in every respect (number of objects,
            and relation, size, background where stated) and name colour and shape of every object.
        object_f1: micro F1 over objects as (shape, colour) pairs; an object without its colour does
            not count. Bootstrap interval over the captions.
        colour: share of captions that name exactly the colours of the scene, each as often as it
            comes.
        relation: share of the stated relations that hold between two objects that fit their
            descriptions; n is the number of relations stated.
        count: share of captions that mention as many objects as there are.

        A caption that is not in the grammar is never exact and states no relation; its objects are
        all object phrases in it ("red star", "two rings").
    """
    exact, colour, count, relations = [], [], [], []
    doubled_hits, mentioned = [], []
    for text, scene in zip(texts, scenes, strict=True):
        requirement = parse_caption(text)
        wanted = list(requirement.objects) if requirement else mentioned_objects(text)
        exact.append(caption_is_exact(text, scene))
        count.append(len(wanted) == len(scene.objects))
        colour.append(Counter(o.colour for o in wanted) == Counter(o.colour for o in scene.objects))
        said: Counter[Any] = Counter((o.shape, o.colour) for o in wanted)
        shown: Counter[Any] = Counter((o.shape, o.colour) for o in scene.objects)
        doubled_hits.append(2 * (said & shown).total())
        mentioned.append(said.total() + shown.total())
        relations += _relations_that_hold(requirement, scene) if requirement else []
    return {
        "exact": share(exact),
        "object_f1": ratio(doubled_hits, mentioned),
        "colour": share(colour),
        "relation": share(relations),
        "count": share(count),
    }


def _relations_that_hold(requirement: Requirement, scene: Scene) -> list[bool]:
    def fitting(wanted: ObjectRequirement) -> list[Any]:
        return [o for o in scene.objects if wanted.fits(o)]

    return [
        any(
            first is not second and distance_along(relation.name, first, second) >= JUDGED_DISTANCE
            for first in fitting(requirement.objects[relation.first])
            for second in fitting(requirement.objects[relation.second])
        )
        for relation in requirement.relations
    ]


def score_answers(answers: Sequence[str], expected: Sequence[str]) -> Score:
    """Share of answers that are the expected word, but for case, white space and a full stop."""
    return share(
        [
            " ".join(answer.lower().split()).removesuffix(".") == right.lower()
            for answer, right in zip(answers, expected, strict=True)
        ]
    )
