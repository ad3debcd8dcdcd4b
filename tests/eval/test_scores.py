"""Scores: intervals, captions, drawings, reconstructions, text."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Qwen3Config, Qwen3ForCausalLM

from eval.reconstruction import psnr, score_reconstruction
from eval.scores import (
    mean,
    ratio,
    score_answers,
    score_captions,
    score_drawings,
    share,
)
from eval.shapes.captions import captions
from eval.shapes.prompts import prompts
from eval.shapes.render import render
from eval.shapes.requirement import satisfies
from eval.shapes.scene import CATEGORIES, Object, Scene, sample_scene
from eval.text import score_text
from tokenizer_hf.errors import MismatchError


def test_share_is_wilson() -> None:
    # Values of Newcombe (1998), table I: 81 of 263 and 1 of 29.
    score = share([True] * 81 + [False] * 182)
    assert score["n"] == 263
    assert (score["low"], score["high"]) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    score = share([True] + [False] * 28)
    assert (score["low"], score["high"]) == pytest.approx((0.0061, 0.1718), abs=5e-5)
    assert share([False] * 15)["low"] == 0 and share([True] * 15)["high"] == 1
    assert share([]) == {"score": None, "n": 0, "low": None, "high": None}


def test_bootstrap_interval_covers_the_truth() -> None:
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(100):
        score = mean(rng.normal(3, 1, 50).tolist())
        assert score["low"] is not None and score["high"] is not None
        covered += score["low"] <= 3 <= score["high"]
    assert 86 <= covered <= 100
    assert ratio([], [])["score"] is None and ratio([0.0], [0.0])["score"] is None


def _scene() -> Scene:
    return Scene(
        "tan",
        (
            Object("star", "red", "small", 8, 8, 7),
            Object("ring", "blue", "small", 40, 8, 7),
        ),
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a red star and a blue ring", (1, 1, 1, None, 1)),
        ("the red star is left of the blue ring; the background is tan", (1, 1, 1, 1, 1)),
        ("the red star is right of the blue ring", (0, 1, 1, 0, 1)),
        ("a red star and a blue ring on white", (0, 1, 1, None, 1)),
        ("a blue star and a red ring", (0, 0, 1, None, 1)),
        ("a star and a ring", (0, 0, 0, None, 1)),
        ("a red star", (0, 2 / 3, 0, None, 0)),
        ("a red star, a blue ring and a pink heart", (0, 4 / 5, 0, None, 0)),
        ("red star blue ring yes", (0, 1, 1, None, 1)),  # not in the grammar, objects found
        ("", (0, 0, 0, None, 0)),
    ],
)
def test_caption_scores(text: str, expected: tuple[float | None, ...]) -> None:
    scores = score_captions([text], [_scene()])
    names = ("exact", "object_f1", "colour", "relation", "count")
    for name, value in zip(names, expected, strict=True):
        assert scores[name]["score"] == pytest.approx(value), name


def test_true_captions_are_exact() -> None:
    rng = random.Random(3)
    scenes = [sample_scene(rng, held_out="any") for _ in range(200)]
    scores = score_captions([captions(s, rng, "named") for s in scenes], scenes)
    assert all(scores[name]["score"] == 1 for name in scores)
    assert scores["exact"]["n"] == 200 and scores["relation"]["n"] > 30
    shuffled = score_captions([captions(s, rng, "named") for s in scenes[1:] + scenes[:1]], scenes)
    assert all((shuffled[name]["score"] or 0) < 0.5 for name in ("exact", "object_f1", "colour"))


def test_drawings() -> None:
    rng = random.Random(4)
    wanted = [p for category in CATEGORIES for p in prompts(category, 10, seed=1)]
    pictures = []
    for prompt in wanted:
        scene = sample_scene(rng, category=prompt.category)
        while not satisfies(scene, prompt.requirement):
            scene = _scene_like(prompt.requirement, rng)
        pictures.append(render(scene))
    scores = score_drawings(pictures, wanted)
    assert {name: (s["score"], s["n"]) for name, s in scores.items()} == dict.fromkeys(
        CATEGORIES, (1.0, 10)
    )
    blank = [Image.new("RGB", (64, 64), (250, 250, 250))] * len(wanted)
    assert all(s["score"] == 0 for s in score_drawings(blank, wanted).values())


def _scene_like(requirement, rng):  # type: ignore[no-untyped-def]
    """Some scene with the demanded attributes; places by lot."""
    n = len(requirement.objects)
    while True:
        scene = sample_scene(rng)
        if len(scene.objects) != n:
            continue
        order = rng.sample(range(n), n)
        objects = [
            Object(w.shape, w.colour or o.colour, o.size, o.x, o.y, o.radius)
            for w, o in zip((requirement.objects[i] for i in order), scene.objects, strict=True)
            if w.size in (None, o.size)
        ]
        if len(objects) == n:
            return Scene(requirement.background or scene.background, tuple(objects))


def test_answers() -> None:
    score = score_answers(["Red", " two. ", "no", ""], ["red", "two", "yes", "no"])
    assert (score["score"], score["n"]) == (0.5, 4)


def test_psnr() -> None:
    gray = Image.new("RGB", (8, 8), (100, 100, 100))
    assert psnr(gray, gray) == 100
    assert psnr(gray, Image.new("RGB", (8, 8), (110, 110, 110))) == pytest.approx(28.13, abs=0.01)


def test_reconstruction() -> None:
    rng = random.Random(5)
    scenes = [sample_scene(rng) for _ in range(20)]
    pictures = [render(s) for s in scenes]
    codes = [[1, 2, 3]] * 19 + [[7, 2, 3]]
    broken = [*pictures[:15], *[Image.new("RGB", (64, 64))] * 5]
    scores = score_reconstruction(pictures, broken, codes, scenes)
    assert scores["parse_agreement"]["score"] == 0.75
    assert scores["codes_used"] == {"score": 4, "n": 20, "low": None, "high": None}
    assert 50 < (scores["psnr"]["score"] or 0) < 100
    assert "parse_agreement" not in score_reconstruction(pictures, pictures, codes)


def _tiny(rows: int, seed: int) -> Qwen3ForCausalLM:
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=rows,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        tie_word_embeddings=True,
    )
    return Qwen3ForCausalLM(config).eval()


def test_text_of_the_same_model() -> None:
    model = _tiny(48, 0)
    rng = random.Random(6)
    rows = [[rng.randrange(48) for _ in range(rng.randint(1, 12))] for _ in range(40)]
    scores = score_text(model, model, rows, 48, batch_size=7)
    assert scores["kl"]["score"] == pytest.approx(0, abs=1e-6)
    assert scores["image_mass"]["score"] == 0
    assert scores["perplexity_base"] == scores["perplexity_tuned"]
    # Against transformers' own loss, one sequence at a time.
    losses, tokens = 0.0, 0
    for row in rows:
        if len(row) > 1:
            ids = torch.tensor([row])
            with torch.no_grad():
                losses += float(model(input_ids=ids, labels=ids).loss) * (len(row) - 1)
            tokens += len(row) - 1
    assert scores["perplexity_base"]["score"] == pytest.approx(np.exp(losses / tokens), rel=1e-4)
    assert scores["kl"]["n"] == sum(len(row) > 1 for row in rows)


def test_text_of_another_model() -> None:
    base, tuned = _tiny(48, 0), _tiny(64, 1)
    rows = [[3, 4, 5, 6], [7, 8, 9]]
    scores = score_text(base, tuned, rows, 48)
    assert (scores["kl"]["score"] or 0) > 0
    assert 0.1 < (scores["image_mass"]["score"] or 0) < 0.5  # 16 of 64 untrained rows
    # New rows alone change neither KL nor the base's perplexity.
    wider = _tiny(64, 2)
    wider.get_input_embeddings().weight.data[:48] = base.get_input_embeddings().weight.data
    wider.model.layers.load_state_dict(base.model.layers.state_dict())
    same = score_text(base, wider, rows, 48)
    assert same["kl"]["score"] == pytest.approx(0, abs=1e-6)
    assert (same["perplexity_tuned"]["score"] or 0) > (same["perplexity_base"]["score"] or 0)


def test_text_errors() -> None:
    model = _tiny(48, 0)
    with pytest.raises(MismatchError, match="48 embedding rows; expected at least 50"):
        score_text(model, model, [[1, 2]], 50)
    with pytest.raises(MismatchError, match="token id 47 in a text sequence"):
        score_text(model, model, [[1, 47]], 40)
