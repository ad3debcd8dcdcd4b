"""What a caption demands of a picture, in a form that a program can check."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations

from eval.shapes.scene import JUDGED_DISTANCE, Object, Scene, distance_along, stated_relations


@dataclass(frozen=True, slots=True)
class ObjectRequirement:
    """One object; an attribute that is None is left open."""

    shape: str | None = None
    colour: str | None = None
    size: str | None = None

    def fits(self, candidate: Object) -> bool:
        """Whether the object has every attribute that is stated."""
        return (
            self.shape in (None, candidate.shape)
            and self.colour in (None, candidate.colour)
            and self.size in (None, candidate.size)
        )


@dataclass(frozen=True, slots=True)
class Relation:
    """`objects[first]` lies left / right / above / below of `objects[second]`."""

    first: int
    name: str
    second: int


@dataclass(frozen=True, slots=True)
class Requirement:
    """All objects that the picture must hold, no others; relations; the background if stated."""

    objects: tuple[ObjectRequirement, ...]
    relations: tuple[Relation, ...] = ()
    background: str | None = None

    @classmethod
    def of(cls, scene: Scene) -> "Requirement":
        """Everything that can be said of a scene: attributes, plain relations and background."""
        return cls(
            tuple(ObjectRequirement(o.shape, o.colour, o.size) for o in scene.objects),
            tuple(Relation(*relation) for relation in stated_relations(scene.objects)),
            scene.background,
        )


def satisfies(scene: Scene | None, requirement: Requirement) -> bool:
    """The strict verdict: same number of objects, every stated attribute, relation and background.

    Args:
        scene: what the parser read; None (nothing readable) satisfies nothing.
        requirement: what the caption demands.
    """
    if scene is None or len(scene.objects) != len(requirement.objects):
        return False
    if requirement.background not in (None, scene.background):
        return False
    return any(_fits(order, requirement) for order in permutations(scene.objects))


def _fits(objects: Sequence[Object], requirement: Requirement) -> bool:
    wanted = requirement.objects
    return all(w.fits(o) for w, o in zip(wanted, objects, strict=True)) and all(
        distance_along(r.name, objects[r.first], objects[r.second]) >= JUDGED_DISTANCE
        for r in requirement.relations
    )
