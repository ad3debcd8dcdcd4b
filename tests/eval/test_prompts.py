"""Prompts: of the trained kinds, and demanding what they say."""

import pytest

from eval.shapes.prompts import prompts
from eval.shapes.reading import parse_caption
from eval.shapes.scene import CATEGORIES, HELD_OUT
from tokenizer_hf.errors import ConfigurationError


@pytest.mark.parametrize("category", CATEGORIES)
@pytest.mark.parametrize("held_out", [False, True])
def test_prompts(category: str, held_out: bool) -> None:
    drawn = prompts(category, 300, seed=1, held_out=held_out)
    assert drawn == prompts(category, 300, seed=1, held_out=held_out)
    assert drawn != prompts(category, 300, seed=2, held_out=held_out)
    assert len({p.text for p in drawn}) >= 8
    for prompt in drawn:
        assert (prompt.category, prompt.held_out) == (category, held_out)
        assert parse_caption(prompt.text) == prompt.requirement, prompt.text
        pairs = {(o.shape, o.colour) for o in prompt.requirement.objects}
        assert bool(HELD_OUT & pairs) == held_out
        coloured = held_out or category in ("colours", "binding", "caption")
        assert all((o.colour is not None) == coloured for o in prompt.requirement.objects)
        number = len(prompt.requirement.objects)
        assert number in {
            "single": (1,),
            "colours": (1,),
            "counting": (2, 3),
            "caption": (1, 2, 3),
        }.get(category, (2,))
        assert (len(prompt.requirement.relations) == 1) == (category == "position") or (
            category == "caption"
        )
        if category == "counting":
            assert len(set(prompt.requirement.objects)) == 1
        if category == "binding":
            assert len({o.colour for o in prompt.requirement.objects}) == 2


def test_unknown_category() -> None:
    with pytest.raises(ConfigurationError, match="category is 'colour'"):
        prompts("colour", 1)
