"""Prompts for drawing, in the categories of GenEval, and what each one demands.

Source: Ghosh, Hajishirzi and Schmidt, "GenEval: An Object-Focused Framework for Evaluating
Text-to-Image Alignment" (arXiv 2310.11513), section 3: single object, two objects, counting,
colours, position, attribute binding. Differences: the objects are our shapes, an exact parser
stands in for the detector, a seventh category takes whole captions, and the verdict is strict (no
further objects). Scores from here are never to be called GenEval scores.
"""

import random
from dataclasses import dataclass

from eval.shapes.captions import (
    RELATION_PHRASES,
    caption_with_requirement,
    describe,
    list_objects,
)
from eval.shapes.requirement import ObjectRequirement, Relation, Requirement
from eval.shapes.scene import CATEGORIES, HELD_OUT, Level, Scene, sample_scene, stated_relations
from tokenizer_hf.errors import ConfigurationError

_COLOURED = ("colours", "binding")


@dataclass(frozen=True, slots=True)
class Prompt:
    """What to draw, in words and as a requirement."""

    text: str
    requirement: Requirement
    category: str
    held_out: bool = False


def prompts(
    category: str, n: int, seed: int = 0, *, level: Level = "board", held_out: bool = False
) -> list[Prompt]:
    """Draw prompts of one category.

    ========  =====================================  ==============================================
    category  example                                demands (beside: no other objects)
    ========  =====================================  ==============================================
    single    "a star"                               the shape
    two       "a star and a ring"                    both shapes
    counting  "three stars"                          the number of the shape
    colours   "a red star"                           shape and colour
    position  "a star left of a ring"                both shapes and how they lie
    binding   "a red star and a blue ring"           both shapes, each in its colour
    caption   "two small red stars on tan"           all that the caption says
    ========  =====================================  ==============================================

    Args:
        category: one of CATEGORIES.
        n: how many; independent draws, so that short prompts come more than once.
        seed: the same seed draws the same prompts.
        level: the kind of scene that the whole captions are about.
        held_out: every prompt names at least one HELD_OUT (shape, colour) pair; the prompts of all
            categories then name colours. Without it no prompt names such a pair.

    Raises:
        ConfigurationError: an unknown category.
    """
    if category not in CATEGORIES:
        raise ConfigurationError(f"category is {category!r}; expected one of {CATEGORIES}")
    rng = random.Random(f"{seed}-prompts-{category}-{held_out}")
    result = []
    for _ in range(n):
        scene = sample_scene(rng, level, category, "only" if held_out else "exclude")
        if category == "caption":
            text, requirement = caption_with_requirement(scene, rng, "named")
        else:
            text, requirement = _short(scene, category, held_out or category in _COLOURED, rng)
        result.append(Prompt(text, requirement, category, held_out))
    return result


def _short(
    scene: Scene, category: str, coloured: bool, rng: random.Random
) -> tuple[str, Requirement]:
    wanted = [ObjectRequirement(o.shape, o.colour if coloured else None) for o in scene.objects]
    if category == "position":
        first, name, second = rng.choice(stated_relations(scene.objects))
        phrase = rng.choice(RELATION_PHRASES[name])
        text = f"{describe(wanted[first])} {phrase} {describe(wanted[second])}"
        return text, Requirement((wanted[first], wanted[second]), (Relation(0, name, 1),))
    if category == "counting" and coloured:  # the scene may hold the shape in several colours
        named = next(o for o in wanted if (o.shape, o.colour) in HELD_OUT)
        wanted = [named] * len(wanted)
    text, order = list_objects(wanted)
    return text, Requirement(tuple(wanted[i] for i in order))
