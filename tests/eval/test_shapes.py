"""The embedded world: what scenes may hold, what pictures look like, what words say."""

import json
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoConfig, AutoTokenizer

from eval.shapes.captions import (
    ROW_END,
    TEXT_KINDS,
    board_text,
    caption_with_requirement,
    grid_text,
    picture_text,
    questions,
    world_text_messages,
)
from eval.shapes.reading import mentioned_objects, parse_caption
from eval.shapes.render import render, render_array
from eval.shapes.requirement import ObjectRequirement, Relation, Requirement, satisfies
from eval.shapes.scene import (
    BACKGROUNDS,
    CATEGORIES,
    CELL,
    COLOURS,
    HELD_OUT,
    RELATIONS,
    SHAPES,
    Level,
    Object,
    Scene,
    board_cells,
    sample_scene,
    stated_relations,
)
from eval.shapes.world import read_world, write_world
from tokenizer_hf.configuration_image_tokenizer import ImageTokenizerConfig
from tokenizer_hf.errors import ConfigurationError, DataError
from unimodal.row_ends import fit_row_ends
from unimodal.shipped import resolve


def _scenes(n: int, seed: int, **options: object) -> list[Scene]:
    rng = random.Random(seed)
    return [sample_scene(rng, **options) for _ in range(n)]  # type: ignore[arg-type]


@pytest.mark.parametrize("level", ["board", "free"])
def test_objects_never_touch_and_stay_inside(level: str) -> None:
    for scene in _scenes(1000, 1, level=level):
        assert 1 <= len(scene.objects) <= 3
        boxes = [(o.x - o.radius, o.y - o.radius, 2 * o.radius) for o in scene.objects]
        assert all(x >= 1 and y >= 1 and x + side <= 63 and y + side <= 63 for x, y, side in boxes)
        for i, (ax, ay, a_side) in enumerate(boxes):
            for bx, by, b_side in boxes[:i]:
                gap_x = max(bx - ax - a_side, ax - bx - b_side)
                gap_y = max(by - ay - a_side, ay - by - b_side)
                assert max(gap_x, gap_y) >= (2 if level == "board" else 3)


def test_sizes_are_the_published_ones() -> None:
    board = {(o.size, o.radius) for s in _scenes(300, 2) for o in s.objects}
    assert board == {("small", 7.0), ("large", 14.0)}
    for scene in _scenes(300, 2, level="free"):
        for o in scene.objects:
            low, high = (8, 9) if o.size == "small" else (13, 14)
            assert low <= o.radius <= high


def test_held_out_pairs_take_every_shape_and_colour_once() -> None:
    assert {shape for shape, _ in HELD_OUT} == set(SHAPES)
    assert {colour for _, colour in HELD_OUT} == set(COLOURS)
    assert len(HELD_OUT) == 8


@pytest.mark.parametrize("category", [None, *CATEGORIES])
def test_held_out_settings(category: str | None) -> None:
    def pairs(scene: Scene) -> set[tuple[str, str]]:
        return {(o.shape, o.colour) for o in scene.objects}

    for scene in _scenes(200, 3, category=category, held_out="exclude"):
        assert not HELD_OUT & pairs(scene)
    for scene in _scenes(200, 3, category=category, held_out="only"):
        assert HELD_OUT & pairs(scene)
    assert any(HELD_OUT & pairs(s) for s in _scenes(500, 3, category=category, held_out="any"))


def test_scene_json_round_trip_and_errors() -> None:
    for scene in _scenes(50, 4, level="free"):
        assert Scene.from_json(scene.to_json()) == scene
    for text in ("{", "{}", '{"background": "white", "objects": [{"shape": "star"}]}'):
        with pytest.raises(DataError, match="not a scene"):
            Scene.from_json(text)
    with pytest.raises(ConfigurationError, match="expected 'board' or 'free'"):
        sample_scene(random.Random(0), level="bord")  # type: ignore[arg-type]


def test_pictures_show_the_published_colours() -> None:
    for scene in _scenes(200, 5) + _scenes(200, 5, level="free"):
        picture = render_array(scene)
        assert picture.shape == (64, 64, 3) and picture.dtype == np.uint8
        for o in scene.objects:
            assert (picture == COLOURS[o.colour]).all(-1).sum() > o.radius**2 / 2
        frame = np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]])
        assert (frame == BACKGROUNDS[scene.background]).all()


def test_rendering_is_deterministic_across_processes() -> None:
    program = (
        "import hashlib, random\n"
        "from eval.shapes.scene import sample_scene\n"
        "from eval.shapes.render import render_array\n"
        "r = random.Random(7)\n"
        "s = [sample_scene(r, level) for level in ('board', 'free') for _ in range(20)]\n"
        "print(hashlib.sha256(b''.join(render_array(x).tobytes() for x in s)).hexdigest())"
    )
    runs = [subprocess.check_output([sys.executable, "-c", program]) for _ in range(2)]
    assert runs[0] == runs[1]


def test_board_has_few_distinct_patches() -> None:
    patches: dict[tuple[object, ...], bytes] = {}
    for scene in _scenes(6000, 6, held_out="any"):
        picture, cells = render_array(scene), board_cells(scene)
        for row in range(4):
            for column in range(4):
                o, quadrant = cells.get((row, column), (None, ""))
                key = (scene.background, o and (o.shape, o.colour, o.size), quadrant)
                part = picture[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL]
                assert patches.setdefault(key, part.tobytes()) == part.tobytes()
    # 4 empty + 4·64 small + 4·64·4 quarters of large ones
    assert 1200 < len(patches) <= 1284
    assert len(set(patches.values())) == len(patches)


def test_captions_are_true_and_parse_back() -> None:
    rng = random.Random(8)
    words: set[str] = set()
    lengths = []
    for i in range(10_000):
        scene = sample_scene(
            rng,
            rng.choice(("board", "free")),
            rng.choice((None, *CATEGORIES)),
            rng.choice(("any", "only", "exclude")),
        )
        text, requirement = caption_with_requirement(scene, rng, (None, "named", "brief")[i % 3])
        assert text == text.lower()
        assert satisfies(scene, requirement), text
        assert parse_caption(text) == requirement, text
        assert parse_caption(f"  {text.capitalize()}.") == requirement
        mentioned = mentioned_objects(text)
        assert mentioned == list(requirement.objects), text
        words.update(re.findall("[a-z]+", text))
        lengths.append(len(text.split()))
    assert len(words) < 150
    assert 5 <= np.percentile(lengths, 50) <= 12 and np.percentile(lengths, 90) <= 18


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a",
        "a red",
        "red star",
        "a red star and",
        "two star",
        "a red star left a blue ring",
        "a red star on purple",
        "three objects: a star and a ring",
        "a star and a ring and a heart",
        "a red blue star",
        "a star; a ring",
        "there is",
        "the background is white",
    ],
)
def test_not_in_the_grammar(text: str) -> None:
    assert parse_caption(text) is None


def test_named_captions_name_everything_and_brief_ones_do_not() -> None:
    rng = random.Random(9)
    for scene in _scenes(300, 9):
        named = caption_with_requirement(scene, rng, "named")[1]
        assert all(o.shape and o.colour for o in named.objects)
        brief = caption_with_requirement(scene, rng, "brief")[1]
        assert all(o.shape and not o.colour and not o.size for o in brief.objects)


def _object(shape: str, colour: str, size: str, x: float, y: float) -> Object:
    return Object(shape, colour, size, x, y, 7.0 if size == "small" else 14.0)


def test_the_verdict_is_strict() -> None:
    scene = Scene(
        "white",
        (
            _object("star", "red", "small", 8, 8),
            _object("ring", "blue", "small", 40, 8),
            _object("ring", "blue", "large", 16, 48),
        ),
    )
    ring, star = ObjectRequirement("ring", "blue"), ObjectRequirement("star", "red")
    assert satisfies(scene, Requirement((ring, star, ring)))
    assert satisfies(scene, Requirement((ring, star, ring), (Relation(1, "left", 0),), "white"))
    assert not satisfies(None, Requirement(()))
    assert not satisfies(scene, Requirement((ring, star)))  # one object too many
    assert not satisfies(scene, Requirement((ring, star, ring), (), "tan"))
    assert not satisfies(scene, Requirement((ring, star, ring), (Relation(1, "right", 0),)))
    # No single ring is at once to the right of the star and below it.
    both = (Relation(1, "left", 0), Relation(0, "below", 1))
    assert not satisfies(scene, Requirement((ring, star, ring), both))
    small = ObjectRequirement("ring", "blue", "small")
    assert not satisfies(scene, Requirement((small, star, small)))
    assert not satisfies(scene, Requirement((ring, ring, ring)))


def test_full_requirement_tells_scenes_apart() -> None:
    scenes = _scenes(200, 10)
    full = [Requirement.of(scene) for scene in scenes]
    assert all(satisfies(s, f) for s, f in zip(scenes, full, strict=True))
    changed = 0
    for scene, requirement in zip(scenes, full, strict=True):
        for other in scenes:
            changed += other.background != scene.background and satisfies(other, requirement)
    assert changed == 0


def test_answers_are_true() -> None:
    rng = random.Random(11)
    seen = set()
    for _ in range(3000):
        scene = sample_scene(rng, rng.choice(("board", "free")), held_out="any")
        for question, answer in questions(scene, rng):
            seen.add(re.sub("|".join((*SHAPES, *COLOURS)), "X", question))
            _check_answer(scene, question, answer)
    assert len(seen) > 12


def _check_answer(scene: Scene, question: str, answer: str) -> None:
    """An independent reading of the question, by hand."""
    numbers = {"zero": 0, "one": 1, "two": 2, "three": 3}
    words = question.rstrip("?").split()
    objects = scene.objects

    def one(words: list[str]) -> Object:
        found = [o for o in objects if all(w in (o.shape, o.colour, "object") for w in words)]
        assert len(found) == 1, question
        return found[0]

    if question == "how many objects are there?":
        assert numbers[answer] == len(objects)
    elif words[:2] == ["how", "many"]:
        shape = next(s for s in SHAPES if words[2].startswith(s))
        assert numbers[answer] == sum(o.shape == shape for o in objects)
    elif question == "what is the background?":
        assert answer == scene.background
    elif words[:2] == ["what", "colour"]:
        assert one(words[4:]).colour == answer
    elif words[:2] == ["what", "shape"]:
        assert one(words[4:5]).shape == answer
    elif words[:2] == ["is", "there"]:
        exists = any((o.colour, o.shape) == tuple(words[3:]) for o in objects)
        assert answer == ("yes" if exists else "no")
    elif words[-2] == "the" and words[-1] in ("right", "bottom"):
        place = one(words[2:4])
        middle = place.x if words[-1] == "right" else place.y
        sides = ("left", "right") if words[-1] == "right" else ("top", "bottom")
        assert abs(middle - 32) >= 4 and answer == sides[middle > 32]
    elif words[-3:] == ["small", "or", "large"]:
        assert one(words[2:3]).size == answer
    else:
        first, second = one(words[2:4]), one(words[-2:])
        dx, dy = second.x - first.x, second.y - first.y
        holds = {"left": dx, "right": -dx, "above": dy, "below": -dy}
        distance = next(holds[w] for w in words if w in holds)
        assert distance >= 12 if answer == "yes" else distance <= 4


def test_questions_never_name_an_absent_held_out_pair() -> None:
    rng = random.Random(12)
    for scene in _scenes(2000, 12):
        for question, _ in questions(scene, rng, 8):
            for shape, colour in HELD_OUT:
                assert f"{colour} {shape}" not in question


def test_board_text() -> None:
    scene = Scene(
        "white",
        (_object("star", "red", "small", 40, 8), _object("heart", "pink", "large", 16, 48)),
    )
    assert board_text(scene) == (
        "white white small red star white white white white white "
        "large pink heart large pink heart white white "
        "large pink heart large pink heart white white"
    )
    scenes = set(_scenes(500, 13))
    assert len({board_text(s) for s in scenes}) == len(scenes)  # nothing is lost
    with pytest.raises(DataError, match="board"):
        board_text(_scenes(1, 14, level="free")[0])


def test_at_level_free_more_is_said_of_how_things_lie(tmp_path: Path) -> None:
    for level, least, most in (("board", 0.2, 0.6), ("free", 0.65, 0.95)):
        world = write_world(
            tmp_path / level, 150, level=level, validation=2, chats=1000, progress=False
        )
        chats = [json.loads(line) for line in (world / "chat/train.jsonl").open()]
        said = [c["messages"][1]["content"] for c in chats if c["kind"] == "caption_of_board"]
        apart = [p for text in said if (p := parse_caption(text)) and len(set(p.objects)) > 1]
        assert least < sum(bool(p.relations) for p in apart) / len(apart) < most
        asked = extra = count = 0
        for _, _, pairs, scene in read_world(world, "train"):
            if len({(o.shape, o.colour) for o in scene.objects}) < 2:
                continue
            if not stated_relations(scene.objects):
                continue
            count += 1
            asked += any(f" {r} " in question for r in RELATIONS for question, _ in pairs[:3])
            extra += len(pairs) - 3
            assert len(set(pairs)) >= len(pairs) - 2
        assert count > 30
        assert 0.1 < asked / count < 0.7
        assert extra == 0 if level == "board" else extra > 2.5 * count


def test_grid_text() -> None:
    scene = Scene("tan", (Object("cross", "red", "small", 13.0, 20.0, 9.0),))
    rows = [["tan"] * 8 for _ in range(8)]
    for row, column in ((1, 1), (2, 0), (2, 1), (2, 2), (3, 1)):
        rows[row][column] = "cross" if (row + column) % 2 else "red"
    assert grid_text(scene) == ROW_END.join(" ".join(row) for row in rows)


def test_grid_text_says_what_the_pixels_show() -> None:
    missing = 0
    for scene in _scenes(200, 17, level="free"):
        words = [row.split() for row in grid_text(scene).split(ROW_END)]
        inks = (render_array(scene) != BACKGROUNDS[scene.background]).any(-1)
        shares = inks.reshape(8, 8, 8, 8).mean((1, 3))
        for row, column in np.ndindex(8, 8):
            says = {(o.colour, o.shape)[(row + column) % 2] for o in scene.objects}
            if shares[row, column] < 0.06:
                assert words[row][column] == scene.background
            elif shares[row, column] > 0.4:
                assert words[row][column] in says
        said = {word for row in words for word in row}
        missing += len({word for o in scene.objects for word in (o.colour, o.shape)} - said)
    assert missing == 0


def test_rows_of_grid_text_are_as_long_as_those_of_codes() -> None:
    """With the shipped text LLM, so that what it learns of columns in words holds for codes."""
    folder = resolve("shipped:text_model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    codes = ImageTokenizerConfig(
        image_size=64, encoder_type="palette", decoder_type="palette", patch_size=8
    )
    row_ids = 8 + fit_row_ends(AutoConfig.from_pretrained(folder), codes)
    for scene in _scenes(50, 18, level="free"):
        ids = tokenizer(grid_text(scene), add_special_tokens=False)["input_ids"]
        assert len(ids) == 8 * row_ids - (row_ids - 8)
        ends = tokenizer(ROW_END.strip(), add_special_tokens=False)["input_ids"]
        assert [ids[first : first + 3] for first in range(8, len(ids), row_ids)] == [ends] * 7


@pytest.mark.parametrize("level", ["board", "free"])
def test_text_messages(level: Level) -> None:
    rng = random.Random(15)
    seen, further = set(), 0
    for scene in _scenes(300, 15, level=level):
        kind, messages = world_text_messages(scene, rng, level=level)
        seen.add(kind)
        assert [m["role"] for m in messages] == ["user", "assistant"] * (len(messages) // 2)
        user, assistant, *more = (m["content"] for m in messages)
        if kind == "caption_of_board":
            assert picture_text(scene, level) in user
            assert satisfies(scene, parse_caption(assistant) or Requirement(()))
        elif kind in ("board_of_caption", "dialogue_about_board"):
            for question, answer in zip(more[::2], more[1::2], strict=True):
                _check_answer(scene, question, answer)
            assert bool(more) == kind.startswith("dialogue")
            assert satisfies(
                scene, parse_caption(user.removeprefix("draw in words ")) or Requirement(())
            )
            assert assistant == picture_text(scene, level)
        elif kind.startswith("question"):
            about = (
                picture_text(scene, level)
                if kind == "question_about_board"
                else user.split(".")[0] + "."
            )
            _check_answer(scene, user.removeprefix(about).strip(), assistant)
            for question, answer in zip(more[::2], more[1::2], strict=True):
                _check_answer(scene, question, answer)
                further += 1
        json.dumps(messages)
    assert (further > 10) == (level == "free")
    assert seen == set(TEXT_KINDS)


def test_render_is_rgb() -> None:
    picture = render(_scenes(1, 16)[0])
    assert (picture.mode, picture.size) == ("RGB", (64, 64))
